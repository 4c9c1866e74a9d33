"""The algorithm of LSAST's released code, in plain functions on tensors in CompVis naming.

Written from docs/method.md §1.3, §3 and §4 and the layout of CompVis's files, without diffusers and without our own
code: the independent side of every comparison with the preset ``released``. Where recordings of the released code are
at hand (`golden_sets.RELEASED`), a test compares this module with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

UNET, CONTROL = "model.diffusion_model.", "control_model."
"""Prefixes of the U-Net's and the ControlNet's tensors."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scope:
    """The tensors under a prefix."""

    state: State
    prefix: str

    def __truediv__(self, name: object) -> Scope:
        return Scope(self.state, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[self.prefix + name]

    def exists(self) -> bool:
        return any(key.startswith(self.prefix) for key in self.state)

    def conv(self, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return F.conv2d(x, self["weight"], self["bias"], stride, self["weight"].shape[-1] // 2)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self["weight"], self.state.get(f"{self.prefix}bias"))

    def group_norm(self, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return F.group_norm(x, 32, self["weight"], self["bias"], eps)

    def layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"])


def in_float32(state: State, prefix: str) -> Scope:
    return Scope({key: value.float() for key, value in state.items()}, prefix)


# The generator


def generator(state: State, e: torch.Tensor) -> torch.Tensor:
    """[K, dim] from the constant [dim], without dropout (docs/method.md §1.3): attention over one token is linear."""
    s = in_float32(state, "")
    x = e + (s / "attn1.to_out.0").linear((s / "attn1.to_v").linear((s / "norm1").layer_norm(e)))
    x = x + (s / "attn2.to_out.0").linear((s / "attn2.to_v").linear(e))
    value, gate = (s / "ff.net.0.proj").linear((s / "norm3").layer_norm(x)).chunk(2)
    return (s / "ff.net.2").linear(value * F.gelu(gate)).view(-1, len(e))


# The networks


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
    """One of input_blocks, middle_block, output_blocks: its layers in order, each known by its tensors' names."""
    place = 0
    while (layer := s / place).exists():
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
    while (part := s / name / len(found)).exists():
        found.append(part)
    return found


def unet_encoder(s: Scope, x: torch.Tensor, t: int, c: torch.Tensor, heads: int) -> tuple[Any, list[Any], Any]:
    """The way down and the middle, on the contexts `c` [B, 3, T, dim]: the middle's output, skips, time embedding."""
    emb, skips = time_embedding(s, t, len(x)), []
    for part in blocks(s, "input_blocks"):
        x = block(part, x, emb, c[:, 0], heads)
        skips.append(x)
    return block(s / "middle_block", x, emb, c[:, 1], heads), skips, emb


def unet_decoder(
    s: Scope, x: torch.Tensor, skips: list[Any], emb: torch.Tensor, context: torch.Tensor, heads: int
) -> torch.Tensor:
    """The way up, on one context [B, T, dim]: → eps."""
    skips = list(skips)
    for part in blocks(s, "output_blocks"):
        x = block(part, torch.cat([x, skips.pop()], dim=1), emb, context, heads)
    return (s / "out.2").conv(F.silu((s / "out.0").group_norm(x)))


def unet(s: Scope, x: torch.Tensor, t: int, c: torch.Tensor, heads: int, control: list[torch.Tensor]) -> torch.Tensor:
    """eps [B, 4, h, w]; `c` [B, 3, T, dim]: contexts of encoder, middle, decoder; `control` [] is none."""
    x, skips, emb = unet_encoder(s, x, t, c, heads)
    if control:
        *down, middle = control
        x, skips = x + middle, [skip + more for skip, more in zip(skips, down, strict=True)]
    return unet_decoder(s, x, skips, emb, c[:, 2], heads)


def controlnet(
    s: Scope, x: torch.Tensor, hint: torch.Tensor, t: int, c: torch.Tensor, heads: int
) -> list[torch.Tensor]:
    """The residuals of the input blocks, then that of the middle."""
    emb, residuals = time_embedding(s, t, len(x)), []
    for place in range(0, 16, 2):
        hint = (s / f"input_hint_block.{place}").conv(hint, stride=2 if place in (4, 8, 12) else 1)
        hint = F.silu(hint) if place < 14 else hint
    for index, part in enumerate(blocks(s, "input_blocks")):
        x = block(part, x, emb, c[:, 0], heads) + (hint if index == 0 else 0)
        residuals.append((s / f"zero_convs.{index}.0").conv(x))
    return [*residuals, (s / "middle_block_out.0").conv(block(s / "middle_block", x, emb, c[:, 1], heads))]


# Training and sampling


def alphas_cumprod() -> torch.Tensor:
    """[1000] float32."""
    return torch.tensor(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), dtype=torch.float32)


def training_step(
    unet_state: State, z: torch.Tensor, noise: torch.Tensor, t: int, contexts: torch.Tensor, heads: int
) -> tuple[float, int, torch.Tensor]:
    """One training step (docs/method.md §3): the loss, the number of the context that gets a gradient, the gradient.

    Args:
        unet_state: the U-Net's tensors.
        z: clean latents [B, 4, h, w], as `noise`.
        t: timestep.
        contexts: [K, T, dim], of which s, s + 1 and s + 2 are read.
        heads: of every attention.
    """
    s, stage, abar = in_float32(unet_state, UNET), t * 10 // 1000, alphas_cumprod()[t]
    x = abar.sqrt() * z + (1 - abar).sqrt() * noise
    window = contexts[stage : stage + 3].expand(len(x), -1, -1, -1)
    with torch.no_grad():
        middle, skips, emb = unet_encoder(s, x, t, window, heads)
    decoder = contexts[stage + 2].clone().requires_grad_()
    eps = unet_decoder(s, middle, skips, emb, decoder.expand(len(x), -1, -1), heads)
    loss = (eps - noise).square().mean()
    (gradient,) = torch.autograd.grad(loss, decoder)
    return loss.item(), stage + 2, gradient


@torch.no_grad()
def sample(
    inputs: dict[str, Any], unet_state: State, control_state: State, heads: int, steps: int, strength: float,
    guidance: float,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The image-to-image run (docs/method.md §4.3-5) from z0, noise, hint, contexts, unconditional: all it computes."""
    u, c = in_float32(unet_state, UNET), in_float32(control_state, CONTROL)
    abars = alphas_cumprod()
    grid = np.array(range(0, 1000, 1000 // steps)) + 1
    count = int(strength * steps)
    abar = abars[grid[count]]
    x = abar.sqrt() * inputs["z0"] + (1 - abar).sqrt() * inputs["noise"]
    batch = len(x)
    out: dict[str, torch.Tensor] = {"start_latent": x}
    rows: dict[str, list[Any]] = {"latents_in": [], "eps_cond": [], "eps_uncond": [], "timesteps": []}
    for index in reversed(range(count)):
        t = int(grid[index])
        s = int(t * 10 / 1000)
        style = inputs["contexts"][s : s + 3].expand(batch, -1, -1, -1)  # [B, 3, T, dim]
        control = controlnet(c, x, inputs["hint"], t, style, heads)
        if not rows["timesteps"]:
            out |= {f"control_residual_{i:02}": residual for i, residual in enumerate(control)}
        rows["latents_in"].append(x)
        rows["timesteps"].append(t)
        if guidance == 1:  # all contexts are passed, so that the first three serve every stage (docs/method.md §8.6)
            eps = unet(u, x, t, inputs["contexts"][:3].expand_as(style), heads, control)
            rows["eps_cond"].append(eps)
        else:
            null = inputs["unconditional"].expand_as(style)
            both = [residual.repeat(2, 1, 1, 1) for residual in control]
            eps_null, eps_style = unet(u, torch.cat([x, x]), t, torch.cat([null, style]), heads, both).chunk(2)
            rows["eps_uncond"].append(eps_null)
            rows["eps_cond"].append(eps_style)
            eps = eps_null + guidance * (eps_style - eps_null)
        a, before = abars[t], abars[grid[index - 1] if index else 0]
        x = before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    stacks = {name: torch.cat(rows[name]) for name in ("latents_in", "eps_cond", "eps_uncond") if rows[name]}
    return {**out, **stacks, "timesteps": torch.tensor(rows["timesteps"]), "final_latent": x}
