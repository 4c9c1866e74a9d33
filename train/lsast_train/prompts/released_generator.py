"""The generator of the released code: every matrix from one constant vector, through one block of a transformer.

docs/method.md §1.3 with x = context = e, one token: x₁ = e + A₁(LN₁ e), x₂ = x₁ + A₂(LN₂ x₁; e),
P = W_f (u · GELU(g)) + b with [u; g] = W_p LN₃(x₂) + b; no residual around the last part. Attention over a single token
is linear in its value: queries, keys and LN₂ never get a gradient. They are kept so that released weights fit.
"""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor
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

    The names of the parameters are those of the released module; beside them the state holds ``constant``.

    Args:
        constant: e, never trained: in the release CLIP's embedding of the token ``a`` (docs/method.md §1.2).
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
            # No fused kernel: over a single key its gradient would be rounding noise, that of this processor is zero.
            self.attn1, self.attn2 = (
                Attention(dim, heads=HEADS, dim_head=inner // HEADS, processor=AttnProcessor()) for _ in range(2)
            )
            self.ff = FeedForward(dim, count * tokens * dim, FACTOR, inner_dim=hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, dropout: torch.Generator | None = None) -> torch.Tensor:
        """The matrices [count, tokens, dim]; `dropout` as of `PromptSpace.embeddings`."""
        e = self.constant[None, None]  # [1, 1, dim]
        x = e + _drop(self.attn1(self.norm1(e)), dropout)
        x = x + _drop(self.attn2(self.norm2(x), e), dropout)
        gated, _, last = self.ff.net
        matrices: torch.Tensor = last(_drop(gated(self.norm3(x)), dropout))
        return matrices.view(self._shape)


def _drop(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Inverted dropout with a mask from `generator`, so that a resumed run repeats it on any device."""
    if generator is None:
        return values
    kept = torch.rand(values.shape, generator=generator) >= DROPOUT
    return values * kept.to(values) / (1 - DROPOUT)
