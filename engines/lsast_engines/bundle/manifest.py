"""The manifest of a bundle, ``manifest.json``: the description of its base, graphs and files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..declared_options import Range
from ..diffusion import MAX_TRAIN_STEPS, NoiseSchedule
from ..errors import BundleError, fault_list
from .graph_spec import Geometry, GraphSpec
from .json_fields import MAX_INTEGER, parse_json, read_object
from .location import MANIFEST as MANIFEST

FORMAT = 2
"""Format number of manifests that this version writes and reads."""

StorageDtype = Literal["fp32", "fp16", "bf16", "int8"]
"""Type of the stored weights, in ``int8`` bundles of activations too; inputs and outputs are always float32."""

QUANTIZED: tuple[StorageDtype, ...] = ("int8",)
"""Storage dtypes of bundles that were quantized from another one; no base for training or baking."""

Network = Literal["unet", "control"]
Group = Literal["down", "mid", "up"]

MAX_SIDE = 16384
"""Largest height and width of a base, in pixels."""

_SHA256 = "[0-9a-f]{64}"


@dataclass(frozen=True)
class Defaults:
    """The options that a manifest has defaults for, by their types; the runtime checks their ranges."""

    style: str
    steps: Annotated[int, Range(1, MAX_TRAIN_STEPS)]
    strength: float
    guidance: float
    control_scale: float
    solver: str
    size: Annotated[int, Range(0, MAX_SIDE)]


@dataclass(frozen=True)
class AttentionLayer:
    """The columns of one cross-attention's keys and values in ``kv_<network>`` [..., T, W].

    Keys are in columns [offset, offset + width), values in [offset + width, offset + 2 width). The layers of a network
    fill all W columns without gap or overlap.
    """

    name: str
    """Module path in the base, e.g. ``mid_block.attentions.0.transformer_blocks.0.attn2``."""
    network: Network
    group: Group
    """Layer group: encoder (down), middle or decoder (up) of the network."""
    offset: Annotated[int, Range(0, MAX_INTEGER)]
    """First column of its keys."""
    width: int
    """Channels of its keys, and of its values."""


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hex) and size of a file of a bundle."""

    sha256: Annotated[str, _SHA256]
    bytes: Annotated[int, Range(0, 1 << 50)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a bundle."""

    name: str
    family: str
    """Kind of base, e.g. ``mini`` or ``sd15``."""
    fingerprint: Annotated[str, _SHA256]
    """SHA-256 (hex) of the base's weights; a style fits one base only."""
    height: Annotated[int, Range(1, MAX_SIDE)]
    """Native height in pixels."""
    width: Annotated[int, Range(1, MAX_SIDE)]
    """Native width in pixels."""
    latent_scale: Annotated[float, Range(0, above=True)]
    """Factor from the autoencoder's latents to the U-Net's."""
    storage_dtype: StorageDtype
    noise: NoiseSchedule
    stages: Annotated[int, Range(1, MAX_TRAIN_STEPS)]
    """Stages of the prompts; stage = t * stages // train_steps."""
    tokens: int
    """Tokens T of a context."""
    geometry: Geometry
    attention_layers: tuple[AttentionLayer, ...]
    graphs: dict[str, GraphSpec]
    defaults: Annotated[dict[str, Any], Defaults]
    """Default options for this base."""
    lsast_version: str
    """Version of lsast that exported the bundle."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Every file of the bundle except the manifest and the styles; `Bundle.write` fills it."""
    parity: dict[str, float] = field(default_factory=dict)
    """Largest difference from torch by graph, measured at export. Of a quantized bundle also ``picture_psnr_db``: the
    PSNR of its paintings to those of the bundle that it was made from."""
    source: dict[str, str] = field(default_factory=dict)
    """Origin of the base: versions, data, training settings."""
    multiple: Annotated[int, Range(1, MAX_SIDE)] = 64
    """Heights and widths are multiples of this many pixels."""
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of ``manifest.json``, keys in the order of the fields."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest.json") -> Manifest:
        """Parse the text of a manifest; `where` names it in messages. A `BundleError` if it is no JSON object or of
        another format, else with all invalid fields."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON ({error}); export the bundle again") from error
        if not isinstance(data, dict) or "format" not in data:
            raise BundleError(f"{where} has no format number; expected the manifest of a bundle")
        if data["format"] != FORMAT:
            raise BundleError(
                f"{where} has format {data['format']!r:.40}; this version reads format {FORMAT}: "
                "export the bundle again, or update lsast"
            )
        faults: list[str] = []
        manifest = read_object(cls, data, "", faults)
        if manifest is None or (faults := _contradictions(manifest)):
            raise BundleError(fault_list(f"{where} is not a valid manifest:", faults))
        return manifest


def declared_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the files of a bundle by name, as its manifest says, which `Bundle.open` has compared with the
    files; empty for a folder without a manifest."""
    try:
        files = parse_json((folder / MANIFEST).read_bytes())["files"]
        return {name: entry["sha256"] for name, entry in files.items() if isinstance(entry["sha256"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _contradictions(manifest: Manifest) -> list[str]:
    """Faults of fields that are well formed but contradict each other."""
    faults = [
        f"graphs.{name}.name: found {spec.name!r}; expected {name!r}, its key"
        for name, spec in manifest.graphs.items()
        if spec.name != name
    ]
    geometry = manifest.geometry
    if manifest.tokens != geometry.tokens:
        faults.append(f"tokens: found {manifest.tokens}; expected {geometry.tokens}, as in geometry")
    if manifest.multiple % geometry.factor:
        faults.append(f"multiple: found {manifest.multiple}; expected a multiple of geometry.factor {geometry.factor}")
    for side in ("height", "width"):
        if getattr(manifest, side) % manifest.multiple:
            faults.append(f"{side}: found {getattr(manifest, side)}; expected a multiple of {manifest.multiple}")
    for network, total in (("unet", geometry.unet_width), ("control", geometry.control_width)):
        layers = [layer for layer in manifest.attention_layers if layer.network == network]
        end = 0
        for layer in sorted(layers, key=lambda layer: layer.offset):
            if layer.offset != end:
                faults.append(
                    f"attention_layers: found offset {layer.offset} of {network} {layer.name}; expected {end}"
                )
            end = layer.offset + 2 * layer.width
        if end != total:
            faults.append(f"attention_layers: found {end} columns of {network}; expected {total}, as in geometry")
    return faults
