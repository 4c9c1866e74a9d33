"""Stable Diffusion 1.5 at full size on random weights: export, run, and a training step, measured.

    python -m benchmarks.sd15_random build sd15
    python -m benchmarks.sd15_random export sd15 --storage-dtype fp32 --storage-dtype fp16 --storage-dtype bf16
    python -m benchmarks.sd15_random run sd15
    python -m benchmarks.sd15_random train sd15
    python -m benchmarks.sd15_random compile sd15 --sm 8.9      # TensorRT-RTX, no GPU needed

The base is built from the published configurations (U-Net 860 M weights, ControlNet 361 M, autoencoder 84 M, text
encoder 123 M), nothing is downloaded. What comes out looks like noise; seconds, memory, sizes and parity are those of
the real weights. Each measurement is a process of its own, so that its peak of resident memory is its own. Results go
to stdout as Markdown, with --json as JSON. Run nothing else meanwhile.

Memory: 8 GB. Disk: 3 GB for the base, 5.2 GB for a bundle in fp32, 2.6 GB in fp16 or bf16, as much again while it is
exported.
"""

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.bench.machine import describe

# runwayml/stable-diffusion-v1-5, unet/config.json
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,  # diffusers' name for the number of heads
    "cross_attention_dim": 768,
}
# lllyasviel/control_v11p_sd15_canny, config.json
CONTROLNET: dict[str, Any] = {
    "in_channels": 4,
    "down_block_types": UNET["down_block_types"],
    "block_out_channels": UNET["block_out_channels"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}
# runwayml/stable-diffusion-v1-5, vae/config.json
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# openai/clip-vit-large-patch14, the text half
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}

STYLE = "random"
GIGA = 1e9


@click.group()
def main() -> None:
    """Measure Stable Diffusion 1.5 at full size on random weights."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def build(folder: Path, seed: int) -> None:
    """Write a random base to FOLDER, in diffusers' format and fp16, and the prompts of a random style."""
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    kinds: dict[str, Callable[[], Any]] = {
        "base/unet": lambda: UNet2DConditionModel(**UNET),
        "base/vae": lambda: AutoencoderKL(**VAE),
        "base/text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        "controlnet": lambda: random_controlnet(ControlNetModel(**CONTROLNET)),
    }
    for name, make in kinds.items():
        network = make()
        print(f"{name}: {sum(weight.numel() for weight in network.parameters()):,} weights", file=sys.stderr)
        network.half().save_pretrained(folder / name)
        del network
        gc.collect()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (folder / "base" / "model_index.json").write_text(json.dumps(index))
    write_prompts(folder)


def random_controlnet(controlnet: Any) -> Any:
    """Its zero convolutions get small weights: residuals of zero would prove nothing."""
    from torch import nn

    ends = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
    for name, weight in controlnet.named_parameters():
        if name.startswith(ends):
            nn.init.normal_(weight, std=0.02 if weight.ndim == 1 else 0.5 / math.sqrt(weight[0].numel()))
    return controlnet


def write_prompts(folder: Path) -> None:
    """Prompts of the size of contexts: the last thing in the text encoder is a norm."""
    import torch

    from lsast_train.base.lazy_base import open_base
    from lsast_train.prompts.matrix_index import matrix_index
    from lsast_train.prompts.prompt_file import Prompts, save_prompts

    parts = open_base(source(folder))
    matrices = torch.randn(30, parts.config.tokens, TEXT["hidden_size"])
    prompts = matrices[matrix_index("step+layer")]
    learned = Prompts(STYLE, parts.fingerprint, "step+layer", "direct", "strided", "all", prompts)
    save_prompts(learned, folder / f"{STYLE}.prompts.safetensors")


