"""stable-diffusion.cpp, one peer of `compare.py`: ``python peer_sdcpp.py`` with JSON on stdin and stdout.

Needs ``pip install stable-diffusion-cpp-python`` (compiled on the spot, by CMake and a C++ compiler; 0.4.7 was tried),
and a Stable Diffusion 1.5 in diffusers' format, text encoder included, with its ControlNet: `sd15_random.py build`
makes one of random weights. It reads such a base, but for the names that newer versions of transformers give the text
encoder, and a ControlNet in CompVis naming; both are written for it.

It paints as the other peers do (`peers.py`): 50 steps at strength 0.7, of which 35 run, guidance 10, a ControlNet, its
sampler `euler`, which is DDIM's step. ControlNet and U-Net both run twice a step, at batch 1, for guidance; once a
picture prompts go through the text encoder, and picture and edges through the autoencoder. Weights of convolutions are
in fp16 whatever is asked for, others as `compute_dtype` says.
"""

import json
import os
import re
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from benchmarks.speed.peer import GUIDANCE, STEPS, timed

TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
"""What it calls the types of weights; its own documentation recommends f16 and q8_0."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_HEADS: tuple[tuple[str, Any], ...] = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"^controlnet_cond_embedding\.blocks\.(\d)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
    (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    (r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"),
    (r"^controlnet_mid_block", "middle_block_out.0"),
)


def compvis_key(key: str) -> str:
    """CompVis' name (cldm/cldm.py) of a tensor of a ControlNet for Stable Diffusion 1.x that has diffusers' name.

    Raises:
        ValueError: it is the name of no such tensor.
    """
    for pattern, head in _HEADS:
        named, count = re.subn(pattern, head, key)
        if count:
            inner = re.compile(r"\.({})\.".format("|".join(_RESNET)))
            return inner.sub(lambda m: f".{_RESNET[m[1]]}.", named) if ".resnets." in key else named
    raise ValueError(f"found the tensor {key!r}; expected one of a ControlNet in diffusers' naming")


def write_controlnet(folder: Path, file: Path) -> None:
    """Write the ControlNet in `folder` (diffusers' format) to `file`, in CompVis naming."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({f"control_model.{compvis_key(key)}": value for key, value in tensors.items()}, file)


def write_base(base: Path, folder: Path) -> None:
    """Make `folder` the base in `base`, its text encoder's tensors named as transformers before 5.6 did."""
    for name in ("unet", "vae"):
        (folder / name).symlink_to((base / name).resolve())
    (folder / "text_encoder").mkdir()
    tensors = load_file(base / "text_encoder" / "model.safetensors")
    named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
    save_file(named, folder / "text_encoder" / "model.safetensors")


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """See `peers.measure`; multiplications are not counted."""
    from stable_diffusion_cpp import StableDiffusion

    size = task["size"]
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    edges = Image.fromarray(np.where(rng.random((size, size, 1)) < 0.1, 255, 0).astype(np.uint8).repeat(3, axis=2))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        controlnet = Path(scratch) / "controlnet.safetensors"
        write_controlnet(Path(task["controlnet"]), controlnet)
        base = Path(scratch) / "base"
        base.mkdir()
        write_base(Path(task["base"]), base)
        model = StableDiffusion(
            model_path=str(base),
            control_net_path=str(controlnet),
            wtype=TYPES[task["compute_dtype"]],
            n_threads=task["threads"] or os.cpu_count() or 1,  # by itself it takes half
            verbose=False,
        )
    opened = time.perf_counter() - begin

    def paint(steps: int) -> list[float]:
        ticks: list[float] = []
        paintings = model.generate_image(
            prompt="a painting",
            negative_prompt="",
            init_image=image,
            control_image=edges,
            control_strength=1.0,
            width=size,
            height=size,
            cfg_scale=GUIDANCE,
            sample_method="euler",
            sample_steps=STEPS,
            strength=(steps - 0.5) / STEPS,  # it rounds down, and runs one more
            seed=0,
            # Called for other work, too, which has other totals.
            progress_callback=lambda step, total, _: ticks.append(time.perf_counter()) if total == steps else None,
        )
        if len(paintings) != 1 or len(ticks) != steps + 1:
            raise RuntimeError(f"found {len(paintings)} paintings, {len(ticks)} ticks; expected 1, {steps + 1}")
        return [later - earlier for earlier, later in pairwise(ticks)]

    begin = time.perf_counter()
    paint(1)
    first = time.perf_counter() - begin
    return timed(task, paint, opened, first)


if __name__ == "__main__":
    # What the library prints on stdout is no part of the report.
    report, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)
    report.write(json.dumps(measure(json.load(sys.stdin))) + "\n")
    report.close()
