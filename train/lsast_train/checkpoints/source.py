"""Published bases of Stable Diffusion 1.5's architecture.

A base is a folder in diffusers' format (on disk, or a repository of the Hugging Face hub at a pinned revision) or a
single file in CompVis naming; so is its ControlNet. Parts that do not fit together are refused before any network is
built.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsast_engines.errors import TrainingError, UsageError, fault_list

from .diffusers_folder import FILES, Repository, add_from, is_hub_id, open_hub, read_folder
from .inspection import BaseInspection, Part, UnetWeights
from .single_file import read_controlnet_file, read_single_file, read_vae_file
from .weights import weights_format

_ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Endings by which a missing file is told from a name."""
_PARTS: dict[Part, str] = {
    "unet": "U-Net",
    "controlnet": "ControlNet; name one with --controlnet",
    "autoencoder": "autoencoder; name one with --vae",
    "text_encoder": "text encoder",
}
"""What is expected where a part is missing."""
_FAMILIES = {1024: "1024 are Stable Diffusion 2's", 2048: "2048 are Stable Diffusion XL's"}
"""Other models by the channels of their contexts."""
_UNET: dict[str, tuple[Any, str]] = {
    "class_embed_type": (None, ""),
    "addition_embed_type": (None, "Stable Diffusion XL has one"),
    "encoder_hid_dim_type": (None, ""),
    "time_cond_proj_dim": (None, "a latent consistency model (LCM) has it"),
    "attention_type": ("default", "GLIGEN has gated ones"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "small distilled models have none"),
}
"""Settings of the U-Net, and who has others."""
_SDXL_SCALE = 0.13025
_log = logging.getLogger("lsast.base")


@dataclass(frozen=True)
class BaseSource:
    """Which base to load; `UsageError` for an unknown choice of weights."""

    base: str | Path | None = None
    """A base or bundle that lsast wrote, by name or folder (None: the embedded default); a folder in diffusers' format;
    a single file in CompVis naming; or OWNER/NAME of the hub."""
    controlnet: str | Path | None = None
    """Its ControlNet: a folder in diffusers' format, a single file, or OWNER/NAME of the hub. None: the base's own."""
    unet_weights: UnetWeights = "auto"
    revision: str | None = None
    """Commit hash or tag of what comes from the hub and names none itself (OWNER/NAME@REVISION)."""
    vae: str | Path | None = None
    """Its autoencoder, in the forms of `controlnet`, such as ft-mse's. None: the base's own."""

    def __post_init__(self) -> None:
        if self.unet_weights not in ("auto", "ema", "non-ema"):
            raise UsageError(f"unet_weights: found {self.unet_weights!r}; expected auto, ema or non-ema")


