"""A base in diffusers' format, in a folder or on the hub (a stand-in for huggingface_hub)."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lsast_engines.errors import LsastError, TrainingError, UsageError
from lsast_train.base.lazy_base import load_base, open_base
from lsast_train.checkpoints.source import BaseSource

NETWORKS = ("unet", "controlnet", "autoencoder", "text_encoder")


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


def _bin(folder: Path) -> None:
    """The text encoder in the form that transformers writes no more."""
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, _old),
        ({"variant": "fp16"}, None),
        ({"safe_serialization": False}, _bin),
        ({"max_shard_size": "200KB"}, None),
    ],
    ids=["names of 2022", "fp16", "bin", "shards"],
)
def test_diffusers_folder_in_any_form_gives_the_networks(published, folder, settings, change):
    half = "variant" in settings
    for part, name in (("unet", "ema"), ("vae", "autoencoder"), ("text_encoder", "text_encoder"),
                       ("controlnet", "controlnet")):  # fmt: skip
        shutil.rmtree(folder / part, ignore_errors=True)  # the base's own ControlNet is found, too
        network = copy.deepcopy(published.networks[name])
        # transformers writes safetensors alone
        how = {} if part == "text_encoder" and "safe_serialization" in settings else settings
        (network.half() if half else network).save_pretrained(folder / part, **how)
    if change is not None:
        change(folder)
    base = load_base(folder)
    for name in NETWORKS:
        found = base.text_encoder if name == "text_encoder" else base.networks()[name]
        expected = published.tensors(published.networks["ema" if name == "unet" else name])
        for key, value in published.tensors(found).items():
            assert torch.equal(value, expected[key].half().float() if half else expected[key]), (name, key)
    assert base.config.latent_scale == 0.18215
    assert (base.text_encoder.config.bos_token_id, base.text_encoder.config.eos_token_id) == (398, 399)


def test_diffusers_folder_gives_ema_and_non_ema_weights(published, folder, tmp_path):
    with pytest.raises(TrainingError, match=r"no diffusion_pytorch_model\.non_ema\.safetensors"):
        open_base(BaseSource(folder, tmp_path / "canny", "ema"))
    published.networks["unet"].save_pretrained(folder / "unet", variant="non_ema")
    for wanted, network in (("non-ema", "unet"), ("ema", "ema"), ("auto", "ema")):
        parts = open_base(BaseSource(folder, tmp_path / "canny", wanted))
        assert published.same(parts.load("unet"), published.networks[network])


def test_diffusers_folder_schedule_is_read_and_others_are_refused(published, folder, tmp_path):
    source = BaseSource(folder, tmp_path / "canny")
    schedule = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**schedule, "prediction_type": "v_prediction", "_class_name": None}))
    facts = open_base(source).config
    assert (facts.noise.beta_schedule, facts.noise.beta_end, facts.prediction) == ("linear", 0.02, "v_prediction")
    for content, message in (
        ({**schedule, "prediction_type": "sample"}, "scheduler: found prediction 'sample'"),
        ({**schedule, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr; expected betas of a named schedule"),
        ({"_class_name": "DDIMScheduler"}, r"scheduler: .*beta_start"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "scheduler: found FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "scheduler: found EDMEulerScheduler"),
    ):
        file.write_text(json.dumps({"num_train_timesteps": 1000, **content}))
        with pytest.raises(TrainingError, match=message):
            open_base(source)


def test_diffusers_folder_with_missing_parts_reports_all(published, folder, tmp_path):
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


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("unet", {"attention_type": "gated"}, "unet attention_type: found gated; expected default (GLIGEN"),
        ("unet", {"quantization_config": {"load_in_8bit": True}}, "unet: found quantized weights"),
        ("vae", {"scaling_factor": 0.13025}, "0.18215 (that of Stable Diffusion XL's autoencoder)"),
        ("vae", {"scaling_factor": None}, "autoencoder scaling_factor: found None; expected a number above 0"),
        ("text_encoder", {"hidden_size": "x"}, "text_encoder: its configuration makes no CLIPTextModel"),
        ("text_encoder", {"num_attention_heads": 7}, "text_encoder: its configuration makes no CLIPTextModel"),
    ],
)
def test_diffusers_folder_with_other_settings_is_refused_by_name(folder, tmp_path, file, changed, message):
    config = folder / file / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(TrainingError, match=re.escape(message)):
        open_base(BaseSource(folder, tmp_path / "canny"))


def test_shard_index_with_a_path_is_refused(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../../secret.safetensors"}}))
    with pytest.raises(TrainingError, match=r"lists '\.\./\.\./\.\./secret.safetensors'"):
        open_base(BaseSource(folder, tmp_path / "canny"))


@pytest.mark.parametrize("revision", [None, "main"])
def test_hub_name_without_a_pinned_revision_is_refused(revision):
    with pytest.raises(UsageError, match="expected a commit hash or tag"):
        open_base(BaseSource("someone/stable-diffusion", revision=revision))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> list[tuple[str, str, str, bool]]:
    """A hub with two repositories, one of which is in the cache already; lists what was asked for."""
    asked: list[tuple[str, str, str, bool]] = []
    folders = {"someone/tiny-v1-5": folder, "else/canny": tmp_path / "canny"}

    def cached(name: str, path: str, _: None, revision: str) -> str | None:
        asked.append((name, path, revision, True))
        file = folders[name] / path if name == "else/canny" else None
        return os.fspath(file) if file is not None and file.is_file() else None

    def download(name: str, path: str, *, revision: str) -> str:
        asked.append((name, path, revision, False))
        if name not in folders:
            raise LocalEntryNotFoundError("no connection")
        if not (folders[name] / path).is_file():
            raise EntryNotFoundError("no such file")
        return os.fspath(folders[name] / path)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_base_and_controlnet_are_read_from_the_cache_first(published, hub):
    parts = open_base(BaseSource("someone/tiny-v1-5", "else/canny@v1.1", revision="0123abc"))
    assert published.same(parts.load("unet"), published.networks["ema"])
    assert published.same(parts.load("controlnet"), published.networks["controlnet"])
    assert {(name, revision) for name, _, revision, _ in hub} == {
        ("someone/tiny-v1-5", "0123abc"),
        ("else/canny", "v1.1"),
    }
    assert parts.config.name == "tiny-v1-5"
    assert parts.config.training["source"] == "someone/tiny-v1-5"
    assert (parts.config.training["revision"], parts.config.training["controlnet_revision"]) == ("0123abc", "v1.1")
    # What is in the cache is not asked for on the network.
    assert all(local for name, path, _, local in hub if (name, path) == ("else/canny", "config.json"))


def test_hub_without_a_network_says_how_to_download(hub):
    with pytest.raises(LsastError, match="hf download no/where --revision 0123abc"):
        open_base(BaseSource("no/where", revision="0123abc"))
    assert sum(not local for *_, local in hub) == 1  # a dead network is tried once
