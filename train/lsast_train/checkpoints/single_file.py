"""A base, a ControlNet or an autoencoder in a single file in CompVis naming, as Stable Diffusion 1.x was published.

Names are translated by diffusers' own converters, and nothing may be left over or missing afterwards.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from lsast_engines.errors import TrainingError, fault_list

from .inspection import BaseInspection, Part, UnetWeights
from .networks import CLASSES, HEADS, Kind, Tensors, clip_weights, count, diffusers_weights, require
from .weights import Weights, read_metadata, read_tensors, truncate

UNET, CONTROL, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer."
"""Prefixes of the keys of each network, and of the CLIP text encoder's."""

_EMA = "model_ema.diffusion_model"

_OTHER_BASES = {
    r"^(conditioner\.embedders\.1\.|model\.diffusion_model\.label_emb\.)": "Stable Diffusion XL",
    r"\.(time_stack|time_mixer)\.": "a video model (Stable Video Diffusion)",
    r"^(cond_stage_model|conditioner\.embedders\.0)\.model\.": "Stable Diffusion 2 or SD-Turbo (OpenCLIP)",
    r"(joint|double)_blocks\.": "a diffusion transformer (Stable Diffusion 3, Flux)",
    r"\.time_embed\.cond_proj\.": "a latent consistency model (LCM), whose U-Net takes the guidance scale,",
}
"""Other bases by a pattern in the names of their tensors."""

_NO_BASES = {
    r"(^|[._])lora([._]|$)|\.(hada_w1_|lokr_w1|oft_|dora_scale)": "a LoRA, which changes a base but is none,",
    r"motion_modules\.": "an AnimateDiff motion module",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter",
    r"^lllite_": "a ControlNet-LLLite",
    r"^(emb_params|clip_[lg]|<.+>)$": "a textual inversion",
    r"^((control_model\.)?input_hint_block|controlnet_cond_embedding)\.": "a ControlNet alone (take --controlnet)",
    r"^model_ema\.diffusion_model": "EMA weights alone, whose names are not whole without the others,",
    r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|mid)": "an autoencoder alone (take --vae)",
    r"^(input_blocks|middle_block|output_blocks)\.": "a U-Net alone (take the file of the whole model)",
    r"^(down_blocks|up_blocks|conv_in)\.": "a network in diffusers' naming (name the folder of its model)",
}
"""What else a file may hold, by such a pattern."""


def read_single_file(path: Path, wanted: UnetWeights, own: Sequence[Part], found: BaseInspection) -> None:
    """Add the parts of the base in `path` to `found`: those named in `own`."""
    found.origin["source"] = path.name
    try:
        state = read_tensors(path)
    except TrainingError as error:
        found.fail("base", f"{error}")
        return
    if kind := describe_unsupported(state):
        found.fail("base", f"found {kind} in {path.name}; expected Stable Diffusion 1.5 in CompVis naming")
        return
    try:
        names, found.origin["unet_weights"] = _choose_unet(state, wanted)
        found.add("unet", lambda: unet_weights(_pick(path, names), found.heads))
    except TrainingError as error:
        found.fail("unet", f"{error}")
    if "autoencoder" in own and any(key.startswith(VAE) for key in state):
        found.add("autoencoder", lambda: vae_weights(read_tensors(path)))
    if any(key.startswith(TEXT) for key in state):
        found.add("text_encoder", lambda: clip_weights(section(read_tensors(path), TEXT)))
    if "controlnet" in own and any(key.startswith(CONTROL) for key in state):
        found.add("controlnet", lambda: controlnet_weights(read_tensors(path), found.heads))
    _read_schedule(path, state, found)


def read_vae_file(path: Path) -> Weights:
    """The autoencoder in `path`, in CompVis' or diffusers' naming; `TrainingError` if there is none."""
    state = read_tensors(path)
    if "encoder.conv_norm_out.weight" in state:
        return diffusers_weights("AutoencoderKL", state)
    if "encoder.conv_in.weight" not in section(state, VAE):
        kind = describe_unsupported(state) or "no autoencoder"
        raise TrainingError(f"found {kind} in {path.name}; expected an autoencoder")
    return vae_weights(state)


def read_controlnet_file(path: Path, heads: int = HEADS) -> Weights:
    """The ControlNet in `path`, in either naming; `TrainingError` for none, or one of differences to a U-Net."""
    state = read_tensors(path)
    for key, kind in (("difference", "differences"), ("lora_controlnet", "a Control-LoRA, low-rank differences")):
        if key in state:
            raise TrainingError(
                f"found {kind} to a U-Net in {path.name} (it has the key {key!r}); expected whole weights, such as "
                "control_v11p_sd15_canny"
            )
    if "controlnet_cond_embedding.conv_in.weight" in state:
        return diffusers_weights("ControlNetModel", state, heads=heads)
    if "input_hint_block.0.weight" not in section(state, CONTROL):
        raise TrainingError(f"found {describe_unsupported(state) or 'a base'} in {path.name}; expected a ControlNet")
    return controlnet_weights(state, heads)


