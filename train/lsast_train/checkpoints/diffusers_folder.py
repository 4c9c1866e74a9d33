"""A base, or a ControlNet, in diffusers' format: a folder for each network with its configuration and its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.errors import TrainingError, UsageError

from . import compvis
from .found_parts import BaseInspection, Part, UnetWeights
from .hub import Repository, weight_files
from .weights import Weights, read_tensors

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""What diffusers calls the weights of a network."""

_NON_EMA = ".non_ema"
_CLASSES: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "ControlNetModel": ControlNetModel,
    "AutoencoderKL": AutoencoderKL,
}
_TEXT_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps"),
)
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names that diffusers gave to the autoencoder's attention when Stable Diffusion 1.5 was published, and today's."""

_log = logging.getLogger("lsast.base")


def read_folder(repository: Repository, wanted: UnetWeights, own: Sequence[Part], found: BaseInspection) -> None:
    """Add the parts of the base in `repository` to `found`: those named in `own`."""
    found.origin["source"] = repository.name
    names = weight_files(*FILES)
    files, found.origin["unet_weights"] = names, "the folder's own"
    if wanted != "auto":
        others = weight_files(*FILES, marks=[_NON_EMA])
        found.origin["unet_weights"] = wanted
        files = others if wanted == "non-ema" else names
        if repository.first(*(f"unet/{name}" for name in others)) is None:
            found.fail(
                "unet",
                f"found no {others[0]}, without which a folder does not tell EMA from other weights; "
                f"expected it for --unet-weights {wanted}: take --unet-weights auto",
            )
    if "unet" not in found.failed:
        add_from(repository, "unet", "unet", "UNet2DConditionModel", files, found)
    if "autoencoder" in own and (vae := add_from(repository, "vae", "autoencoder", "AutoencoderKL", names, found)):
        found.latent_scale = float(vae.config["scaling_factor"])
    texts = weight_files("model.safetensors", "pytorch_model.bin")
    add_from(repository, "text_encoder", "text_encoder", "CLIPTextModel", texts, found)
    if "controlnet" in own and repository.first("controlnet/config.json") is not None:
        add_from(repository, "controlnet", "controlnet", "ControlNetModel", names, found)
    if "unet" in found.networks:
        heads = found.networks["unet"]().config["attention_head_dim"]
        found.heads = heads if isinstance(heads, int) else found.heads
    _read_schedule(repository, found)


def add_from(
    repository: Repository, folder: str, part: Part, kind: str, names: list[str], found: BaseInspection
) -> Weights | None:
    """Add the network in `folder` of `repository` (the root for an empty name) to `found`, if there is one.

    Args:
        repository: of the base or ControlNet.
        folder: the network's folder there.
        part: the network's part in the base.
        kind: its class in diffusers or transformers.
        names: the names its weights may have, most wanted first.
        found: gets the network, or the faults.
    """
    prefix = f"{folder}/" if folder else ""
    config_file = repository.first(f"{prefix}config.json")
    weights_file = repository.first(*(prefix + name for name in names))
    if config_file is None and weights_file is None:
        return None
    if config_file is None or weights_file is None:
        missing = "config.json" if config_file is None else f"weights ({names[0]} or the like)"
        found.fail(part, f"found no {prefix}{missing} in {repository.name}; expected it")
        return None
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        found.fail(part, f"{prefix}config.json of {repository.name} cannot be read ({error})")
        return None
    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), kind)
    if named not in (kind, f"{kind}WithProjection"):
        found.fail(part, f"found a {named}; expected a {kind}")
        return None
    _log.info("%s: %s of %s", part, weights_file.name, repository.name)
    if kind == "CLIPTextModel":
        settings = {key: config[key] for key in _TEXT_SETTINGS if key in config}
        return found.add(part, lambda: compvis.clip_weights(_shards(repository, prefix, weights_file), settings))
    return found.add(part, lambda: diffusers_weights(kind, config, _shards(repository, prefix, weights_file)))


def diffusers_weights(kind: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Weights:
    """A network of diffusers' class `kind`, not built yet.

    Raises:
        TrainingError: a configuration that does not describe such a network.
    """
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    if kind == "AutoencoderKL":
        tensors = {_current_name(key): value for key, value in tensors.items()}
    try:
        with torch.device("meta"):
            complete = {k: v for k, v in _CLASSES[kind].from_config(known).config.items() if not k.startswith("_")}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"its configuration makes no {kind} ({error})") from error
    if "controlnet_conditioning_channel_order" in complete:
        # Our edges have equal channels, and diffusers would reverse those of the hint features.
        complete["controlnet_conditioning_channel_order"] = "rgb"
    return Weights(f"the {kind}", complete, lambda: _CLASSES[kind].from_config(complete), tensors)


def controlnet_config(state: Mapping[str, torch.Tensor], heads: int) -> dict[str, Any]:
    """The configuration of the ControlNet whose tensors `state` holds under diffusers' names, for files without one."""
    levels = range(compvis.count(state, "down_blocks."))
    halving = range(1, compvis.count(state, "controlnet_cond_embedding.blocks."), 2)
    hints = ["conv_in.weight", *(f"blocks.{place}.weight" for place in halving)]
    try:
        edges = [state[f"controlnet_cond_embedding.{hint}"] for hint in hints]
        return {
            "in_channels": state["conv_in.weight"].shape[1],
            "conditioning_channels": edges[0].shape[1],
            "conditioning_embedding_out_channels": tuple(len(weight) for weight in edges),
            "block_out_channels": tuple(len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in levels),
            "down_block_types": tuple(
                "CrossAttnDownBlock2D" if f"down_blocks.{i}.attentions.0.norm.weight" in state else "DownBlock2D"
                for i in levels
            ),
            "layers_per_block": compvis.count(state, "down_blocks.0.resnets."),
            "cross_attention_dim": state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "attention_head_dim": heads,
        }
    except KeyError as error:
        raise TrainingError(f"found no tensor {error}; expected those of a ControlNet") from None


def _current_name(key: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


def _shards(repository: Repository, prefix: str, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of `file`, or of all files that it lists if it is an index."""
    if file.suffix != ".json":
        return read_tensors(file)
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file.name} is no index of shards ({error})") from error
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise TrainingError(f"{file.name} lists {name!r}; expected the names of files beside it")
        shard = repository.first(prefix + name)
        if shard is None:
            raise TrainingError(f"{file.name} lists {name}, which is not there")
        tensors |= read_tensors(shard)
    return tensors


def _read_schedule(repository: Repository, found: BaseInspection) -> None:
    file = repository.first("scheduler/scheduler_config.json")
    if file is None:
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        default = NoiseSchedule()
        found.noise = NoiseSchedule(
            config.get("num_train_timesteps", default.train_steps),
            config.get("beta_start", default.beta_start),
            config.get("beta_end", default.beta_end),
            config.get("beta_schedule", default.beta_schedule),
        )
    except (OSError, ValueError, TypeError, AttributeError, UsageError) as error:
        found.fail("scheduler", str(error))
        return
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        found.fail("scheduler", "found trained_betas or rescale_betas_zero_snr; expected betas of a named schedule")
    prediction = config.get("prediction_type", "epsilon")
    if prediction in ("epsilon", "v_prediction"):
        found.prediction = prediction
    else:
        found.fail("scheduler", f"found prediction {prediction!r}; expected epsilon or v_prediction")
