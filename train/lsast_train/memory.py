"""The memory of a training step, estimated before the first one."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .base.attention import GROUPS
from .base.base import Base, autocast
from .options import TrainOptions
from .prompts.prompt_space import PromptSpace

log = logging.getLogger("lsast.train")

_LEARNED = 4
"""Numbers kept for each learned one: itself, its gradient and AdamW's two moments."""


class _Kept:
    """Bytes that a forward pass keeps for the backward pass, in all and in each block that can be computed again."""

    def __init__(self, frozen: set[int]) -> None:
        self.total = 0
        self.blocks: list[int] = []
        """Of each block."""
        self.inputs = 0
        """Of all that blocks are called with: what gradient checkpointing keeps of them."""
        self._seen, self._inside = frozen, False
        self._alive: list[Any] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called by autograd for every tensor that it keeps."""
        storage = tensor.untyped_storage()
        self._alive.append(storage)  # or its number would be given again
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.total += storage.nbytes()
            if self._inside:
                self.blocks[-1] += storage.nbytes()
        return tensor

    def enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A block begins."""
        self._inside = True
        self.blocks.append(0)
        self.inputs += sum(value.nbytes for value in arguments if isinstance(value, torch.Tensor))

    def leave(self, *_: Any) -> None:
        """It ends."""
        self._inside = False


def activation_bytes(base: Base, space: PromptSpace, options: TrainOptions) -> int:
    """Bytes that a step of `options` keeps for its backward pass.

    The U-Net and the text encoder run on tensors without values, on the device of `base`: it takes seconds and no
    memory. With gradient checkpointing it is what stays, and the largest block while it is computed again.
    """
    networks = [base.unet, *([] if base.text_encoder is None else [base.text_encoder])]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [p for network in networks for p in network.parameters()]
    frozen = [*weights, *(mode.from_tensor(p) for p in weights)]  # alive until the end, and so the same in each use
    kept = _Kept({p.untyped_storage()._cdata for p in frozen})
    blocks = [m for m in base.unet.modules() if isinstance(m, (ResnetBlock2D, BasicTransformerBlock))]
    handles = [block.register_forward_pre_hook(kept.enter) for block in blocks]
    handles += [block.register_forward_hook(kept.leave) for block in blocks]
    base.unet.disable_gradient_checkpointing()
    side = options.size // 8
    try:
        with (
            mode,
            torch.device(base.device),
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        ):
            learning = [options.gradient == "all" or group == "up" for group in GROUPS]
            contexts = [_context(base, space, options, learns) for learns in learning]
            latents, times = torch.zeros(options.batch, 4, side, side), torch.zeros(options.batch, dtype=torch.long)
            with autocast(base.device, options.mixed_precision):
                base.eps(latents, times, contexts)
    finally:
        for handle in handles:
            handle.remove()
        if options.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
    if not options.gradient_checkpointing:
        return kept.total
    return kept.total - sum(kept.blocks) + kept.inputs + max(kept.blocks)


def _context(base: Base, space: PromptSpace, options: TrainOptions, learns: bool) -> torch.Tensor:
    """A context for each picture of a batch, with a gradient if a layer group `learns`."""
    with torch.set_grad_enabled(learns):
        if space.text is None:
            return torch.zeros(options.batch, base.config.tokens, base.context_dim, requires_grad=learns)
        rows = torch.zeros(options.batch, options.rows, space.text.dim, requires_grad=learns)
        return space.text.contexts(rows)


def log_memory(base: Base, space: PromptSpace, options: TrainOptions) -> None:
    """Tell what a step will need on the device of `base`; the loop measures it after some steps."""
    networks = [*base.networks().values(), base.text_encoder]
    there = [p for n in networks if n is not None and n is not base.controlnet for p in n.parameters()]
    learned = sum(p.numel() for p in space.parameters())
    parts = [sum(p.nbytes for p in there), _LEARNED * 4 * learned, activation_bytes(base, space, options)]
    log.info(
        "on %s: about %.2f GB at the peak of a step: %.2f GB of weights, %.2f GB for %.1f million learned values and "
        "their optimiser, %.2f GB of activations",
        *(base.device, sum(parts) / 1e9, parts[0] / 1e9, parts[1] / 1e9, learned / 1e6, parts[2] / 1e9),
    )