def _read_schedule(path: Path, state: Mapping[str, torch.Tensor], found: BaseInspection) -> None:
    """Prediction and noise schedule, as far as a file tells them; by itself CompVis naming has no place for them."""
    beside = path.with_suffix(".yaml")
    told = (
        "v_pred" in state,  # ComfyUI
        read_metadata(path).get("modelspec.prediction_type") == "v",  # github.com/Stability-AI/ModelSpec
        beside.is_file() and re.search(r"parameterization:\s*[\"']?v\b", beside.read_text("utf-8", "replace")),
    )
    if any(told):
        found.prediction = "v_prediction"
    if "ztsnr" in state:
        found.fail("alphas_cumprod", "found the key 'ztsnr', a zero-SNR schedule; expected Stable Diffusion 1.5's")
    if (schedule := state.get("alphas_cumprod")) is not None:
        expected = found.noise.alphas_cumprod
        rounding = torch.finfo(schedule.dtype).eps if schedule.is_floating_point() else 0.0  # a file wholly in bf16
        near = max(1e-3, rounding)
        if schedule.shape != expected.shape or np.abs(schedule.double().numpy() - expected).max() > near:
            found.fail("alphas_cumprod", "found another noise schedule; expected Stable Diffusion 1.5's")


def _choose_unet(state: Mapping[str, torch.Tensor], wanted: UnetWeights) -> tuple[dict[str, str], str]:
    """The file's key of each tensor of the U-Net, by its name without prefix; and the kind of weights they are."""
    plain = {key.removeprefix(UNET): key for key in state if key.startswith(UNET)}
    # Averaged weights lie under the same names without their dots (Stable Diffusion, ldm/modules/ema.py).
    averaged = {name: _EMA + name.replace(".", "") for name in plain}
    there = [key for key in averaged.values() if key in state]
    if wanted != "auto" and not there:
        raise TrainingError(
            f"found one set of weights (no model_ema.*), which may be EMA weights or not; expected two sets for "
            f"--unet-weights {wanted}: take --unet-weights auto"
        )
    if wanted == "non-ema" or not there:
        return plain, "non-ema" if there else "the only ones there"
    if missing := [key for key in averaged.values() if key not in state]:
        raise TrainingError(
            fault_list(
                f"found EMA weights without {len(missing)} of {len(averaged)} tensors; take --unet-weights non-ema, or "
                "get the file again; missing are, e.g.:",
                missing[:3],
            )
        )
    return averaged, "ema"


def _pick(path: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = read_tensors(path)
    return {name: state[key] for name, key in names.items()}


def unet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The U-Net of `state`: of the tensors under its prefix, or of all, if nothing has it; not built yet.

    Raises:
        TrainingError: no U-Net, or one of another architecture, or tensors left over; all faults at once.
    """
    state = section(state, UNET)
    blocks = _blocks(state, "U-Net in CompVis naming", "out.2.weight")
    prefixed = {UNET + key: value for key, value in state.items()}
    return _translate("UNet2DConditionModel", prefixed, convert_ldm_unet_checkpoint, blocks, heads)


def controlnet_weights(state: Tensors, heads: int = HEADS) -> Weights:
    """The ControlNet of `state`, not built yet; see `unet_weights`."""
    state = section(state, CONTROL)
    blocks = _blocks(state, "ControlNet in CompVis naming", "input_hint_block.0.weight", "time_embed.0.weight")
    return _translate("ControlNetModel", state, convert_controlnet_checkpoint, blocks, heads)


def vae_weights(state: Tensors) -> Weights:
    """The autoencoder of `state`, not built yet; see `unet_weights`."""
    found = {key: value for key, value in section(state, VAE).items() if not key.startswith(("loss.", "model_ema."))}
    require(found, ("encoder.conv_in.weight", "decoder.conv_in.weight"), "autoencoder in CompVis naming")
    levels = range(count(found, "encoder.down."))
    # 1x1 convolutions there are linear layers in diffusers.
    flat = {k: v.flatten(1) if ".attn_1." in k and v.ndim > 2 else v for k, v in found.items()}
    blocks = {"down_block_types": levels, "up_block_types": levels}
    return _translate("AutoencoderKL", flat, convert_ldm_vae_checkpoint, blocks)


def section(state: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, without it; all of `state` if nothing has it."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return found or dict(state)


def _blocks(state: Tensors, what: str, *needed: str) -> dict[str, int]:
    """What diffusers' converters ask of a configuration: residual blocks in a level."""
    require(state, ("input_blocks.0.0.weight", *needed), what)
    levels = 1 + sum(key.startswith("input_blocks.") and key.endswith(".0.op.weight") for key in state)
    return {"layers_per_block": count(state, "input_blocks.") // levels - 1}


def _translate(kind: Kind, state: Tensors, convert: Any, blocks: Mapping[str, Any], heads: int = HEADS) -> Weights:
    """`state` under the names that diffusers' `convert` gives. It drops what it does not know; here that is a fault."""
    renamed = {key: value for key, value in convert(dict(state), blocks).items() if value is not None}
    used = {id(value) for value in renamed.values()}
    if left := [f"{key}: not expected" for key, value in state.items() if id(value) not in used]:
        heading = f"the weights of {CLASSES[kind][1]} are not those of its architecture:"
        raise TrainingError(fault_list(heading, truncate(left)))
    return diffusers_weights(kind, renamed, heads=heads)


def describe_unsupported(keys: Iterable[str]) -> str | None:
    """What a file with these keys holds if it is no Stable Diffusion 1.x in CompVis naming; None if it is one."""
    names = list(keys)
    there = any(name.startswith(UNET) for name in names)
    for pattern, kind in (_OTHER_BASES if there else _OTHER_BASES | _NO_BASES).items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return None if there else f"{len(names)} tensors of an unknown kind, such as {', '.join(names[:3])},"
