"""Bases on disk: opened without loading their weights, loaded, and written.

One code path for every base. A base is stored as ``base.json`` (configurations) and ``base.safetensors`` (all weights,
keys ``unet.*``, ``controlnet.*``, ``autoencoder.*``, ``style_encoder.*``, ``null_context``). An exported bundle holds
the same two files: its ONNX graphs refer to the weights by offset, so nothing is stored twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from lsast_engines.bundle.bundle import find_bundle
from lsast_engines.bundle.manifest import MANIFEST
from lsast_engines.diffusion import NoiseSchedule
from lsast_engines.errors import BundleError, Lines, TrainingError, UsageError, fault_list
from lsast_engines.files import file_sha256, replace_file

from ..checkpoints.inspection import BaseInspection, OpenWeights
from ..checkpoints.source import BaseSource, bases_inside, import_base, is_importable
from ..checkpoints.weights import OpenTensors, Weights, read_tensors, tensors_sha256, write_tensors
from .base import Base, BaseConfig
from .mini_networks import MiniAutoencoder, StyleEncoder

FORMAT = 1
"""Format number of ``base.json``."""

_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (UNet2DConditionModel, ControlNetModel, StyleEncoder, AutoencoderKL, MiniAutoencoder)
}


@dataclass(eq=False)
class LazyBase:
    """A base on disk, of which one network at a time may be in memory; `open_base` makes it."""

    config: BaseConfig
    networks: Mapping[str, OpenWeights]
    """Opens each network, not built yet: those of `Base.networks`, and ``text_encoder`` of an imported base."""
    folder: Path | None = None
    """Where lsast wrote it; None for an imported base."""
    stored_fingerprint: str | None = None
    stored_null_context: torch.Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The networks that a bundle holds."""
        return tuple(name for name in self.networks if name != "text_encoder")

    @cached_property
    def fingerprint(self) -> str:
        """What styles are bound to: the SHA-256 of ``base.safetensors``; of an imported base `tensors_sha256` of all
        networks, for which every file is read once."""
        return self.stored_fingerprint or tensors_sha256(
            {name: lambda opened=opened: opened().named() for name, opened in self.networks.items()}  # type: ignore[misc]
        )

    @cached_property
    def null_context(self) -> torch.Tensor:
        """[tokens, dim] float32: the unconditional context; of an imported base that of the empty text."""
        if self.stored_null_context is not None:
            return self.stored_null_context
        encoder = self.load("text_encoder")
        # Begin, then end to the last place: the end is the padding, too (docs/method.md §2).
        ids = torch.full((1, self.config.tokens), encoder.config.eos_token_id)
        ids[0, 0] = encoder.config.bos_token_id
        with torch.no_grad():
            context: torch.Tensor = encoder(input_ids=ids).last_hidden_state[0]
        return context

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """The network `name`, frozen, in evaluation mode: a new one each time, nothing is kept here."""
        return self.networks[name]().build(dtype)

    def base(self, dtype: torch.dtype = torch.float32) -> Base:
        """All networks at once; see `load_base`."""
        if self.folder is not None and file_sha256(self.folder / "base.safetensors") != self.fingerprint:
            raise TrainingError(
                f"{self.folder / 'base.safetensors'} has other values than were written (SHA-256 differs from that in "
                "base.json); get the base again"
            )
        loaded = {name: self.load(name, dtype) for name in self.networks}
        return Base(self.config, self.fingerprint, null_context=self.null_context.to(dtype), **loaded)


def open_base(source: str | Path | BaseSource | None = None) -> LazyBase:
    """Open a base without loading its weights; arguments and errors are those of `load_base`."""
    if not isinstance(source, BaseSource):
        source = BaseSource(source)
    folder = resolve_local_base(source)
    return _open_imported(import_base(source)) if folder is None else _open_stored(folder)


