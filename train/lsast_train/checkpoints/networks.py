"""Networks under the names of diffusers and transformers, not built yet.

Where no configuration comes with the tensors, the architecture is read from their names and shapes; only the number of
attention heads cannot be.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn

from lsast_engines.errors import MissingExtraError, TrainingError, fault_list

from .weights import Weights

Kind = Literal["UNet2DConditionModel", "ControlNetModel", "AutoencoderKL"]
"""A class of diffusers."""

HEADS = 8
"""Attention heads of Stable Diffusion 1.5, at every level."""

Tensors = Mapping[str, torch.Tensor]

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names that diffusers gave to the autoencoder's attention when Stable Diffusion 1.5 was published, and today's."""
_CLIP_HEAD_WIDTH = 64
"""Channels of a head in every CLIP text encoder (Radford et al. 2021, table 19)."""
_NOT_TEXT_ENCODER = ("position_ids", "text_projection", "text_projection.weight", "logit_scale")
"""Ends of keys beside a text encoder's weights: a constant, and what CLIP needs to compare texts with pictures."""
_TOKENS, _PLACES = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"


def diffusers_weights(
    kind: Kind, tensors: Tensors, config: Mapping[str, Any] | None = None, heads: int = HEADS
) -> Weights:
    """A network of diffusers' class `kind`; without `config`, of the architecture that the tensors tell.

    Args:
        heads: attention heads of U-Net or ControlNet, without `config`.

    Raises:
        TrainingError: no such network, or one of an architecture that is not read; all faults at once.
    """
    made, what, read_config = CLASSES[kind]
    if config is None:
        config = read_config(tensors, heads)
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    if kind == "AutoencoderKL":
        tensors = {_current_name(key): value for key, value in tensors.items()}
    try:
        with torch.device("meta"):
            complete = {k: v for k, v in made.from_config(known).config.items() if not k.startswith("_")}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"its configuration makes no {kind} ({error})") from error
    if "controlnet_conditioning_channel_order" in complete:
        # Our edges have equal channels, and diffusers would reverse those of the hint features.
        complete["controlnet_conditioning_channel_order"] = "rgb"
    return Weights(what, complete, lambda: made.from_config(complete), tensors)


def clip_weights(state: Tensors, config: Mapping[str, Any] | None = None) -> Weights:
    """A CLIPTextModel of transformers' configuration `config`; if None, of the one that the tensors tell.

    Begin and end of a text are the vocabulary's last two tokens; Stable Diffusion 1.5's configuration names others.

    Raises:
        MissingExtraError: transformers is not installed.
        TrainingError: no CLIP text encoder.
    """
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error

    # The names depend on the version of transformers.
    plain = {k.removeprefix("text_model."): v for k, v in state.items() if not k.endswith(_NOT_TEXT_ENCODER)}
    wide = "encoder.layers.0.mlp.fc1.weight"
    require(plain, (_TOKENS, _PLACES, wide), "text encoder")
    vocabulary, dim = plain[_TOKENS].shape
    names = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    read = {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": len(plain[wide]),
        "num_hidden_layers": count(plain, "encoder.layers."),
        "num_attention_heads": max(1, dim // _CLIP_HEAD_WIDTH),
        "max_position_embeddings": len(plain[_PLACES]),
        "hidden_act": "quick_gelu",
    }
    known = read if config is None else {key: config[key] for key in (*read, "layer_norm_eps") if key in config}
    try:
        settings = CLIPTextConfig(**{**known, **names})
        with torch.device("meta"):
            # transformers put everything under ``text_model.`` before 5.6.
            prefix = "text_model." if hasattr(CLIPTextModel(settings), "text_model") else ""
    except Exception as error:  # which ones depends on the version of transformers
        raise TrainingError(f"its configuration makes no CLIPTextModel ({error})") from error

    def make() -> nn.Module:
        model = CLIPTextModel(settings)
        # Not among the weights, and without memory where everything else gets it from them.
        embeddings = getattr(model, "text_model", model).embeddings
        embeddings.position_ids = torch.arange(settings.max_position_embeddings, device="cpu")[None]
        return model

    complete = {key: getattr(settings, key) for key in (*read, *names)}
    return Weights("the text encoder", complete, make, {prefix + key: value for key, value in plain.items()})


def _unet_config(state: Tensors, heads: int) -> dict[str, Any]:
    require(state, ("conv_out.weight",), "U-Net")
    shared = _shared_config(state, heads, "U-Net")
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(shared["down_block_types"]))
    return {**shared, "out_channels": len(state["conv_out.weight"]), "up_block_types": ups}


