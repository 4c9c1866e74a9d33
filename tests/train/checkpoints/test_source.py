"""Published bases: every format gives the networks it was written from, and what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lsast_engines.errors import BundleError, LsastError, TrainingError, UsageError
from lsast_export.cli.main import main as lsast_export
from lsast_train.__main__ import main as lsast_train
from lsast_train.base.lazy_base import load_base, open_base
from lsast_train.checkpoints.source import BaseSource

NETWORKS = ("unet", "controlnet", "autoencoder", "text_encoder")


def _tensors(network: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}


def _same(found: Any, expected: Any) -> bool:
    ours, theirs = _tensors(found), _tensors(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _source(files: Any, **changes: Any) -> BaseSource:
    return BaseSource(**{"base": files.file, "controlnet": files.controlnet_file, **changes})


@pytest.fixture
def folder(compvis_base: Any, tmp_path: Path) -> Path:
    """The same base as diffusers and transformers themselves write it."""
    root = tmp_path / "tiny-v1-5"
    for name, part in (("unet", "ema"), ("vae", "autoencoder"), ("text_encoder", "text_encoder")):
        compvis_base.networks[part].save_pretrained(root / name)
    compvis_base.networks["controlnet"].save_pretrained(tmp_path / "canny")
    return root


def test_a_single_file_gives_the_networks_it_was_written_from(compvis_base: Any) -> None:
    base = load_base(_source(compvis_base))
    loaded = {**base.networks(), "text_encoder": base.text_encoder}
    assert loaded.keys() == set(NETWORKS)
    for name in NETWORKS:
        assert _same(loaded[name], compvis_base.networks["ema" if name == "unet" else name]), name
    facts = base.config
    assert (facts.name, facts.family, facts.prediction, facts.tokens) == ("tiny-v1-5", "sd15", "epsilon", 77)
    assert (facts.latent_scale, facts.size, facts.multiple) == (0.18215, 512, 16)  # 8 x one halving of the U-Net
    assert facts.training == {
        "source": "tiny-v1-5.safetensors",
        "controlnet": "tiny-canny.safetensors",
        "unet_weights": "ema",
    }
    assert "text_encoder" not in base.networks()
    ids = torch.tensor([[398, *[399] * 76]])
    expected = compvis_base.networks["text_encoder"](input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(base.null_context, expected)
    assert not any(p.requires_grad for network in loaded.values() for p in network.parameters())


def test_equal_weights_have_one_fingerprint_in_every_format(compvis_base: Any, folder: Path, tmp_path: Path) -> None:
    named = {
        f"{name}.{key}": value.float().contiguous().numpy()
        for name in NETWORKS
        for key, value in _tensors(compvis_base.networks["ema" if name == "unet" else name]).items()
    }
    digest = hashlib.sha256()
    for key in sorted(named, key=lambda key: key.split(".", 1)):
        digest.update(f"{key} {list(named[key].shape)}\n".encode() + named[key].tobytes())
    parts = [
        open_base(_source(compvis_base)),
        open_base(BaseSource(folder, tmp_path / "canny")),
        open_base(BaseSource(folder, compvis_base.controlnet_file)),
    ]
    assert [part.fingerprint for part in parts] == [digest.hexdigest()] * 3
    assert open_base(_source(compvis_base, unet_weights="non-ema")).fingerprint != digest.hexdigest()
    halved = {k: v.half() if v.is_floating_point() else v for k, v in _one(compvis_base.tensors).items()}
    save_file(halved, tmp_path / "half.safetensors")
    widened = {k: v.float() if v.is_floating_point() else v for k, v in halved.items()}
    save_file(widened, tmp_path / "full.safetensors")
    half, full = (open_base(_source(compvis_base, base=tmp_path / f"{n}.safetensors")) for n in ("half", "full"))
    assert half.fingerprint == full.fingerprint != digest.hexdigest()


@pytest.mark.parametrize(
    ("wanted", "stored", "taken", "fact"),
    [
        ("auto", "both", "ema", "ema"),
        ("ema", "both", "ema", "ema"),
        ("non-ema", "both", "unet", "non-ema"),
        ("auto", "one", "unet", "the only ones there"),
    ],
)
def test_ema_or_not(
    compvis_base: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wanted: Any,
    stored: str,
    taken: str,
    fact: str,
) -> None:
    file = compvis_base.file
    if stored == "one":
        file = tmp_path / "one.safetensors"
        save_file(_one(compvis_base.tensors), file)
    with caplog.at_level(logging.INFO, "lsast"):
        parts = open_base(_source(compvis_base, base=file, unet_weights=wanted))
    assert _same(parts.load("unet"), compvis_base.networks[taken])
    assert parts.config.training["unet_weights"] == fact
    assert f"unet weights: {fact}" in caplog.text


def test_ema_that_is_not_there_is_an_error(compvis_base: Any, tmp_path: Path) -> None:
    save_file(_one(compvis_base.tensors), tmp_path / "one.safetensors")
    for wanted in ("ema", "non-ema"):
        with pytest.raises(TrainingError, match=f"found one set of weights .* two sets for --unet-weights {wanted}"):
            open_base(_source(compvis_base, base=tmp_path / "one.safetensors", unet_weights=wanted))
    broken = {k: v for k, v in compvis_base.tensors.items() if k != "model_ema.diffusion_modelout2bias"}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(TrainingError, match=r"without 1 of \d+ tensors.*\n.*modelout2bias"):
        open_base(_source(compvis_base, base=tmp_path / "broken.safetensors"))


@pytest.mark.parametrize("ending", ["ckpt", "pth"])
def test_pickled_checkpoints_go_through_the_restricted_loader(compvis_base: Any, tmp_path: Path, ending: str) -> None:
    base, control = tmp_path / f"tiny.{ending}", tmp_path / f"control.{ending}"
    torch.save({"epoch": 3, "state_dict": {k: v.half() for k, v in compvis_base.tensors.items()}}, base)
    torch.save(load_file(compvis_base.controlnet_file), control)
    parts = open_base(BaseSource(base, control))
    assert _same(parts.load("controlnet"), compvis_base.networks["controlnet"])
    halved = parts.load("unet").state_dict()
    assert all(torch.equal(halved[k], v.half().float()) for k, v in compvis_base.networks["ema"].state_dict().items())


def _half(folder: Path) -> None:
    for file in [*folder.glob("*/*.safetensors")]:
        save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()


def _shards(folder: Path) -> None:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: value for key, value in tensors.items() if places[key] == name}, folder / "unet" / name)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _bin(folder: Path) -> None:
    for file in [*folder.glob("*/*.safetensors")]:
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def _old(folder: Path) -> None:
    """Names and configurations as they were when Stable Diffusion 1.5 was published."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    tensors = load_file(file)
    for today, then in old.items():
        tensors = {re.sub(rf"(attentions\.0)\.{today}\.", rf"\1.{then}.", key): v for key, v in tensors.items()}
    save_file(tensors, file)
    config = json.loads((folder / "vae" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("scaling_factor", "shift_factor", "use_quant_conv")}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    text = folder / "text_encoder" / "model.safetensors"
    wrapped = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}
    save_file({**wrapped, "text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 2}))


@pytest.mark.parametrize("change", [None, _half, _shards, _bin, _old])
def test_a_diffusers_folder_in_each_of_its_forms(
    compvis_base: Any, folder: Path, tmp_path: Path, change: Callable[[Path], None] | None
) -> None:
    if change is not None:
        change(folder)
    shutil.copytree(tmp_path / "canny", folder / "controlnet")  # the base's own
    base = load_base(folder)
    rounded = (lambda value: value.half().float()) if change is _half else lambda value: value
    for name in NETWORKS:
        found = base.text_encoder if name == "text_encoder" else base.networks()[name]
        expected = _tensors(compvis_base.networks["ema" if name == "unet" else name])
        exact = name == "controlnet"
        for key, value in _tensors(found).items():
            assert torch.equal(value, expected[key] if exact else rounded(expected[key])), (name, key)
    assert base.config.latent_scale == 0.18215
    assert (base.text_encoder.config.bos_token_id, base.text_encoder.config.eos_token_id) == (398, 399)


def test_non_ema_weights_of_a_folder(compvis_base: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no diffusion_pytorch_model\.non_ema\.safetensors"):
        open_base(BaseSource(folder, tmp_path / "canny", "ema"))
    compvis_base.networks["unet"].save_pretrained(folder / "unet", variant="non_ema")
    for wanted, network in (("non-ema", "unet"), ("ema", "ema"), ("auto", "ema")):
        parts = open_base(BaseSource(folder, tmp_path / "canny", wanted))  # type: ignore[arg-type]
        assert _same(parts.load("unet"), compvis_base.networks[network])


def test_the_schedule_of_a_folder_is_read(compvis_base: Any, folder: Path, tmp_path: Path) -> None:
    schedule = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**schedule, "prediction_type": "v_prediction"}))
    facts = open_base(BaseSource(folder, tmp_path / "canny")).config
    assert (facts.noise.beta_schedule, facts.noise.beta_end, facts.prediction) == ("linear", 0.02, "v_prediction")
    file.write_text(json.dumps({**schedule, "prediction_type": "sample"}))
    with pytest.raises(TrainingError, match="scheduler: found prediction 'sample'"):
        open_base(BaseSource(folder, tmp_path / "canny"))
    file.write_text(json.dumps({**schedule, "rescale_betas_zero_snr": True}))
    with pytest.raises(TrainingError, match="rescale_betas_zero_snr; expected betas of a named schedule"):
        open_base(BaseSource(folder, tmp_path / "canny"))