def load_base(source: str | Path | BaseSource | None = None, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base, frozen.

    Args:
        source: name or folder of a bundle or of a base that lsast wrote (None: the embedded default), or a base to
            import (`BaseSource`).
        dtype: element type of weights and null context.

    Raises:
        BundleError: no such base.
        TrainingError: another format, weights that do not fit or changed, or no Stable Diffusion 1.5; all at once.
        UsageError: options that are invalid for this base.
    """
    return open_base(source).base(dtype)


def save_base(base: Base | LazyBase, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write ``folder/base.json`` and ``folder/base.safetensors``, floating tensors in `dtype`; returns the fingerprint.

    Tensors are written one after the other: of a `LazyBase` no network is built.
    """
    networks: dict[str, OpenTensors] = {"": lambda: {"null_context": base.null_context}}
    configs = {}
    if isinstance(base, Base):
        for prefix, network in base.networks().items():
            networks[prefix] = network.state_dict
            configs[prefix] = _description(network)
    else:
        for prefix in base.names:
            networks[prefix] = lambda opened=base.networks[prefix]: opened().tensors  # type: ignore[misc]
            configs[prefix] = _description(base.networks[prefix]().on_meta())
    fingerprint = write_tensors(folder / "base.safetensors", networks, dtype)
    content = {"format": FORMAT, **asdict(base.config), "fingerprint": fingerprint, "networks": configs}
    with replace_file(folder / "base.json") as handle:
        handle.write(json.dumps(content, indent=1).encode())
    return fingerprint


def resolve_local_base(source: BaseSource) -> Path | None:
    """The folder of a base that lsast wrote, if `source` names one; None if it is one to import.

    `BundleError` if it is neither, `UsageError` for options of an import beside a base that lsast wrote.
    """
    given = None if source.base is None else Path(source.base).expanduser()
    # A base just trained has no manifest yet.
    trained, bundle = (given is not None and (given / name).is_file() for name in ("base.json", MANIFEST))
    if source.base is not None and not (trained or bundle) and is_importable(source.base):
        return None
    try:
        folder = given if given is not None and trained else find_bundle(source.base)
    except BundleError as error:
        raise BundleError(
            Lines(
                f"{error!s}\n  or a base to import: a folder in diffusers' format, a .safetensors or .ckpt file in "
                f"CompVis naming, or OWNER/NAME of the hub with a revision{bases_inside(source.base)}"
            )
        ) from error
    imports = {"--controlnet": source.controlnet, "--vae": source.vae, "--revision": source.revision}
    given_options = [name for name, value in imports.items() if value is not None]
    given_options += ["--unet-weights"] * (source.unet_weights != "auto")
    if given_options:
        raise UsageError(f"found {', '.join(given_options)} for {folder}; expected them only for a base to import")
    return folder


def _description(network: Any) -> dict[str, Any]:
    return {"class": type(network).__name__, **{k: v for k, v in network.config.items() if not k.startswith("_")}}


def _open_imported(found: BaseInspection) -> LazyBase:
    tokens = found.configs["text_encoder"]["max_position_embeddings"]
    scale = float(found.configs["autoencoder"]["scaling_factor"])
    config = BaseConfig(
        *(found.name, "sd15", found.prediction, tokens, 512, scale),
        noise=found.noise,
        multiple=found.multiple,
        training=found.origin,
    )
    return LazyBase(config, {str(part): opened for part, opened in found.networks.items()})


def _open_stored(folder: Path) -> LazyBase:
    description, file = folder / "base.json", folder / "base.safetensors"
    if not description.is_file():
        raise TrainingError(
            f"found no base.json in {folder}; expected a base folder written by lsast-export (a "
            "quantized bundle has none: name the bundle that it was made from)"
        )
    try:
        raw = json.loads(description.read_text())
        if raw["format"] != FORMAT:
            raise TrainingError(f"{description} has format {raw['format']}; this version reads format {FORMAT}")
        known = {field.name: raw[field.name] for field in fields(BaseConfig)}
        noise = {"beta_schedule" if key == "curve" else key: value for key, value in raw["noise"].items()}  # before 0.1
        config = BaseConfig(**{**known, "noise": NoiseSchedule(**noise)})
        networks = {
            prefix: lambda prefix=prefix, settings=settings: _stored_weights(file, prefix, settings)
            for prefix, settings in raw["networks"].items()
        }
        faults = [f"{prefix}.{fault}" for prefix, opened in networks.items() for fault in opened().faults()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{description} cannot be read ({type(error).__name__}: {error}); get it again") from error
    tensors = read_tensors(file)
    if "null_context" not in tensors:
        faults.append("null_context: missing")
    if faults:
        raise TrainingError(fault_list(f"{file} does not fit {description}:", faults))
    null_context = tensors["null_context"].float().clone()
    return LazyBase(config, networks, folder, raw["fingerprint"], null_context)


def _stored_weights(file: Path, prefix: str, config: Mapping[str, Any]) -> Weights:
    kind = config["class"]
    if kind not in _CLASSES:
        raise TrainingError(f"base.json names a network {kind!r}; expected one of {', '.join(sorted(_CLASSES))}")
    known = {key: value for key, value in config.items() if key != "class"}
    tensors = {k.removeprefix(f"{prefix}."): v for k, v in read_tensors(file).items() if k.startswith(f"{prefix}.")}
    return Weights(prefix, known, lambda: _CLASSES[kind].from_config(known), tensors)
