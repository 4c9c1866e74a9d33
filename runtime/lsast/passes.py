"""What runs at which step: the levers of `Options` as a plan, laid out before the first step.

A run that pulls no lever computes the whole denoiser at every step. The levers leave something out:

=================================== =====================================================================
guidance_low, guidance_high         outside these timesteps one conditional pass instead of two (Kynkäänniemi
                                    et al. 2024, arXiv 2404.07724)
control_low                         below this timestep no ControlNet: its residuals are 0
control_interval                    the ControlNet at every n-th step, its residuals forecast between
cache_interval                      the whole U-Net at every n-th step, between them its outermost level on
                                    a forecast of the feature below (Ma et al. 2023, DeepCache, arXiv 2312.00858)
=================================== =====================================================================

Forecasts (`parted`) go by the last two runs of what rests (Liu et al. 2025, TaylorSeer, arXiv 2503.06923).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lsast_engines.bundle import Bundle
from lsast_engines.errors import BundleError
from lsast_engines.schedule import Step
from lsast_engines.spec import CONTROL, DECODER, DECODER_SMALL, DEEP, DENOISER, SHALLOW

from .options import Options


@dataclass(frozen=True)
class Pass:
    """What runs at one step."""

    guided: bool
    """Whether the null half is computed, too."""
    control: Literal["inside", "fresh", "kept", "off"]
    """The ControlNet: inside the whole denoiser, computed anew, a forecast of its residuals, or none."""
    unet: Literal["whole", "deep", "shallow"]
    """The U-Net: inside the whole denoiser, all of it, or its outermost level on a forecast of the rest."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that run, in order."""
        if self.unet == "whole":
            return (DENOISER,)
        last = DEEP if self.unet == "deep" else SHALLOW
        return (CONTROL, last) if self.control == "fresh" else (last,)


def lay_passes(options: Options, steps: Sequence[Step]) -> tuple[Pass, ...]:
    """The plan of a run over `steps`.

    With `cache_interval` the ControlNet rests at the shallow steps too, for most of what it says is in the feature. A
    feature of one half does for no step of two: where guidance begins, the U-Net is computed whole.
    """
    in_parts = options.control_low > 0 or options.control_interval > 1 or options.cache_interval > 1
    passes: list[Pass] = []
    since_deep, since_control = 0, 0
    for step in steps:
        guided = options.guidance != 1 and options.guidance_low <= step.t <= options.guidance_high
        if not in_parts:
            passes.append(Pass(guided, "inside", "whole"))
            continue
        before = passes[-1] if passes else None
        since_deep, since_control = since_deep + 1, since_control + 1
        deep = before is None or since_deep >= options.cache_interval or (guided and not before.guided)
        control: Literal["fresh", "kept", "off"] = "kept"
        if step.t < options.control_low:
            control = "off"
        elif before is None or (deep and since_control >= options.control_interval):
            control, since_control = "fresh", 0
        if deep:
            since_deep = 0
        passes.append(Pass(guided, control, "deep" if deep else "shallow"))
    return tuple(passes)


def graphs_of(passes: Sequence[Pass]) -> tuple[str, ...]:
    """Names of the graphs that a plan runs, each once, in the order of their first use."""
    return tuple(dict.fromkeys(name for each in passes for name in each.graphs))


def require_parts(bundle: Bundle, names: Iterable[str], levers: Sequence[str]) -> None:
    """Make sure that a bundle has the graphs `names`, which `levers` need.

    Raises:
        BundleError: it has not; the message says what adds them.
    """
    if missing := [name for name in names if name not in bundle.manifest.graphs]:
        raise BundleError(
            f"found no graph {', '.join(missing)} in {bundle.path}, which {', '.join(levers)} needs; add the "
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
    return DECODER_SMALL if options.decoder == "small" else DECODER


def levers_of(options: Options) -> list[str]:
    """The levers that are pulled of those that need the denoiser's parts, by the name of the option."""
    idle = {"control_low": 0, "control_interval": 1, "cache_interval": 1}
    return [name for name, value in idle.items() if getattr(options, name) != value]