def source(folder: Path) -> Any:
    from lsast_train.checkpoints.source import BaseSource

    return BaseSource(folder / "base", controlnet=folder / "controlnet")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--storage-dtype", "storage_dtypes", multiple=True, default=("fp32", "fp16", "bf16"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def export(folder: Path, storage_dtypes: tuple[str, ...], as_json: bool) -> None:
    """Export the base in FOLDER to FOLDER/STORAGE_DTYPE."""
    rows = []
    for storage_dtype in storage_dtypes:
        command = ["lsast_export", "bundle", "--base", folder / "base", "--controlnet", folder / "controlnet"]
        command += ["--style", folder / f"{STYLE}.prompts.safetensors", "--storage-dtype", storage_dtype]
        report, peak = measured(*command, "--default", "size=512", "--out", folder / storage_dtype, "--json")
        seconds = sum(report["seconds"].values())
        rows.append(
            {
                "storage_dtype": storage_dtype,
                "peak_rss_gb": peak / GIGA,
                "seconds": seconds,
                "disk_gb": report["bytes"] / GIGA,
            }
            | {"phases": report["seconds"], "parity": report["parity"]}
        )
    show(rows, as_json, ("torch", "diffusers", "onnx", "onnxruntime"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--storage-dtype", "storage_dtypes", multiple=True, default=("fp32", "fp16", "bf16"), show_default=True)
@click.option("--steps", default=5, show_default=True, help="Of the schedule; at strength 0.7 the last 3 of 5 run.")
@click.option("--size", default=512, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def run(folder: Path, storage_dtypes: tuple[str, ...], steps: int, size: int, as_json: bool) -> None:
    """Paint a picture with each exported bundle in FOLDER on each backend."""
    from PIL import Image

    weights = 1e-9 * 4 * (859_520_964 + 361_279_120 + 83_653_863)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture.png"
        Image.linear_gradient("L").resize((size, size)).convert("RGB").save(picture)
        for storage_dtype in storage_dtypes:
            for backend, compute_dtype in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
                command = ["lsast", picture, Path(scratch) / "out.png", "--bundle", folder / storage_dtype]
                command += ["--backend", backend, "--compute-dtype", compute_dtype, "--size", size, "--guidance", 3]
                report, peak = measured(*command, "--steps", steps, "--solver", "ddim", "--json")
                count = max(1, int(steps * report["options"]["strength"]))
                rows.append(
                    {
                        "storage_dtype": storage_dtype,
                        "backend": backend,
                        "compute_dtype": compute_dtype,
                        "peak_rss_gb": peak / GIGA,
                    }
                    | {"over_weights_gb": peak / GIGA - weights, "step_s": report["seconds"]["denoise"] / count}
                    | {"phases": report["seconds"]}
                )
    show(rows, as_json, ("numpy", "onnxruntime", "openvino"))


@main.command("compile")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--storage-dtype", default="fp16", show_default=True, help="Of the exported bundle.")
@click.option("--compute-dtype", default="fp16", show_default=True)
@click.option("--sm", default="8.6,8.9,12.0", show_default=True)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    default=("vae_encoder", "controlnet_cond", "denoiser", "vae_decoder"),
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True)
def compile_(
    folder: Path, storage_dtype: str, compute_dtype: str, sm: str, graphs: tuple[str, ...], as_json: bool
) -> None:
    """Compile the bundle FOLDER/STORAGE_DTYPE ahead of time by TensorRT-RTX; nothing is run."""
    rows = []
    for graph in graphs:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = ["lsast_export", "compile", folder / storage_dtype, "--backend", "tensorrt-rtx", "--sm", sm]
            command += ["--compute-dtype", compute_dtype, "--graph", graph, "--out", scratch, "--json"]
            report, peak = measured(*command)
        facts = report["graphs"][graph]
        rows.append(
            {"graph": graph, "compute_dtype": compute_dtype, "targets": ",".join(facts["targets"])}
            | {"seconds": facts["seconds"], "engine_gb": facts["bytes"] / GIGA, "peak_rss_gb": peak / GIGA}
        )
    show(rows, as_json, ("onnx", "tensorrt-rtx"))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--size", default=512, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def train(folder: Path, size: int, as_json: bool) -> None:
    """Take two training steps in fp32 and bf16, with gradient checkpointing and without."""
    rows = []
    for precision in ("no", "bf16"):
        for checkpointing in (True, False):
            flag = "--checkpointing" if checkpointing else "--no-checkpointing"
            command = ("benchmarks.sd15_random", "step", folder, "--mixed-precision", precision, flag, "--size", size)
            report, peak = measured(*command)
            rows.append({"precision": precision, "checkpointing": checkpointing, "peak_rss_gb": peak / GIGA, **report})
    show(rows, as_json, ("torch", "diffusers", "transformers"))


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--mixed-precision", "precision", required=True)
@click.option("--checkpointing/--no-checkpointing", required=True)
@click.option("--size", type=int, required=True)
def step(folder: Path, precision: Any, checkpointing: bool, size: int) -> None:
    """One measurement of `train`."""
    import dataclasses

    from benchmarks.train_step import training_step_cost
    from lsast_train.base.lazy_base import load_base
    from lsast_train.options import PRESETS

    base = load_base(source(folder))
    if precision == "bf16":
        base.round_unet("bf16")
    options = dataclasses.replace(
        PRESETS["released"], mixed_precision=precision, gradient_checkpointing=checkpointing, size=size
    )
    cost = training_step_cost(base, options)
    print(json.dumps({"step_s": cost.seconds, "loss": cost.loss}))


def measured(*command: Any) -> tuple[dict[str, Any], int]:
    """The JSON that a command prints last, and its peak of resident memory in bytes; stderr goes through."""
    arguments = [sys.executable, "-m", *map(str, command)]
    print("$", *arguments[1:], file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{command[0]} failed with exit status {process.returncode}")
        output.seek(0)
        report = json.loads(output.read().splitlines()[-1])
    return report, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(rows: list[dict[str, Any]], as_json: bool, packages: tuple[str, ...]) -> None:
    """Print rows as JSON, or as a Markdown table with what is nested below it."""
    facts = describe(packages)
    if as_json:
        print(json.dumps({"machine": facts, "rows": rows}, indent=1))
        return
    columns = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    print(facts, "\n")
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = (f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns)
        print("|", " | ".join(cells), "|")
    for row in rows:
        for name, value in row.items():
            if isinstance(value, dict):
                listing = ", ".join(f"{key} {number:.2g}" for key, number in value.items())
                print(f"\n{' '.join(str(row[c]) for c in columns[:3])}, {name}: {listing}")


if __name__ == "__main__":
    main()
