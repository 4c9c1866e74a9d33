"""Bases: what the inversion feeds to the frozen networks, against diffusers' own, and bases on disk."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.errors import TrainingError
from lsast_train.base.base import autocast_dtype
from lsast_train.base.lazy_base import load_base, open_base, save_base
from lsast_train.options import PRESETS, FinetuneOptions
from schedulers import ddpm


def _stock(network: Any) -> Any:
    stock = copy.deepcopy(network)
    stock.set_attn_processor(AttnProcessor())
    return stock


@pytest.mark.parametrize("controlled", [False, True])
def test_eps_with_equal_contexts_equals_stock_diffusers(base, controlled):
    generator = torch.Generator().manual_seed(0)
    latent, times = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([30, 870])
    context = torch.randn(2, *base.null_context.shape, generator=generator)
    edges = (torch.rand(2, 1, 64, 64, generator=generator) < 0.2).float().expand(-1, 3, -1, -1)
    residuals = {}
    if controlled:
        down, mid = _stock(base.controlnet)(latent, times, context, edges, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    velocity = _stock(base.unet)(latent, times, context, **residuals, return_dict=False)[0]
    schedule = ddpm()
    alphas = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    # v = alpha eps - sigma x0 and x = alpha x0 + sigma eps, solved for eps
    expected = alphas.sqrt() * velocity + (1 - alphas).sqrt() * latent
    found = base.eps(latent, times, context[:, None].expand(-1, 3, -1, -1), edges if controlled else None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    noise = torch.randn(latent.shape, generator=generator)
    torch.testing.assert_close(base.add_noise(latent, noise, times), schedule.add_noise(latent, noise, times))


def test_saved_base_loads_with_the_same_predictions(tmp_path):
    base = build_mini(MiniConfig.tiny(), 4)
    base.config = replace(base.config, training={"steps": "0"})
    fingerprint = save_base(base, tmp_path)
    loaded = load_base(tmp_path)
    assert (loaded.fingerprint, loaded.config) == (fingerprint, base.config)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    contexts, edges = loaded.null_context.expand(1, 3, -1, -1), (torch.rand(1, 3, 64, 64) > 0.9).float()
    for name, network in base.networks().items():
        found = loaded.networks()[name].state_dict()
        assert all(torch.equal(value, found[key]) for key, value in network.state_dict().items())
    with torch.no_grad():  # weights in the file lie elsewhere in memory, and products round otherwise
        found_eps, expected_eps = loaded.eps(x, t, contexts, edges), base.eps(x, t, contexts, edges)
    torch.testing.assert_close(found_eps, expected_eps, atol=1e-5, rtol=0)


def test_open_base_with_weights_that_do_not_fit_reports_all(base, tmp_path):
    save_base(base, tmp_path)
    tensors = load_file(tmp_path / "base.safetensors")
    tensors["unet.extra"] = tensors.pop("unet.conv_in.bias")
    del tensors["controlnet.conv_in.weight"]
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(TrainingError) as caught:
        load_base(tmp_path)
    for part in ("unet.conv_in.bias: missing", "unet.extra: not expected", "controlnet.conv_in.weight: missing"):
        assert part in str(caught.value)


def test_load_base_with_changed_weights_is_refused(base, tmp_path):
    fingerprint = save_base(base, tmp_path)
    tensors = load_file(tmp_path / "base.safetensors")
    tensors["unet.conv_in.bias"] += 1
    save_file(tensors, tmp_path / "base.safetensors")
    assert open_base(tmp_path).fingerprint == fingerprint
    with pytest.raises(TrainingError, match="SHA-256 differs"):
        load_base(tmp_path)


def test_open_base_with_a_damaged_description_is_refused(base, tmp_path):
    save_base(base, tmp_path)
    description = tmp_path / "base.json"
    noise = {**json.loads(description.read_text()), "noise": {"train_steps": "many"}}
    for content in ("[", "[]", '{"format": 1}', '{"format": 9}', json.dumps(noise)):
        description.write_text(content)
        fault = "has format 9" if "9" in content[:12] else "cannot be read"
        with pytest.raises(TrainingError, match=rf"base\.json {fault}"):
            open_base(tmp_path)


@pytest.mark.parametrize(("device", "instructions", "expected"), [
    ("cpu", True, torch.bfloat16), ("cpu", False, None), ("cuda", False, torch.bfloat16)
])  # fmt: skip
def test_auto_precision_is_bf16_where_it_is_multiplied(base, monkeypatch, device, instructions, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions, raising=False)
    place = torch.device(device)
    assert autocast_dtype(place, "auto") == expected
    assert [autocast_dtype(place, named) for named in ("no", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
    base.round_unet("auto", place)
    assert base.unet.conv_in.weight.dtype == (expected or torch.float32)
    assert {PRESETS["quick"].mixed_precision, FinetuneOptions().mixed_precision} == {"auto"}
