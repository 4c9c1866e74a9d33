"""Networks from weights in CompVis naming, as Stable Diffusion and ControlNet were published.

Names are translated by diffusers' own converters, and nothing may be left over or missing afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from lsast_engines.errors import TrainingError, fault_list

from .networks import (
    HEADS,
    Tensors,
    clip_weights,
    controlnet_config,
    count,
    diffusers_weights,
    require,
    unet_config,
    vae_config,
)
from .weights import Weights, truncate

UNET = "model.diffusion_model."
"""Prefix of the U-Net's keys."""
CONTROL = "control_model."
"""Prefix of ControlNet's keys."""
VAE = "first_stage_model."
"""Prefix of the autoencoder's keys."""
TEXT = "cond_stage_model.transformer."
"""Prefix of the keys of the CLIP text encoder."""


def unet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The U-Net of `state`, not built yet.

    Args:
        state: tensors by name. Those under the network's prefix are used; all, if nothing has it.
        heads: attention heads of every level.

    Raises:
        TrainingError: no U-Net, or one of another architecture, or tensors left over; all faults at once.
    """
    state = section(state, UNET)
    blocks = _blocks(state, "U-Net in CompVis naming", "out.2.weight")
    prefixed = {UNET + key: value for key, value in state.items()}
    tensors = _translate(prefixed, lambda tensors: convert_ldm_unet_checkpoint(tensors, blocks), "the U-Net")
    return diffusers_weights("UNet2DConditionModel", tensors, unet_config(tensors, heads))


def controlnet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The ControlNet of `state`, not built yet; see `unet_weights`."""
    state = section(state, CONTROL)
    blocks = _blocks(state, "ControlNet in CompVis naming", "input_hint_block.0.weight", "time_embed.0.weight")
    tensors = _translate(state, lambda tensors: convert_controlnet_checkpoint(tensors, blocks), "ControlNet")
    return diffusers_weights("ControlNetModel", tensors, controlnet_config(tensors, heads))


def vae_weights(state: Tensors) -> Weights:
    """The autoencoder of `state`, not built yet; see `unet_weights`."""
    found = {key: value for key, value in section(state, VAE).items() if not key.startswith(("loss.", "model_ema."))}
    require(found, ("encoder.conv_in.weight", "decoder.conv_in.weight"), "autoencoder in CompVis naming")
    levels = range(count(found, "encoder.down."))
    # 1x1 convolutions there are linear layers in diffusers.
    flat = {k: v.flatten(1) if ".attn_1." in k and v.ndim > 2 else v for k, v in found.items()}
    blocks = {"down_block_types": levels, "up_block_types": levels}
    tensors = _translate(flat, lambda tensors: convert_ldm_vae_checkpoint(tensors, blocks), "the autoencoder")
    return diffusers_weights("AutoencoderKL", tensors, vae_config(tensors))


def text_encoder_weights(state: Tensors) -> Weights:
    """The CLIP text encoder of `state`, not built yet; see `unet_weights`."""
    return clip_weights(section(state, TEXT))


def has(state: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with `prefix`."""
    return any(key.startswith(prefix) for key in state)


def section(state: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, without it; all of `state` if nothing has it."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return found or dict(state)


def _blocks(state: Tensors, what: str, *needed: str) -> dict[str, int]:
    """What diffusers' converters ask of a configuration: residual blocks in a level."""
    require(state, ("input_blocks.0.0.weight", *needed), what)
    levels = 1 + sum(key.startswith("input_blocks.") and key.endswith(".0.op.weight") for key in state)
    return {"layers_per_block": count(state, "input_blocks.") // levels - 1}


def _translate(
    state: Tensors, convert: Callable[[dict[str, Any]], Mapping[str, torch.Tensor | None]], what: str
) -> dict[str, torch.Tensor]:
    """`state` under diffusers' names. The converters drop what they do not know; here that is a fault."""
    renamed = {key: value for key, value in convert(dict(state)).items() if value is not None}
    used = {id(value) for value in renamed.values()}
    if left := [f"{key}: not expected" for key, value in state.items() if id(value) not in used]:
        raise TrainingError(fault_list(f"the weights of {what} are not those of its architecture:", truncate(left)))
    return renamed
