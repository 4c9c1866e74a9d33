"""The frozen base: U-Net, ControlNet and autoencoder that the prompt space is learned against.

One code path for every base. A base is stored as ``base.json`` (configurations and facts) and ``base.safetensors``
(all weights, keys ``unet.*``, ``controlnet.*``, ``autoencoder.*``, ``style_encoder.*``, ``null_context``); an exported
bundle holds the same two files, its ONNX graphs refer to the weights by offset, so nothing is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn

from lsast_engines.bundle.bundle import MANIFEST, find_bundle
from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.errors import BundleError, StyleError, TrainingError, UsageError, fault_list
from lsast_engines.files import replace_file

from ..checkpoints.found_parts import OpenWeights
from ..checkpoints.source import BaseSource, ImportedBase, import_base, is_source
from ..checkpoints.weights import OpenTensors, Weights, read_tensors, tensors_sha256, write_tensors
from .attention import ContextBox, Contexts, install_grouped_attention
from .mini_autoencoder import MiniAutoencoder
from .style_encoder import StyleEncoder

FORMAT = 1
"""Format number of ``base.json``."""

_CLASSES: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "ControlNetModel": ControlNetModel,
    "StyleEncoder": StyleEncoder,
    "AutoencoderKL": AutoencoderKL,
    "MiniAutoencoder": MiniAutoencoder,
}


@dataclass(frozen=True)
class BaseFacts:
    """What a base is, beside its weights."""

    name: str
    family: str
    """``mini`` or ``sd15``."""
    prediction: Literal["epsilon", "v_prediction"]
    """What the U-Net was trained to predict; `Base.eps` always gives the noise."""
    tokens: int
    """Tokens of a context."""
    size: int
    """Native side of a picture in pixels."""
    latent_scale: float
    """Factor from the autoencoder's latents to the U-Net's."""
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    multiple: int = 64
    """Legal heights and widths are multiples of this many pixels."""
    training: dict[str, str] = field(default_factory=dict)
    """How it was trained: data, steps, versions."""


@dataclass(eq=False)
class Base:
    """A base in memory, frozen, in evaluation mode."""

    facts: BaseFacts
    fingerprint: str
    """SHA-256 of the weights; styles are bound to it (`BaseParts.fingerprint`)."""
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    autoencoder: Any
    """A `MiniAutoencoder` or diffusers' AutoencoderKL."""
    null_context: torch.Tensor
    """[tokens, dim]: the unconditional context."""
    style_encoder: StyleEncoder | None = None
    text_encoder: Any | None = None
    """transformers' CLIPTextModel of an imported base. It is none of `networks`: a bundle has no use for it."""
    unet_box: ContextBox = field(default_factory=ContextBox)
    control_box: ContextBox = field(default_factory=ContextBox)

    def __post_init__(self) -> None:
        self.unet_box = install_grouped_attention(self.unet)
        self.control_box = install_grouped_attention(self.controlnet)
        self.alphas_cumprod = torch.from_numpy(self.facts.noise.alphas_cumprod()).float().to(self.null_context.device)
        frozen = [*self.networks().values(), *([] if self.text_encoder is None else [self.text_encoder])]
        for network in frozen:
            network.eval().requires_grad_(False)

    @property
    def context_dim(self) -> int:
        """Channels of a context token."""
        return int(self.null_context.shape[1])

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their key prefix in the weights file."""
        found = {"unet": self.unet, "controlnet": self.controlnet, "autoencoder": self.autoencoder}
        return found if self.style_encoder is None else {**found, "style_encoder": self.style_encoder}

    def eps(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        contexts: Contexts,
        edges: torch.Tensor | None = None,
        control_contexts: Contexts | None = None,
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w].

        Args:
            latent: noised latents [B, 4, h, w].
            timestep: [B] in 0..train_steps-1.
            contexts: [B, 3, tokens, dim], a context for each layer group, or three of [B, tokens, dim].
            edges: [B, 3, 8h, 8w] of 0 and 1; None leaves ControlNet out, as the released training does
            (docs/method.md §3).
            control_contexts: contexts of the ControlNet; `contexts` if None.
        """
        residuals: dict[str, Any] = {}
        if edges is not None:
            self.control_box.fill(contexts if control_contexts is None else control_contexts)
            down, mid = self.controlnet(latent, timestep, self.control_box.down, edges, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        self.unet_box.fill(contexts)
        output = self.unet(latent, timestep, self.unet_box.down, **residuals, return_dict=False)[0]
        return self.eps_from_output(output, latent, timestep)

    def eps_from_output(self, output: torch.Tensor, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The U-Net's output as noise: v = α ε - σ x₀ gives ε = α v + σ x (Salimans & Ho 2022, appendix D)."""
        if self.facts.prediction == "epsilon":
            return output
        abar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return abar.sqrt() * output + (1 - abar).sqrt() * latent

    def add_noise(self, latent: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """q(x_t | x_0) = √ᾱ x₀ + √(1-ᾱ) ε; all [B, 4, h, w], `timestep` [B]."""
        abar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return abar.sqrt() * latent + (1 - abar).sqrt() * noise

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image [B, 3, H, W] in [-1, 1] → mean and standard deviation [B, 4, h, w] of the unscaled latent."""
        if isinstance(self.autoencoder, MiniAutoencoder):
            mean = self.autoencoder.encode(image)
            return mean, torch.zeros_like(mean)
        posterior = self.autoencoder.encode(image).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [B, 4, h, w] → image [B, 3, H, W], about [-1, 1]."""
        if isinstance(self.autoencoder, MiniAutoencoder):
            decoded: torch.Tensor = self.autoencoder.decode(latent)
            return decoded
        image: torch.Tensor = self.autoencoder.decode(latent, return_dict=False)[0]
        return image


@dataclass(eq=False)
class BaseParts:
    """A base on disk, of which one network at a time may be in memory. `open_base_parts` makes it."""

    facts: BaseFacts
    networks: Mapping[str, OpenWeights]
    """Opens each network, not built yet: those of `Base.networks`, and ``text_encoder`` of an imported base."""
    stored_fingerprint: str | None = None
    stored_null_context: torch.Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The networks that a bundle holds."""
        return tuple(name for name in self.networks if name != "text_encoder")

    @cached_property
    def fingerprint(self) -> str:
        """What styles are bound to: the SHA-256 that the base was stored with; of an imported one that of all tensors,
        the text encoder's among them (`tensors_sha256`). Then every file is read once.
        """
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
        ids = torch.full((1, self.facts.tokens), encoder.config.eos_token_id)
        ids[0, 0] = encoder.config.bos_token_id
        with torch.no_grad():
            context: torch.Tensor = encoder(input_ids=ids).last_hidden_state[0]
        return context

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """The network `name`, frozen, in evaluation mode. It is a new one each time; nothing is kept here."""
        return self.networks[name]().build(dtype)

    def base(self, dtype: torch.dtype = torch.float32) -> Base:
        """All networks at once."""
        loaded = {name: self.load(name, dtype) for name in self.networks}
        return Base(self.facts, self.fingerprint, null_context=self.null_context.to(dtype), **loaded)


def save_base(base: Base | BaseParts, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write ``folder/base.json`` and ``folder/base.safetensors``; returns the fingerprint of what was written.

    Floating tensors are stored in `dtype`. They are written one after the other: of `BaseParts` no network is built.
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
    facts = {"format": FORMAT, **asdict(base.facts), "fingerprint": fingerprint, "networks": configs}
    with replace_file(folder / "base.json") as handle:
        handle.write(json.dumps(facts, indent=1).encode())
    return fingerprint


def _description(network: Any) -> dict[str, Any]:
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"class": type(network).__name__, **config}


def find_base(name_or_path: str | Path | None = None) -> Path:
    """The folder of a base: one just trained, which has no manifest yet, or else what `find_bundle` finds."""
    given = None if name_or_path is None else Path(name_or_path).expanduser()
    return given if given is not None and (given / "base.json").is_file() else find_bundle(name_or_path)


def stored_base(source: BaseSource) -> Path | None:
    """The folder of a base that lsast wrote, if `source` names one; None if it is one to import.

    Raises:
        BundleError: neither.
        UsageError: options of an import for a base that lsast wrote.
    """
    if source.base is not None:
        given = Path(source.base).expanduser()
        if is_source(source.base) and not any((given / name).is_file() for name in ("base.json", MANIFEST)):
            return None
    try:
        folder = find_base(source.base)
    except BundleError as error:
        raise BundleError(
            f"{error}\nor a base to import: a folder in diffusers' format, a .safetensors or .ckpt file in CompVis "
            "naming, or OWNER/NAME of the hub with a revision"
        ) from error
    imports = {"--controlnet": source.controlnet, "--revision": source.revision}
    given_options = [name for name, value in imports.items() if value is not None]
    given_options += ["--unet-weights"] * (source.unet_weights != "auto")
    if given_options:
        raise UsageError(f"found {', '.join(given_options)} for {folder}; expected them only for a base to import")
    return folder


def open_base_parts(source: str | Path | BaseSource | None = None) -> BaseParts:
    """Open a base without loading its weights; arguments and errors are those of `load_base`."""
    if not isinstance(source, BaseSource):
        source = BaseSource(source)
    folder = stored_base(source)
    return _import_parts(import_base(source)) if folder is None else _stored_parts(folder)


def load_base(name_or_path: str | Path | BaseSource | None = None, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base, frozen.

    Args:
        name_or_path: name or folder of a bundle or of a base that lsast wrote (None: the embedded default), or what
            `BaseSource` says of bases to import.
        dtype: element type of weights and null context.

    Raises:
        BundleError: no such base.
        TrainingError: another format, weights that do not fit, or no Stable Diffusion 1.5 (all faults at once).
        UsageError: options that cannot be meant for this base.
    """
    return open_base_parts(name_or_path).base(dtype)


def _import_parts(found: ImportedBase) -> BaseParts:
    tokens = found.networks["text_encoder"]().config["max_position_embeddings"]
    facts = BaseFacts(
        *(found.name, "sd15", found.prediction, tokens, 512, found.latent_scale),
        noise=found.noise,
        multiple=found.multiple,
        training=found.origin,
    )
    return BaseParts(facts, {str(part): opened for part, opened in found.networks.items()})


def _stored_parts(folder: Path) -> BaseParts:
    description = folder / "base.json"
    if not description.is_file():
        raise TrainingError(
            f"found no base.json in {folder}; expected a base folder written by lsast-train mini or lsast-export (a "
            "quantised bundle is none: name the bundle that it was made from)"
        )
    raw = json.loads(description.read_text())
    if raw.get("format") != FORMAT:
        raise TrainingError(f"{description} has format {raw.get('format')}; this version reads format {FORMAT}")
    file = folder / "base.safetensors"
    networks = {
        prefix: lambda prefix=prefix, config=config: _stored_weights(file, prefix, config)
        for prefix, config in raw["networks"].items()
    }
    faults = [f"{prefix}.{fault}" for prefix, opened in networks.items() for fault in opened().faults()]
    tensors = read_tensors(file)
    if "null_context" not in tensors:
        faults.append("null_context: missing")
    if faults:
        raise TrainingError(fault_list(f"{file} does not fit {description}:", faults))
    known = {name: raw[name] for name in BaseFacts.__dataclass_fields__}
    facts = BaseFacts(**{**known, "noise": NoiseSchedule(**raw["noise"])})
    return BaseParts(facts, networks, raw["fingerprint"], tensors["null_context"].float().clone())


def _stored_weights(file: Path, prefix: str, config: Mapping[str, Any]) -> Weights:
    kind = config["class"]
    if kind not in _CLASSES:
        raise TrainingError(f"base.json names a network {kind!r}; expected one of {', '.join(sorted(_CLASSES))}")
    known = {key: value for key, value in config.items() if key != "class"}
    tensors = {k.removeprefix(f"{prefix}."): v for k, v in read_tensors(file).items() if k.startswith(f"{prefix}.")}
    return Weights(prefix, known, lambda: _CLASSES[kind].from_config(known), tensors)


def check_fingerprint(found: str, base: Base | BaseParts, what: str) -> None:
    """Refuse `what` (a prompt file) if it was learned against another base than `base`."""
    if found != base.fingerprint:
        raise StyleError(
            f"{what} was learned on base {found[:12]}…; the base {base.facts.name!r} is {base.fingerprint[:12]}…: "
            f"train it again on this base, or pass the --base it was trained on"
        )
