"""One picture on its way: read, laid on a canvas, through the four graphs, and cut out again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import Engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, VAE_ENCODER
from lsast_engines.diffusion.solvers import make_solver
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.images import canny_edges, on_white, read_picture

from .images import mask as masking
from .images.canvas import Pixels, canvas_for
from .images.preview import Previewer
from .images.provenance import Provenance, bundle_sha256, pixels_sha256, versions
from .options.options import Options
from .options.style_mix import Hand, Mix
from .sampling import sampler
from .sampling import tiling as tiles
from .sampling.step_plan import graphs_of, lay_passes, require_decoder, require_parts
from .sampling.tiling import Grid
from .sampling.x0_blend import X0Blend
from .sessions.style_cache import Shelf

if TYPE_CHECKING:
    from PIL import Image

    from .video.optical_flow import Follower

    Picture = str | Path | bytes | Image.Image | npt.NDArray[Any]
    """A path, the bytes of an image file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4] (uint8, uint16, or
    float in [0, 1])."""


class Painting:
    """What is known of one picture between its reading and its result."""

    def __init__(
        self,
        bundle: Bundle,
        picture: Picture,
        options: Options,
        mask: Picture | None = None,
        follower: Follower | None = None,
    ) -> None:
        """Read the picture and lay it on its canvas; needs no engine.

        Args:
            bundle: whose graphs will paint.
            picture: what to paint.
            options: how.
            mask: where.
            follower: what remembers the painting of the frame before.

        Raises:
            UsageError: options that this bundle does not have.
            BundleError: options that need parts of the denoiser, or a small decoder, of which this bundle has none.
            PictureError: the picture or the mask cannot be read, or they differ in size.
        """
        manifest = bundle.manifest
        self.options = options
        self.clock = Clock()
        self.mix = Mix.parse(options.style)
        self.mix.check(list(bundle.styles()), manifest.stages)
        self._schedule = TimestepSchedule.build(
            manifest.noise, options.steps, options.strength, manifest.stages, options.solver
        )
        self.passes = lay_passes(options, len(self._schedule.steps))
        self._bundle = bundle
        require_parts(bundle, graphs_of(self.passes))
        require_decoder(bundle, options)
        self._follower = follower
        with self.clock("read"):
            self._source = read_picture(picture)
            rgb, alpha = self._source.rgb, self._source.alpha
            self._rgb = rgb if options.alpha == "keep" else on_white(rgb, alpha)
            self._mask = None if mask is None else masking.read_mask(mask, self._source.size, options.feather)
            self._canvas = canvas_for(self._source.size, options.size, manifest.multiple, options.fit)
            self._content, outlined = self._canvas.views(self._rgb)
            self.grid = Grid.lay(self.canvas_size, options.tile, manifest.geometry.factor, manifest.multiple)
        with self.clock("edges"):
            self._edges = canny_edges(outlined)

    @property
    def batch_key(self) -> Hashable:
        """Paintings of equal keys can share a batch."""
        return (
            self._content.shape,
            self.options.tile,
            self.passes,
            self.options.control,
            self.options.guidance != 1,
        )

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Height and width that are painted, in pixels."""
        return self._content.shape[0], self._content.shape[1]

    def provenance(self, engine: Engine, shelf: Shelf) -> Provenance:
        """What the painting is made of, by the denoiser that paints it."""
        return Provenance(
            bundle=self._bundle.manifest.name,
            bundle_sha256=bundle_sha256(self._bundle),
            styles={name: shelf[name].fingerprint for name in self.mix.styles},
            picture_sha256=pixels_sha256(self._source.rgb, self._source.alpha),
            mask_sha256=None if self._mask is None else pixels_sha256(self._mask),
            painted=self.canvas_size,
            backend=engine.backend,
            device=engine.device,
            compute_dtype=engine.compute_dtype,
            versions=versions(engine.backend),
        )

    def begin(self, engines: Mapping[str, Engine], shelf: Shelf) -> sampler.Row:
        """Take the picture through `controlnet_cond` and `vae_encoder` and noise it."""
        manifest = self._bundle.manifest
        with self.clock("edges"):
            hint = tiles.hint_features(engines[CONTROLNET_COND], self._edges, self.grid)
        with self.clock("encode"):
            rng = np.random.Generator(np.random.PCG64(self.options.seed))
            z0 = tiles.encode(engines[VAE_ENCODER], self._content, manifest.latent_scale, rng, self.grid)[0]
            noise = rng.standard_normal((1, *z0.shape), dtype=np.float32)[0]
        solver = make_solver(self.options.solver, manifest.noise, self._schedule)
        if self._follower:
            solver = self._follower.begin(self._content, manifest.geometry.factor, solver, self._schedule)
        if self._mask is not None:
            solver = X0Blend(solver, self._schedule, z0, 1 - self._cells(self._mask))
        styles = shelf.take(self.mix.styles)
        self.previewer = Previewer(self._content, z0, self._canvas)
        return sampler.Row(
            solver=solver,
            schedule=self._schedule,
            z0=z0,
            noisy=self._schedule.add_noise(z0, noise, self._schedule.start_t),
            hint=hint[0],
            hand=Hand(self.mix, styles, self._bundle.null_style, manifest.attention_layers),
            guidance=self.options.guidance,
        )

    def settle(self, latent: sampler.Floats, canvas: Pixels) -> Pixels:
        """The canvas to finish, [H, W, 3], after the latent [4, h, w] was painted and decoded to `canvas`."""
        return self._follower.end(latent, canvas) if self._follower else canvas

    def finish(self, painted: Pixels) -> Image.Image:
        """The painted canvas [H, W, 3] as the picture's painting, with its transparency and its colour profile."""
        from PIL import Image

        with self.clock("finish"):
            rgb = self._canvas.cut(painted)
            if self.options.keep_colour or self._mask is not None:
                beneath = self._canvas.under(self._rgb)
                rgb = masking.keep_colour(rgb, beneath) if self.options.keep_colour else rgb
                mask = self._canvas.cover(self._mask)
                rgb = rgb if mask is None else masking.blend(rgb, beneath, mask)
            alpha = self._canvas.cover(self._source.alpha if self.options.alpha == "keep" else None)
            image = Image.fromarray(rgb if alpha is None else np.dstack([rgb, alpha]))
            if self._source.icc:
                image.info["icc_profile"] = self._source.icc
        return image

    def _cells(self, mask: Pixels) -> sampler.Floats:
        """How much is painted of every latent cell, [h, w] of 0 … 1."""
        planes, _ = self._canvas.views(np.repeat(mask[:, :, None], 3, axis=2))
        return masking.cells(planes[:, :, 0], self._bundle.manifest.geometry.factor)


class Clock:
    """Wall time of named phases; a phase that is entered again goes on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's time to `phase`."""
        begin = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        """Count `seconds` to `phase`."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
