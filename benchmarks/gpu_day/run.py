"""One call of the day on a card: its steps one after the other, each with a limit, results written as they come.

    python -m benchmarks.gpu_day.run parity --out $OUT      # and: engines, train
    python -m benchmarks.gpu_day.run parity --out day --rehearse

Each step is a process of its own and prints one JSON object last. Its line in OUT/CALL.jsonl holds that object, or the
end of what it printed. A step that fails or is stopped does not stop the others. README.md has the commands for a card.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REHEARSAL_FACTOR = 20
"""A rehearsal, on a CPU that others use, too, may take so many times a step's limit."""

WORK = Path(tempfile.gettempdir()) / "lsast_gpu_day"
"""What the steps of `train` hand on; more than may come back."""

YARDSTICK = {"eager": 30, "graph": 30, "reduce-overhead": 75, "compile": 60}
"""Ways to run the yardstick's step, and the limit of each in seconds."""


@dataclass(frozen=True)
class Step:
    """One process: its arguments behind `python -m`, and the seconds after which it is stopped."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def steps(call: str, out: Path, rehearse: bool, pictures: Path | None, seconds: float) -> list[Step]:
    """The steps of a call; a rehearsal takes the same ones on the CPU, at tiny sizes."""
    tiny = ("--rehearse",) if rehearse else ()
    torch, engines = "benchmarks.gpu_day.torch_steps", "benchmarks.gpu_day.engine_steps"
    if call == "parity":
        return [Step("machine", (torch, "machine", *tiny), 20), Step("mini", (torch, "mini", *tiny), 60)]
    if call == "engines":
        flags = ("-q", "-p", "torch", "-p", "no:cacheprovider", "-m", "gpu", "-n", "0")
        tests = ("tests/engines/backends/test_onnxruntime_cuda.py", "tests/benchmarks/mini/test_training.py")
        return [
            Step("graphs", (engines, "graphs", *tiny), 45),
            Step("painting", (engines, "painting", *tiny), 40),
            *([] if rehearse else [Step("tests", ("pytest", *flags, *tests), 60)]),
            Step("captured", (engines, "sd15", *tiny), 75),
            Step("plain", (engines, "sd15", "--plain", *tiny), 45),
            *(Step(way, (torch, "sd15", "--way", way, *tiny), limit) for way, limit in YARDSTICK.items()),
        ]
    train = ("benchmarks.gpu_day.train_steps", "--work", str(WORK / ("tiny" if rehearse else "mini")), *tiny)
    given = ("--pictures", str(pictures), "--out", str(out))
    return [
        Step(
            "train",
            (*train, "train", *given, "--seconds", str(seconds), *([] if rehearse else ["--compile"])),
            seconds + 90,
        ),
        Step("styles", (*train, "styles", *given), 150),
        Step("decoder", (*train, "decoder", *given), 120),
    ]


def run(step: Step, factor: float = 1) -> dict[str, Any]:
    """What a step gave: seconds, exit status (None: stopped), and its JSON or the end of its output.

    It is stopped after `factor` times its limit.
    """
    # One process group, so that what a step started ends with it.
    process = subprocess.Popen(
        [sys.executable, "-m", *step.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    begin = time.perf_counter()
    try:
        output, _ = process.communicate(timeout=step.seconds * factor)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = None
    result: dict[str, Any] = {"step": step.name, "status": status, "seconds": round(time.perf_counter() - begin, 2)}
    lines = output.strip().splitlines()
    try:
        return {**result, "result": json.loads(lines[-1])}
    except (IndexError, ValueError):
        return {**result, "output": "\n".join(lines)[-2000:]}


def _python_path() -> str:
    packages = [str(ROOT), *(str(ROOT / name) for name in ("engines", "runtime", "train", "export", "eval"))]
    wheels = [str(file) for file in sorted((ROOT / "wheels").glob("*.whl"))]  # pure Python: read as they are
    unpacked = [str(ROOT / "wheels")]
    return os.pathsep.join([*packages, *wheels, *unpacked, os.environ.get("PYTHONPATH", "")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=("parity", "engines", "train"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="Of `train`: folders `paintings` and `photos`, a folder a label.")
    parser.add_argument("--seconds", type=float, default=300, help="Of `train`: time for the base.")
    parser.add_argument("--rehearse", action="store_true", help="On the CPU, at tiny sizes, in seconds.")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / f"{chosen.call}.jsonl").open("a") as results:
        for step in steps(chosen.call, chosen.out.absolute(), chosen.rehearse, chosen.pictures, chosen.seconds):
            line = json.dumps(run(step, REHEARSAL_FACTOR if chosen.rehearse else 1))
            print(line, flush=True)
            results.write(f"{line}\n")
            results.flush()


if __name__ == "__main__":
    main()
