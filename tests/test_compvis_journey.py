"""A tiny base with the names of Stable Diffusion 1.5's files goes the whole way of docs/sd15.md, in every form."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from lsast.cli.main import main as lsast_run
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import StyleError
from lsast_export.cli.main import main as lsast_export
from lsast_export.graphs.modules import base_on_meta
from lsast_export.styles.bake import KVProjector, bake_null_style, check_prompts
from lsast_train.__main__ import main as lsast_train
from lsast_train.base.lazy_base import load_base, open_base, save_base
from lsast_train.checkpoints.source import BaseSource
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.prompts.released_generator import GegluGenerator

PAGE = Path(__file__).parent.parent / "docs" / "sd15.md"
SHORT = {
    "lsast-train": "--steps 2 --batch 2 --size 64",
    "lsast-run": "--size 64 --steps 5 --backend onnxruntime",
}
"""Options that the page's commands get here, so that they take seconds."""


def _commands() -> list[list[str]]:
    """The commands of ours in the page's first block, as words."""
    block = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("lsast-")]


def _run(words: list[str]) -> str:
    program, *arguments = [*words, *shlex.split(SHORT.get(words[0], ""))]
    if program == "lsast-export":
        result = CliRunner().invoke(lsast_export, arguments)
        code, out, err = result.exit_code, result.stdout, result.stderr
        assert code == 0, (words, err)
        return out.strip()
    with pytest.raises(SystemExit) as caught:
        {"lsast-train": lsast_train, "lsast-run": lsast_run}[program](arguments)
    assert caught.value.code in (0, None), words
    return ""


@pytest.fixture
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@pytest.mark.usefixtures("_at_home")
def test_commands_of_the_page_run_one_after_the_other(compvis_base: Any) -> None:
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    for artist in ("morisot", "cassatt"):
        Path("paintings", artist).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(rng.normal([200, 60, 30], 20, (72, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"paintings/{artist}/{number}.png")
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save("photo.jpg")
    Path("weights").mkdir()
    torch.save({"state_dict": compvis_base.tensors, "global_step": 3}, "weights/v1-5-pruned.ckpt")
    torch.save(load_file(compvis_base.controlnet_file), "weights/control_v11p_sd15_canny.pth")
    generator = GegluGenerator(compvis_base.networks["text_encoder"].get_input_embeddings().weight[320], 30, inner=16)
    constant = torch.nn.Parameter(generator.constant[None])
    torch.save({"attention": generator, "initial_embeddings": constant}, "embeddings_gs-99999.pt")

    said = [_run(words) for words in _commands()]
    assert len(said) == 9

    prompts = load_prompts(Path("runs/morisot/morisot.prompts.safetensors"))
    imported = load_base(BaseSource(compvis_base.file, compvis_base.controlnet_file, "non-ema"))
    assert prompts.base == imported.fingerprint
    assert prompts.embeddings is not None
    assert (prompts.embeddings.shape, prompts.prompts.shape) == ((30, 10, 64), (10, 3, 77, 64))
    # A causal encoder gives the begin of every text the same context, that of the empty one too (docs/method.md §2).
    begin = prompts.prompts[:, :, 0]
    torch.testing.assert_close(begin, imported.null_context[0].expand_as(begin))
    bundle = Bundle.open(Path("engines/sd15"))
    assert list(bundle.styles()) == ["morisot", "cassatt", "released"]
    manifest = bundle.manifest
    assert max(manifest.parity.values()) < 1e-3
    assert (manifest.family, manifest.tokens, manifest.latent_scale) == ("sd15", 77, 0.18215)
    assert not any("text" in key for key in json.loads(Path("engines/sd15/base.json").read_text())["networks"])
    painted = [np.asarray(Image.open(name)) for name in ("painted.png", "cassatt.png")]
    assert painted[0].shape == (64, 64, 3)  # released squashes
    assert painted[1].shape == (64, 96, 3)
    assert all(picture.std() > 1 for picture in painted)
    other = load_base(BaseSource(compvis_base.file, compvis_base.controlnet_file, "ema"))
    with pytest.raises(StyleError, match=f"was learned on base {prompts.base[:12]}"):
        check_prompts(prompts, other.config.name, other.fingerprint, "")


def _source(form: str, compvis_base: Any) -> BaseSource:
    """`compvis_base` with its averaged weights, as a base in this form."""
    networks, settings = compvis_base.networks, {
        "fp16 folder": {"variant": "fp16"}, ".bin folder": {"safe_serialization": False},
        "sharded folder": {"max_shard_size": "200KB"},
    }.get(form, {})  # fmt: skip
    if "folder" in form:
        for part, name in (("ema", "unet"), ("autoencoder", "vae"), ("controlnet", "controlnet")):
            network = copy.deepcopy(networks[part])
            (network.half() if form == "fp16 folder" else network).save_pretrained(Path("base", name), **settings)
        networks["text_encoder"].save_pretrained("base/text_encoder")
        return BaseSource("base")
    tensors, wanted = compvis_base.tensors, "ema"
    if form == "emaonly.ckpt":
        averaged = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in tensors}
        kept = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
        tensors = {key: tensors.get(averaged[key], value) for key, value in kept.items()}
        wanted = "auto"
    if form.endswith(".safetensors"):
        save_file(tensors, form)
        return BaseSource(form, compvis_base.controlnet_file, wanted)
    extras = {"epoch": 1, "optimizer_states": [], "hyper_parameters": {"lr": 1e-4}}
    torch.save({"state_dict": tensors, **extras} if "ckpt" in form else tensors, form)
    torch.save(load_file(compvis_base.controlnet_file), "control.pth")
    return BaseSource(form, "control.pth", wanted)


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize(
    "form",
    [
        "ema.safetensors",
        "lightning.ckpt",
        "emaonly.ckpt",
        "plain.pth",
        "fp32 folder",
        "fp16 folder",
        ".bin folder",
        "sharded folder",
    ],
)
def test_every_form_is_trained_on_stored_and_baked_alike(compvis_base: Any, form: str) -> None:
    """Graphs, parity and paintings of a bundle depend on nothing else of the form than the weights that it stores;
    learning reads the text encoder, too."""
    parts = open_base(_source(form, compvis_base))
    text = parts.load("text_encoder").state_dict()
    given = compvis_base.networks["text_encoder"].state_dict()
    assert all(torch.equal(value, given[key]) for key, value in text.items())
    save_base(parts, Path("stored"), torch.float16)
    stored = load_file("stored/base.safetensors")
    expected = {
        f"{name}.{key}": value.half() if value.is_floating_point() else value
        for name, part in (("unet", "ema"), ("autoencoder", "autoencoder"), ("controlnet", "controlnet"))
        for key, value in compvis_base.networks[part].state_dict().items()
    }
    null_context = stored.pop("null_context")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], value) for key, value in expected.items())
    again = open_base("stored")
    style = bake_null_style(KVProjector.of_base(base_on_meta(again), again))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    weight = compvis_base.networks["ema"].get_submodule(layer).to_k.weight
    key = null_context.double() @ weight.half().double().T
    np.testing.assert_allclose(style.kv_unet[0, :, : key.shape[1]], key, rtol=1e-6, atol=1e-7)
