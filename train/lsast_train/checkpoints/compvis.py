"""Networks from weights in CompVis naming, as Stable Diffusion and ControlNet were published.

Such a file holds tensors and no configuration. The architecture is read from their names and shapes; only the number
of attention heads cannot be. Names are translated by diffusers' own converters, and nothing may be left over or
missing afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import nn

from lsast_engines.errors import MissingExtraError, TrainingError, fault_list

from .weights import Weights, truncate

UNET = "model.diffusion_model."
"""Prefix of the U-Net's keys."""
CONTROL = "control_model."
"""Prefix of ControlNet's keys."""
VAE = "first_stage_model."
"""Prefix of the autoencoder's keys."""
TEXT = "cond_stage_model.transformer."
"""Prefix of the keys of the CLIP text encoder."""
HEADS = 8
"""Attention heads of Stable Diffusion 1.5, at every level."""

Tensors = Mapping[str, torch.Tensor]

_CLIP_HEAD_WIDTH = 64
"""Channels of a head in every CLIP text encoder (Radford et al. 2021, table 19)."""
_NOT_TEXT_ENCODER = ("position_ids", "text_projection", "text_projection.weight", "logit_scale")
"""Ends of keys beside a text encoder's weights: a constant, and what CLIP needs to compare texts with pictures."""
_TOKENS = "embeddings.token_embedding.weight"
_HINT_CONVOLUTIONS = tuple(range(0, 16, 2))
"""Places of ControlNet's eight hint convolutions; between them are activations (ControlNet, cldm/cldm.py)."""


def unet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The U-Net of `state`, not built yet.

    Args:
        state: tensors by name. Those under the network's prefix are used; all, if nothing has it.
        heads: attention heads of every level.

    Raises:
        TrainingError: no U-Net, or one of another architecture, or tensors left over; all faults at once.
    """
    state = section(state, UNET)
    config = unet_config(state, heads)
    prefixed = {UNET + key: value for key, value in state.items()}
    tensors = _translate(prefixed, lambda tensors: convert_ldm_unet_checkpoint(tensors, config), "the U-Net")
    return Weights("the U-Net", config, lambda: UNet2DConditionModel(**config), tensors)


def controlnet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The ControlNet of `state`, not built yet; see `unet_weights`."""
    state = section(state, CONTROL)
    config = controlnet_config(state, heads)
    tensors = _translate(state, lambda tensors: convert_controlnet_checkpoint(tensors, config), "ControlNet")
    return Weights("ControlNet", config, lambda: ControlNetModel(**config), tensors)


def vae_weights(state: Tensors) -> Weights:
    """The autoencoder of `state`, not built yet; see `unet_weights`."""
    found = {key: value for key, value in section(state, VAE).items() if not key.startswith(("loss.", "model_ema."))}
    config = vae_config(found)
    # 1x1 convolutions there are linear layers in diffusers.
    flat = {k: v.flatten(1) if ".attn_1." in k and v.ndim > 2 else v for k, v in found.items()}
    tensors = _translate(flat, lambda tensors: convert_ldm_vae_checkpoint(tensors, config), "the autoencoder")
    return Weights("the autoencoder", config, lambda: AutoencoderKL(**config), tensors)


def text_encoder_weights(state: Tensors) -> Weights:
    """The CLIP text encoder of `state`, not built yet; see `unet_weights`."""
    tensors = convert_ldm_clip_checkpoint({TEXT + key: value for key, value in section(state, TEXT).items()})
    return clip_weights(tensors, text_encoder_config(tensors))


def clip_weights(state: Tensors, config: Mapping[str, Any]) -> Weights:
    """A CLIPTextModel of transformers' configuration `config` with the tensors `state`, not built yet.

    Begin and end of a text are the last two tokens of the vocabulary; the configuration of Stable Diffusion 1.5 names
    others.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error

    plain = {_text_key(key): value for key, value in state.items() if not key.endswith(_NOT_TEXT_ENCODER)}
    _require(plain, (_TOKENS,), "the text encoder")
    vocabulary = plain[_TOKENS].shape[0]
    names = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    settings = CLIPTextConfig(**{**config, **names})

    def make() -> nn.Module:
        model = CLIPTextModel(settings)
        # Not among the weights, and without memory where everything else gets it from them.
        embeddings = getattr(model, "text_model", model).embeddings
        embeddings.position_ids = torch.arange(settings.max_position_embeddings, device="cpu")[None]
        return model

    with torch.device("meta"):
        # transformers put everything under ``text_model.`` before 5.6.
        prefix = "text_model." if hasattr(CLIPTextModel(settings), "text_model") else ""
    tensors = {prefix + key: value for key, value in plain.items()}
    return Weights("the text encoder", {**config, **names}, make, tensors)


def _text_key(key: str) -> str:
    """A key of a CLIP text encoder without ``text_model.``, which depends on the version of transformers."""
    return key.removeprefix("text_model.")


def has(state: Iterable[str], prefix: str) -> bool:
    """Whether any name starts with `prefix`."""
    return any(key.startswith(prefix) for key in state)


def section(state: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, without it; all of `state` if nothing has it."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return found or dict(state)


def unet_config(state: Tensors, heads: int = HEADS) -> dict[str, Any]:
    """diffusers' configuration of the U-Net whose tensors `state` holds (CompVis names, no prefix)."""
    return {
        **_shared_config(state, heads, "the U-Net", "out.2.weight"),
        "out_channels": state["out.2.weight"].shape[0],
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(_attending_levels(state))
        ),
    }


