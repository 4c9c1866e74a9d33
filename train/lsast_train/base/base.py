"""The frozen base: U-Net, ControlNet and autoencoder that the prompt space is learned against."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from lsast_engines.diffusion import NoiseSchedule

from ..options import MixedPrecision
from .attention import Contexts, layer_contexts, set_layerwise_processors
from .mini_networks import MiniAutoencoder, StyleEncoder


@dataclass(frozen=True)
class BaseConfig:
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
    """A base in memory: its networks are frozen and in evaluation mode.

    They are called with the ``cross_attention_kwargs`` of `lsast_train.base.attention` and without
    ``encoder_hidden_states``.
    """

    config: BaseConfig
    fingerprint: str
    """SHA-256 of the weights; styles are bound to it (`lsast_train.base.lazy_base.LazyBase.fingerprint`)."""
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    autoencoder: Any
    """A `MiniAutoencoder` or diffusers' AutoencoderKL."""
    null_context: torch.Tensor
    """[tokens, dim]: the unconditional context."""
    style_encoder: StyleEncoder | None = None
    text_encoder: Any | None = None
    """transformers' CLIPTextModel of an imported base. It is not among `networks`: a bundle has no use for it."""
    alphas_cumprod: torch.Tensor = field(init=False)
    """[train_steps] float32: ᾱ of every timestep."""

    def __post_init__(self) -> None:
        for network in (self.unet, self.controlnet):
            set_layerwise_processors(network)
        for network in (*self.networks().values(), self.text_encoder):
            if network is not None:
                network.eval().requires_grad_(False)
        alphas = self.config.noise.alphas_cumprod
        self.alphas_cumprod = torch.tensor(alphas, dtype=torch.float32, device=self.null_context.device)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.null_context.device

    @property
    def context_dim(self) -> int:
        """Channels of a context token."""
        return int(self.null_context.shape[1])

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their key prefix in the weights file."""
        found = {"unet": self.unet, "controlnet": self.controlnet, "autoencoder": self.autoencoder}
        return found if self.style_encoder is None else {**found, "style_encoder": self.style_encoder}

    def to(self, device: torch.device, gradient_checkpointing: bool = False, controlnet: bool = True) -> None:
        """Move the base to `device`, the U-Net channels-last, in which convolutions are faster.

        Args:
            gradient_checkpointing: the U-Net computes its activations again in the backward pass.
            controlnet: whether ControlNet is moved, too.
        """
        for network in (*self.networks().values(), self.text_encoder):
            if network is not None and (controlnet or network is not self.controlnet):
                network.to(device)
        unet = self.unet.to(memory_format=torch.channels_last)
        (unet.enable_gradient_checkpointing if gradient_checkpointing else unet.disable_gradient_checkpointing)()
        self.null_context = self.null_context.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)

    def round_unet(self, mixed_precision: MixedPrecision, device: torch.device | None = None) -> None:
        """Store the weights of the U-Net's convolutions and linear layers in the type of autocast: half the memory.

        With mixed precision they are rounded at every call otherwise, so the results are the same; the norms keep
        float32. The base then runs in this precision only, on `device` (None: where it lies). Without mixed precision
        nothing changes.
        """
        if dtype := autocast_dtype(device or self.device, mixed_precision):
            for module in self.unet.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(dtype)

    def eps(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        contexts: Contexts | dict[str, Any],
        edges: torch.Tensor | None = None,
        residuals: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Predicted noise [B, 4, h, w].

        Args:
            latent: noised, [B, 4, h, w].
            timestep: [B] in 0..train_steps-1.
            contexts: `Contexts`, or `packed_kv`.
            edges: [B, 3, 8h, 8w] of 0 and 1; None leaves ControlNet out, as the released training does
                (docs/method.md §3).
            residuals: of the ControlNet, as `control` gives them, where its contexts differ; in place of `edges`.
        """
        if residuals is None:
            residuals = {} if edges is None else self.control(latent, timestep, contexts, edges)
        kwargs = contexts if isinstance(contexts, dict) else layer_contexts(contexts)
        output = self.unet(latent, timestep, None, cross_attention_kwargs=kwargs, **residuals, return_dict=False)[0]
        return self.eps_from_output(output, latent, timestep)

    def control(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        contexts: Contexts | dict[str, Any],
        edges: torch.Tensor,
        scale: float = 1.0,
    ) -> dict[str, Any]:
        """The ControlNet's residuals for the U-Net, times `scale`; the other arguments are those of `eps`."""
        kwargs = contexts if isinstance(contexts, dict) else layer_contexts(contexts)
        down, mid = self.controlnet(
            *(latent, timestep, None, edges), conditioning_scale=scale, cross_attention_kwargs=kwargs, return_dict=False
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def eps_from_output(self, output: torch.Tensor, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The U-Net's output as noise: v = α ε - σ x₀ gives ε = α v + σ x (Salimans & Ho 2022, appendix D)."""
        if self.config.prediction == "epsilon":
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


def autocast(device: torch.device, mixed_precision: MixedPrecision) -> torch.autocast:
    """The context manager in which networks on `device` run in `mixed_precision`."""
    dtype = autocast_dtype(device, mixed_precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def autocast_dtype(device: torch.device, mixed_precision: MixedPrecision) -> torch.dtype | None:
    """The type of autocast on `device`, None without; ``auto`` takes no bf16 of a processor that only emulates it."""
    if mixed_precision == "auto":
        multiplies = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        mixed_precision = "bf16" if multiplies else "no"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
