"""A tiny base with the names of Stable Diffusion 1.5's files goes the whole way of docs/sd15.md, in every form."""

import copy
import hashlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import compvis_names
from lsast.cli.main import main as lsast_run
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import Style
from lsast_engines.errors import StyleError
from lsast_export.cli.main import main as lsast_export
from lsast_train import inversion
from lsast_train.base.lazy_base import load_base
from lsast_train.checkpoints.source import BaseSource
from lsast_train.cli.main import command as lsast_train
from lsast_train.options import PRESETS
from lsast_train.prompts.prompt_file import check_fingerprint, load_prompts
from lsast_train.prompts.released_generator import GegluGenerator

PAGE = Path(__file__).parent.parent / "docs" / "sd15.md"
PROGRAMS = {"lsast-train": lsast_train, "lsast-export": lsast_export, "lsast-run": lsast_run}
SHORT = {
    "lsast-train": "--steps 2 --batch 2 --size 64",
    "lsast-run": "--size 64 --steps 5 --backend onnxruntime",
}
"""Options that the page's commands get here, so that they take seconds."""


def _commands() -> list[list[str]]:
    """The commands of ours in the page's first block, as words."""
    block = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0].replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("lsast-")]


def _run(words: list[str]) -> None:
    program, *arguments = [*words, *shlex.split(SHORT.get(words[0], ""))]
    result = CliRunner().invoke(PROGRAMS[program], arguments, catch_exceptions=False)
    assert result.exit_code == 0, (words, result.stderr)


@pytest.fixture(scope="module")
def rounded(compvis_base: Any) -> SimpleNamespace:
    """`compvis_base` with values that fp16 holds, so that no form rounds them: its networks and tensors."""
    networks = {name: copy.deepcopy(network).half().float() for name, network in compvis_base.networks.items()}
    control = {f"control_model.{k}": v for k, v in compvis_names.compvis_network(networks["controlnet"]).items()}
    return SimpleNamespace(networks=networks, tensors=compvis_names.compvis_tensors(networks), control=control)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str]]:
    """What the commands left, by the weights that they took."""
    return {}


@pytest.fixture
def _short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and few evaluations."""
    monkeypatch.setitem(PRESETS, "paper", replace(PRESETS["paper"], views=1, evaluate_latents=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


NON_EMA, EMA, ONE_SET = "non-ema", "ema", "auto"
FORMS: dict[str, tuple[str, str]] = {
    "as the page says": ("weights/v1-5-pruned.ckpt", NON_EMA),
    "ema .ckpt": ("weights/v1-5-pruned.ckpt", EMA),
    "emaonly .ckpt": ("weights/v1-5-pruned.ckpt", ONE_SET),
    "safetensors": ("weights/v1-5-pruned.safetensors", NON_EMA),
    "fp16 safetensors": ("weights/v1-5-pruned.safetensors", EMA),
    ".pth": ("weights/v1-5-pruned.pth", EMA),
    "folder": ("weights/v1-5-pruned", ONE_SET),
    "fp16 folder": ("weights/v1-5-pruned", ONE_SET),
    ".bin folder": ("weights/v1-5-pruned", ONE_SET),
    "sharded folder": ("weights/v1-5-pruned", ONE_SET),
}
"""The base's path in each form, and ``--unet-weights``."""

QUICK = ("as the page says",)
"""Forms of the default run, which has to end within minutes; tests/train/checkpoints compares what all of them hold."""


def _write(form: str, rounded: Any) -> str:
    """Write the base in this form and its ControlNet; returns the ControlNet's path."""
    path, wanted = Path(FORMS[form][0]), FORMS[form][1]
    networks, tensors, control = rounded.networks, rounded.tensors, rounded.control
    if "folder" in form:
        settings = {"fp16 folder": {"variant": "fp16"}, ".bin folder": {"safe_serialization": False},
                    "sharded folder": {"max_shard_size": "200KB"}}.get(form, {})  # fmt: skip
        parts = {"unet": "ema", "vae": "autoencoder", "text_encoder": "text_encoder", "../control": "controlnet"}
        for folder, name in parts.items():
            network = copy.deepcopy(networks[name])
            (network.half() if form == "fp16 folder" else network).save_pretrained(path / folder, **settings)
        if form == ".bin folder":  # transformers writes none any more
            text = path / "text_encoder" / "model.safetensors"
            torch.save(load_file(text), text.with_name("pytorch_model.bin"))
            text.unlink()
        return "weights/control"
    if wanted == ONE_SET:
        averaged = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in tensors}
        kept = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
        tensors = {key: tensors.get(averaged[key], value) for key, value in kept.items()}
    if "fp16" in form:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        save_file(control, "weights/control.safetensors")
        return "weights/control.safetensors"
    extras = {"epoch": 1, "global_step": 3, "optimizer_states": [], "hyper_parameters": {"lr": 1e-4}}
    torch.save({"state_dict": tensors, **extras} if path.suffix == ".ckpt" else tensors, path)
    torch.save(control, "weights/control_v11p_sd15_canny.pth")
    return "weights/control_v11p_sd15_canny.pth"


