"""The released sampler and its networks once more, in plain functions on tensors in CompVis naming.

Written from docs/method.md §4 and the layout of CompVis's files, without diffusers and without our own code, so that
sets
of any architecture, schedule and shape can be recorded. The released code itself recorded ``../shared/golden``; that
this module repeats it is a test of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

UNET, CONTROL = "model.diffusion_model.", "control_model."


@dataclass(frozen=True)
class Scope:
    """The tensors under a prefix."""

    state: dict[str, torch.Tensor]
    prefix: str

    def __truediv__(self, name: object) -> Scope:
        return Scope(self.state, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[self.prefix + name]

    def there(self) -> bool:
        return any(key.startswith(self.prefix) for key in self.state)

    def conv(self, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(x, self["weight"], self["bias"], stride, self["weight"].shape[-1] // 2)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self["weight"], self.state.get(f"{self.prefix}bias"))

    def group_norm(self, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return F.group_norm(x, 32, self["weight"], self["bias"], eps)

    def layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"])


def residual(s: Scope, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    h = (s / "in_layers.2").conv(F.silu((s / "in_layers.0").group_norm(x)))
    h = h + (s / "emb_layers.1").linear(F.silu(emb))[:, :, None, None]
    h = (s / "out_layers.3").conv(F.silu((s / "out_layers.0").group_norm(h)))
    return h + ((s / "skip_connection").conv(x) if "skip_connection.weight" in s else x)


def attention(s: Scope, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    def split(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = (split((s / name).linear(y)) for name, y in (("to_q", x), ("to_k", context), ("to_v", context)))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (s / "to_out.0").linear((weights @ v).transpose(1, 2).flatten(2))


def transformer(s: Scope, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    h = (s / "proj_in").conv((s / "norm").group_norm(x, 1e-6)).flatten(2).transpose(1, 2)
    b = s / "transformer_blocks.0"
    y = (b / "norm1").layer_norm(h)
    h = h + attention(b / "attn1", y, y, heads)
    h = h + attention(b / "attn2", (b / "norm2").layer_norm(h), context, heads)
    value, gate = (b / "ff.net.0.proj").linear((b / "norm3").layer_norm(h)).chunk(2, -1)
    h = h + (b / "ff.net.2").linear(value * F.gelu(gate))
    return x + (s / "proj_out").conv(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def block(s: Scope, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    """One of input_blocks, middle_block, output_blocks: its layers one after another, told by their tensors."""
    place = 0
    while (layer := s / place).there():
        if "in_layers.0.weight" in layer:
            x = residual(layer, x, emb)
        elif "proj_in.weight" in layer:
            x = transformer(layer, x, context, heads)
        elif "op.weight" in layer:
            x = (layer / "op").conv(x, stride=2)
        elif "conv.weight" in layer:
            x = (layer / "conv").conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        else:
            x = layer.conv(x)
        place += 1
    return x


def time_embedding(s: Scope, t: int, batch: int) -> torch.Tensor:
    half = (s / "time_embed.0")["weight"].shape[1] // 2
    angles = t * torch.exp(-math.log(10000) * torch.arange(half) / half)
    row = torch.cat([angles.cos(), angles.sin()]).expand(batch, -1)
    return (s / "time_embed.2").linear(F.silu((s / "time_embed.0").linear(row)))


def blocks(s: Scope, name: str) -> list[Scope]:
    found = []
    while (part := s / name / len(found)).there():
        found.append(part)
    return found


def unet(s: Scope, x: torch.Tensor, t: int, c: torch.Tensor, heads: int, control: list[torch.Tensor]) -> torch.Tensor:
    """`c` [B, 3, T, dim]: contexts of encoder, middle, decoder; `control` [] is none."""
    control = list(control)
    emb, skips = time_embedding(s, t, len(x)), []
    for part in blocks(s, "input_blocks"):
        x = block(part, x, emb, c[:, 0], heads)
        skips.append(x)
    x = block(s / "middle_block", x, emb, c[:, 1], heads)
    if control:
        x = x + control.pop()
    for part in blocks(s, "output_blocks"):
        x = torch.cat([x, skips.pop() + (control.pop() if control else 0)], dim=1)
        x = block(part, x, emb, c[:, 2], heads)
    return (s / "out.2").conv(F.silu((s / "out.0").group_norm(x)))


def controlnet(
    s: Scope, x: torch.Tensor, hint: torch.Tensor, t: int, c: torch.Tensor, heads: int
) -> list[torch.Tensor]:
    emb, residuals = time_embedding(s, t, len(x)), []
    for place in range(0, 16, 2):
        hint = (s / f"input_hint_block.{place}").conv(hint, stride=2 if place in (4, 8, 12) else 1)
        hint = F.silu(hint) if place < 14 else hint
    for index, part in enumerate(blocks(s, "input_blocks")):
        x = block(part, x, emb, c[:, 0], heads) + (hint if index == 0 else 0)
        residuals.append((s / f"zero_convs.{index}.0").conv(x))
    return [*residuals, (s / "middle_block_out.0").conv(block(s / "middle_block", x, emb, c[:, 1], heads))]


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


def random_weights(recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A U-Net and a ControlNet in CompVis naming, halves, of about unit gain."""
    generator = torch.Generator().manual_seed(recipe.seed)
    state: dict[str, torch.Tensor] = {}
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
    for index, (inside, out) in enumerate(pairwise((3, 16, 16, 32, 32, 96, 96, 256, width))):
        put(f"{CONTROL}input_hint_block.{2 * index}", out, inside, 3, 3)
    halves = {key: value.half() for key, value in state.items()}
    return tuple({k: v for k, v in halves.items() if k.startswith(prefix)} for prefix in (UNET, CONTROL))  # type: ignore[return-value]


