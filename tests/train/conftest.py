import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.errors import TrainingError
from lsast_train.__main__ import main
from lsast_train.base.base import Base
from lsast_train.inversion import Inversion
from lsast_train.options import TrainOptions
from lsast_train.paintings import PaintingDataset
from lsast_train.training.loop import TrainingLoop
from lsast_train.training.run import InterruptionError, LossCurve, RunResult

SIZE = 64


@pytest.fixture(autouse=True)
def _quiet_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results must not depend on a GPU that happens to be there."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _curves_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib takes half a second at every evaluation; test_loop has it draw."""
    monkeypatch.setattr(LossCurve, "_plot", lambda *_: b"")


@pytest.fixture
def base() -> Base:
    """A base of a few ten thousand random weights: 4 tokens of 24 channels, v-prediction."""
    return build_mini(MiniConfig.tiny())


def tiny_clip(vocabulary: int, **ids: int) -> CLIPTextModel:
    """A text encoder of 24 channels with random weights."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **ids
    )
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture
def text_base() -> Base:
    """The same networks as a base with a text encoder: predicts the noise, contexts of 77 tokens, no style encoder."""
    encoder = tiny_clip(400, bos_token_id=398, eos_token_id=399)
    base = build_mini(MiniConfig.tiny())
    base.config = replace(base.config, name="tiny-sd", family="sd15", prediction="epsilon", tokens=77)
    base.text_encoder, base.style_encoder = encoder, None
    base.null_context = encoder(torch.tensor([[398] + [399] * 76])).last_hidden_state[0]
    return base


@pytest.fixture(scope="session")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of one palette: the mean of their latents is something that prompts can learn."""
    folder = tmp_path_factory.mktemp("paintings")
    rng = np.random.default_rng(0)
    for index in range(10):
        colour = np.array([200, 60, 30]) + rng.integers(-10, 10, 3)
        pixels = np.clip(colour + rng.normal(0, 6, (80, 96, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def collection(paintings: Path) -> PaintingDataset:
    return PaintingDataset.load(paintings, SIZE, progress=False)


@pytest.fixture
def brief() -> TrainOptions:
    """A run of a second: 64 pixels, few and large steps."""
    return TrainOptions(
        steps=10,
        batch=4,
        lr=0.1,
        map_lr=0.04,
        schedule="constant",
        weight_decay=0.0,
        size=SIZE,
        views=1,
        evaluate_every=10,
        evaluate_latents=4,
    )


@pytest.fixture
def invert(collection: PaintingDataset, brief: TrainOptions, tmp_path: Path) -> Callable[..., Inversion]:
    """Makes a run of `brief` with other options: invert(base, folder="", resume=…, device=…, **options)."""

    def make(base: Base, folder: str = "", **given: Any) -> Inversion:
        how = {name: given.pop(name) for name in ("resume", "device") if name in given}
        return Inversion(base, collection, replace(brief, **given), "red", tmp_path / folder, **how)

    return make


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], None]:
    """Has a function called after each step of the runs that follow, with the number of steps done."""
    run = TrainingLoop.run

    def register(action: Callable[[int], Any]) -> None:
        def observed(loop: TrainingLoop, train_step: Callable[[int], float], *others: Any) -> None:
            def stepped(step: int) -> float:
                loss = train_step(step)
                action(step + 1)
                return loss

            run(loop, stepped, *others)

        monkeypatch.setattr(TrainingLoop, "run", observed)

    return register


def weights(base: Base) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a base's networks."""
    return {
        f"{name}.{key}": value.clone()
        for name, network in base.networks().items()
        for key, value in network.state_dict().items()
    }


@pytest.fixture
def interrupt_at(after_step: Callable[[Callable[[int], Any]], None]) -> Callable[[int], None]:
    """Sends SIGINT to this process after a step of this number."""
    return lambda step: after_step(lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None)


@pytest.fixture
def stop_and_resume(interrupt_at: Callable[[int], None]) -> Callable[..., RunResult]:
    """Has a run made, stopped after a step and resumed, and again after its result could not be written; returns its
    result, which is that of an uninterrupted one.

    ``make(folder, resume=…)`` makes the run; with ``others``, options of another run, it is refused.
    """

    def check(make: Callable[..., Any], step: int, **others: Any) -> RunResult:
        handler = signal.getsignal(signal.SIGINT)
        straight = make("straight").run()
        interrupt_at(step)
        with pytest.raises(InterruptionError, match=rf"after step {step}; .* --resume") as caught:
            make("parts").run()
        assert caught.value.exit_code == 130
        with pytest.raises(TrainingError, match="unfinished run"):
            make("parts")
        for name, value in others.items():
            with pytest.raises(
                TrainingError, match=rf"(?s)another run.*{name}: found .* in the checkpoint, {value} now"
            ):
                make("parts", resume=True, **{name: value})
        (in_the_way := straight.file.parent.with_name("parts") / straight.file.name).mkdir()
        with pytest.raises(
            TrainingError, match=r"cannot write .*; expected a place to write to, with room: then go on"
        ):
            make("parts", resume=True).run()
        in_the_way.rmdir()
        finished = make("parts", resume=True)
        assert finished.loop.step == straight.steps
        finish = finished._finish

        def interrupted() -> RunResult:  # after the last step, when a signal would lose all of it
            os.kill(os.getpid(), signal.SIGINT)
            ended: RunResult = finish()
            return ended

        finished._finish = interrupted
        resumed: RunResult = finished.run()
        assert resumed.file.read_bytes() == straight.file.read_bytes()
        assert resumed.curve.read_text() == straight.curve.read_text()
        assert (resumed.steps, resumed.best_step) == (straight.steps, straight.best_step)
        assert list(resumed.file.parent.glob("*.safetensors")) == [resumed.file]
        assert signal.getsignal(signal.SIGINT) is handler
        return resumed

    return check


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``lsast-train`` with arguments; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return int(caught.value.code or 0), *capsys.readouterr()

    return run
