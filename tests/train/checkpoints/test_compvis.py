"""Networks from CompVis naming against the diffusers and transformers networks that were written under those names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train.checkpoints.single_file import unet_weights


def test_built_network_shares_weights_of_the_same_dtype(compvis: Any, compvis_base: Any) -> None:
    unet = unet_weights(compvis_base.tensors).build()
    stored = compvis_base.tensors["model.diffusion_model.out.2.weight"]
    assert unet.conv_out.weight.data_ptr() == stored.data_ptr()
    assert not unet.conv_out.weight.requires_grad
    half = unet_weights(compvis_base.tensors).build(torch.float16)
    assert torch.equal(half.conv_out.weight, stored.half())


def test_compvis_weights_that_do_not_fit_are_named(compvis_base: Any) -> None:
    tensors = {key: value for key, value in compvis_base.tensors.items() if key.startswith("model.diffusion_model.")}
    prefix = "model.diffusion_model."
    missing = dict(tensors)
    del missing[f"{prefix}output_blocks.1.0.in_layers.2.bias"]
    missing[f"{prefix}input_blocks.1.0.in_layers.2.bias"] = torch.zeros(5)
    with pytest.raises(TrainingError) as caught:
        unet_weights(missing).build()
    assert "up_blocks.0.resnets.1.conv1.bias: missing" in str(caught.value)
    assert "down_blocks.0.resnets.0.conv1.bias: found shape [5]; expected [32]" in str(caught.value)
    broken = {**tensors, f"{prefix}out.2.bias": torch.full((4,), float("nan"))}
    with pytest.raises(TrainingError, match=r"weights of the U-Net that are no numbers:\n  - conv_out\.bias: NaN"):
        unet_weights(broken).build()
    with pytest.raises(TrainingError, match=r"label_emb\.0\.0\.weight: not expected"):
        unet_weights({**tensors, f"{prefix}label_emb.0.0.weight": torch.zeros(3)})
    with pytest.raises(TrainingError, match=r"32.*multiples of 5"):
        unet_weights(tensors, heads=5)
    with pytest.raises(TrainingError, match=r"missing:\n  - input_blocks\.0\.0\.weight"):
        unet_weights({"something": torch.zeros(1)})
