"""The memory of a training step, estimated before the first one."""

from __future__ import annotations

import logging
from collections import defaultdict
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


def activation_bytes(base: Base, space: PromptSpace, options: TrainOptions) -> int:
    """Bytes that a step of `options` keeps for its backward pass.

    The U-Net and the text encoder run on tensors without values, on the device of `base`: it takes seconds and no
    memory. With gradient checkpointing it is what stays, and the largest block while it is computed again.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    weights = [*base.unet.parameters(), *([] if base.text_encoder is None else base.text_encoder.parameters())]
    frozen = [*weights, *(mode.from_tensor(p) for p in weights)]  # alive until the end, and so the same in each use
    known = {p.untyped_storage()._cdata: p.untyped_storage() for p in frozen}
    kept: dict[nn.Module | None, int] = defaultdict(int)  # by block that can be computed again; None: outside of them
    block, inputs = None, 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            kept[block] += storage.nbytes()
        return tensor

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal block, inputs
        block = module
        inputs += sum(value.nbytes for value in arguments if isinstance(value, torch.Tensor))

    def leave(*_: Any) -> None:
        nonlocal block
        block = None

    blocks = [m for m in base.unet.modules() if isinstance(m, (ResnetBlock2D, BasicTransformerBlock))]
    handles = [module.register_forward_pre_hook(enter) for module in blocks]
    handles += [module.register_forward_hook(leave) for module in blocks]
    checkpointing = base.unet.is_gradient_checkpointing
    base.unet.disable_gradient_checkpointing()
    side = options.size // 8
    groups = [
        (matrix, options.gradient == "all" or group == "up")
        for matrix, group in zip(space.table[0].tolist(), GROUPS, strict=True)
    ]
    stages = len(space.table.unique(dim=0))  # 1 if all have the same matrices
    try:
        with (
            mode,
            torch.device(base.device),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            made = {key: _context(base, space, options, stages, learns=key[1]) for key in set(groups)}
            contexts = [made[key] for key in groups]
            latents, times = torch.zeros(options.batch, 4, side, side), torch.zeros(options.batch, dtype=torch.long)
            with autocast(base.device, options.mixed_precision):
                base.eps(latents, times, contexts)
    finally:
        for handle in handles:
            handle.remove()
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
    if not options.gradient_checkpointing:
        return sum(kept.values())
    outside = kept.pop(None, 0)
    return outside + inputs + max(kept.values())


def _context(base: Base, space: PromptSpace, options: TrainOptions, stages: int, learns: bool) -> torch.Tensor:
    """A context for each picture of a batch, spread over `stages`, with a gradient if a layer group `learns`."""
    with torch.set_grad_enabled(learns):
        if space.text is None:
            return torch.zeros(options.batch, base.config.tokens, base.context_dim, requires_grad=learns)
        rows = torch.zeros(min(options.batch, stages), options.rows, space.text.dim, requires_grad=learns)
        return space.text.contexts(rows)[torch.arange(options.batch) % len(rows)]


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
