"""The manifest of a bundle, ``manifest.json``: the description of its base, graphs and files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..diffusion import MAX_TRAIN_STEPS, BetaSchedule, NoiseSchedule
from ..errors import BundleError, UsageError, fault_list
from .graph_spec import Geometry, GraphSpec, TensorSpec
from .json_fields import JsonReader, parse_json
from .location import MANIFEST as MANIFEST

FORMAT = 2
"""Format number of manifests that this version writes and reads."""

StorageDtype = Literal["fp32", "fp16", "bf16", "int8"]
"""Type of the stored weights, in ``int8`` bundles of activations too; inputs and outputs are always float32."""

QUANTISED: tuple[StorageDtype, ...] = ("int8",)
"""Storage dtypes of bundles that were quantized from another one; no base for training or baking."""

Network = Literal["unet", "control"]
Group = Literal["down", "mid", "up"]

DEFAULTS = ("style", "steps", "strength", "guidance", "control_scale", "solver", "size")
"""The options that a manifest has defaults for."""

MAX_SIDE = 16384
"""Largest height and width of a base, in pixels."""

_SHA256 = "[0-9a-f]{64}"
_DTYPES = ("float32", "int64")


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
    offset: int
    """First column of its keys."""
    width: int
    """Channels of its keys, and of its values."""


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hex) and size of a file of a bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a bundle."""

    name: str
    family: str
    """Kind of base, e.g. ``mini`` or ``sd15``."""
    fingerprint: str
    """SHA-256 (hex) of the base's weights; a style fits one base only."""
    height: int
    """Native height in pixels."""
    width: int
    """Native width in pixels."""
    latent_scale: float
    """Factor from the autoencoder's latents to the U-Net's."""
    storage_dtype: StorageDtype
    noise: NoiseSchedule
    stages: int
    """Stages of the prompts; stage = t * stages // train_steps."""
    tokens: int
    """Tokens T of a context."""
    geometry: Geometry
    attention_layers: tuple[AttentionLayer, ...]
    graphs: dict[str, GraphSpec]
    defaults: dict[str, Any]
    """Default options for this base, one for each of `DEFAULTS`."""
    lsast_version: str
    """Version of lsast that exported the bundle."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Every file of the bundle except the manifest and the styles; `Bundle.write` fills it."""
    parity: dict[str, float] = field(default_factory=dict)
    """Largest difference from torch by graph, measured at export. Of a quantized bundle also ``picture_psnr_db``: the
    PSNR of its paintings to those of the bundle that it was made from."""
    source: dict[str, str] = field(default_factory=dict)
    """Origin of the base: versions, data, training settings."""
    multiple: int = 64
    """Heights and widths are multiples of this many pixels."""
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of ``manifest.json``, keys in the order of the fields."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "manifest.json") -> Manifest:
        """Parse the text of a manifest; `where` names it in messages.

        Raises:
            BundleError: not a JSON object, another format, or invalid fields; all faults at once.
        """
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
        manifest = _read(JsonReader(data, "", faults, _names(cls)), faults)
        if faults:
            raise BundleError(fault_list(f"{where} is not a valid manifest:", faults))
        return manifest


def declared_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the files of a bundle by name, as its manifest says; empty for a folder without a manifest.

    `Bundle.open` has compared them with the files.
    """
    try:
        files = parse_json((folder / MANIFEST).read_bytes())["files"]
        return {name: entry["sha256"] for name, entry in files.items() if isinstance(entry["sha256"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read(fields: JsonReader, faults: list[str]) -> Manifest:
    """The manifest in `fields`; valid only if no fault was added."""
    geometry = fields.object("geometry", _names(Geometry))
    manifest = Manifest(
        name=fields.string("name"),
        family=fields.string("family"),
        fingerprint=fields.string("fingerprint", _SHA256),
        height=fields.integer("height", at_most=MAX_SIDE),
        width=fields.integer("width", at_most=MAX_SIDE),
        latent_scale=fields.number("latent_scale", above=0),
        storage_dtype=fields.choice("storage_dtype", get_args(StorageDtype)),
        noise=_noise(fields.object("noise", _names(NoiseSchedule)), faults),
        stages=fields.integer("stages", at_most=MAX_TRAIN_STEPS),
        tokens=fields.integer("tokens"),
        geometry=Geometry(**{name: geometry.integer(name) for name in _names(Geometry)}),
        attention_layers=tuple(_layer(layer) for layer in fields.list_of("attention_layers", _names(AttentionLayer))),
        graphs={name: _graph(name, graph) for name, graph in fields.dict_of("graphs", _names(GraphSpec)).items()},
        defaults=_defaults(fields.object("defaults", DEFAULTS)),
        lsast_version=fields.string("lsast_version"),
        files={
            name: FileEntry(entry.string("sha256", _SHA256), entry.integer("bytes", at_least=0, at_most=1 << 50))
            for name, entry in fields.dict_of("files", _names(FileEntry)).items()
        },
        parity=fields.numbers("parity"),
        source=fields.string_dict("source"),
        multiple=fields.integer("multiple", at_most=MAX_SIDE),
    )
    if not faults:
        faults += _contradictions(manifest)
    return manifest


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(kind))


def _noise(fields: JsonReader, faults: list[str]) -> NoiseSchedule:
    before = len(faults)
    values: dict[str, Any] = {
        "train_steps": fields.integer("train_steps", at_most=MAX_TRAIN_STEPS),
        "beta_start": fields.number("beta_start", above=0),
        "beta_end": fields.number("beta_end", above=0),
        "beta_schedule": fields.choice("beta_schedule", get_args(BetaSchedule)),
    }
    if fields.is_object and len(faults) == before:
        try:
            return NoiseSchedule(**values)
        except UsageError as error:
            faults.append(f"noise: {error}")
    return NoiseSchedule()


def _layer(fields: JsonReader) -> AttentionLayer:
    return AttentionLayer(
        name=fields.string("name"),
        network=fields.choice("network", get_args(Network)),
        group=fields.choice("group", get_args(Group)),
        offset=fields.integer("offset", at_least=0),
        width=fields.integer("width"),
    )


def _graph(name: str, fields: JsonReader) -> GraphSpec:
    if fields.string("name") != name:
        fields.error("name", fields.string("name"), f"{name!r}, its key")
    tensors = {
        side: tuple(
            TensorSpec(tensor.string("name"), tensor.choice("dtype", _DTYPES), tensor.axes("shape"))
            for tensor in fields.list_of(side, _names(TensorSpec))
        )
        for side in ("inputs", "outputs")
    }
    return GraphSpec(name, tensors["inputs"], tensors["outputs"])


def _defaults(fields: JsonReader) -> dict[str, Any]:
    # Only their types; the runtime checks their ranges.
    return {
        "style": fields.string("style"),
        "steps": fields.integer("steps", at_most=MAX_TRAIN_STEPS),
        "strength": fields.number("strength"),
        "guidance": fields.number("guidance"),
        "control_scale": fields.number("control_scale"),
        "solver": fields.string("solver"),
        "size": fields.integer("size", at_least=0, at_most=MAX_SIDE),
    }


def _contradictions(manifest: Manifest) -> list[str]:
    """Faults of fields that are well formed but contradict each other."""
    faults = []
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
            faults.append(
                f"attention_layers: found {end} columns of {network} in all; expected {total}, as in geometry"
            )
    return faults