def test_a_controlnet_file_may_have_diffusers_names(compvis_base: Any, tmp_path: Path) -> None:
    file = tmp_path / "canny.safetensors"
    save_file(compvis_base.networks["controlnet"].state_dict(), file)
    parts = open_base(_source(compvis_base, controlnet=file))
    assert _same(parts.load("controlnet"), compvis_base.networks["controlnet"])


def test_a_controlnet_of_differences_is_refused(compvis_base: Any, tmp_path: Path) -> None:
    file = tmp_path / "diff.safetensors"
    save_file({**load_file(compvis_base.controlnet_file), "difference": torch.ones(())}, file)
    with pytest.raises(TrainingError, match="controlnet: found differences to a U-Net"):
        open_base(_source(compvis_base, controlnet=file))


def test_a_file_with_its_own_controlnet(compvis_base: Any, tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    save_file({**compvis_base.tensors, **load_file(compvis_base.controlnet_file)}, file)
    assert _same(open_base(file).load("controlnet"), compvis_base.networks["controlnet"])


def test_other_element_types_are_converted_as_torch_does(compvis_base: Any) -> None:
    base = load_base(_source(compvis_base), torch.bfloat16)
    assert {p.dtype for n in base.networks().values() for p in n.parameters()} == {torch.bfloat16}
    assert base.null_context.dtype == torch.bfloat16
    expected = compvis_base.networks["ema"].conv_in.weight.bfloat16()
    assert torch.equal(base.unet.conv_in.weight, expected)


def _one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without averaged weights."""
    return {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}


def _changed(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    return rest if value is None else {**rest, name: value}


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (
            lambda t: _changed(_one(t), "model.diffusion_model.input_blocks.0.0.weight", torch.zeros(32, 9, 3, 3)),
            ["unet input channels: found 9; expected 4 (9 are an inpainting model's)"],
        ),
        (
            lambda t: {
                k: torch.zeros(len(v), 1024) if "attn2.to_k" in k or "attn2.to_v" in k else v
                for k, v in _one(t).items()
            },
            [
                "unet context channels: found 1024; expected 768 (1024 are Stable Diffusion 2's)",
                "controlnet context channels: found 64; expected 1024",
                "text encoder channels: found 64; expected 1024",
            ],
        ),
        (lambda t: {**t, "cond_stage_model.model.ln_final.bias": torch.zeros(4)}, ["found Stable Diffusion 2"]),
        (lambda t: {**t, "conditioner.embedders.0.x": torch.zeros(4)}, ["found Stable Diffusion XL"]),
        (lambda t: {"lora_unet_down.lora_up.weight": torch.zeros(4)}, ["found a LoRA"]),
        (lambda t: {k: v for k, v in t.items() if k.startswith("first_stage")}, ["found an autoencoder alone"]),
        (
            lambda t: {k: v for k, v in t.items() if k.startswith("model.")},
            ["autoencoder: found none in bad.safetensors", "text_encoder: found none in bad.safetensors"],
        ),
        (
            lambda t: {"a.b": torch.zeros(1), "c": torch.zeros(1)},
            ["found 2 tensors of an unknown kind, such as a.b, c"],
        ),
        (lambda t: {**t, "alphas_cumprod": torch.linspace(1, 0, 1000)}, ["alphas_cumprod: found another noise"]),
        (
            lambda t: _changed(
                _changed(t, "first_stage_model.quant_conv.bias", None), "model_ema.diffusion_modelout2bias", None
            ),
            ["unet: found EMA weights without 1", "autoencoder: quant_conv.bias: missing"],
        ),
    ],
    ids=["inpainting", "sd2", "openclip", "sdxl", "lora", "vae", "parts", "unknown", "schedule", "several"],
)
def test_a_wrong_file_is_refused_with_what_was_found(
    compvis_base: Any, tmp_path: Path, make: Any, messages: list[str]
) -> None:
    file = tmp_path / "bad.safetensors"
    save_file(make(compvis_base.tensors), file)
    with pytest.raises(TrainingError) as caught:
        open_base(_source(compvis_base, base=file, controlnet=compvis_base.controlnet_file))
    for message in messages:
        assert message in str(caught.value), caught.value


def test_parts_of_two_models_are_refused_together(compvis: Any, compvis_base: Any, tmp_path: Path) -> None:
    other = compvis.random_networks(
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
    text = {k: v for k, v in compvis.compvis_tensors(other).items() if k.startswith("cond_stage")}
    rest = {k: v for k, v in compvis_base.tensors.items() if not k.startswith("cond_stage")}
    save_file({**rest, **text}, tmp_path / "mixed.safetensors")
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


def test_a_controlnet_must_be_named_and_be_one(compvis_base: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"controlnet: found none in tiny-v1-5\.safetensors.*--controlnet"):
        open_base(compvis_base.file)
    with pytest.raises(TrainingError, match=r"controlnet: found a base in tiny-v1-5\.safetensors"):
        open_base(BaseSource(folder, compvis_base.file))
    with pytest.raises(TrainingError, match="controlnet: found a UNet2DConditionModel; expected a ControlNetModel"):
        open_base(BaseSource(folder, folder / "unet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="controlnet: found none in empty"):
        open_base(BaseSource(folder, tmp_path / "empty"))
    with pytest.raises(TrainingError, match=r"gone\.safetensors cannot be read"):
        open_base(BaseSource(folder, tmp_path / "gone.safetensors"))


def test_folders_that_lack_something(compvis_base: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    (folder / "text_encoder" / "model.safetensors").unlink()
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(TrainingError) as caught:
        open_base(BaseSource(folder, tmp_path / "canny"))
    for message in (
        "unet: found none in tiny-v1-5",
        "autoencoder: found no vae/config.json",
        "text_encoder: found no text_encoder/weights (model.safetensors or the like)",
    ):
        assert message in str(caught.value), caught.value


def test_an_index_may_only_list_files_beside_it(folder: Path, tmp_path: Path) -> None:
    _shards(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../../secret.safetensors"}}))
    with pytest.raises(TrainingError, match=r"lists '\.\./\.\./\.\./secret.safetensors'"):
        open_base(BaseSource(folder, tmp_path / "canny"))


def test_names_that_are_nothing_say_what_may_be_named() -> None:
    with pytest.raises(BundleError, match="or a base to import: a folder in diffusers' format"):
        load_base("nowhere")


def test_options_of_an_import_do_not_go_with_a_base_of_ours() -> None:
    with pytest.raises(UsageError, match="--controlnet, --revision, --unet-weights"):
        open_base(BaseSource(None, "x", "ema", "1234"))
    with pytest.raises(UsageError, match="unet_weights: found 'both'"):
        BaseSource(unet_weights="both")  # type: ignore[arg-type]


def test_the_command_lines_hand_the_options_on(
    compvis_base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.safetensors"
    save_file(_one(compvis_base.tensors), one)
    options = ["--base", str(one), "--controlnet", str(compvis_base.controlnet_file), "--unet-weights", "ema"]
    with pytest.raises(SystemExit) as caught:
        lsast_train(["--style", "x", "--images", str(tmp_path), *options])
    assert caught.value.code == 1
    assert "found one set of weights" in capsys.readouterr().err
    exported = CliRunner().invoke(lsast_export, ["bundle", *options, "--out", str(tmp_path / "out")])
    assert exported.exit_code == 1
    assert "found one set of weights" in exported.stderr
    exported = CliRunner().invoke(lsast_export, ["bundle", "--revision", "abc", "--out", str(tmp_path / "out")])
    assert exported.exit_code == 2
    assert "found --revision" in exported.stderr


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_hub_needs_a_pinned_revision(revision: str | None) -> None:
    with pytest.raises(UsageError, match="expected a commit hash or tag"):
        open_base(BaseSource("someone/stable-diffusion", revision=revision))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> list[tuple[str, str, str, bool]]:
    """A hub with two repositories, one of which is in the cache already; lists what was asked for."""
    asked: list[tuple[str, str, str, bool]] = []
    folders = {"someone/tiny-v1-5": folder, "else/canny": tmp_path / "canny"}

    def download(name: str, path: str, *, revision: str, local_files_only: bool) -> str:
        asked.append((name, path, revision, local_files_only))
        file = folders.get(name, tmp_path / "none") / path
        if local_files_only and name != "else/canny":
            raise LocalEntryNotFoundError("not in the cache")
        if name not in folders:
            raise LocalEntryNotFoundError("no connection")
        if not file.is_file():
            raise (LocalEntryNotFoundError if local_files_only else EntryNotFoundError)("no such file")
        return os.fspath(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_base_and_a_controlnet_from_the_hub(compvis_base: Any, hub: list[tuple[str, str, str, bool]]) -> None:
    parts = open_base(BaseSource("someone/tiny-v1-5", "else/canny@v1.1", revision="0123abc"))
    assert _same(parts.load("unet"), compvis_base.networks["ema"])
    assert _same(parts.load("controlnet"), compvis_base.networks["controlnet"])
    assert {(name, revision) for name, _, revision, _ in hub} == {
        ("someone/tiny-v1-5", "0123abc"),
        ("else/canny", "v1.1"),
    }
    assert parts.config.name == "tiny-v1-5"
    assert parts.config.training["source"] == "someone/tiny-v1-5"
    assert (parts.config.training["revision"], parts.config.training["controlnet_revision"]) == ("0123abc", "v1.1")
    # What is in the cache is not asked for on the network.
    assert all(local for name, path, _, local in hub if (name, path) == ("else/canny", "config.json"))


def test_without_a_network_the_error_says_how_to_download(hub: list[tuple[str, str, str, bool]]) -> None:
    with pytest.raises(LsastError, match="hf download no/where --revision 0123abc"):
        open_base(BaseSource("no/where", revision="0123abc"))
    assert sum(not local for *_, local in hub) == 1  # a dead network is tried once