@torch.no_grad()
def sample(inputs: dict[str, Any], unet_state: Any, control_state: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The released image-to-image run (docs/method.md §4.3-5) from z0, noise, hint, contexts, unconditional."""
    u, c = (
        Scope({key: value.float() for key, value in state.items()}, prefix)
        for state, prefix in ((unet_state, UNET), (control_state, CONTROL))
    )
    abars = torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), dtype=torch.float32)
    grid = np.array(range(0, 1000, 1000 // recipe.steps)) + 1
    count = int(recipe.strength * recipe.steps)
    abar = abars[grid[count]]
    x = abar.sqrt() * inputs["z0"] + (1 - abar).sqrt() * inputs["noise"]
    batch = len(x)
    out: dict[str, Any] = {"start_latent": x, "latents_in": [], "eps_cond": [], "eps_uncond": [], "timesteps": []}
    for index in reversed(range(count)):
        t = int(grid[index])
        s = int(t * 10 / 1000)
        # [B, 3, T, dim]
        style = inputs["contexts"][s : s + 3].expand(batch, -1, -1, -1)
        control = controlnet(c, x, inputs["hint"], t, style, recipe.num_heads)
        if not out["latents_in"]:
            out |= {f"control_residual_{i:02}": residual for i, residual in enumerate(control)}
        out["latents_in"].append(x)
        out["timesteps"].append(t)
        if recipe.guidance == 1:  # all contexts are handed over, so the first three serve every stage
            eps = unet(u, x, t, inputs["contexts"][:3].expand_as(style), recipe.num_heads, control)
            out["eps_cond"].append(eps)
        else:
            null = inputs["unconditional"].expand_as(style)
            both = [residual.repeat(2, 1, 1, 1) for residual in control]
            eps_both = unet(u, torch.cat([x, x]), t, torch.cat([null, style]), recipe.num_heads, both)
            eps_null, eps_style = eps_both.chunk(2)
            out["eps_uncond"].append(eps_null)
            out["eps_cond"].append(eps_style)
            eps = eps_null + recipe.guidance * (eps_style - eps_null)
        a, before = abars[t], abars[grid[index - 1] if index else 0]
        x = before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    stacks = {name: torch.cat(out[name]) for name in ("latents_in", "eps_cond", "eps_uncond") if out[name]}
    out = {name: value for name, value in out.items() if name not in ("latents_in", "eps_cond", "eps_uncond")}
    return {**out, **stacks, "timesteps": torch.tensor(out["timesteps"]), "final_latent": x}


def random_inputs(recipe: Recipe) -> dict[str, torch.Tensor]:
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


@dataclass(frozen=True)
class Recorder:
    """Records golden sets."""

    folder: Path

    def __call__(
        self, drop: tuple[str, ...] = (), change: Any = None, says: dict[str, str] | None = None, **recipe_changes: Any
    ) -> Path:
        """Write a set and return its prefix.

        Args:
            drop: metadata and tensors to leave out.
            change: called with the tensors of ``_io`` before they are written.
            says: metadata to write besides, or instead.
            recipe_changes: fields of `Recipe`.
        """
        recipe = replace(Recipe(), **recipe_changes)
        unet_state, control_state = random_weights(recipe)
        inputs = random_inputs(recipe)
        tensors = {**inputs, **sample(inputs, unet_state, control_state, recipe)}
        if change is not None:
            change(tensors)
        names = ("model_channels", "num_res_blocks", "num_heads", "context_dim", "steps", "strength", "guidance")
        metadata = {name: str(getattr(recipe, name)) for name in names} | (says or {})
        metadata.setdefault("channel_mult", json.dumps(recipe.channel_mult))
        tensors = {name: value.contiguous() for name, value in tensors.items() if name not in drop}
        prefix = self.folder / "set"
        save_file(unet_state, f"{prefix}_unet.safetensors")
        save_file(control_state, f"{prefix}_control.safetensors")
        metadata = {name: value for name, value in metadata.items() if name not in drop}
        save_file(tensors, f"{prefix}_io.safetensors", metadata or None)
        return prefix


@pytest.fixture
def record(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


@pytest.fixture(scope="session")
def reference() -> Any:
    """`sample` and `unet`, for tests that bring their own tensors."""
    return {"sample": sample, "unet": unet, "scope": Scope, "recipe": Recipe}
