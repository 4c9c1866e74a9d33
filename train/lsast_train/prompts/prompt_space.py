"""The step-aware and layer-aware prompt space: learnable matrices that become the contexts of cross-attention.

Each stage (a tenth of the noise schedule) and layer group (`GROUPS`) has a context [T, dim]. It comes from a prompt
matrix P_k [tokens, dim]; `matrix_index` gives the k of a stage and group. With a `PlaceholderEncoder` the matrix
replaces the caption's placeholder, and the frozen text encoder gives the context; without one the matrix is the
context, and both have equally many tokens.

P_k is a parameter (``direct``), or self-attention over the tokens of a parameter M_k with weights that all matrices
share (``attention``: Q, K, V = M W_Q, M W_K, M W_V; A = softmax(Q Kᵀ / √d); P = A V, no residual), or an output of the
released code's generator (``geglu``).
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn

from lsast_engines.errors import UsageError, fault_list

from ..base.base import Base
from ..options import Generator, Gradient, Layout, TrainOptions, Variant
from .matrix_index import matrix_count, matrix_index
from .released_generator import FACTOR, GegluGenerator
from .text_encoder import A_TOKEN, PlaceholderEncoder

log = logging.getLogger("lsast.train")

INIT_STD = 0.01
"""Standard deviation of the matrices around their start, relative to its root mean square."""

GEGLU_LIMIT = 1_000_000_000
"""Most weights of the last layer of ``geglu``; the release has 71 million."""

_MIN_SINGULAR = 0.01
"""Directions of the initial tokens below this part of the largest singular value are damped at the start."""

_SELF_ATTENTION = 0.99
"""Attention of a token to itself at the start."""


class PromptSpace(nn.Module):
    """The learnable matrices, or the network that generates them, and their prompts.

    Args:
        initial: matrix [tokens, dim] that every matrix starts near; for ``geglu`` the mean of its rows is the constant
            that the generator starts from.
        seed: of the small differences between the matrices at the start, or of the generator's weights.
        text: the text encoder; None if the matrices are the contexts.

    Raises:
        UsageError: a generator that would be too large.
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
        train_steps: int = 1000,
        seed: int = 0,
        text: PlaceholderEncoder | None = None,
    ) -> None:
        super().__init__()
        self.variant, self.generator, self.layout, self.gradient = variant, generator, layout, gradient
        self.train_steps, self.text = train_steps, text
        self.register_buffer("table", matrix_index(variant, layout), persistent=False)
        initial = initial.detach().float().cpu()
        count = matrix_count(variant, generator, layout)
        if generator == "geglu":
            tokens, dim = initial.shape
            if (size := FACTOR * dim * count * tokens * dim) > GEGLU_LIMIT:
                raise UsageError(
                    f"found generator geglu for {count} matrices of {tokens} tokens of {dim} channels, whose last "
                    f"layer would have {size / 1e9:.1f} billion weights; expected fewer tokens: choose prompt text, or "
                    "generator attention"
                )
            self.geglu = GegluGenerator(initial.mean(0), count, tokens, seed=seed)
            return
        spread = INIT_STD * (initial.square().mean().sqrt().item() or 1.0)
        noise = torch.randn(count, *initial.shape, generator=torch.Generator().manual_seed(seed))
        self.matrices = nn.Parameter(initial + spread * noise)  # [K, tokens, dim]
        if generator == "attention":
            near_identity = identity_attention_init(initial)
            self.query = nn.Parameter(near_identity.clone())
            self.key = nn.Parameter(near_identity)
            self.value = nn.Parameter(torch.eye(initial.shape[1]))

    @property
    def stages(self) -> int:
        """Equal parts of the noise schedule."""
        return len(self.table)

    def attention_weights(self) -> dict[str, nn.Parameter]:
        """W_Q, W_K, W_V [dim, dim] as ``query``, ``key`` and ``value``; empty for other generators."""
        return {name: getattr(self, name) for name in ("query", "key", "value") if self.generator == "attention"}

    def embeddings(self, index: torch.Tensor | None = None, dropout: torch.Generator | None = None) -> torch.Tensor:
        """P_k [N, tokens, dim]: of the matrices `index` [N], or of all.

        `dropout` gives random numbers for the dropout of ``geglu`` in training; None leaves dropout out.
        """
        if self.generator == "geglu":
            made: torch.Tensor = self.geglu(dropout)
            return made if index is None else made[index]
        matrices = self.matrices if index is None else self.matrices[index]
        if self.generator == "direct":
            return matrices
        query, key, value = matrices @ self.query, matrices @ self.key, matrices @ self.value
        scores = query @ key.transpose(1, 2) / math.sqrt(matrices.shape[2])
        return scores.softmax(dim=2) @ value

    def prompts(self) -> torch.Tensor:
        """The prompt of every stage and layer group, [stages, 3, T, dim]."""
        used, where = self.table.unique(return_inverse=True)
        return self._contexts(self.embeddings(used))[where]

    def contexts(self, timestep: torch.Tensor, dropout: torch.Generator | None = None) -> torch.Tensor:
        """Contexts [B, 3, T, dim] of the stages of `timestep` [B]; arguments are those of `contexts_by_group`."""
        return torch.stack(self.contexts_by_group(timestep, dropout), dim=1)

    def contexts_by_group(
        self, timestep: torch.Tensor, dropout: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Contexts of each layer group, [B, T, dim], in the stages of `timestep` [B]; stages may be mixed.

        Only the matrices of these stages get a gradient. With ``gradient="decoder"`` the contexts of `down` and `mid`
        are constants, so nothing before the decoder is kept for the backward pass; the released code runs that part
        without gradient, to the same effect (docs/method.md §3).
        """
        stage = timestep * self.stages // self.train_steps
        used, where = self.table[stage].unique(return_inverse=True)  # where: [B, 3]
        embeddings = self.embeddings(used, dropout)
        if self.gradient == "all":
            down, mid, up = self._contexts(embeddings)[where].unbind(1)
            return down, mid, up
        with torch.no_grad():
            constant, at = where[:, :2].unique(return_inverse=True)
            down, mid = self._contexts(embeddings[constant])[at].unbind(1)
        trained, at = where[:, 2].unique(return_inverse=True)
        return down, mid, self._contexts(embeddings[trained])[at]

    def _contexts(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[N, tokens, dim] to [N, T, dim]."""
        return embeddings if self.text is None else self.text.contexts(embeddings)


def build_space(base: Base, options: TrainOptions, draw: Callable[[], torch.Tensor]) -> PromptSpace:
    """The initial prompt space of `options` on `base`, on its device.

    Through a text encoder the matrices start near CLIP's words ``a``, ``b``, ``c`` …, the released generator near
    ``a``; else near `initial_context`. `draw` gives latents of the artist [N, 4, h, w]; it is called only if the start
    depends on them.

    Raises:
        UsageError: text prompts without a text encoder, placeholder tokens without text prompts or more of them than a
            caption has room for (all faults at once), or a generator that would be too large.
    """
    mode = ("context" if base.text_encoder is None else "text") if options.prompt == "auto" else options.prompt
    text = PlaceholderEncoder(base.text_encoder) if mode == "text" and base.text_encoder is not None else None
    faults = []
    if mode == "text" and text is None:
        faults.append(
            f"prompt: found text on base {base.config.name!r}, which has no text encoder; expected auto or context, "
            "or the --base that the encoder belongs to"
        )
    if mode == "context" and options.placeholder_tokens is not None:
        faults.append(
            f"placeholder_tokens: found {options.placeholder_tokens} where contexts are learned; expected none: "
            f"those of base {base.config.name!r} have {base.config.tokens} tokens of their own"
        )
    if text is not None and options.rows > text.tokens - 2:
        faults.append(
            f"placeholder_tokens: found {options.rows}; expected at most {text.tokens - 2}: "
            "the text encoder's context has room for these between begin and end"
        )
    if faults:
        raise UsageError(fault_list("options that do not fit the base:", faults))
    if text is None:
        initial = initial_context(base, draw)
        if base.config.family == "sd15" and base.text_encoder is None:
            log.warning(
                "base %r has no text encoder (no bundle has one): the contexts themselves are learned, %d tokens of %d "
                "channels for each stage and layer group; the paper learns the embeddings of a few tokens. For that, "
                "name the --base that the bundle was exported from",
                *(base.config.name, *initial.shape),
            )
    else:
        # Unlike words, because self-attention gives equal rows equal results, and equal gradients for ever.
        letters = [A_TOKEN + place * (options.generator != "geglu") for place in range(options.rows)]
        initial = torch.stack([text.token_embedding(token) for token in letters])
        if options.generator == "attention" and options.rows == 1:
            log.warning("self-attention over one row is a linear map: W_Q and W_K get no gradient")
    kinds = (options.variant, options.generator, options.layout, options.gradient)
    steps = base.config.noise.train_steps
    space = PromptSpace(initial, *kinds, train_steps=steps, seed=options.seed, text=text)
    return space.to(base.device)


def initial_context(base: Base, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The start of the prompts of an artist, [tokens, dim]: the mean of the style tokens that the base's style encoder
    computes from latents [N, 4, h, w] of the artist, given by `draw`; without a style encoder, the null context."""
    if base.style_encoder is None:
        return base.null_context.detach().clone()
    with torch.no_grad():
        tokens: torch.Tensor = base.style_encoder(draw()).mean(0)
    return tokens


def identity_attention_init(initial: torch.Tensor) -> torch.Tensor:
    """W [dim, dim] that, as W_Q and W_K, makes every token of `initial` [tokens, dim] attend to itself.

    With P = U S Vᵀ and W = V (c / S) Vᵀ the scores P W Wᵀ Pᵀ are c² I. A scaled identity would not do: the tokens of a
    text encoder share a large common part and differ tenfold in length, so all would attend to the longest. Directions
    in which the tokens hardly differ are damped; such tokens may be mixed without harm.
    """
    tokens, dim = initial.shape
    _, singular, directions = torch.linalg.svd(initial.double(), full_matrices=False)  # directions: Vᵀ [r, dim]
    if singular[0] == 0:
        return torch.eye(dim)
    score = math.log(_SELF_ATTENTION / (1 - _SELF_ATTENTION) * max(tokens - 1, 1)) * math.sqrt(dim)
    stretch = torch.sqrt(score / (singular.square() + (_MIN_SINGULAR * singular[0]).square()))
    weight: torch.Tensor = (directions.T @ (stretch[:, None] * directions)).float()
    return weight
