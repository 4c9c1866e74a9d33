"""Recordings of the released algorithm: what `released_lsast.sample` takes and gives.

`OWN` lies in tests/data; `tests/data/record.py` wrote it with `released_lsast`. `RELEASED` was computed by the released
code itself; it is not part of the repository, and tests on it are skipped without it. `record` makes recordings of any
architecture, schedule and shape.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from released_lsast import CONTROL, UNET, State, sample


@dataclass(frozen=True)
class Recording:
    """A run of B pictures in n steps; floats in float32."""

    unet: State
    """In CompVis naming, as `control`."""
    control: State
    io: State
    """z0, noise, hint, contexts [K, T, dim], unconditional [T, dim], and what `released_lsast.sample` gives: of every
    step timesteps [n], latents_in, eps_cond and eps_uncond [n·B, 4, h, w]; start_latent, final_latent; and the first
    step's control_residual_00 …"""
    heads: int
    steps: int
    strength: float
    guidance: float


@dataclass(frozen=True)
class GoldenFiles:
    """Where a recording lies, and how the released code was called."""

    folder: Path
    name: str
    heads: int
    steps: int = 50
    strength: float = 0.7
    guidance: float = 10.0

    @property
    def prefix(self) -> Path:
        return self.folder / self.name

    @property
    def checkpoint(self) -> Path:
        """A pickled generator, as the released training saves it."""
        return self.folder / "embeddings_gs-99999.pt"

    def tensors(self, part: str) -> State:
        """Of ``unet``, ``control``, ``io`` or ``train``."""
        return load_file(f"{self.prefix}_{part}.safetensors")

    def recording(self) -> Recording:
        unet, control, io = (self.tensors(part) for part in ("unet", "control", "io"))
        io = {name: value.float() if value.is_floating_point() else value for name, value in io.items()}
        return Recording(unet, control, io, self.heads, self.steps, self.strength, self.guidance)

    def generator(self) -> State:
        """``initial`` [1, dim], the checkpoint's constant, and ``prompts`` [30, dim], what its generator gives."""
        return load_file(self.folder / "generator_io.safetensors")

    def training_cases(self) -> list[State]:
        """``z``, ``noise``, ``t``, ``contexts``, ``loss``, ``grad_index``, ``grad`` of each training step."""
        tensors = self.tensors("train")
        numbers = sorted({name.split("_", 1)[0] for name in tensors})
        return [{k.split("_", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{n}_")} for n in numbers]


OWN = GoldenFiles(Path(__file__).parents[1] / "data", "released", heads=4)
RELEASED = GoldenFiles(Path(__file__).parents[3] / "shared" / "golden", "tiny_a", heads=2)

both_sets = pytest.mark.parametrize(
    "golden",
    [
        pytest.param(OWN, id="own"),
        pytest.param(
            RELEASED,
            id="released",
            marks=pytest.mark.skipif(
                not RELEASED.folder.is_dir(), reason="needs ../shared/golden, which the released code recorded"
            ),
        ),
    ],
)
"""Runs a test on our own recording, and on that of the released code where it is there."""


@dataclass(frozen=True)
class Recipe:
    """What a recorded set is like."""

    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attending: tuple[int, ...] = (0,)
    """Levels with attention, beside the middle."""
    num_heads: int = 4
    context_dim: int = 24
    tokens: int = 5
    size: tuple[int, int] = (8, 4)
    """Of the latent, in cells."""
    batch: int = 1
    steps: int = 20
    strength: float = 0.3
    guidance: float = 7.5
    seed: int = 0


def random_weights(recipe: Recipe) -> tuple[State, State]:
    """A U-Net and a ControlNet in CompVis naming, halves, of about unit gain."""
    generator = torch.Generator().manual_seed(recipe.seed)
    state: State = {}
    width = recipe.model_channels

    def put(name: str, *shape: int, bias: bool = True) -> None:
        fan_in = max(1, math.prod(shape[1:]))
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        if len(shape) == 1:
            state[f"{name}.weight"] = 1 + 0.1 * state[f"{name}.weight"]
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def put_residual(name: str, inside: int, out: int) -> None:
        put(f"{name}.in_layers.0", inside)
        put(f"{name}.in_layers.2", out, inside, 3, 3)
        put(f"{name}.emb_layers.1", out, 4 * width)
        put(f"{name}.out_layers.0", out)
        put(f"{name}.out_layers.3", out, out, 3, 3)
        if inside != out:
            put(f"{name}.skip_connection", out, inside, 1, 1)

    def put_transformer(name: str, ch: int) -> None:
        put(f"{name}.norm", ch)
        put(f"{name}.proj_in", ch, ch, 1, 1)
        put(f"{name}.proj_out", ch, ch, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for number, dim in ((1, ch), (2, recipe.context_dim)):
            put(f"{inner}.attn{number}.to_q", ch, ch, bias=False)
            put(f"{inner}.attn{number}.to_k", ch, dim, bias=False)
            put(f"{inner}.attn{number}.to_v", ch, dim, bias=False)
            put(f"{inner}.attn{number}.to_out.0", ch, ch)
        for number in (1, 2, 3):
            put(f"{inner}.norm{number}", ch)
        put(f"{inner}.ff.net.0.proj", 8 * ch, ch)
        put(f"{inner}.ff.net.2", ch, 4 * ch)

    def put_encoder(prefix: str) -> list[int]:
        put(f"{prefix}time_embed.0", 4 * width, width)
        put(f"{prefix}time_embed.2", 4 * width, 4 * width)
        put(f"{prefix}input_blocks.0.0", width, 4, 3, 3)
        channels = [width]
        for level, mult in enumerate(recipe.channel_mult):
            for _ in range(recipe.num_res_blocks):
                name = f"{prefix}input_blocks.{len(channels)}"
                put_residual(f"{name}.0", channels[-1], mult * width)
                if level in recipe.attending:
                    put_transformer(f"{name}.1", mult * width)
                channels.append(mult * width)
            if level < len(recipe.channel_mult) - 1:
                put(f"{prefix}input_blocks.{len(channels)}.0.op", mult * width, mult * width, 3, 3)
                channels.append(mult * width)
        put_residual(f"{prefix}middle_block.0", channels[-1], channels[-1])
        put_transformer(f"{prefix}middle_block.1", channels[-1])
        put_residual(f"{prefix}middle_block.2", channels[-1], channels[-1])
        return channels

    skips = put_encoder(UNET)
    ch, number = skips[-1], 0
    for level, mult in reversed(list(enumerate(recipe.channel_mult))):
        for place in range(recipe.num_res_blocks + 1):
            name = f"{UNET}output_blocks.{number}"
            put_residual(f"{name}.0", ch + skips.pop(), mult * width)
            ch, number = mult * width, number + 1
            if level in recipe.attending:
                put_transformer(f"{name}.1", ch)
            if level and place == recipe.num_res_blocks:
                put(f"{name}.{2 if level in recipe.attending else 1}.conv", ch, ch, 3, 3)
    put(f"{UNET}out.0", ch)
    put(f"{UNET}out.2", 4, ch, 3, 3)
    for index, channels in enumerate(put_encoder(CONTROL)):
        put(f"{CONTROL}zero_convs.{index}.0", channels, channels, 1, 1)
    put(f"{CONTROL}middle_block_out.0", channels, channels, 1, 1)
    # Stable Diffusion's has 16, 16, 32, 32, 96, 96 and 256 channels.
    for index, (inside, out) in enumerate(pairwise((3, 4, 4, 8, 8, 12, 12, 16, width))):
        put(f"{CONTROL}input_hint_block.{2 * index}", out, inside, 3, 3)
    halves = {key: value.half() for key, value in state.items()}
    return tuple({k: v for k, v in halves.items() if k.startswith(prefix)} for prefix in (UNET, CONTROL))  # type: ignore[return-value]


def random_inputs(recipe: Recipe) -> State:
    """``z0``, ``noise``, ``hint``, ``contexts`` [30, T, dim] and ``unconditional`` of a run."""
    generator = torch.Generator().manual_seed(100 + recipe.seed)
    latent = (recipe.batch, 4, *recipe.size)
    pixels = (recipe.batch, 3, *(8 * side for side in recipe.size))
    return {
        "z0": torch.randn(latent, generator=generator),
        "noise": torch.randn(latent, generator=generator),
        "hint": (torch.rand(pixels, generator=generator) < 0.1).float(),
        "contexts": torch.randn(30, recipe.tokens, recipe.context_dim, generator=generator),
        "unconditional": torch.randn(recipe.tokens, recipe.context_dim, generator=generator),
    }


def record(**recipe: Any) -> Recording:
    """A run of random weights and inputs; `recipe` are fields of `Recipe`."""
    chosen = replace(Recipe(), **recipe)
    unet, control = random_weights(chosen)
    inputs = random_inputs(chosen)
    call = (chosen.num_heads, chosen.steps, chosen.strength, chosen.guidance)
    return Recording(unet, control, inputs | sample(inputs, unet, control, *call), *call)


# What the released training pickles: the parts and names of its generator (docs/method.md §1.3, §3).


class CrossAttention(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.1))


class GEGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)


class FeedForward(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim), nn.Dropout(0.1), nn.Linear(4 * dim, out))


class TransformerBlock(nn.Module):
    """The generator's weights; what it computes is `released_lsast.generator`."""

    def __init__(self, dim: int, matrices: int = 30, inner: int = 512) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(dim, inner), CrossAttention(dim, inner)
        self.ff = FeedForward(dim, matrices * dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))


def save_checkpoint(content: dict[str, Any], path: Path) -> Path:
    """Pickle `content` as the released training does: modules whole, under names of classes that no library has."""
    places: dict[str, list[type]] = {
        "ldm": [],
        "ldm.modules": [],
        "ldm.modules.attention": [CrossAttention, GEGLU, FeedForward],
        "ldm.modules.embedding_manager": [TransformerBlock],
    }
    modules = {place: ModuleType(place) for place in places}
    with mock.patch.dict(sys.modules, modules):
        for place, kinds in places.items():
            for kind in kinds:
                setattr(modules[place], kind.__name__, kind)
                kind.__module__ = place
        try:
            torch.save(content, path)
        finally:
            for kinds in places.values():
                for kind in kinds:
                    kind.__module__ = __name__
    return path
