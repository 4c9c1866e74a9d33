"""One picture between reading and result: laid on a canvas, sampled, and cut out of the canvas again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import DENOISER, UNET_SPLIT_GRAPHS, VAE_DECODER, VAE_DECODER_TINY
from lsast_engines.bundle.manifest import QUANTIZED
from lsast_engines.bundle.style import StyleFile
from lsast_engines.diffusion import TimestepSchedule
from lsast_engines.errors import BundleError, Lines, UnknownStyleError, UsageError, did_you_mean, fault_list
from lsast_engines.images import canny_edges, on_white, read_picture

from .images.canvas import Canvas, Pixels, Previewer, released_edge_input, resize
from .images.mask import composite, keep_colour, read_mask, to_latent_mask
from .options.options import Options, current_options, rules
from .options.style_mix import Mix, Term, syntax_error
from .sampling.batch import MixedStyle, Palette, Sample, X0Blend
from .sampling.networks import Floats
from .sampling.tiling import WHOLE_UP_TO, TileGrid
from .sessions.native_calls import native_call

if TYPE_CHECKING:
    from .video.optical_flow import TemporalState

    Picture = str | os.PathLike[str] | BinaryIO | Image.Image | npt.ArrayLike
    """See `Stylizer.stylize`."""


class Request:
    """A picture that is to be repainted with resolved options; needs no engine."""

    def __init__(
        self,
        bundle: Bundle,
        picture: Picture,
        options: Options,
        styles: Mapping[str, StyleFile],
        mask: Picture | None = None,
        temporal: TemporalState | None = None,
        max_megapixels: float | None = None,
    ) -> None:
        """Read the picture, lay it on its canvas and find its edges. `styles` are the open styles that the options
        name, `temporal` the frame before and its painting, of a video. Raises a `PictureError` if the picture or the
        mask cannot be read, or they differ in size."""
        self.bundle, self.options, self.styles = bundle, options, styles
        self.seconds: dict[str, float] = {}
        self._temporal = temporal
        self._schedule = make_schedule(bundle, options)
        with self._timed("read"):
            self.source = read_picture(picture, max_megapixels)
            rgb, alpha = self.source.rgb, self.source.alpha
            rgb = rgb if options.alpha == "keep" else on_white(rgb, alpha)
            self.mask = None if mask is None else read_mask(mask, self.source.size, options.feather, max_megapixels)
            self._canvas = Canvas.fit(self.source.size, options.size, bundle.manifest.multiple, options.fit)
            self._rgb = resize(rgb, self._canvas.own)
            self._alpha, self._mask = (
                None if plane is None else resize(plane, self._canvas.own) for plane in (alpha, self.mask)
            )
            with native_call():
                self._content = self._canvas.pad(self._rgb)
                edge_input = released_edge_input(rgb, self._canvas.own) if options.fit == "stretch" else self._content
        with self._timed("edges"), native_call():
            self._edges = canny_edges(edge_input)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Height and width that are painted, in pixels."""
        return self._canvas.outer

    @property
    def batch_key(self) -> tuple[tuple[str, Hashable], ...]:
        """Requests with equal keys can share a batch; names and values of what must be equal."""
        facts = {"painted size": self.canvas_size, "steps": len(self._schedule.steps)}
        shared = {name: getattr(self.options, name) for name in ("tile", "cache_interval", "control_scale", "decoder")}
        return (*facts.items(), ("whether guidance is 1", self.options.guidance == 1), *shared.items())

    @property
    def grid(self) -> TileGrid | None:
        """The tiles of the canvas; None if it is painted whole."""
        manifest, (height, width) = self.bundle.manifest, self.canvas_size
        side = -(-self.options.tile // manifest.multiple) * manifest.multiple
        if side == 0 or height * width <= WHOLE_UP_TO * side * side:
            return None
        return TileGrid.cover((height, width), side, manifest.geometry.factor)

    def prepare(self) -> Sample:
        """The picture as the sampler takes it."""
        mix = Mix.parse(self.options.style)
        style: StyleFile | MixedStyle = self.styles[mix.terms[0].style]
        if not mix.is_single:
            style = MixedStyle(mix, self.styles, self.bundle.null_style, self.bundle.manifest.attention_layers)
        return Sample(
            picture=self._content,
            edges=self._edges,
            style=style,
            schedule=self._schedule,
            blends=self._blends,
            guidance=self.options.guidance,
            seed=self.options.seed,
            palette=self._palette(mix),
        )

    def _palette(self, mix: Mix) -> Palette | None:
        """That of the styles by their weights; `Options.resolve` has found that all of them have one."""
        weighted = [(term.weight, self.styles[term.style].latent_statistics) for term in mix.terms]
        parts = [(weight, statistics) for weight, statistics in weighted if statistics is not None]
        return Palette.of(parts, self.options.palette) if parts and self.options.palette else None

    def _blends(self, z0: Floats) -> list[X0Blend]:
        """What a mask and a video blend x0 with, given the picture's latent z0 [4, h, w]."""
        factor, blends = self.bundle.manifest.geometry.factor, []
        if self._mask is not None:
            blends.append(X0Blend(z0, 1 - to_latent_mask(self._canvas.pad(self._mask), factor)))
        if self._temporal and (blend := self._temporal.begin(self._content, factor)):
            blends.append(blend)
        return blends

    def previewer(self, z0: Floats) -> Previewer:
        """Makes small pictures of latents, given the picture's own latent z0 [4, h, w]."""
        return Previewer(self._content, z0, self._canvas)

    def blend_with_previous(self, latent: Floats, painted: Pixels) -> Pixels:
        """The painted canvas [H, W, 3] of a latent [4, h, w]; in a video, blended with the painting before."""
        return self._temporal.blend(latent, painted) if self._temporal else painted

    def compose(self, painted: Pixels) -> Image.Image:
        """The painted canvas [H, W, 3] as the picture's painting, with its transparency and its colour profile."""
        with self._timed("finish"):
            rgb = self._canvas.crop(painted)
            if self.options.keep_colour:
                rgb = keep_colour(rgb, self._rgb)
            if self._mask is not None:
                rgb = composite(rgb, self._rgb, self._mask)
            if self._alpha is not None and self.options.alpha == "keep":
                rgb = np.dstack([rgb, self._alpha])
            image = Image.fromarray(rgb)
            if self.source.icc:
                image.info["icc_profile"] = self.source.icc
        return image


def resolve_options(
    bundle: Bundle, given: Mapping[str, Any], preset: str | None, open_style: Callable[[str], StyleFile]
) -> tuple[Options, dict[str, StyleFile]]:
    """The complete options of a call with the arguments `given`, and the open styles that they name. A `UsageError`
    names all invalid options and unknown styles, or steps that the solver does not allow; a `BundleError` graphs that
    the options need and the bundle lacks. Errors of `open_style` are raised, too."""
    given, manifest = current_options({name: given[name] for name in given if name != "mask"}), bundle.manifest
    names = f"; expected {', '.join(rules())}"
    faults = [f"{name}: unknown{did_you_mean(name, rules()) or names}" for name in given if name not in rules()]
    terms: tuple[Term, ...] = ()
    styles: dict[str, StyleFile] = {}
    style = manifest.defaults["style"] if given.get("style") is None else given["style"]
    if isinstance(style, str):
        with contextlib.suppress(UsageError):  # `Options` reports a syntax error, together with all other faults
            terms = Mix.parse(style).terms
    for term in terms:
        try:
            styles[term.style] = styles.get(term.style) or open_style(term.style)
        except UnknownStyleError as error:
            if given.get("style") is None and term.style == "none":  # of a bundle that was written without a style
                faults.append(
                    f"style: found none; expected one of {', '.join(bundle.styles()) or 'those of lsast-train'}"
                )
            else:
                pointed = syntax_error(f"{error}", rules()["style"].plain(style), term.column)
                faults.append(Lines(f"style: {pointed!s}"))
    try:
        known = {name: given[name] for name in given if name in rules()}
        options = Options.resolve(known, manifest.defaults, styles, preset)
    except UsageError as error:
        raise UsageError(fault_list(Lines(error), [*dict.fromkeys(faults)])) from None
    if faults:
        raise UsageError(fault_list("invalid options:", [*dict.fromkeys(faults)]))
    Mix.parse(options.style, manifest.stages)
    require_graphs(bundle, options)
    make_schedule(bundle, options)
    return options, styles


def make_schedule(bundle: Bundle, options: Options) -> TimestepSchedule:
    """The steps of a painting; a `UsageError` where the solver does not allow them."""
    manifest = bundle.manifest
    return TimestepSchedule.build(manifest.noise, options.steps, options.strength, manifest.stages, options.solver)


def graphs_of(options: Options | Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Names of the graphs that denoise with `options`, and of the one that decodes."""
    given = vars(options) if isinstance(options, Options) else options
    denoisers = UNET_SPLIT_GRAPHS if (given.get("cache_interval") or 1) > 1 else (DENOISER,)
    return denoisers, VAE_DECODER_TINY if given.get("decoder") == "small" else VAE_DECODER


def require_graphs(bundle: Bundle, options: Options) -> None:
    """Raise a `BundleError` if a bundle lacks graphs that `options` need; the message says what adds them."""
    denoisers, decoder = graphs_of(options)
    if missing := [name for name in denoisers if name not in bundle.manifest.graphs]:
        stored = bundle.manifest.storage_dtype
        if stored in QUANTIZED:
            again = (
                "quantize its source again, once that has them: lsast-export bundle --base FOLDER --out FOLDER; "
                f"lsast-export quantize FOLDER --out {bundle.path}"
            )
        else:
            again = (
                "export it again, from itself: lsast-export bundle "
                f"--base {bundle.path} --out {bundle.path} --storage-dtype {stored}"
            )
        raise BundleError(f"found no graph {', '.join(missing)} in {bundle.path}, which cache_interval needs; {again}")
    if decoder not in bundle.manifest.graphs:
        raise BundleError(
            f"found no graph {decoder} in {bundle.path}, which decoder {options.decoder} needs; add it with: "
            f"lsast-export decoder {bundle.path} --small FOLDER, of TAESD for a base like Stable Diffusion 1.x"
        )
