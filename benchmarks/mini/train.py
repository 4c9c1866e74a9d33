"""Train a base such as mini and its styles from nothing: every command of docs/mini.md in order, with a log.

    python -m benchmarks.mini.train --paintings paintings --photos photos --teacher taesd --out mini --seconds 3600 \\
        --style vangogh=vincent-van-gogh --style monet=claude-monet

Each step is a process of its own. OUT/train.jsonl has a line for each that ended: its command, seconds and what it
printed. The same command again skips these and goes on in the step that was stopped. The last step writes OUT/bundle.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = "benchmarks.mini.training"


@dataclass(frozen=True)
class Step:
    """A command of the trainer or the exporter, as arguments behind `python -m`."""

    name: str
    arguments: tuple[str, ...]
    folder: Path | None = None
    """Where a stopped run leaves its checkpoint: the step goes on from there with --resume."""
    anew: tuple[str, ...] = ("--overwrite",)
    """Arguments of a step that finds no checkpoint; a result without a line in the log counts for nothing."""


def steps(given: argparse.Namespace) -> list[Step]:
    """Base, prompts by inversion, fine-tuned prompts, decoder, bundle."""
    out, shared = given.out, ("--json", *(("--threads", str(given.threads)) if given.threads else ()))
    styles = dict(text.split("=", 1) for text in given.style)

    def train(command: str, folder: Path, *arguments: str) -> tuple[str, ...]:
        return (*command.split(), *arguments, *shared, "--out", str(folder))

    base, touched, contents = out / "base", out / "touched", str(given.contents or given.photos)
    images = ("--images", str(given.paintings), "--images", str(given.photos), "--teacher", str(given.teacher))
    time_limit = ("--seconds", str(given.seconds)) if given.seconds else ()
    shares = tuple(word for share in given.share for word in ("--share", share))
    listed = [Step("base", train(f"{TRAINING} base", base, *images, *shares, *time_limit), base, anew=())]
    prompts: dict[str, Path] = {}
    for name, label in styles.items():
        works = ("--images", str(given.paintings / label), "--base", str(base))
        learned, tuned = out / "learned" / name, out / "tuned" / name
        listed.append(Step(f"learn {name}", train("lsast_train", learned, "--style", name, *works), learned))
        prompts[name] = learned / f"{name}.prompts.safetensors"
        arguments = ("--style", str(prompts[name]), "--contents", contents, *works)
        listed.append(Step(f"finetune {name}", train("lsast_train finetune", tuned, *arguments), tuned))
        prompts[name] = tuned / f"{name}.prompts.safetensors"
    pairs = [f"{prompts[name]}={given.paintings / label}" for name, label in styles.items()]
    given_styles = tuple(word for pair in pairs for word in ("--style", pair))
    decoder = train(f"{TRAINING} decoder", touched, "--base", str(base), "--contents", contents, *given_styles)
    listed.append(Step("decoder", decoder, touched))
    baked = tuple(word for file in prompts.values() for word in ("--style", str(touched / "prompts" / file.name)))
    bundle = ("lsast_export", "bundle", "--base", str(touched), *baked, "--out", str(out / "bundle"), "--json")
    listed.append(Step("bundle", bundle, anew=()))
    return listed


def run(step: Step) -> dict[str, Any]:
    """Run a step; its line of the log. Its progress goes to stderr."""
    stopped = step.folder is not None and any(step.folder.glob("*.checkpoint.safetensors"))
    arguments = [*step.arguments, *(("--resume",) if stopped else step.anew)]
    begin = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = {
        "step": step.name,
        "command": arguments,
        "status": process.returncode,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return {**result, "output": [json.loads(line) for line in process.stdout.splitlines()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paintings", type=Path, required=True, help="A folder of pictures for each artist.")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--contents", type=Path, help="Photographs to paint while styles are tuned. [default: photos]")
    parser.add_argument("--teacher", type=Path, required=True, help="TAESD as a diffusers folder.")
    parser.add_argument("--style", action="append", required=True, metavar="NAME=FOLDER", help="Folder in paintings.")
    parser.add_argument("--share", action="append", default=[], metavar="LABEL=X", help="As of `training base`.")
    parser.add_argument("--seconds", type=float, help="Time for the base alone.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "train.jsonl"
    ended = {entry["step"] for entry in map(json.loads, file.read_text().splitlines())} if file.exists() else set()
    for step in steps(given):
        if step.name in ended:
            continue
        print(step.name, file=sys.stderr)
        entry = run(step)
        if entry["status"]:
            sys.exit(f"step {step.name!r} ended with status {entry['status']}; the same command goes on there")
        with file.open("a") as log:
            log.write(f"{json.dumps(entry)}\n")


if __name__ == "__main__":
    # Ctrl-C is the step's, which writes its checkpoint and ends; then this program ends, too.
    signal.signal(signal.SIGINT, lambda *_: None)
    main()
