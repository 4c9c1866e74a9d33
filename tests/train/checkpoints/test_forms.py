"""The forms of a base that docs/sd15.md lists, against diffusers' own readers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lsast_engines.errors import TrainingError
from lsast_train.base.lazy_base import LazyBase, open_base
from lsast_train.checkpoints.source import BaseSource

Tensors = dict[str, torch.Tensor]

TEXT = "cond_stage_model.transformer."


def _pickled(tensors: Tensors, path: Path) -> None:
    torch.save({"state_dict": tensors, "global_step": 3, "epoch": 1}, path)


def _extras(tensors: Tensors) -> Tensors:
    """What trainings and merges leave beside the networks."""
    return {
        **tensors,
        "first_stage_model.model_ema.decay": torch.tensor(0.999),
        "first_stage_model.model_ema.encoderconv_inweight": torch.zeros(3),
        "first_stage_model.loss.logvar": torch.zeros(()),
        f"{TEXT}text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{TEXT}text_projection.weight": torch.zeros(64, 64),
        f"{TEXT}logit_scale": torch.tensor(4.6),
    }


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


FORMS: dict[str, tuple[str, Callable[[Tensors], Tensors], Callable[[Tensors, Path], None]]] = {
    "safetensors": ("a.safetensors", lambda t: t, save_file),
    "upper-case": ("a.SAFETENSORS", lambda t: t, save_file),
    "Lightning .ckpt": ("a.ckpt", _extras, _pickled),
    "fp16 .ckpt": ("a.ckpt", lambda t: _cast(t, torch.float16), _pickled),
    ".pth": ("a.pth", lambda t: t, torch.save),
    "bf16 merge": ("a.safetensors", lambda t: _cast(_extras(t), torch.bfloat16), save_file),
}


@pytest.mark.parametrize("form", FORMS)
def test_single_file_gives_what_diffusers_converter_gives(published: Any, tmp_path: Path, form: str) -> None:
    name, change, write = FORMS[form]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = {"alphas_cumprod": (1 - betas).cumprod(0).float()}
    file = tmp_path / name
    tensors = change({**published.one_set, **schedule})
    write(tensors, file)
    found = open_base(BaseSource(file, published.controlnet_file))
    # diffusers looks at the ending, not at the file.
    plain = {"upper-case": tmp_path / "b.safetensors"}.get(form, file)
    if plain != file:
        save_file(tensors, plain)
    assert {part: _same_as_diffusers(published, found, part, plain) for part in ("unet", "autoencoder")} == {
        "unet": True, "autoencoder": True,
    }  # fmt: skip
    text = {key: value.float() for key, value in tensors.items() if key.startswith(TEXT)}
    for key, value in published.tensors(found.load("text_encoder")).items():
        assert torch.equal(value, text[f"{TEXT}text_model.{key}"]), key


def _same_as_diffusers(published: Any, found: LazyBase, part: str, file: Path) -> bool:
    """Whether the network `part` of `found` has the tensors that diffusers' ``from_single_file`` gives."""
    kinds = {"unet": UNet2DConditionModel, "autoencoder": AutoencoderKL, "controlnet": ControlNetModel}
    settings = file.parent / part
    published.networks[part].save_config(settings)
    expected = kinds[part].from_single_file(str(file), config=str(settings), torch_dtype=torch.float32)
    return bool(published.same(found.load(part), expected))


def test_controlnet_file_gives_what_diffusers_converter_gives(published: Any, tmp_path: Path) -> None:
    bare = {key.removeprefix("control_model."): v for key, v in load_file(published.controlnet_file).items()}
    torch.save(bare, tmp_path / "bare.pth")
    save_file(published.networks["controlnet"].state_dict(), tmp_path / "diffusers.safetensors")
    for file in (published.controlnet_file, tmp_path / "bare.pth", tmp_path / "diffusers.safetensors"):
        found = open_base(published.source(controlnet=file))
        copied = tmp_path / f"copy{file.suffix}"
        copied.write_bytes(file.read_bytes())
        assert _same_as_diffusers(published, found, "controlnet", copied)


def test_vae_option_replaces_the_autoencoder_or_adds_the_missing_one(published: Any, tmp_path: Path) -> None:
    other = published.networks["autoencoder"].__class__(**dict(published.networks["autoencoder"].config))
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "ft-mse")
    compvis = {k.removeprefix("first_stage_model."): v for k, v in published.one_set.items() if "first_stage" in k}
    torch.save({"state_dict": compvis}, tmp_path / "vae.ckpt")
    save_file({k: v for k, v in published.one_set.items() if "first_stage" not in k}, tmp_path / "bare.safetensors")
    with pytest.raises(TrainingError, match=r"autoencoder: found none in bare\.safetensors.*--vae"):
        open_base(published.source(base=tmp_path / "bare.safetensors"))
    for base in (published.file, tmp_path / "bare.safetensors"):
        found = open_base(published.source(base=base, vae=tmp_path / "vae.ckpt"))
        assert published.same(found.load("autoencoder"), published.networks["autoencoder"])
        found = open_base(published.source(base=base, vae=tmp_path / "ft-mse"))
        assert published.same(found.load("autoencoder"), other)
        assert (found.config.latent_scale, found.config.training["autoencoder"]) == (0.5, "ft-mse")
        found = open_base(published.source(base=base, vae=tmp_path / "ft-mse" / "diffusion_pytorch_model.safetensors"))
        assert published.same(found.load("autoencoder"), other)


@pytest.mark.parametrize(("key", "kind"), [("difference", "differences"), ("lora_controlnet", "a Control-LoRA")])
def test_controlnet_of_differences_is_refused_by_name(published: Any, tmp_path: Path, key: str, kind: str) -> None:
    file = tmp_path / "difference.safetensors"
    save_file({**load_file(published.controlnet_file), key: torch.zeros(())}, file)
    with pytest.raises(TrainingError, match=f"controlnet: found {kind}"):
        open_base(published.source(controlnet=file))


def test_controlnet_for_bgr_edges_keeps_the_order_of_its_hint_features(published: Any, tmp_path: Path) -> None:
    """Canny edges are the same in all three channels; diffusers would reverse what it is given, also features."""
    network = published.networks["controlnet"]
    settings = {**network.config, "controlnet_conditioning_channel_order": "bgr"}
    bgr = ControlNetModel(**{key: value for key, value in settings.items() if not key.startswith("_")})
    bgr.load_state_dict(network.state_dict())
    bgr.save_pretrained(tmp_path / "bgr")
    found = open_base(published.source(controlnet=tmp_path / "bgr")).load("controlnet")
    assert found.config["controlnet_conditioning_channel_order"] == "rgb"
    edges = torch.randint(2, (1, 1, 64, 64)).float().expand(1, 3, 64, 64)
    given = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 64), edges)
    torch.testing.assert_close(found(*given).mid_block_res_sample, bgr(*given).mid_block_res_sample)
