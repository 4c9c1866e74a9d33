import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.mini.training.__main__ import main, parse_pairs
from benchmarks.mini.training.train_decoder import DecoderOptions, DecoderTraining, StyleWorks
from lsast_engines.bundle.style import encode_defaults
from lsast_engines.errors import StyleError, TrainingError, UsageError
from lsast_train.base.lazy_base import load_base, save_base
from lsast_train.paintings import PaintingDataset, encode_pictures
from lsast_train.prompts.prompt_file import Prompts, find_prompts, load_prompts, save_prompts
from lsast_train.training.run import InterruptionError

from ..conftest import weights

pytest.importorskip("efficientnet_lite_pytorch")

BRIEF = DecoderOptions(
    steps=30, batch=4, paintings=8, lr=2e-3, size=64, mixed_precision="no", evaluate_every=15, content_weight=1.0
)


@pytest.fixture
def styles(prompts: Prompts, collection: PaintingDataset) -> dict[str, StyleWorks]:
    return {name: StyleWorks(replace(prompts, name=name), collection) for name in ("red", "a.dot")}


@pytest.mark.slow
def test_decoder_nears_the_works_and_nothing_else_of_the_base_changes(base, styles, contents, tmp_path):
    before = weights(base)
    DecoderTraining(base, styles, contents, BRIEF, tmp_path).run()
    changed = {key for key, value in weights(base).items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("autoencoder.decoder.")}
    assert not any(weight.requires_grad for weight in base.autoencoder.parameters())
    history = json.loads((tmp_path / "decoder.curve.json").read_text())["history"]
    assert [row["step"] for row in history] == [0, 15, 30]
    first, last = (
        np.mean([row["held_out"][name]["style"] + row["held_out"][name]["content"] for name in styles])
        for row in (history[0], history[-1])
    )
    assert last < first


@pytest.mark.slow
def test_resumed_decoder_training_equals_the_uninterrupted_one(base, styles, contents, tmp_path, interrupt_at, caplog):
    caplog.set_level("INFO")
    options, start = replace(BRIEF, steps=6, evaluate_every=3), base.autoencoder.state_dict()
    start = {key: value.clone() for key, value in start.items()}

    def make(name: str, **more: Any) -> DecoderTraining:
        base.autoencoder.load_state_dict(start)
        return DecoderTraining(base, styles, contents, options, tmp_path / name, **more)

    make("straight").run()
    straight = weights(base)
    interrupt_at(4)
    with pytest.raises(InterruptionError, match="after step 4"):
        make("parts").run()
    with pytest.raises(TrainingError, match="go on with --resume, or delete it"):
        make("parts")
    other = replace(styles["red"].prompts, prompts=2 * styles["red"].prompts.prompts)
    changed = {"red": replace(styles["red"], prompts=other), "a.dot": styles["a.dot"]}
    caplog.clear()
    with pytest.raises(TrainingError, match=r"belongs to another run.*\n  - prompts of red: "):
        DecoderTraining(base, changed, contents, options, tmp_path / "parts", resume=True)
    with pytest.raises(TrainingError, match=r"belongs to another run.*\n  - styles: "):
        DecoderTraining(base, dict(reversed(styles.items())), contents, options, tmp_path / "parts", resume=True)
    assert "painting" not in caplog.text
    make("parts", resume=True).run()
    assert all(torch.equal(value, straight[key]) for key, value in weights(base).items())
    logs = [(tmp_path / name / "decoder.curve.json").read_text() for name in ("straight", "parts")]
    assert logs[0] == logs[1]
    # A run that ended before its base was written gives it again.
    (ended := make("parts", resume=True)).run()
    assert all(torch.equal(value, straight[key]) for key, value in weights(base).items())
    ended.files.checkpoint.unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint .*; start without --resume"):
        make("parts", resume=True)


def test_decoder_training_paints_with_the_defaults_of_the_style(base, prompts, collection, contents, tmp_path):
    given = {}
    for name, strength in (("weak", 0.1), ("strong", 0.9)):
        tuned = replace(prompts, meta={**prompts.meta, **encode_defaults({"strength": strength})})
        works = {name: StyleWorks(tuned, collection)}
        run = DecoderTraining(base, works, contents, replace(BRIEF, paintings=2), tmp_path / name)
        painted = run.paintings[name]["training"]
        before = encode_pictures(base, list(painted.pictures.numpy()))[0] * base.config.latent_scale
        given[name] = (painted.latents - before).square().mean()
    assert given["strong"] > given["weak"]


def test_decoder_command_keeps_the_prompts_with_the_base(base, styles, paintings, tmp_path, monkeypatch):
    source, out, given = tmp_path / "source", tmp_path / "out", tmp_path / "red.prompts.safetensors"
    monkeypatch.setattr(base, "config", replace(base.config, training={"steps": "1"}))
    save_base(base, source)
    save_prompts(replace(styles["red"].prompts, base=load_base(source).fingerprint), given)
    call = ["decoder", "--contents", str(paintings), "--base", str(source), "--out", str(out)]
    call += ["--steps", "1", "--paintings", "1", "--size", "64", "--style", f"{given}={paintings}"]
    done = CliRunner().invoke(main, call, catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"{out}\n")
    assert not any(out.rglob("*checkpoint*"))
    kept = load_prompts(find_prompts("red", out), load_base(out))
    assert torch.equal(kept.prompts, styles["red"].prompts.prompts)
    copied = tmp_path / "copy"
    copied.write_bytes(given.read_bytes())
    refused = CliRunner().invoke(main, [*call, "--overwrite", "--style", f"{copied}={paintings}"])
    assert (refused.exit_code, "found one style twice" in refused.stderr) == (2, True)


def test_decoder_training_refuses_what_it_cannot_train(base, styles, contents, tmp_path, caplog):
    caplog.set_level("INFO")
    bare = StyleWorks(replace(styles["red"].prompts, name="bare", meta={}), styles["red"].works)
    with pytest.raises(StyleError, match="no statistics of the artist's latents"):
        DecoderTraining(base, {**styles, "bare": bare}, contents, BRIEF, tmp_path)
    assert "painting" not in caplog.text
    with pytest.raises(UsageError, match="found no style; expected one or more"):
        DecoderTraining(base, {}, contents, BRIEF, tmp_path)
    with pytest.raises(UsageError, match="size: found 65; expected a multiple"):
        DecoderTraining(base, styles, contents, replace(BRIEF, size=65), tmp_path)
    with pytest.raises(UsageError, match="--style monet; expected NAME=DIR"):
        parse_pairs("--style", "NAME=DIR", ("van=a", "monet"), Path)
    with pytest.raises(UsageError, match="each once"):
        parse_pairs("--style", "NAME=DIR", ("van=a", "van=b"), Path)
    assert parse_pairs("--style", "NAME=DIR", ("van=a=b",), Path) == {"van": Path("a=b")}
