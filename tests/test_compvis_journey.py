"""A tiny base as Stable Diffusion was published goes the whole way: imported, trained on, exported, painted with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import lsast
from lsast_engines.bundle.manifest import Manifest
from lsast_export.cli.main import main as lsast_export
from lsast_train.__main__ import main as lsast_train
from lsast_train.base.lazy_base import load_base
from lsast_train.checkpoints.source import BaseSource
from lsast_train.prompts.prompt_file import load_prompts


def _pictures(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        pixels = np.clip(rng.normal([200, 60, 30], 20, (72, 80, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def _train(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        lsast_train([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    assert "unet weights: ema" in err
    return out.strip()


def test_from_a_published_file_to_a_painted_picture(
    compvis_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    # Pickled files, as the base and its ControlNet were first published.
    torch.save({"state_dict": compvis_base.tensors, "global_step": 3}, "tiny-v1-5.ckpt")
    torch.save(load_file(compvis_base.controlnet_file), "tiny-canny.pth")
    base = ["--base", "tiny-v1-5.ckpt", "--controlnet", "tiny-canny.pth"]
    pictures = _pictures(tmp_path / "paintings")

    knobs = ["--steps", "3", "--batch", "2", "--size", "64", "--mixed-precision", "no", "--prompt", "text"]
    file = _train(capsys, "--style", "red", "--images", pictures, *base, *knobs)
    prompts = load_prompts(Path(file))
    imported = load_base(BaseSource(compvis_base.file, compvis_base.controlnet_file))
    assert prompts.base == imported.fingerprint
    assert prompts.prompts.shape == (10, 3, 77, 64)
    # A causal encoder gives the begin of every text the same context, that of the empty one too (docs/method.md §2).
    begin = prompts.prompts[:, :, 0]
    torch.testing.assert_close(begin, imported.null_context[0].expand_as(begin))

    arguments = ["bundle", "--style", file, *base, "--out", "bundle", "--storage-dtype", "fp32", "--json"]
    refused = CliRunner().invoke(lsast_export, [str(part) for part in (*arguments, "--unet-weights", "non-ema")])
    assert refused.exit_code == 1
    assert f"was learned on base {prompts.base[:12]}" in refused.stderr
    exported = CliRunner().invoke(lsast_export, [str(argument) for argument in arguments])
    assert exported.exit_code == 0, exported.stderr
    assert max(json.loads(exported.stdout)["parity"].values()) < 1e-3
    manifest = Manifest.from_json(Path("bundle", "manifest.json").read_text(), "it")
    assert (manifest.family, manifest.tokens, manifest.latent_scale) == ("sd15", 77, 0.18215)
    assert not any("text" in key for key in json.loads(Path("bundle", "base.json").read_text())["networks"])

    photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    with lsast.load("bundle", backend="onnxruntime") as stylizer:
        painted, unguided = (
            np.asarray(stylizer.stylize(photo, steps=4, size=64, seed=3, guidance=guidance).image)
            for guidance in (3.0, 1.0)
        )
    assert painted.shape == (64, 96, 3)
    assert (painted != unguided).any()  # prompts and empty text give different noise
