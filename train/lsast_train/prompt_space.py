"""The step-aware and layer-aware prompt space: learnable matrices that become the contexts of cross-attention.

A prompt is a context [tokens, dim] for one stage (a tenth of the noise schedule) and one layer group (`GROUPS`). It
comes from a matrix P_k of the same shape; `matrix_table` says which k serves which stage and group. With the
``attention`` generator a prompt is self-attention over the tokens of its matrix, with maps that all matrices share:
Q, K, V = P W_Q, P W_K, P W_V; A = softmax(Q Kᵀ / √d); prompt = A V. There is no residual.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lsast_engines.errors import UsageError, fault_list

from .attention import GROUPS
from .base import Base
from .options import Generator, Gradient, Layout, Variant, choice_faults

STAGES = 10
"""Equal parts of the noise schedule; stage 0 is the clean end (method.md §1.4)."""

NOISE = 0.01
"""Spread of the matrices around the initial context, relative to its root mean square: no two start alike."""

_UNRESOLVED = 0.01
"""Differences between initial tokens below this part of the largest singular value are not told apart at the start."""

_OWN_SHARE = 0.99
"""Attention of a token to itself at the start."""


def matrix_table(variant: Variant, layout: Layout = "strided", stages: int = STAGES) -> torch.Tensor:
    """Index k of the matrix that serves each stage and layer group, int64 [stages, 3].

    ``step+layer`` gives 3s + l (30 matrices) or, overlapping, s + l: 12 matrices, each serving three stages in turn
    (the released code allocates 30 and never reads the other 18, method.md §8.1). ``step`` gives s, ``layer`` l and
    ``global`` 0.
    """
    stage = torch.arange(stages)[:, None].expand(stages, len(GROUPS))
    group = torch.arange(len(GROUPS))[None].expand(stages, len(GROUPS))
    if variant == "step+layer":
        return stage + group if layout == "overlap" else len(GROUPS) * stage + group
    tables = {"step": stage, "layer": group, "global": torch.zeros_like(stage)}
    return tables[variant].clone()


class PromptSpace(nn.Module):
    """The learnable matrices and, for ``attention``, the maps that turn them into prompts.

    Args:
        initial: context [tokens, dim] that every prompt starts near.
        variant, generator, layout, gradient: see `options`.
        stages: equal parts of the noise schedule.
        train_steps: timesteps of the noise schedule.
        seed: of the small differences between the matrices at the start.

    Raises:
        UsageError: values that cannot be meant, all of them at once.
    """

    table: torch.Tensor

    def __init__(
        self,
        initial: torch.Tensor,
        variant: Variant = "step+layer",
        generator: Generator = "attention",
        layout: Layout = "strided",
        gradient: Gradient = "all",
        *,
        stages: int = STAGES,
        train_steps: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        named = {"variant": variant, "generator": generator, "layout": layout, "gradient": gradient}
        if faults := choice_faults(named):
            raise UsageError(fault_list("these prompt space options cannot be meant:", faults))
        self.variant, self.generator, self.layout, self.gradient = variant, generator, layout, gradient
        self.train_steps = train_steps
        self.register_buffer("table", matrix_table(variant, layout, stages), persistent=False)
        initial = initial.detach().float().cpu()
        count = int(self.table.max()) + 1
        spread = NOISE * (initial.square().mean().sqrt().item() or 1.0)
        noise = torch.randn(count, *initial.shape, generator=torch.Generator().manual_seed(seed))
        self.matrices = nn.Parameter(initial + spread * noise)  # P: [K, tokens, dim]
        if generator == "attention":
            near_identity = _own_token_map(initial)
            self.query = nn.Parameter(near_identity.clone())
            self.key = nn.Parameter(near_identity)
            self.value = nn.Parameter(torch.eye(initial.shape[1]))

    @property
    def stages(self) -> int:
        """Equal parts of the noise schedule."""
        return len(self.table)

    def maps(self) -> dict[str, nn.Parameter]:
        """The attention's maps ``query``, ``key`` and ``value``, each [dim, dim]; empty for ``direct``."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "matrices"}

    def generate(self, matrices: torch.Tensor) -> torch.Tensor:
        """Matrices [N, tokens, dim] → prompts [N, tokens, dim]."""
        if self.generator == "direct":
            return matrices
        query, key, value = matrices @ self.query, matrices @ self.key, matrices @ self.value
        scores = query @ key.transpose(1, 2) / math.sqrt(matrices.shape[2])
        return scores.softmax(dim=2) @ value

    def prompts(self) -> torch.Tensor:
        """The prompt of every stage and layer group, [stages, 3, tokens, dim]."""
        return self.generate(self.matrices)[self.table]

    def contexts(self, timestep: torch.Tensor) -> torch.Tensor:
        """Contexts [B, 3, tokens, dim] of the stages of `timestep` [B]; stages may be mixed.

        Only the matrices of these stages are read, so only they get a gradient. With ``gradient="decoder"`` the
        contexts of `down` and `mid` are detached.
        """
        stage = timestep * self.stages // self.train_steps
        used, where = self.table[stage].unique(return_inverse=True)  # where: [B, 3]
        contexts = self.generate(self.matrices[used])[where]
        if self.gradient == "decoder":
            contexts = torch.cat([contexts[:, :2].detach(), contexts[:, 2:]], dim=1)
        return contexts


def initial_context(base: Base, latents: torch.Tensor) -> torch.Tensor:
    """Where the prompts of an artist start, [tokens, dim].

    The mean of the style tokens that the base's style encoder reads from the artist's `latents` [N, 4, h, w]; for a
    base without one, its null context.
    """
    if base.style_encoder is None:
        return base.null_context.detach().clone()
    with torch.no_grad():
        tokens: torch.Tensor = base.style_encoder(latents).mean(0)
    return tokens


def _own_token_map(initial: torch.Tensor) -> torch.Tensor:
    """W [dim, dim] that, as W_Q and W_K, makes every token of `initial` [tokens, dim] attend to itself.

    With P = U S Vᵀ and W = V (c / S) Vᵀ the scores P W Wᵀ Pᵀ are c² I. A plain scaled identity would not do: the
    tokens of a text encoder share a large common part and differ tenfold in length, so all would attend to the
    longest. Directions in which the tokens hardly differ are damped; tokens that alike may be mixed without harm.
    """
    tokens, dim = initial.shape
    _, singular, directions = torch.linalg.svd(initial.double(), full_matrices=False)  # directions: Vᵀ [r, dim]
    if singular[0] == 0:
        return torch.eye(dim)
    score = math.log(_OWN_SHARE / (1 - _OWN_SHARE) * max(tokens - 1, 1)) * math.sqrt(dim)
    stretch = torch.sqrt(score / (singular.square() + (_UNRESOLVED * singular[0]).square()))
    own: torch.Tensor = (directions.T @ (stretch[:, None] * directions)).float()
    return own
