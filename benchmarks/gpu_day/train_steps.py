"""The step of the call `train`: `lsast-train mini` on the pictures that travel along; rehearsed on a few made ones.

Only U-Net, ControlNet and style encoder are trained: the weights that the losses of the other phases need do not fit
beside the pictures. What comes back is the base in fp16, its weights in parts (``cat base.safetensors.? >
base.safetensors``), and the log; a checkpoint with its optimiser is larger than all that may come back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base, save_base
from lsast_train.mini.architecture import MiniConfig, build_mini

PICTURES = Path(__file__).parent / "pictures"
AUTOENCODER = Path(__file__).parents[1] / "mini" / "autoencoder_next.safetensors"
CARD = ("--device", "cuda", "--seconds", "270", "--steps", "100000", "--batch", "256", "--lr", "6e-4")
REHEARSAL = ("--device", "cpu", "--seconds", "100", "--steps", "2", "--side", "8", "--threads", "2")
PART = 15 << 20
"""Bytes of a part of the weights: files of 16 MiB come back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "lsast_train", "mini"]
    with tempfile.TemporaryDirectory() as scratch:
        images, base = PICTURES, Path(scratch) / "base"
        if chosen.rehearse:
            images = Path(scratch) / "pictures"
            images.mkdir()
            for index in range(128):  # some are held out by their names
                pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).resize((96, 96)).save(images / f"{index}.png")
        init = Path(scratch) / "init"
        init.mkdir()
        save_base(_with_autoencoder(), init)
        command += ["--images", str(images), "--init", str(init), "--out", str(base), "--json"]
        command += ["--gan-steps", "0", *(REHEARSAL if chosen.rehearse else CARD)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            keep(base, chosen.out)
    print(json.dumps({"status": done.returncode, "out": done.stdout.strip()[-500:]}))
    raise SystemExit(done.returncode)


def _with_autoencoder() -> Base:
    """A base that is random but for its autoencoder."""
    base, prefix = build_mini(MiniConfig()), "autoencoder."
    found = {key.removeprefix(prefix): v.float() for key, v in load_file(AUTOENCODER).items() if key.startswith(prefix)}
    base.autoencoder.load_state_dict(found)
    return base


def keep(base: Path, out: Path) -> None:
    """Write the base in fp16 and the log of its training to `out`, no file larger than `PART`."""
    save_base(load_base(str(base)), out, torch.float16)
    weights = out / "base.safetensors"
    data = weights.read_bytes()
    for index in range(0, len(data), PART):
        Path(f"{weights}.{index // PART}").write_bytes(data[index : index + PART])
    weights.unlink()
    shutil.copy(base / "base.log.json", out)


if __name__ == "__main__":
    main()
