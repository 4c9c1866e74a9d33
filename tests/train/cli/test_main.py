import importlib.util
import json
from pathlib import Path

import pytest

from lsast_engines.files import lock_file
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base, save_base
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.training.run import RunFiles


@pytest.fixture
def base_folder(base: Base, tmp_path: Path) -> Path:
    save_base(base, tmp_path / "base")
    return tmp_path / "base"


def _errors(err: str) -> list[str]:
    """The lines of stderr that are neither progress nor log."""
    lines = err.replace("\r", "\n").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Error: "))
    return lines[start:]


RED = ["--style", "red", "--images", "."]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*RED, "--prompt", "context", "--placeholder-tokens", "2"], "found 2 with prompt"),
        ([], "--style NAME and no --images DIR"),
        (["--style", "red"], "no --images DIR"),
        ([*RED, "--preset", "slow"], "'slow' is not one of"),
        ([*RED, "--steps", "many"], "not a valid integer"),
        ([*RED, "--no-such-option"], "No such option"),
        ([*RED, "--steps", "0", "--lr", "-1"], "steps: found 0"),
        ([*RED, "--variant", "step", "--layout", "overlap"], "overlap with variant"),
        (["distill", *RED], "Missing option '--guidance'"),
        (["finetune", *RED, "--contents", ".", "--batch", "1"], "batch: found 1"),
        ([*RED, "--seed", 2**63], "seed: found"),
        (["monet"], "found command 'monet'"),
        (["--style", "rotü", "--images", ".", "--base", "nowhere"], "name: found 'rotü'"),
        ([*RED, "--base", "nowhere", "--out", __file__], "expected a folder that can"),
    ],
)
def test_train_command_with_wrong_usage_exits_with_2(command, arguments, expected):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["--images"], ["distill", "--guidance", "3", "--images"], ["finetune", "--images", ".", "--contents"]],
)
def test_train_command_without_the_folder_of_pictures_fails_before_the_base(command, tmp_path, arguments):
    code, _, err = command(*arguments, tmp_path / "nowhere", "--style", "red", "--base", "nowhere")
    assert code == 1
    assert _errors(err) == [f"Error: found no folder {tmp_path / 'nowhere'}; expected a folder of pictures"]


def test_interrupted_training_goes_on_with_resume_and_prints_its_result(
    command, base_folder, paintings, tmp_path, interrupt_at
):
    interrupt_at(1)
    folder = tmp_path / "there"
    arguments = ["--style", "red", "--images", paintings, "--base", base_folder, "--batch", "2", "--size", "64"]
    arguments += ["--variant", "layer", "--preset", "paper", "--licence", "CC0", "--out", folder, "--json"]
    code, out, err = command(*arguments, "--steps", "3")
    assert (code, out) == (130, "")
    (line,) = _errors(err)
    assert "go on with --resume" in line
    assert [path.name for path in folder.iterdir()] == ["red.checkpoint.safetensors"]
    code, _, err = command(*arguments, "--steps", "4", "--resume")
    assert code == 1
    assert "steps: found 3 in the checkpoint, 4 now" in err
    code, out, err = command(*arguments, "--steps", "3", "--resume")
    assert code == 0, err
    assert all(part in err for part in ("goes on after step 1 of 3", "loss=", "kept step 3"))
    result = json.loads(out)
    assert set(result) == {"file", "curve", "steps", "best_step", "relative_loss", "seconds"}
    assert result["steps"] == 3
    files = [Path(result["curve"]), folder / "red.curve.png", Path(result["file"])]
    assert sorted(folder.iterdir()) == files
    prompts = load_prompts(files[2], load_base(base_folder))
    assert (prompts.name, prompts.variant) == ("red", "layer")
    assert (prompts.meta["licence"], prompts.meta["works"]) == ("CC0", "10")
    knobs = json.loads(prompts.meta["options"])
    assert (knobs["steps"], knobs["schedule"]) == (3, "step")
    code, out, err = command(*arguments, "--steps", "1", "--overwrite", "--quiet")
    assert (code, err) == (0, "")


def test_train_command_refuses_a_folder_that_another_run_trains_in_or_has_just_finished(
    command, base_folder, paintings, tmp_path, monkeypatch
):
    files = RunFiles(tmp_path / "runs", "red")
    arguments = ["--style", "red", "--images", paintings, "--base", base_folder, "--out", files.folder, "--steps", "1"]
    with files.reserved(64, 8, False):
        code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert "is being trained by another run; wait for it" in err
    assert not list(files.folder.iterdir())

    def finish_meanwhile(path: Path) -> int:
        files.result.write_text("another run's")
        return lock_file(path)

    monkeypatch.setattr("lsast_train.training.run.lock_file", finish_meanwhile)
    assert "found a finished training" in command(*arguments)[2]
    assert files.result.read_text() == "another run's"


def test_training_without_the_extra_names_it(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, out, err = command(*RED)
    assert (code, out) == (1, "")
    assert err == "Error: torch is not installed; install it with: pip install 'lsast[train]'\n"
