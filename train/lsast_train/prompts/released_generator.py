"""The generator of the released code: every matrix from one constant vector, through one block of a transformer.

docs/method.md §1.3 with x = context = e, one token: x₁ = e + A₁(LN₁ e), x₂ = x₁ + A₂(LN₂ x₁; e),
P = W_f (u · GELU(g)) + b with [u; g] = W_p LN₃(x₂) + b; no residual around the last part. Attention over a single token
is linear in its value: queries, keys and LN₂ never get a gradient. They are kept so that released weights fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HEADS = 8
"""Heads of both attentions (docs/method.md §1.3)."""

INNER = 512
"""Channels of queries, keys and values: 8 heads of 64."""

FACTOR = 4
"""Hidden channels of the gated part, as a multiple of the constant's."""

DROPOUT = 0.1
"""Part of the values that each dropout sets to zero; in training only."""


class GegluGenerator(nn.Module):
    """Matrices [count, tokens, dim] from a constant [dim].

    The names of the parameters are those of the released module, e.g. ``attn1.to_out.0.weight``, ``ff.net.2.bias``;
    beside them the state holds ``constant``.

    Args:
        constant: e, [dim], never trained: in the release CLIP's embedding of the token ``a`` (docs/method.md §1.2).
        tokens: rows of a matrix; 1 in the release.
        inner: channels of queries, keys and values, a multiple of `HEADS`.
        hidden: channels of the gated part; 4 dim if None.
        seed: of the initial weights, which are torch's defaults for linear layers.
    """

    constant: torch.Tensor

    def __init__(
        self,
        constant: torch.Tensor,
        count: int,
        tokens: int = 1,
        *,
        inner: int = INNER,
        hidden: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        dim = len(constant)
        self._shape = (count, tokens, dim)
        self.register_buffer("constant", constant.detach().float().cpu().clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.attn1 = _Attention(dim, inner)
            self.attn2 = _Attention(dim, inner)
            self.ff = _FeedForward(dim, FACTOR * dim if hidden is None else hidden, count * tokens * dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, dropout: torch.Generator | None = None) -> torch.Tensor:
        """The matrices [count, tokens, dim].

        Args:
            dropout: random numbers of the dropout in training; None leaves dropout out.
        """
        e = self.constant[None]  # [1, dim]
        normed = self.norm1(e)
        x = e + _drop(self.attn1(normed, normed), dropout)
        x = x + _drop(self.attn2(self.norm2(x), e), dropout)
        matrices: torch.Tensor = self.ff(self.norm3(x), dropout)
        return matrices.view(self._shape)


class _Attention(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """`hidden` [N, dim] attends to `context` [M, dim]."""
        query, key, value = (
            rows.view(len(rows), HEADS, -1).transpose(0, 1)  # [heads, N or M, channels]
            for rows in (self.to_q(hidden), self.to_k(context), self.to_v(context))
        )
        # Written out: over a single key the gradient of a fused kernel is rounding noise, this one's is zero.
        weights = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).softmax(dim=2)
        out: torch.Tensor = self.to_out((weights @ value).transpose(0, 1).flatten(1))
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        gate = nn.ModuleDict({"proj": nn.Linear(dim, 2 * hidden)})
        self.net = nn.ModuleDict({"0": gate, "2": nn.Linear(hidden, out)})  # the release has dropout at 1

    def forward(self, hidden: torch.Tensor, dropout: torch.Generator | None) -> torch.Tensor:
        """[N, dim] to [N, out]."""
        value, gate = self.net["0"]["proj"](hidden).chunk(2, dim=-1)  # type: ignore[index]
        out: torch.Tensor = self.net["2"](_drop(value * F.gelu(gate), dropout))
        return out


def _drop(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Inverted dropout with a mask from `generator`, so that a resumed run repeats it on any device."""
    if generator is None:
        return values
    kept = torch.rand(values.shape, generator=generator) >= DROPOUT
    return values * kept.to(values) / (1 - DROPOUT)