@pytest.mark.usefixtures("_short", "one_trace")
@pytest.mark.parametrize("form", [pytest.param(form, marks=[pytest.mark.slow] * (form not in QUICK)) for form in FORMS])
def test_commands_of_the_page_give_the_same_bundle_styles_and_pictures_in_every_form(
    rounded, outcomes, form, monkeypatch
):
    if outcomes:  # what no form changes, and the page's own run has shown
        monkeypatch.setattr(inversion.LossCurve, "save", lambda *_: None)
    rng = np.random.default_rng(0)
    for artist in ("morisot", "cassatt"):
        Path("paintings", artist).mkdir(parents=True)
        for number in range(3):
            pixels = np.clip(rng.normal([200, 60, 30], 20, (72, 80, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"paintings/{artist}/{number}.png")
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save("photo.jpg")
    Path("weights").mkdir()
    taken = {"weights/v1-5-pruned.ckpt": FORMS[form][0], NON_EMA: FORMS[form][1]}
    taken["weights/control_v11p_sd15_canny.pth"] = _write(form, rounded)
    torch.manual_seed(0)
    generator = GegluGenerator(rounded.networks["text_encoder"].get_input_embeddings().weight[320], 30, inner=16)
    constant = torch.nn.Parameter(generator.constant[None])
    torch.save({"attention": generator, "initial_embeddings": constant}, "embeddings_gs-99999.pt")

    commands = _commands()
    assert len(commands) == 9
    for words in commands:
        _run([taken.get(word, word) for word in words])

    weights = NON_EMA if FORMS[form][1] == NON_EMA else EMA
    kept = [path for folder in ("runs", "engines") for path in sorted(Path(folder).rglob("*.*"))]
    data = {str(path): path.read_bytes() for path in kept if path.suffix in (".safetensors", ".onnx")}
    pictures = {name: np.asarray(Image.open(name)) for name in ("painted.png", "cassatt.png")}
    data |= {name: picture.tobytes() for name, picture in pictures.items()}
    outcome = {name: hashlib.sha256(value).hexdigest() for name, value in data.items()}
    assert {"runs/morisot/morisot.prompts.safetensors", "engines/sd15/denoiser.onnx"} < outcome.keys()
    assert outcome == outcomes.setdefault(weights, outcome)
    stored = load_file("engines/sd15/base.safetensors")
    parts = {"unet": "unet" if weights == NON_EMA else "ema", "autoencoder": "autoencoder", "controlnet": "controlnet"}
    for name, part in parts.items():
        for key, value in rounded.networks[part].state_dict().items():
            assert torch.equal(stored[f"{name}.{key}"], value.half()), (name, key)
    others = [found["runs/morisot/morisot.prompts.safetensors"] for found in outcomes.values()]
    assert len(set(others)) == len(outcomes)
    if form == next(iter(FORMS)):
        _check_contents(rounded, pictures)


def _check_contents(rounded: Any, pictures: dict[str, np.ndarray]) -> None:
    """What the commands left is what the page says."""
    prompts = load_prompts(Path("runs/morisot/morisot.prompts.safetensors"))
    source = (FORMS["as the page says"][0], "weights/control_v11p_sd15_canny.pth")
    imported = load_base(BaseSource(*source, "non-ema"))
    assert prompts.base == imported.fingerprint
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
    stored = load_file("engines/sd15/base.safetensors")
    # Keys of the unconditional style, against a product in float64.
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    weight = rounded.networks["unet"].get_submodule(layer).to_k.weight
    key = stored["null_context"].double() @ weight.double().T
    null = Style.load(Path("engines/sd15/null.safetensors"))
    np.testing.assert_allclose(null.kv_unet[0, :, : key.shape[1]], key, rtol=1e-3, atol=1e-4)
    assert pictures["painted.png"].shape == (64, 64, 3)  # released squashes
    assert pictures["cassatt.png"].shape == (64, 96, 3)
    assert all(picture.std() > 1 for picture in pictures.values())
    other = load_base(BaseSource(*source, "ema"))
    with pytest.raises(StyleError, match=f"was learned on base {prompts.base[:12]}"):
        check_fingerprint(prompts.base, "prompts", other.config.name, other.fingerprint, {})
