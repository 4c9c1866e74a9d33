"""The steps of the call `parity`: torch on the card against the CPU, and the yardstick of a step of SD 1.5.

The yardstick is a ControlNet at batch 1 and a U-Net at batch 2, of Stable Diffusion 1.5's sizes, on random weights
drawn there, in fp16 and channels_last: the work of one guided step. `graph` is eager torch, captured as a CUDA graph.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GROUPS = 5
TINY = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 32, "norm_num_groups": 8}  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """What runs here."""
    card = torch.cuda.get_device_name() if device == "cuda" else "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if device == "cuda" else None
    return {"card": card, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version()}  # fmt: skip


def mini(device: str, tiny: bool) -> dict[str, Any]:
    """Largest relative difference of mini's networks on `device` from the CPU in fp32, by graph and type."""
    from benchmarks.mini.training.mini_base import MiniConfig, build_mini
    from lsast_engines.bundle.bundle import EMBEDDED
    from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, graph_specs
    from lsast_export.graphs.modules import geometry, graph_module
    from lsast_train.base.lazy_base import load_base

    base = build_mini(MiniConfig.tiny()) if tiny else load_base(EMBEDDED)
    cells = 8 if tiny else 32
    lengths = {"B": 1, "G": 2, "h": cells, "w": cells, "H": 8 * cells, "W": 8 * cells}
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    for name in REQUIRED_GRAPHS:
        spec = graph_specs(geometry(base))[name]
        feeds = {}
        for tensor in spec.inputs:
            shape = [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            feeds[tensor.name] = torch.full(shape, 500) if tensor.dtype == "int64" else torch.randn(shape)
        module = graph_module(base, name)
        with torch.inference_mode():
            expected = _outputs(module.cpu()(*feeds.values()))
            there = [value.to(device) for value in feeds.values()]
            module.to(device)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    outputs = _outputs(module(*there))
                pairs = zip(outputs, expected, strict=True)
                errors = [float((a.cpu().float() - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs]
                found[f"{name} {str(dtype).removeprefix('torch.')}"] = max(errors)
            module.cpu()
    return found


class GuidedStep(nn.Module):
    """One guided step of SD 1.5 with its ControlNet."""

    def __init__(self, tiny: bool) -> None:
        from diffusers import ControlNetModel, UNet2DConditionModel

        from benchmarks.sd15_random import CONTROLNET, UNET

        super().__init__()
        up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
        self.unet = UNet2DConditionModel(**({**UNET, **TINY, **up} if tiny else UNET))
        self.controlnet = ControlNetModel(**({**CONTROLNET, **TINY} if tiny else CONTROLNET))

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, hint: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        down, mid = self.controlnet(latent, timestep, context[1:], hint, return_dict=False)
        noise: torch.Tensor = self.unet(
            latent.expand(2, -1, -1, -1),
            timestep,
            context,
            down_block_additional_residuals=[row.expand(2, -1, -1, -1) for row in down],
            mid_block_additional_residual=mid.expand(2, -1, -1, -1),
            return_dict=False,
        )[0]
        return noise


def sd15(device: str, tiny: bool, way: str) -> dict[str, Any]:
    """Milliseconds of a step, the spread of five groups, and the memory."""
    torch.manual_seed(0)
    dtype = torch.float32 if tiny else torch.float16
    with torch.device(device):
        module = GuidedStep(tiny)
    module = module.to(device, dtype, memory_format=torch.channels_last).eval()
    channels, width, cells = module.unet.config.block_out_channels[0], module.unet.config.cross_attention_dim, 64
    cells = 8 if tiny else cells
    latent = torch.randn(1, 4, cells, cells, device=device, dtype=dtype)
    hint = torch.randn(1, channels, cells, cells, device=device, dtype=dtype)
    context = torch.randn(2, 77, width, device=device, dtype=dtype)
    inputs = (latent, torch.tensor(500, device=device), hint, context)
    begin = time.perf_counter()
    module.controlnet.controlnet_cond_embedding = nn.Identity()  # hint features, where it takes edges
    with torch.inference_mode():
        step = _way(module, inputs, way, tiny)
        for _ in range(3):
            step()
        _wait(device)
        prepared = time.perf_counter() - begin
        groups = _groups(step, 1 if tiny else 50, device)
    memory = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    return {"way": way, "ms": statistics.median(groups), "spread": max(groups) - min(groups),
            "prepared_s": prepared, "memory_bytes": memory}  # fmt: skip


def _way(module: nn.Module, inputs: tuple[torch.Tensor, ...], way: str, tiny: bool) -> Callable[[], Any]:
    if way in ("compile", "reduce-overhead"):
        options: dict[str, Any] = {"mode": way} if way != "compile" else {}
        compiled = torch.compile(module, **({"backend": "eager"} if tiny else options))
        return lambda: compiled(*inputs)
    if way == "graph" and not tiny:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(*inputs)
        return graph.replay
    return lambda: module(*inputs)


def _groups(step: Callable[[], Any], repeats: int, device: str) -> list[float]:
    groups = []
    for _ in range(GROUPS):
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(device)
        groups.append(1e3 * (time.perf_counter() - begin) / repeats)
    return groups


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _outputs(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("machine", "mini", "sd15"))
    parser.add_argument("--way", default="eager")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    device, tiny = ("cpu", True) if chosen.rehearse else ("cuda", False)
    steps = {
        "machine": lambda: machine(device),
        "mini": lambda: mini(device, tiny),
        "sd15": lambda: sd15(device, tiny, chosen.way),
    }
    print(json.dumps(steps[chosen.step]()))


if __name__ == "__main__":
    main()
