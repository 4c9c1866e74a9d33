"""A smaller decoder for a bundle: that of a tiny autoencoder (TAESD, github.com/madebyollin/taesd; diffusers'
`AutoencoderTiny`).

Such an autoencoder is distilled from a large one and takes the scaled latents of the U-Net. Graphs of a bundle take
unscaled latents, so the graph contains the factor and has the interface of `vae_decoder`. The weights are a file of
their own, in float32, with the configuration in its metadata, so that `check` can compare with torch again.
"""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save
from torch import nn

from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY, tiny_decoder_spec
from lsast_engines.bundle.manifest import Manifest
from lsast_engines.errors import ExportError, TrainingError, fault_list
from lsast_engines.files import replace_file
from lsast_train.checkpoints.weights import Weights, read_metadata, read_tensors, truncate

from .trace import TracedGraph, trace

WEIGHTS = f"{VAE_DECODER_TINY}.safetensors"
"""Name of the weight file in a bundle."""

_CONFIG = "config"
"""Key of the configuration, as JSON, in the metadata of that file."""

_IN_FOLDER = tuple(f"diffusion_pytorch_model{mark}.{end}" for mark in ("", ".fp16") for end in ("safetensors", "bin"))
"""Names that diffusers gives to weight files in a folder."""


@dataclass(frozen=True, eq=False)
class SmallDecoder:
    """A tiny autoencoder whose decoder is in memory, in float32."""

    autoencoder: Any
    """diffusers' `AutoencoderTiny`; its encoder has no weights."""
    config: Mapping[str, Any]
    """Arguments of `AutoencoderTiny`, and the name of the class."""

    @property
    def scale(self) -> float:
        """The autoencoder's scaling factor: 1 for TAESD, whose latents are those of the U-Net."""
        return float(self.autoencoder.config.scaling_factor)


class SmallDecoderGraph(nn.Module):
    """Graph `vae_decoder_tiny`."""

    def __init__(self, small: SmallDecoder, latent_scale: float) -> None:
        super().__init__()
        self.decoder = small.autoencoder.decoder
        self._factor = latent_scale / small.scale

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [B, 4, h, w] → image [B, 3, H, W]."""
        image: torch.Tensor = self.decoder(latent * self._factor)
        return image


def _made(config: Mapping[str, Any]) -> AutoencoderTiny:
    """An autoencoder without its encoder."""
    made = AutoencoderTiny(**{name: value for name, value in config.items() if name != "_class_name"})
    made.encoder = nn.Identity()
    return made


def read_small_decoder(path: Path, manifest: Manifest) -> SmallDecoder:
    """Read the decoder of a tiny autoencoder and make sure that it can decode the latents of a bundle.

    Args:
        path: a folder of diffusers (``config.json`` and weights), or a file of weights in diffusers' naming or that of
            TAESD's own ``taesd_decoder``, which is assumed to be of TAESD's architecture unless it comes from a bundle.
            Pickled weights go through the restricted loader.
        manifest: the bundle's.

    Raises:
        ExportError: no such file, or a decoder that does not fit the bundle; all faults at once.
        TrainingError: a file that cannot be read, or is refused.
    """
    config, file = _found(path)
    if (kind := config.get("_class_name")) != "AutoencoderTiny":
        raise ExportError(f"{path} is not a small decoder: found {kind or 'no class'}; expected AutoencoderTiny")
    # diffusers writes more than the arguments, such as its version.
    known = inspect.signature(AutoencoderTiny.__init__).parameters
    config = {name: value for name, value in config.items() if name == "_class_name" or name in known}
    found = {_diffusers_name(name): value for name, value in read_tensors(file).items()}
    tensors = {name: value for name, value in found.items() if name.startswith("decoder.")}
    weights = Weights(f"the decoder in {file}", config, lambda: _made(config), tensors)
    faults = _config_faults(config, manifest)
    faults += [f"{name}: found {t.dtype}; expected floats" for name, t in tensors.items() if not t.is_floating_point()]
    try:
        faults += weights.faults()
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        faults.append(f"diffusers cannot build an AutoencoderTiny from its configuration ({error})")
    if faults:
        raise ExportError(fault_list(f"{path} is not a small decoder for {manifest.name}:", truncate(faults)))
    return SmallDecoder(weights.build(), config)


def trace_small_decoder(small: SmallDecoder, manifest: Manifest) -> TracedGraph:
    """Trace the graph `vae_decoder_tiny` of a bundle; errors are as of `trace`."""
    module = SmallDecoderGraph(small, manifest.latent_scale).eval()
    return trace(module, tiny_decoder_spec(manifest.geometry), manifest.multiple, manifest.geometry.factor)


def save_small_decoder(small: SmallDecoder, path: Path) -> None:
    """Write the decoder's weights to `path`, whole, with the configuration in the metadata."""
    state = {f"decoder.{name}": value.contiguous() for name, value in small.autoencoder.decoder.state_dict().items()}
    with replace_file(path) as handle:
        handle.write(save(state, {_CONFIG: json.dumps(dict(small.config), sort_keys=True)}))


def _found(path: Path) -> tuple[dict[str, Any], Path]:
    """The configuration and the file of weights at `path`."""
    if path.is_dir():
        file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        faults = [] if file else [f"found no weights; expected {' or '.join(_IN_FOLDER)}"]
        config: Any = None
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            faults.append("found no config.json; expected that of an AutoencoderTiny")
        except (OSError, ValueError) as error:
            faults.append(f"config.json cannot be read ({error})")
        if file is None or faults:
            raise ExportError(fault_list(f"{path} is not an autoencoder of diffusers:", faults))
        return config if isinstance(config, dict) else {}, file
    if not path.is_file():
        raise ExportError(
            f"found nothing at {path}; expected a folder or a file of an AutoencoderTiny, such as TAESD's"
        )
    try:
        config = json.loads(read_metadata(path).get(_CONFIG, "{}"))
    except ValueError as error:
        raise TrainingError(f"{path} cannot be read ({error}); get the file again") from error
    # That of TAESD, the default of diffusers, for a file that is no bundle's.
    return {"_class_name": "AutoencoderTiny", **(config if isinstance(config, dict) else {})}, path


def _diffusers_name(key: str) -> str:
    """A key of ``taesd_decoder``, which has one layer more in front, as diffusers names it; other keys as they are."""
    place, _, rest = key.partition(".")
    return f"decoder.layers.{int(place) - 1}.{rest}" if place.isdecimal() else key


def _config_faults(config: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Reasons why an autoencoder cannot decode the latents of a bundle."""
    # A missing entry means the default of diffusers.
    levels, step = config.get("num_decoder_blocks", (3, 3, 3, 1)), config.get("upsampling_scaling_factor", 2)
    factor = step ** (len(levels) - 1) if isinstance(levels, (list, tuple)) and isinstance(step, int) else None
    geometry = manifest.geometry
    wanted = (
        ("latent channels", config.get("latent_channels", 4), geometry.latent_channels),
        ("pixels along a side of a latent cell", factor, geometry.factor),
        ("channels of its pictures", config.get("out_channels", 3), 3),
        ("a shift_factor of", config.get("shift_factor") or 0, 0),
    )
    faults = [f"{what}: found {found!r}; expected {expected}" for what, found, expected in wanted if found != expected]
    scale = config.get("scaling_factor", 1.0)
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
        faults.append(f"a scaling_factor of: found {scale!r}; expected a number above 0")
    return faults
