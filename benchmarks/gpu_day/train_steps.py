"""The steps of the call `train`: mini's U-Net, ControlNet and style encoder trained on, then its styles and decoder.

The autoencoder stays, so that the latents, and with them decoder and styles, are near what they were. What comes back
is the base in fp16, its weights in parts (``cat base/base.safetensors.? > base.safetensors``), its log, and the
prompts.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.mini.training.dataset import LatentDataset, build_cache
from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from benchmarks.mini.training.train_unet import BaseTrainingOptions, JointModel, train_base
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base, save_base
from lsast_train.training.loop import TrainingLoop

CARD = BaseTrainingOptions(
    steps=100_000,
    batch=512,
    lr=6e-4,
    ema=0.997,
    evaluate_every=500,
    checkpoint_minutes=2.5,
    share={
        "vincent-van-gogh": 1.5, "claude-monet": 1.3, "katsushika-hokusai": 2.5, "ohara-koson": 2, "henri-martin": 2,
        "nicholas-roerich": 2, "marianne-north": 2.5, "paul-cezanne": 2.5, "kazimir-malevich": 1.5,
        "landscapes": 0.5, "objects": 0.4, "scenes": 0.6,
    },
)  # fmt: skip
REHEARSAL = BaseTrainingOptions(steps=3, batch=4, side=8, evaluate_every=2)
STYLES = {
    "vangogh": ("vincent-van-gogh", {"strength": 0.35, "guidance": 6, "palette": 0.8}),
    "cezanne": ("paul-cezanne", {"strength": 0.35, "guidance": 6, "palette": 0.8}),
    "koson": ("ohara-koson", {"strength": 0.35, "guidance": 6, "palette": 0.8}),
    "monet": ("claude-monet", {"strength": 0.5, "guidance": 7, "palette": 0.8}),
    "roerich": ("nicholas-roerich", {"strength": 0.55, "guidance": 7, "palette": 1}),
    "martin": ("henri-martin", None),
    "north": ("marianne-north", None),
}
"""The embedded styles: the artist's folder, and the options of fine-tuning; None for prompts of inversion alone."""

PART = 15 << 20
"""Bytes of a part of the weights: files of 16 MiB come back."""


def compiled_v_error() -> None:
    """Compile the loss of a training step; evaluations, which have another batch, stay as they are."""
    eager = JointModel.v_error
    compiled = torch.compile(eager, fullgraph=True)

    def v_error(self: JointModel, *given: torch.Tensor) -> torch.Tensor:
        return (compiled if self.training else eager)(self, *given)

    JointModel.v_error = v_error  # type: ignore[method-assign]


