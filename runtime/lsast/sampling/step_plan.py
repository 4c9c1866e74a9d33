"""Which graphs run at which step: a plan, laid out before the first step.

Without `cache_interval` the whole denoiser runs at every step. With it the ControlNet and the whole U-Net run at every
n-th step, and between them only the U-Net's outermost level, on a forecast of the feature below (Ma et al. 2023,
DeepCache, arXiv 2312.00858). The ControlNet is skipped at those steps as well: its effect is mostly in the cached
feature, and its residuals at the outermost level are forecast too. `parted` forecasts from the last two runs (Liu et
al. 2025, TaylorSeer, arXiv 2503.06923).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import CONTROLNET, DENOISER, UNET_FULL, UNET_OUTER, VAE_DECODER, VAE_DECODER_TINY
from lsast_engines.errors import BundleError

from ..options.options import Options

Pass = Literal["whole", "deep", "shallow"]
"""What runs at one step: the whole denoiser; its parts, all computed; or the U-Net's outermost level on forecasts."""

_GRAPHS: dict[Pass, tuple[str, ...]] = {"whole": (DENOISER,), "deep": (CONTROLNET, UNET_FULL), "shallow": (UNET_OUTER,)}


def lay_passes(options: Options, count: int) -> tuple[Pass, ...]:
    """The plan of a run of `count` steps."""
    if options.cache_interval == 1:
        return tuple("whole" for _ in range(count))
    return tuple("shallow" if index % options.cache_interval else "deep" for index in range(count))


def graphs_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    """Names of the graphs that a plan runs, each once, in the order of their first use."""
    return tuple(dict.fromkeys(name for each in passes for name in _GRAPHS[each]))


def require_parts(bundle: Bundle, names: Iterable[str]) -> None:
    """Make sure that a bundle has the graphs `names`, which a plan runs.

    Raises:
        BundleError: it has not; the message says what adds them.
    """
    if missing := [name for name in names if name not in bundle.manifest.graphs]:
        raise BundleError(
            f"found no graph {', '.join(missing)} in {bundle.path}, which cache_interval needs; add the "
            f"denoiser's parts with: lsast-export parts {bundle.path}"
        )


def require_decoder(bundle: Bundle, options: Options) -> None:
    """Make sure that a bundle has the decoder that options ask for.

    Raises:
        BundleError: it has not; the message says what adds it.
    """
    if (name := decoder_of(options)) not in bundle.manifest.graphs:
        raise BundleError(
            f"found no graph {name} in {bundle.path}, which decoder {options.decoder} needs; add it with: "
            f"lsast-export decoder {bundle.path} --small FOLDER, of TAESD for a base like Stable Diffusion 1.x"
        )


def decoder_of(options: Options) -> str:
    """Name of the graph that decodes."""
    return VAE_DECODER_TINY if options.decoder == "small" else VAE_DECODER
