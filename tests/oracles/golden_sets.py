"""Recordings of the released algorithm: what `released_lsast.sample` takes and gives.

`OWN` lies in tests/data; `tests/data/record.py` wrote it with `released_lsast`. `RELEASED` was computed by the released
code itself; it is not part of the repository, and tests on it are skipped without it. `record` makes recordings of any
architecture, schedule and shape.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from compvis_names import compvis_network
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


def record(
    model_channels: int = 32,
    channel_mult: tuple[int, ...] = (1, 2),
    num_res_blocks: int = 1,
    attending: tuple[int, ...] = (0,),
    num_heads: int = 4,
    context_dim: int = 24,
    tokens: int = 5,
    size: tuple[int, int] = (8, 4),
    batch: int = 1,
    steps: int = 20,
    strength: float = 0.3,
    guidance: float = 7.5,
    seed: int = 0,
) -> Recording:
    """A run of random weights, halves of about unit gain, and random inputs.

    `attending` are the levels with attention, beside the middle; `size` is that of the latent.
    """
    attends = [level in attending for level in range(len(channel_mult))]
    shared: dict[str, Any] = {
        "block_out_channels": tuple(model_channels * mult for mult in channel_mult),
        "down_block_types": tuple("CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends),
        "layers_per_block": num_res_blocks,
        "cross_attention_dim": context_dim,
        "attention_head_dim": num_heads,
    }
    ups = tuple("CrossAttnUpBlock2D" if there else "UpBlock2D" for there in attends[::-1])
    # Stable Diffusion's hint encoder has 16, 32, 96 and 256 channels.
    networks = (
        UNet2DConditionModel(**shared, up_block_types=ups),
        ControlNetModel(**shared, conditioning_embedding_out_channels=(4, 8, 12, 16)),
    )
    generator = torch.Generator().manual_seed(seed)
    states = []
    for network, prefix in zip(networks, (UNET, CONTROL), strict=True):
        for name, weight in network.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.data = scale * torch.randn(weight.shape, generator=generator)
            weight.data += float(weight.ndim == 1 and name.endswith("weight"))  # norms
        named = compvis_network(network)
        states.append({prefix + key: value.half().contiguous() for key, value in named.items()})
    generator = torch.Generator().manual_seed(100 + seed)
    inputs = {
        "z0": torch.randn(batch, 4, *size, generator=generator),
        "noise": torch.randn(batch, 4, *size, generator=generator),
        "hint": (torch.rand(batch, 3, 8 * size[0], 8 * size[1], generator=generator) < 0.1).float(),
        "contexts": torch.randn(30, tokens, context_dim, generator=generator),
        "unconditional": torch.randn(tokens, context_dim, generator=generator),
    }
    call = (num_heads, steps, strength, guidance)
    return Recording(*states, inputs | sample(inputs, *states, *call), *call)


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