def is_importable(name: str | Path) -> bool:
    """Whether `name` is a folder or file that `import_base` reads, or has the form of a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file()
    return _is_file(path) or is_hub_id(str(name))


def bases_inside(name: str | Path | None) -> str:
    """What to name instead of the folder `name`, which is no base: what lies in it or above it; empty for nothing."""
    folder = Path(name or "").expanduser()
    if not name or not folder.is_dir():
        return ""
    near = [folder.parent] if is_importable(folder.parent) else [*folder.glob("snapshots/*"), *folder.glob("*")]
    found = sorted(str(path) for path in near if is_importable(path) and (path.is_dir() or weights_format(path)))
    heading = f"{folder} is a folder without unet/config.json; perhaps you mean:"
    return "\n  " + fault_list(heading, found[:8]) if found else ""


def import_base(source: BaseSource) -> BaseInspection:
    """Find the parts of `source`, unread, and check that they are those of a Stable Diffusion 1.5 and fit together.

    Raises:
        TrainingError: parts that are missing, damaged, of another kind of model, or do not fit together; all at once.
        UsageError: a repository of the hub without a pinned revision.
        MissingExtraError: transformers is not installed.
    """
    assert source.base is not None
    found = BaseInspection()
    given = {"controlnet": source.controlnet, "autoencoder": source.vae}
    own = [part for part in _PARTS if given.get(part) is None]
    path = Path(source.base).expanduser()
    if _is_file(path):
        found.name = path.stem
        read_single_file(path, source.unet_weights, own, found)
    else:
        repository = _repository(source.base, source, "revision", found)
        found.name = repository.name.rpartition("/")[2]
        read_folder(repository, source.unet_weights, own, found)
    if source.controlnet is not None:
        _read_part("controlnet", source.controlnet, source, found)
    if source.vae is not None:
        _read_part("autoencoder", source.vae, source, found)
    for part, expected in _PARTS.items():
        if part not in found.networks and found.failed.isdisjoint({part, "base"}):
            found.fail(part, f"found none in {found.origin['source']}; expected the {expected}")
    if faults := found.faults + _compatibility_errors(found.configs):
        heading = f"{source.base} cannot be used; expected the parts of one Stable Diffusion 1.5:"
        raise TrainingError(fault_list(heading, faults))
    for key, value in found.origin.items():
        _log.info("%s: %s: %s", found.name, key.replace("_", " "), value)
    found.multiple = 2 ** sum(len(found.configs[part]["block_out_channels"]) - 1 for part in ("unet", "autoencoder"))
    return found


def _is_file(path: Path) -> bool:
    """Whether `path` names a file, which may be missing; without an ending it has to be one of weights."""
    if path.is_file():
        return path.suffix != "" or weights_format(path) is not None
    return path.suffix.lower() in _ENDINGS and not path.is_dir()


def _repository(name: str | Path, source: BaseSource, key: str, found: BaseInspection) -> Repository:
    if not is_hub_id(str(name)):
        return Repository(Path(name).expanduser())
    repository = open_hub(str(name), source.revision)
    found.origin[key] = repository.revision
    return repository


def _read_part(part: Part, name: str | Path, source: BaseSource, found: BaseInspection) -> None:
    """Add the ControlNet or autoencoder `name` to `found`."""
    path = Path(name).expanduser()
    if _is_file(path):
        found.origin[part] = path.name
        found.add(
            part, lambda: read_controlnet_file(path, found.heads) if part == "controlnet" else read_vae_file(path)
        )
        return
    if not path.exists() and not is_hub_id(str(name)):
        found.fail(part, f"found no file or folder {name}")
        return
    repository = _repository(name, source, f"{part}_revision", found)
    found.origin[part] = repository.name
    add_from(repository, part, found, root=repository.first("config.json") is not None)
    if part not in found.networks and part not in found.failed:
        found.fail(part, f"found none in {repository.name}; expected config.json and {FILES[0]}")


def _compatibility_errors(configs: Mapping[Part, Mapping[str, Any]]) -> list[str]:
    """Settings of the parts that are not Stable Diffusion 1.5's, or that do not fit one another; a line each."""
    faults: list[str] = []

    def expect(what: str, found: Any, expected: Any, why: str = "") -> None:
        found, expected = (list(value) if isinstance(value, tuple) else value for value in (found, expected))
        if found != expected:
            faults.append(f"{what}: found {found}; expected {expected}{f' ({why})' if why else ''}")

    unet, control = configs.get("unet"), configs.get("controlnet")
    vae, text = configs.get("autoencoder"), configs.get("text_encoder")
    width: Any = None if unet is None else unet["cross_attention_dim"]
    if unet is not None:
        inputs = unet["in_channels"]
        other = {8: "8 are InstructPix2Pix's", 9: "9 are an inpainting model's"}.get(inputs, "")
        expect("unet input channels", inputs, 4, other)
        expect("unet output channels", unet["out_channels"], 4)
        if family := _FAMILIES.get(width):
            expect("unet context channels", width, 768, family)
        expect("unet linear projections", bool(unet.get("use_linear_projection")), False, "Stable Diffusion 2 has them")
        expect("unet transformer blocks in a layer", unet.get("transformer_layers_per_block", 1), 1)
        for key, (expected, whose) in _UNET.items():
            expect(f"unet {key}", unet.get(key), expected, whose)
    if unet is not None and control is not None:
        for key in ("block_out_channels", "layers_per_block", "down_block_types", "in_channels"):
            expect(f"controlnet {key}", control[key], unet[key], "the U-Net's")
        context = control["cross_attention_dim"]
        expect("controlnet context channels", context, width, _FAMILIES.get(context, "the U-Net's"))
        expect("controlnet channels of the edges", control.get("conditioning_channels", 3), 3)
    if vae is not None:
        expect("autoencoder latent channels", vae["latent_channels"], 4)
        for key in ("shift_factor", "latents_mean"):
            expect(f"autoencoder {key}", vae.get(key), None)
        scale = vae["scaling_factor"]
        if scale == _SDXL_SCALE:
            expect("autoencoder scaling_factor", scale, 0.18215, "that of Stable Diffusion XL's autoencoder")
        elif not isinstance(scale, (int, float)) or not scale > 0:
            expect("autoencoder scaling_factor", scale, "a number above 0")
    if vae is not None and control is not None:
        halvings = len(control["conditioning_embedding_out_channels"]) - 1
        expect("autoencoder halvings", len(vae["block_out_channels"]) - 1, halvings, "ControlNet's")
    if text is not None and unet is not None:
        expect("text encoder channels", text["hidden_size"], width, "the U-Net's context")
    return faults