def _controlnet_config(state: Tensors, heads: int) -> dict[str, Any]:
    # Convolutions come in pairs, the second of which halves the picture and widens it.
    halving = range(1, count(state, "controlnet_cond_embedding.blocks."), 2)
    places = ["conv_in", *(f"blocks.{place}" for place in halving)]
    hints = [f"controlnet_cond_embedding.{place}.weight" for place in places]
    require(state, hints, "ControlNet")
    return {
        **_shared_config(state, heads, "ControlNet"),
        "conditioning_channels": state[hints[0]].shape[1],
        "conditioning_embedding_out_channels": tuple(len(state[hint]) for hint in hints),
    }


def _vae_config(state: Tensors, _: int) -> dict[str, Any]:
    levels = count(state, "encoder.down_blocks.")
    widths = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    ends = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    require(state, (*ends, *widths), "autoencoder")
    return {
        "in_channels": state[ends[0]].shape[1],
        "out_channels": len(state[ends[2]]),
        "latent_channels": state[ends[1]].shape[1],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(len(state[width]) for width in widths),
        "layers_per_block": count(state, "encoder.down_blocks.0.resnets."),
    }


def _shared_config(state: Tensors, heads: int, what: str) -> dict[str, Any]:
    """What the configurations of the U-Net and of ControlNet, a copy of its encoder, have in common."""
    levels = range(count(state, "down_blocks."))
    widths = [f"down_blocks.{level}.resnets.0.conv1.weight" for level in levels]
    keys = [key for key in state if key.endswith(".attn2.to_k.weight")]
    middle = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    require(state, ("conv_in.weight", *widths, middle), what)
    channels = tuple(len(state[width]) for width in widths)
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in state for level in levels]
    contexts = sorted({state[key].shape[1] for key in keys})
    depths = sorted({count(state, key.split("0.attn2.")[0]) for key in keys if ".transformer_blocks.0." in key})
    layers = sorted({count(state, f"down_blocks.{level}.resnets.") for level in levels})
    faults = [
        f"found {found} {of}; expected {wanted}"
        for found, of, wanted in (
            (layers, "residual blocks in a level", "equally many at each level"),
            (contexts, "channels of a context", "one width"),
            (depths, "transformer blocks in a layer", "equally many in each"),
        )
        if len(found) > 1
    ]
    if unequal := [width for width in channels if width % heads]:
        faults.append(f"found levels of {unequal} channels; expected multiples of {heads} attention heads")
    if faults:
        raise TrainingError(fault_list(f"the {what} has an architecture that cannot be read from its weights:", faults))
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends),
        "layers_per_block": layers[0],
        "cross_attention_dim": contexts[0],
        "attention_head_dim": heads,
        "transformer_layers_per_block": depths[0],
        "use_linear_projection": any(v.ndim == 2 for k, v in state.items() if k.endswith(".proj_in.weight")),
    }


def count(state: Iterable[str], prefix: str) -> int:
    """How many different names follow `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def require(state: Tensors, keys: Iterable[str], what: str) -> None:
    """Raise `TrainingError` for those of `keys` that are missing in `state`."""
    if missing := [key for key in keys if key not in state]:
        raise TrainingError(fault_list(f"found no {what}; missing:", missing))


def _current_name(key: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


CLASSES: dict[Kind, tuple[Any, str, Callable[[Tensors, int], dict[str, Any]]]] = {
    "UNet2DConditionModel": (UNet2DConditionModel, "the U-Net", _unet_config),
    "ControlNetModel": (ControlNetModel, "ControlNet", _controlnet_config),
    "AutoencoderKL": (AutoencoderKL, "the autoencoder", _vae_config),
}
"""Each class, its name in messages, and what reads its configuration from tensors and attention heads."""
