"""One peer of `compare.py`, measured in this very process: ``python peers.py NAME`` with JSON on stdin and stdout.

A peer paints one picture as LSAST's released code does (50 steps at strength 0.7, of which 35 run, guidance 10, a
ControlNet): `reference` is that loop in eager torch, with the ControlNet at batch 1 and keys and values projected from
the prompts at every step; `torch.compile` the same with U-Net and ControlNet compiled; `diffusers` its own ControlNet
img2img pipeline, whose ControlNet runs at batch 2. Contexts and picture are random: they cost what real ones cost.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.speed.peer import GUIDANCE, RUN, STEPS, Paint, timed
from lsast_engines.diffusion import TimestepSchedule, make_solver
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base

STAGES = 10

COMPILED = "torch.compile"


def reference(base: Base, size: int, dtype: torch.dtype) -> Paint:
    """The released loop in eager torch."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(STAGES, 1, 3, base.config.tokens, base.context_dim, generator=generator).to(dtype)
    null = base.null_context.expand(1, 3, -1, -1)
    image, edges = _picture(size, dtype)

    def paint(steps: int) -> list[float]:
        schedule = TimestepSchedule.build(base.config.noise, STEPS, _strength(steps), STAGES, "ddim_lsast")
        solver = make_solver(schedule)
        mean, std = base.encode(image)
        z0 = base.config.latent_scale * (mean + std * torch.randn(mean.shape, generator=generator).to(dtype))
        noise = torch.randn(mean.shape, generator=generator)
        latent = schedule.add_noise(z0.float().numpy(), noise.numpy())
        ticks = [time.perf_counter()]
        for index, step in enumerate(schedule.steps):
            z, t = torch.from_numpy(latent).to(dtype), torch.tensor([step.t])
            kwargs = layer_contexts(contexts[step.stage])
            down, mid = base.controlnet(z, t, None, edges, cross_attention_kwargs=kwargs, return_dict=False)
            twice, times = z.expand(2, -1, -1, -1), t.expand(2)
            output = base.unet(
                twice,
                times,
                None,
                cross_attention_kwargs=layer_contexts(torch.cat([null, contexts[step.stage]])),
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                return_dict=False,
            )[0]
            unconditional, conditional = base.eps_from_output(output, twice, times).float().numpy()
            latent = solver.step(unconditional + GUIDANCE * (conditional - unconditional), index, latent[0])[None]
            latent = np.asarray(latent, np.float32)
            ticks.append(time.perf_counter())
        base.decode(torch.from_numpy(latent).to(dtype) / base.config.latent_scale)
        return [later - earlier for earlier, later in pairwise(ticks)]

    return paint


class PipelineAutoencoder(nn.Module):
    """An autoencoder of lsast's bases as diffusers' pipelines want theirs."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        super().__init__()
        self._base = base
        self.dtype, self.device = dtype, torch.device("cpu")
        self.config = SimpleNamespace(scaling_factor=base.config.latent_scale, block_out_channels=(1, 1, 1, 1))

    def encode(self, image: torch.Tensor) -> Any:
        mean, std = self._base.encode(image)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda _: mean + std * torch.randn_like(mean)))

    def decode(self, latent: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self._base.decode(latent),)


def diffusers(base: Base, size: int, dtype: torch.dtype) -> Paint:
    """`StableDiffusionControlNetImg2ImgPipeline` as it comes."""
    noise = base.config.noise
    scheduler = DDIMScheduler(
        noise.train_steps,
        noise.beta_start,
        noise.beta_end,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=base.config.prediction,
    )
    for network in (base.unet, base.controlnet):
        network.set_attn_processor(AttnProcessor2_0())
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=PipelineAutoencoder(base, dtype),
        text_encoder=None,
        tokenizer=None,
        unet=base.unet,
        controlnet=base.controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    image, edges = _picture(size, dtype)
    prompt = torch.randn(1, base.config.tokens, base.context_dim, generator=torch.Generator().manual_seed(0)).to(dtype)

    def paint(steps: int) -> list[float]:
        ticks: list[float] = []

        def tick(_pipeline: Any, _step: int, _t: int, values: dict[str, Any]) -> dict[str, Any]:
            ticks.append(time.perf_counter())
            return values

        pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=base.null_context[None],
            image=image / 2 + 0.5,
            control_image=edges,
            num_inference_steps=STEPS,
            strength=_strength(steps),
            guidance_scale=GUIDANCE,
            output_type="np",
            callback_on_step_end=tick,
        )
        # The time before the first step's end is not its own.
        return [later - earlier for earlier, later in pairwise(ticks)]

    return paint


PEERS: dict[str, Callable[[Base, int, torch.dtype], Paint]] = {
    "reference": reference,
    COMPILED: reference,
    "diffusers": diffusers,
}


def _strength(steps: int) -> float:
    """The strength at which so many of `STEPS` run; both sides round it down."""
    return (steps + 0.5) / STEPS


def _picture(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A random picture in [-1, 1] and random edges, both [1, 3, size, size]."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    edges = (torch.rand(1, 1, size, size, generator=generator) < 0.1).expand(-1, 3, -1, -1)
    return image.to(dtype), edges.to(dtype)


def counted(paint: Paint, steps: int) -> int:
    """Multiply-accumulates of painting with so many steps."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # torch has no count for its attention on the CPU.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        paint(steps)
    return int(counter.get_total_flops() // 2)


def measure(task: dict[str, Any], name: str) -> dict[str, Any]:
    """See `peer.timed`; with what a picture and a step ask for."""
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task["compute_dtype"]]
    begin = time.perf_counter()
    base = load_base(Path(task["bundle"]), dtype)
    paint = PEERS[name](base, task["size"], dtype)
    opened = time.perf_counter() - begin
    with torch.inference_mode():
        begin = time.perf_counter()
        once, twice = counted(paint, 2), counted(paint, 3)  # warms up, too
        if name == COMPILED:
            for network in (base.unet, base.controlnet):
                network.compile()
            paint(2)
        first = time.perf_counter() - begin
        report = timed(task, paint, opened, first)
    step = twice - once
    return {**report, "macs_step": step, "macs_picture": once + (RUN - 2) * step}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.load(sys.stdin), sys.argv[1])) + "\n")
