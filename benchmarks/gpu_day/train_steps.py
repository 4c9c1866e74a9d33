"""The step of the call `train`: `lsast-train mini` on the pictures that travel along; rehearsed on a few made ones.

Options that `lsast-train mini` has for a card (--device, --seconds) are given if it has them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = Path(__file__).parent / "pictures"
AUTOENCODER = Path(__file__).parents[1] / "mini" / "autoencoder_next.safetensors"
SECONDS = 270
REHEARSAL = ("--steps", "2", "--gan-steps", "0", "--decoder-steps", "0", "--side", "8", "--threads", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "lsast_train", "mini"]
    known = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as scratch:
        images = PICTURES
        if chosen.rehearse:
            images = Path(scratch)
            for index in range(128):  # some are held out by their names
                pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).resize((96, 96)).save(images / f"{index}.png")
        command += ["--images", str(images), "--init", str(AUTOENCODER), "--out", str(chosen.out), "--json"]
        command += REHEARSAL if chosen.rehearse else ()
        wanted = {} if chosen.rehearse else {"--device": "cuda", "--seconds": str(SECONDS)}
        command += [word for option, value in wanted.items() if option in known for word in (option, value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    missing = [option for option in wanted if option not in known]
    print(json.dumps({"status": done.returncode, "missing_options": missing, "out": done.stdout.strip()[-500:]}))
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
