"""A base, a ControlNet or an autoencoder in a single file, as Stable Diffusion 1.x was published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lsast_engines.errors import TrainingError, fault_list

from . import compvis
from .inspection import BaseInspection, Part, UnetWeights
from .networks import HEADS, controlnet_config, diffusers_weights, vae_config
from .weights import Weights, read_metadata, read_tensors

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
        found.add("unet", lambda: compvis.unet_weights(_pick(path, names), found.heads))
    except TrainingError as error:
        found.fail("unet", f"{error}")
    if "autoencoder" in own and compvis.has(state, compvis.VAE):
        found.add("autoencoder", lambda: compvis.vae_weights(read_tensors(path)))
    if compvis.has(state, compvis.TEXT):
        found.add("text_encoder", lambda: compvis.text_encoder_weights(read_tensors(path)))
    if "controlnet" in own and compvis.has(state, compvis.CONTROL):
        found.add("controlnet", lambda: compvis.controlnet_weights(read_tensors(path), found.heads))
    _read_schedule(path, state, found)


def read_vae_file(path: Path) -> Weights:
    """The autoencoder in `path`, in CompVis' or diffusers' naming.

    Raises:
        TrainingError: there is none.
    """
    state = read_tensors(path)
    if "encoder.conv_norm_out.weight" in state:
        return diffusers_weights("AutoencoderKL", state, vae_config(state))
    if "encoder.conv_in.weight" not in compvis.section(state, compvis.VAE):
        kind = describe_unsupported(state) or "no autoencoder"
        raise TrainingError(f"found {kind} in {path.name}; expected an autoencoder")
    return compvis.vae_weights(state)


def read_controlnet_file(path: Path, heads: int = HEADS) -> Weights:
    """The ControlNet in `path`, in CompVis' or diffusers' naming.

    Raises:
        TrainingError: there is none, or one of differences to a U-Net.
    """
    state = read_tensors(path)
    for key, kind in (("difference", "differences"), ("lora_controlnet", "a Control-LoRA, low-rank differences")):
        if key in state:
            raise TrainingError(
                f"found {kind} to a U-Net in {path.name} (it has the key {key!r}); expected whole weights, such as "
                "control_v11p_sd15_canny"
            )
    if "controlnet_cond_embedding.conv_in.weight" in state:
        return diffusers_weights("ControlNetModel", state, controlnet_config(state, heads))
    section = compvis.section(state, compvis.CONTROL)
    if "input_hint_block.0.weight" not in section:
        raise TrainingError(f"found {describe_unsupported(state) or 'a base'} in {path.name}; expected a ControlNet")
    return compvis.controlnet_weights(section, heads)


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
    plain = {key.removeprefix(compvis.UNET): key for key in state if key.startswith(compvis.UNET)}
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


def describe_unsupported(keys: Iterable[str]) -> str | None:
    """What a file with these keys holds if it is no Stable Diffusion 1.x in CompVis naming; None if it is one."""
    names = list(keys)
    there = any(name.startswith(compvis.UNET) for name in names)
    for pattern, kind in (_OTHER_BASES if there else _OTHER_BASES | _NO_BASES).items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return None if there else f"{len(names)} tensors of an unknown kind, such as {', '.join(names[:3])},"
