"""The frozen base: U-Net, ControlNet and autoencoder that the prompt space is learned against.

One code path for every base. A base is stored as ``base.json`` (configurations and facts) and ``base.safetensors``
(all weights, keys ``unet.*``, ``controlnet.*``, ``autoencoder.*``, ``style_encoder.*``, ``null_context``); an exported
bundle holds the same two files, its ONNX graphs refer to the weights by offset, so nothing is stored twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lsast_engines.bundle import find_bundle
from lsast_engines.errors import StyleError, TrainingError, fault_list
from lsast_engines.files import replace_file
from lsast_engines.noise import NoiseSpec

from .attention import ContextBox, install_grouped_attention
from .mini.autoencoder import MiniAutoencoder
from .mini.style_encoder import StyleEncoder

FORMAT = 1
"""Format number of ``base.json``."""

_AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "MiniAutoencoder": MiniAutoencoder}


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
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    multiple: int = 64
    """Legal heights and widths are multiples of this many pixels."""
    training: dict[str, str] = field(default_factory=dict)
    """How it was trained: data, steps, versions."""


@dataclass(eq=False)
class Base:
    """A base in memory, frozen, in evaluation mode."""

    facts: BaseFacts
    fingerprint: str
    """SHA-256 of the stored weights; styles are bound to it."""
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    autoencoder: Any
    """A `MiniAutoencoder` or diffusers' AutoencoderKL."""
    null_context: torch.Tensor
    """[tokens, dim]: the unconditional context."""
    style_encoder: StyleEncoder | None = None
    unet_box: ContextBox = field(default_factory=ContextBox)
    control_box: ContextBox = field(default_factory=ContextBox)

    def __post_init__(self) -> None:
        self.unet_box = install_grouped_attention(self.unet)
        self.control_box = install_grouped_attention(self.controlnet)
        self.alphas_cumprod = torch.from_numpy(self.facts.noise.alphas_cumprod()).float().to(self.null_context.device)
        for network in self.networks().values():
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
        contexts: torch.Tensor,
        edges: torch.Tensor | None = None,
        control_contexts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w].

        Args:
            latent: noised latents [B, 4, h, w].
            timestep: [B] in 0..train_steps-1.
            contexts: [B, 3, tokens, dim], a context for each layer group.
            edges: [B, 3, 8h, 8w] of 0 and 1; None leaves ControlNet out, as the released training does (method.md §3).
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


def save_base(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write ``folder/base.json`` and ``folder/base.safetensors``; returns the fingerprint of what was written."""
    tensors = {"null_context": base.null_context.to(dtype).contiguous()}
    for prefix, network in base.networks().items():
        for key, value in network.state_dict().items():
            tensors[f"{prefix}.{key}"] = value.to(dtype).contiguous() if value.is_floating_point() else value
    data = save(tensors)
    fingerprint = hashlib.sha256(data).hexdigest()
    configs = {prefix: {"class": type(net).__name__, **_config(net)} for prefix, net in base.networks().items()}
    facts = {"format": FORMAT, **asdict(base.facts), "fingerprint": fingerprint, "networks": configs}
    with replace_file(folder / "base.safetensors") as handle:
        handle.write(data)
    with replace_file(folder / "base.json") as handle:
        handle.write(json.dumps(facts, indent=1).encode())
    return fingerprint


def _config(network: Any) -> dict[str, Any]:
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def find_base(name_or_path: str | Path | None = None) -> Path:
    """The folder of a base: one just trained, which has no manifest yet, or else what `find_bundle` finds."""
    given = None if name_or_path is None else Path(name_or_path).expanduser()
    return given if given is not None and (given / "base.json").is_file() else find_bundle(name_or_path)


def load_base(name_or_path: str | Path | None = None) -> Base:
    """Load a base by the name or folder of its bundle (None: the embedded default), in float32, frozen.

    Raises:
        TrainingError: no such base, another format, or weights that do not fit the configuration (all faults at once).
    """
    folder = find_base(name_or_path)
    description = folder / "base.json"
    if not description.is_file():
        raise TrainingError(
            f"found no base.json in {folder}; expected a base folder written by lsast-train mini or lsast-export"
        )
    raw = json.loads(description.read_text())
    if raw.get("format") != FORMAT:
        raise TrainingError(f"{description} has format {raw.get('format')}; this version reads format {FORMAT}")
    weights = folder / "base.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{weights} cannot be read ({error}); expected the weights beside base.json") from error
    networks: dict[str, Any] = {}
    faults: list[str] = []
    for prefix, config in raw["networks"].items():
        network = _build(dict(config))
        state = {k.removeprefix(f"{prefix}."): v.float() for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        report = network.load_state_dict(state, strict=False)
        faults += [f"{prefix}.{key}: missing" for key in report.missing_keys]
        faults += [f"{prefix}.{key}: not expected" for key in report.unexpected_keys]
        networks[prefix] = network
    if faults:
        raise TrainingError(fault_list(f"{weights} does not fit {description}:", faults))
    known = {name: raw[name] for name in BaseFacts.__dataclass_fields__}
    facts = BaseFacts(**{**known, "noise": NoiseSpec(**raw["noise"])})
    return Base(facts, raw["fingerprint"], null_context=tensors["null_context"].float(), **networks)


def _build(config: dict[str, Any]) -> Any:
    kind = config.pop("class")
    classes: dict[str, Any] = {
        "UNet2DConditionModel": UNet2DConditionModel,
        "ControlNetModel": ControlNetModel,
        "StyleEncoder": StyleEncoder,
        **_AUTOENCODERS,
    }
    if kind not in classes:
        raise TrainingError(f"base.json names a network {kind!r}; expected one of {', '.join(sorted(classes))}")
    return classes[kind].from_config(config)


def check_fingerprint(found: str, base: Base, what: str) -> None:
    """Refuse `what` (a prompt file) if it was learned against another base than `base`."""
    if found != base.fingerprint:
        raise StyleError(
            f"{what} was learned on base {found[:12]}…; the base {base.facts.name!r} is {base.fingerprint[:12]}…: "
            f"train it again on this base, or pass the --base it was trained on"
        )
