"""The day on a card is rehearsed: every step of every call runs on the CPU, at tiny sizes, and reports."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.gpu_day import run
from benchmarks.gpu_day.run import ROOT, steps

KIT = ROOT / "benchmarks" / "gpu_day"


@pytest.mark.parametrize(
    "call", ["engines", pytest.param("parity", marks=pytest.mark.slow), pytest.param("train", marks=pytest.mark.slow)]
)
def test_call_runs_every_step_on_the_cpu(call, tmp_path, monkeypatch):
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["run", call, "--out", str(tmp_path), "--rehearse"])
    run.main()
    results = [json.loads(line) for line in (tmp_path / f"{call}.jsonl").read_text().splitlines()]
    assert [result["step"] for result in results] == [step.name for step in steps(call, tmp_path, True)]
    assert [result for result in results if result["status"] != 0 or "result" not in result] == []


def test_commands_for_the_card_are_short_and_within_the_limits():
    """A call may take 2 000 characters, and its steps together the seconds that gpu_day/README.md says."""
    lines = [line for line in (KIT / "README.md").read_text().splitlines() if "gpu_day.run" in line]
    calls = {shlex.split(line)[shlex.split(line).index("benchmarks.gpu_day.run") + 1]: line for line in lines}
    assert calls.keys() == {"parity", "engines", "train"}
    for call, line in calls.items():
        assert len(line) < 2000
        limit = float(line.partition("timeout ")[2].split()[0])
        assert sum(step.seconds for step in steps(call, Path("out"), False)) <= limit <= 600