def warm(base: Base, device: str, options: BaseTrainingOptions) -> dict[str, Any]:
    """Milliseconds of a training step on made latents, eager and compiled; the compiler's cache is filled."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "latents.safetensors"
        labels = [Path(scratch) / f"{index:02d}" for index in range(21 if device == "cuda" else 2)]
        rng = np.random.default_rng(0)
        for label in labels:
            label.mkdir()
            for index in range(8 if device == "cuda" else 30):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).resize((96, 96)).save(label / f"{index}.png")
        build_cache(labels, base.autoencoder.encoder, cache, device)
        data = LatentDataset(cache, device, options.side)
        for name in ("eager", "compiled"):
            if name == "compiled":
                compiled_v_error()
            times: list[float] = []
            descend = TrainingLoop.descend

            def timed(*given: Any, times: list[float] = times, descend: Any = descend, **more: Any) -> float:
                value: float = descend(*given, **more)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
                return value

            TrainingLoop.descend = timed  # type: ignore[method-assign]
            begin = time.perf_counter()
            steps = 14 if device == "cuda" else 5
            train_base(base, data, replace(options, steps=steps, share={}), Path(scratch) / name, False)
            TrainingLoop.descend = descend  # type: ignore[method-assign]
            found[name] = {"first_s": times[0] - begin, "ms": 1e3 * statistics.median(np.diff(times[2:] or times))}
            if device == "cuda":
                found[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
            print(json.dumps(found), flush=True)
    return found


def train(base: Base, pictures: Path, out: Path, device: str, options: BaseTrainingOptions, compiled: bool) -> None:
    """Train `base` on; it is written to `out`, and in fp16 beside it."""
    folders = sorted(path for root in sorted(pictures.iterdir()) for path in sorted(root.iterdir()))
    cache = out.parent / "latents.safetensors"
    if not cache.exists():
        build_cache(folders, base.autoencoder.encoder, cache, device)
    data = LatentDataset(cache, device, options.side)
    if compiled:
        compiled_v_error()
    model = train_base(base, data, options, out, resume=False)
    origins = f"{base.config.training.get('exported_from', '')} {base.fingerprint}".split()
    facts = {"trained_on": "benchmarks/gpu_day/train_steps.py", "exported_from": " ".join(origins)}
    base.config = replace(base.config, training={**base.config.training, **facts})
    save_base(model.base, out)


def keep(base: Path, out: Path) -> None:
    """Write the base in fp16 and the log of its training to `out`, no file larger than `PART`."""
    out.mkdir(parents=True, exist_ok=True)
    save_base(load_base(str(base)), out, torch.float16)
    weights = out / "base.safetensors"
    data = weights.read_bytes()
    for index in range(0, len(data), PART):
        Path(f"{weights}.{index // PART}").write_bytes(data[index : index + PART])
    weights.unlink()
    shutil.copy(base / "base.log.json", out)


def styles(base: Path, pictures: Path, out: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """Prompts of every style, by inversion and fine-tuning, all at the same time; seconds and status of each."""
    more = ["--device", device, "--threads", "2", "--json"]
    tiny = ["--steps", "2", "--batch", "2", "--size", "64"] if rehearse else []
    begin = time.perf_counter()

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lsast_train", *arguments, *more, *tiny]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    found: dict[str, Any] = {}
    running = {}
    chosen = dict(list(STYLES.items())[: 1 if rehearse else None])
    for name, (label, _) in chosen.items():
        works = ("--images", str(pictures / "paintings" / label), "--base", str(base))
        running[name] = start(
            "--style", name, *works, "--out", str(out / "learned"), "--preset", "quick", "--overwrite"
        )
    for name, process in running.items():
        text = process.communicate()[0]
        found[f"learn {name}"] = [process.returncode, time.perf_counter() - begin, text[-300:]]
        print(json.dumps({f"learn {name}": found[f"learn {name}"]}), flush=True)
    running = {}
    (out / "tuned").mkdir(parents=True, exist_ok=True)
    for name, (label, options) in chosen.items():
        prompts = out / "learned" / f"{name}.prompts.safetensors"
        if options is None:
            shutil.copy(prompts, out / "tuned") if prompts.exists() else None
            continue
        works = ("--images", str(pictures / "paintings" / label), "--base", str(base))
        settings = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        contents = ("--contents", str(pictures / "photos"))
        running[name] = start(
            "finetune",
            "--style",
            str(prompts),
            *works,
            *contents,
            *settings,
            "--out",
            str(out / "tuned"),
            "--overwrite",
        )
    for name, process in running.items():
        text = process.communicate()[0]
        found[f"finetune {name}"] = [process.returncode, time.perf_counter() - begin, text[-300:]]
        print(json.dumps({f"finetune {name}": found[f"finetune {name}"]}), flush=True)
    return found


def decoder(base: Path, pictures: Path, prompts: Path, folder: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """The decoder, on what the styles paint."""
    command = [sys.executable, "-m", "benchmarks.mini.training", "decoder", "--base", str(base), "--out", str(folder)]
    command += ["--json", "--contents", str(pictures / "photos"), "--device", device]
    command += ["--steps", "2", "--batch", "2", "--paintings", "2", "--size", "64"] if rehearse else []
    for name, (label, _) in STYLES.items():
        file = prompts / f"{name}.prompts.safetensors"
        if file.exists():
            command += ["--style", f"{file}={pictures / 'paintings' / label}"]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return {"status": done.returncode, "seconds": time.perf_counter() - begin, "output": done.stdout[-600:]}


def keep_autoencoder(folder: Path, out: Path) -> None:
    """Write the autoencoder of the base in `folder` and its prompts to `out`; the rest of it is known."""
    tensors = load_file(folder / "base.safetensors")
    part = {key: value.half() for key, value in tensors.items() if key.startswith("autoencoder.")}
    save_file(part, out / "autoencoder.safetensors")
    for file in folder.glob("*.json"):
        shutil.copy(file, out / f"touched.{file.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("warm", "train", "styles", "decoder"))
    parser.add_argument("--base", default=str(EMBEDDED))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="Folder of what the steps hand on.")
    parser.add_argument("--out", type=Path, help="Folder of what comes back.")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    device, options = ("cpu", REHEARSAL) if chosen.rehearse else ("cuda", replace(CARD, seconds=chosen.seconds))
    torch.set_float32_matmul_precision("high")
    chosen.work.mkdir(parents=True, exist_ok=True)
    if chosen.step == "warm":
        config = MiniConfig.tiny() if chosen.rehearse else MiniConfig()
        print(json.dumps(warm(build_mini(config), device, options)))
    elif chosen.step == "train":
        base = build_mini(MiniConfig.tiny()) if chosen.rehearse else load_base(chosen.base)
        train(base, chosen.pictures, chosen.work / "base", device, options, chosen.compile)
        keep(chosen.work / "base", chosen.out / "base")
        print(json.dumps({"base": str(chosen.work / "base")}))
    elif chosen.step == "styles":
        found = styles(chosen.work / "base", chosen.pictures, chosen.work, device, chosen.rehearse)
        for name in ("learned", "tuned"):
            shutil.make_archive(str(chosen.out / name), "zip", chosen.work, name)
        print(json.dumps(found))
    else:
        given = (chosen.work / "base", chosen.pictures, chosen.work / "tuned", chosen.work / "touched")
        found = decoder(*given, device, chosen.rehearse)
        keep_autoencoder(chosen.work / "touched", chosen.out)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