def controlnet_config(state: Tensors, heads: int = HEADS) -> dict[str, Any]:
    """diffusers' configuration of the ControlNet whose tensors `state` holds (CompVis names, no prefix)."""
    hints = [f"input_hint_block.{place}.weight" for place in _HINT_CONVOLUTIONS]
    return {
        **_shared_config(state, heads, "ControlNet", *hints),
        "conditioning_channels": state[hints[0]].shape[1],
        # Convolutions come in pairs, the second of which halves the picture and widens it.
        "conditioning_embedding_out_channels": tuple(state[hint].shape[0] for hint in hints[:-1:2]),
    }


def vae_config(state: Tensors) -> dict[str, Any]:
    """diffusers' configuration of the autoencoder whose tensors `state` holds (CompVis names, no prefix)."""
    _require(state, ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"), "the autoencoder")
    levels = count(state, "encoder.down.")
    widths = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    _require(state, widths, "the autoencoder")
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(state[width].shape[0] for width in widths),
        "layers_per_block": count(state, "encoder.down.0.block."),
    }


def text_encoder_config(state: Tensors) -> dict[str, Any]:
    """transformers' configuration of the CLIP text encoder whose tensors `state` holds (no prefix)."""
    plain = {_text_key(key): value for key, value in state.items()}
    places, wide = "embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight"
    _require(plain, (_TOKENS, places, wide), "the text encoder")
    dim = plain[_TOKENS].shape[1]
    return {
        "vocab_size": plain[_TOKENS].shape[0],
        "hidden_size": dim,
        "intermediate_size": plain[wide].shape[0],
        "num_hidden_layers": count(plain, "encoder.layers."),
        "num_attention_heads": max(1, dim // _CLIP_HEAD_WIDTH),
        "max_position_embeddings": plain[places].shape[0],
        "hidden_act": "quick_gelu",
    }


def _shared_config(state: Tensors, heads: int, what: str, *needed: str) -> dict[str, Any]:
    """What the configurations of the U-Net and of ControlNet, a copy of its encoder, have in common."""
    _require(state, ("input_blocks.0.0.weight", *needed), what)
    levels = _levels(state)
    firsts = _first_blocks(state)
    widths = [f"input_blocks.{first}.0.out_layers.3.weight" for first in firsts]
    keys = [key for key in state if key.endswith(".attn2.to_k.weight")]
    _require(state, [*widths, *(keys[:1] or ["middle_block.1.transformer_blocks.0.attn2.to_k.weight"])], what)
    faults = []
    blocks = count(state, "input_blocks.")
    if blocks % levels:
        faults.append(f"found {blocks} input blocks at {levels} levels; expected equally many at each level")
    contexts = sorted({state[key].shape[1] for key in keys})
    if len(contexts) > 1:
        faults.append(f"found cross-attention to contexts of {contexts} channels; expected one width")
    depths = sorted({count(state, key.split("0.attn2.")[0]) for key in keys if ".transformer_blocks.0." in key})
    if len(depths) > 1:
        faults.append(f"found {depths} transformer blocks in a layer; expected equally many in each")
    channels = tuple(state[width].shape[0] for width in widths)
    if unequal := [width for width, attends in zip(channels, _attending_levels(state), strict=True) if width % heads]:
        faults.append(f"found levels of {unequal} channels; expected multiples of {heads} attention heads")
    if faults:
        raise TrainingError(fault_list(f"{what} has an architecture that cannot be read from its weights:", faults))
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": channels,
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in _attending_levels(state)
        ),
        "layers_per_block": blocks // levels - 1,
        "cross_attention_dim": contexts[0],
        "attention_head_dim": heads,
        "transformer_layers_per_block": depths[0],
        "use_linear_projection": any(
            value.ndim == 2 for key, value in state.items() if key.endswith(".proj_in.weight")
        ),
    }


def _levels(state: Tensors) -> int:
    return 1 + sum(key.startswith("input_blocks.") and key.endswith(".0.op.weight") for key in state)


def _first_blocks(state: Tensors) -> list[int]:
    """Number of the first residual block of each level; block 0 is the input convolution."""
    levels = _levels(state)
    return [1 + level * (count(state, "input_blocks.") // levels) for level in range(levels)]


def _attending_levels(state: Tensors) -> list[bool]:
    return [f"input_blocks.{first}.1.norm.weight" in state for first in _first_blocks(state)]


def count(state: Iterable[str], prefix: str) -> int:
    """How many different names follow `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _require(state: Tensors, keys: Iterable[str], what: str) -> None:
    if missing := [key for key in keys if key not in state]:
        raise TrainingError(fault_list(f"found no {what.removeprefix('the ')} in CompVis naming; missing:", missing))


def _translate(
    state: Tensors, convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor | None]], what: str
) -> dict[str, torch.Tensor]:
    """`state` under diffusers' names. The converters drop what they do not know; here that is a fault."""
    renamed = {key: value for key, value in convert(dict(state)).items() if value is not None}
    used = {id(value) for value in renamed.values()}
    if left := [f"{key}: not expected" for key, value in state.items() if id(value) not in used]:
        raise TrainingError(fault_list(f"the weights of {what} are not those of its architecture:", truncate(left)))
    return renamed
