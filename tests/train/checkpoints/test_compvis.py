"""Networks from CompVis naming against the diffusers and transformers networks that were written under those names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train.checkpoints.compvis import controlnet_weights, text_encoder_weights, unet_weights, vae_weights

SD15_LIKE = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
}
OTHER = {
    "block_out_channels": (64, 32, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 3,
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
}


def _same(built: Any, original: Any) -> None:
    """Every tensor and every setting that shapes the computation."""
    expected = original.state_dict()
    found = built.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("shape", "prefixed"), [(SD15_LIKE, True), (OTHER, False)], ids=["sd15", "other"])
def test_compvis_unet_and_controlnet_predict_as_before(compvis: Any, shape: dict[str, Any], prefixed: bool) -> None:
    networks = compvis.random_networks(shape)
    heads = shape["attention_head_dim"]
    names = ("model.diffusion_model.", "control_model.") if prefixed else ("", "")
    unet, controlnet = (
        build({name + key: value for key, value in compvis.compvis_network(networks[network]).items()}, heads).build()
        for build, name, network in zip((unet_weights, controlnet_weights), names, ("unet", "controlnet"), strict=True)
    )
    _same(unet, networks["unet"])
    _same(controlnet, networks["controlnet"])
    generator = torch.Generator().manual_seed(0)
    latent, time = torch.randn(1, 4, 16, 8, generator=generator), torch.tensor([401])
    context = torch.randn(1, 5, shape["cross_attention_dim"], generator=generator)
    edges = torch.rand(1, 3, 128, 64, generator=generator)
    outputs = []
    for control, net in ((controlnet, unet), (networks["controlnet"], networks["unet"])):
        down, mid = control(latent, time, context, edges, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        outputs.append(net(latent, time, context, **residuals, return_dict=False)[0])
    assert torch.equal(*outputs)


def test_compvis_autoencoder_and_text_encoder_compute_as_before(compvis: Any, compvis_base: Any) -> None:
    tensors = {**compvis_base.tensors, "first_stage_model.loss.logvar": torch.zeros(())}
    vae = vae_weights(tensors).build()
    expected = compvis_base.networks["autoencoder"]
    _same(vae, expected)
    picture = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(vae.encode(picture).latent_dist.parameters, expected.encode(picture).latent_dist.parameters)
    latent = torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.decode(latent).sample, expected.decode(latent).sample)
    text = text_encoder_weights(compvis_base.tensors).build()
    ids = torch.tensor([[398, 17, 301, *[399] * 74]])
    torch.testing.assert_close(
        text(input_ids=ids).last_hidden_state, compvis_base.networks["text_encoder"](input_ids=ids).last_hidden_state
    )


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
