"""Published bases: the forms that docs/sd15.md lists give the networks they were written from; what does not fit."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import compvis_names
from lsast_engines.errors import BundleError, TrainingError, UsageError
from lsast_train.base.lazy_base import load_base, open_base
from lsast_train.checkpoints.source import BaseSource

Tensors = dict[str, torch.Tensor]
NETWORKS = ("unet", "controlnet", "autoencoder", "text_encoder")


def test_fingerprint_is_the_same_in_every_format(published, folder, tmp_path):
    named = {
        f"{name}.{key}": value.float().contiguous().numpy()
        for name in NETWORKS
        for key, value in published.tensors(published.networks["ema" if name == "unet" else name]).items()
    }
    digest = hashlib.sha256()
    for key in sorted(named, key=lambda key: key.split(".", 1)):
        digest.update(f"{key} {list(named[key].shape)}\n".encode() + named[key].tobytes())
    for source in (published.source(), BaseSource(folder, tmp_path / "canny")):
        assert open_base(source).fingerprint == digest.hexdigest()
    halved = {k: v.half() if v.is_floating_point() else v for k, v in published.one_set.items()}
    save_file(halved, tmp_path / "half.safetensors")
    widened = {k: v.float() if v.is_floating_point() else v for k, v in halved.items()}
    save_file(widened, tmp_path / "full.safetensors")
    half, full = (open_base(published.source(base=tmp_path / f"{n}.safetensors")) for n in ("half", "full"))
    assert half.fingerprint == full.fingerprint != digest.hexdigest()


def _without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.startswith(prefixes)}


def _one(tensors: Tensors) -> Tensors:
    """Without averaged weights."""
    return _without(tensors, "model_ema.")


_FIRST = "model.diffusion_model.input_blocks.0.0.weight"

CASES: dict[str, Callable[[Tensors], Tensors]] = {
    "unet input channels: found 9; expected 4 (9 are an inpainting model's)":
        lambda t: {**_one(t), _FIRST: torch.zeros(32, 9, 3, 3)},
    "unet input channels: found 8; expected 4 (8 are InstructPix2Pix's)":
        lambda t: {**_one(t), _FIRST: torch.zeros(32, 8, 3, 3)},
    "unet context channels: found 1024; expected 768 (1024 are Stable Diffusion 2's)|"
    "controlnet context channels: found 64; expected 1024|text encoder channels: found 64; expected 1024":
        lambda t: {k: torch.zeros(len(v), 1024) if "attn2.to_k" in k or "attn2.to_v" in k else v
                   for k, v in _one(t).items()},
    "found Stable Diffusion 2 or SD-Turbo (OpenCLIP)": lambda t: {**t, "cond_stage_model.model.a": torch.zeros(4)},
    "found EMA weights alone": lambda t: {k: v for k, v in t.items() if k.startswith("model_ema")},
    "alphas_cumprod: found the key 'ztsnr'": lambda t: {**_one(t), "ztsnr": torch.zeros(0)},
    "found an autoencoder alone": lambda t: {k: v for k, v in t.items() if k.startswith("first_stage")},
    "autoencoder: found none in bad.safetensors|text_encoder: found none in bad.safetensors":
        lambda t: {k: v for k, v in t.items() if k.startswith("model.")},
    "found 2 tensors of an unknown kind, such as a.b, c": lambda t: {"a.b": torch.zeros(1), "c": torch.zeros(1)},
    "alphas_cumprod: found another noise": lambda t: {**t, "alphas_cumprod": torch.linspace(1, 0, 1000)},
    "unet: found EMA weights without 1|modelout2bias|autoencoder: quant_conv.bias: missing":
        lambda t: _without(t, "first_stage_model.quant_conv.bias", "model_ema.diffusion_modelout2bias"),
}  # fmt: skip
"""What is wrong with a file, by the messages."""


@pytest.mark.parametrize("messages", CASES)
def test_single_file_of_another_model_is_refused_by_its_kind(published, tmp_path, messages):
    file = tmp_path / "bad.safetensors"
    save_file(CASES[messages](published.all_tensors), file)
    with pytest.raises(TrainingError) as caught:
        open_base(published.source(base=file, controlnet=published.controlnet_file))
    for message in messages.split("|"):
        assert message in str(caught.value), caught.value


def test_parts_of_two_models_are_all_reported(published, tmp_path):
    other = compvis_names.random_networks(
        {
            "block_out_channels": (64, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 128,
            "attention_head_dim": 8,
        }
    )
    other["controlnet"].save_pretrained(tmp_path / "other")
    text = {k: v for k, v in compvis_names.compvis_tensors(other).items() if k.startswith("cond_stage")}
    save_file({**_without(published.all_tensors, "cond_stage"), **text}, tmp_path / "mixed.safetensors")
    with pytest.raises(TrainingError) as caught:
        open_base(BaseSource(tmp_path / "mixed.safetensors", tmp_path / "other"))
    for message in (
        "controlnet block_out_channels: found [64, 64]; expected [32, 64] (the U-Net's)",
        "controlnet layers_per_block: found 2; expected 1",
        "controlnet down_block_types: found",
        "controlnet context channels: found 128; expected 64",
        "text encoder channels: found 128; expected 64 (the U-Net's context)",
    ):
        assert message in str(caught.value), caught.value


def test_controlnet_that_is_missing_or_none_is_refused(published, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for base, controlnet, message in (
        (published.file, None, r"controlnet: found none in tiny-v1-5\.safetensors.*--controlnet"),
        (folder, published.file, r"controlnet: found a base in tiny-v1-5\.safetensors"),
        (folder, folder / "unet", "controlnet: found a UNet2DConditionModel; expected a ControlNetModel"),
        (folder, tmp_path / "empty", "controlnet: found none in empty"),
        (folder, tmp_path / "gone.safetensors", r"found no file .*gone\.safetensors"),
    ):
        with pytest.raises(TrainingError, match=message):
            open_base(BaseSource(base, controlnet))


def test_load_base_of_an_unknown_name_says_what_may_be_named(tmp_path):
    (tmp_path / "nowhere").touch()  # in the working folder; it holds no weights
    with pytest.raises(BundleError, match="or a base to import: a folder in diffusers' format"):
        load_base("nowhere")
    snapshot = tmp_path / "models--x--sd15" / "snapshots" / "12ab"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "config.json").touch()
    (tmp_path / "one").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "one" / "sd15.safetensors")
    for named, meant in (("models--x--sd15", "12ab"), (snapshot / "unet", "12ab"), ("one", "sd15.safetensors")):
        with pytest.raises(BundleError, match=f"perhaps you mean:\n  - .*{meant}$"):
            load_base(tmp_path / named)


def test_import_options_for_a_stored_base_are_refused():
    with pytest.raises(UsageError, match="--controlnet, --revision, --unet-weights"):
        open_base(BaseSource(None, "x", "ema", "1234"))
    with pytest.raises(UsageError, match="unet_weights: found 'both'"):
        BaseSource(unet_weights="both")


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


FORMS: dict[str, tuple[str, torch.dtype, Callable[[Tensors, Path], None]]] = {
    "upper-case": ("a.SAFETENSORS", torch.float32, save_file),
    "bf16 merge": ("a.safetensors", torch.bfloat16, save_file),
    "Lightning .ckpt": ("a.ckpt", torch.float32, _pickled),
    "fp16 .ckpt": ("a.ckpt", torch.float16, _pickled),
    ".pth": ("a.pth", torch.float32, torch.save),
}


@pytest.mark.parametrize("form", FORMS)
def test_single_file_in_any_form_gives_the_networks(published, tmp_path, form):
    name, dtype, write = FORMS[form]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tensors = _extras({**published.one_set, "alphas_cumprod": (1 - betas).cumprod(0).float()})
    write(_cast(tensors, dtype), tmp_path / name)
    found = open_base(BaseSource(tmp_path / name, published.controlnet_file))
    for part in ("unet", "autoencoder", "text_encoder"):
        expected = _cast(_cast(published.tensors(published.networks[part]), dtype), torch.float32)
        loaded = published.tensors(found.load(part))
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items()), part


def test_single_files_give_what_diffusers_converter_gives(published, tmp_path):
    found = open_base(published.source(unet_weights="non-ema"))
    for part, kind, file in (
        ("unet", UNet2DConditionModel, published.file),
        ("autoencoder", AutoencoderKL, published.file),
        ("controlnet", ControlNetModel, published.controlnet_file),
    ):
        published.networks[part].save_config(tmp_path / part)
        expected = kind.from_single_file(str(file), config=str(tmp_path / part), torch_dtype=torch.float32)
        assert published.same(found.load(part), expected), part


def test_controlnet_file_in_any_form_gives_the_network(published, tmp_path):
    bare = {key.removeprefix("control_model."): v for key, v in load_file(published.controlnet_file).items()}
    torch.save(bare, tmp_path / "bare.pth")
    save_file(published.networks["controlnet"].state_dict(), tmp_path / "diffusers.safetensors")
    for file in (tmp_path / "bare.pth", tmp_path / "diffusers.safetensors"):
        found = open_base(published.source(controlnet=file))
        assert published.same(found.load("controlnet"), published.networks["controlnet"])


def test_vae_option_replaces_the_autoencoder_or_adds_the_missing_one(published, tmp_path):
    other = published.networks["autoencoder"].__class__(**dict(published.networks["autoencoder"].config))
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "ft-mse")
    compvis = {k.removeprefix("first_stage_model."): v for k, v in published.one_set.items() if "first_stage" in k}
    torch.save({"state_dict": compvis}, tmp_path / "vae.ckpt")
    save_file(_without(published.one_set, "first_stage"), tmp_path / "bare.safetensors")
    with pytest.raises(TrainingError, match=r"autoencoder: found none in bare\.safetensors.*--vae"):
        open_base(published.source(base=tmp_path / "bare.safetensors"))
    weights = tmp_path / "ft-mse" / "diffusion_pytorch_model.safetensors"
    for base, vae, expected in (
        ("bare.safetensors", "vae.ckpt", published.networks["autoencoder"]),
        ("bare.safetensors", weights, other),
        (published.file, "ft-mse", other),
    ):
        found = open_base(published.source(base=tmp_path / base, vae=tmp_path / vae))
        assert published.same(found.load("autoencoder"), expected)
    assert (found.config.latent_scale, found.config.training["autoencoder"]) == (0.5, "ft-mse")


@pytest.mark.parametrize(("key", "kind"), [("difference", "differences"), ("lora_controlnet", "a Control-LoRA")])
def test_controlnet_of_differences_is_refused_by_name(published, tmp_path, key, kind):
    file = tmp_path / "difference.safetensors"
    save_file({**load_file(published.controlnet_file), key: torch.zeros(())}, file)
    with pytest.raises(TrainingError, match=f"controlnet: found {kind}"):
        open_base(published.source(controlnet=file))


def test_controlnet_for_bgr_edges_keeps_the_order_of_its_hint_features(published, tmp_path):
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
