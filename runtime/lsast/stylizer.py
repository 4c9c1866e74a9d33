"""A bundle with its engines open, ready to repaint one picture after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from lsast_engines.backends.base import ComputeDtype, Engine
from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.bundle.graph_spec import DENOISER, REQUIRED_GRAPHS, UNET_SPLIT_GRAPHS, VAE_DECODER

from .options.defaults import Defaults
from .request import Painting
from .result import Result
from .sampling import sampler
from .sampling import tiling as tiles
from .sampling.cached_denoiser import PartedDenoiser
from .sampling.step_plan import Pass, decoder_of, graphs_of
from .sessions import batching as batches
from .sessions.cancel import CancelToken
from .sessions.engine_pool import STYLE_MEMORY, Opener, Workshop

if TYPE_CHECKING:
    from PIL import Image

    from .request import Picture
    from .video.optical_flow import Follower

_log = logging.getLogger("lsast.runtime")

Preview = Callable[[], "Image.Image"]
"""What `OnStep` is given to look at the painting: nothing is computed until it is called."""

OnStep = Callable[[int, int, Preview], None]
"""Called with the number of steps done, the number there are, and a function that gives a small picture of what the
painting is about to be, one pixel for a latent cell of 8 x 8."""


def load(
    bundle: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    compute_dtype: ComputeDtype = "fp32",
    style_memory: int = STYLE_MEMORY,
    build: bool = False,
    preset: str | None = None,
) -> Stylizer:
    """Open a bundle and compile its graphs, once for any number of pictures.

    Args:
        bundle: a bundle's folder or name; None is the one of the environment's LSAST_BUNDLE, else the embedded `mini`.
        backend: `onnxruntime`, `openvino`, or `auto` for the first that is installed and has the arithmetic.
        device: `cpu`, `cuda` …, or `auto` for the CPU.
        threads: threads to compute with; None leaves it to the backend.
        compute_dtype: `fp32`, or with `openvino` where the processor has it `bf16` or `fp16`: about twice as fast, and
            off by a grey level or two. If the decoder overflows in it, it is opened in `fp32` and asked again.
        style_memory: bytes of styles to keep in memory between paintings; those used longest ago go first.
        build: with `tensorrt-rtx` or `tensorrt`, compile first what is missing, which takes minutes and the extra
            `export`; without, a missing engine is an error.
        preset: what comes before the defaults of style and bundle at every painting, see `lsast.options.presets`.
        Only what it
            runs is opened here; the rest is opened by the first painting that needs it.

    Raises:
        UsageError: fewer threads than 1, an unknown arithmetic or preset, or `build` with a backend that compiles
            nothing.
        BundleError: there is no such bundle, or it is damaged.
        BackendError: the backend, the device or the arithmetic cannot be had here; the message lists what can.
        MissingExtraError: no backend is installed.
    """
    opener = Opener(Bundle.open(find_bundle(bundle)), backend, device, threads, compute_dtype)
    if build:
        from .sessions.build_engines import build_engines

        build_engines(opener.bundle, backend.lower(), compute_dtype)
    names = REQUIRED_GRAPHS if preset is None else first_graphs(opener.bundle, {"preset": preset})
    return Stylizer(opener, opener.all(names), style_memory, preset)


class Stylizer:
    """A bundle's engines and styles, kept open; a context manager. Made by `load`.

    What `stylize` gives depends on the picture, the options and the bundle alone, never on what was painted before.

    Any number of threads may share one: their calls read and finish pictures side by side and take turns at the
    engines, which are there once. A forked process opens engines of its own at its first call, and a pickled
    stylizer opens its bundle again where it is unpickled, so that one can be handed to a pool of processes.
    """

    def __init__(
        self,
        opener: Opener,
        engines: Mapping[str, Engine],
        style_memory: int = STYLE_MEMORY,
        preset: str | None = None,
    ) -> None:
        self.bundle = opener.bundle
        self._opener = opener
        self._style_memory = style_memory
        self._preset = preset
        self._defaults = Defaults(opener.bundle, preset)
        self._backend = next(iter(engines.values())).backend
        self._workshop = Workshop(opener, engines, style_memory)

    @property
    def styles(self) -> list[str]:
        """Names of the styles there are, sorted."""
        return list(self.bundle.styles())

    @property
    def backend(self) -> str:
        """Name of the backend that the denoiser runs on."""
        return self._backend

    def stylize(
        self,
        picture: Picture,
        style: str | None = None,
        *,
        steps: int | None = None,
        strength: float | None = None,
        guidance: float | None = None,
        control: float | None = None,
        size: int | None = None,
        solver: str | None = None,
        seed: int | None = None,
        alpha: Literal["keep", "composite"] | None = None,
        fit: Literal["aspect", "squash"] | None = None,
        keep_colour: bool | None = None,
        feather: int | None = None,
        tile: int | None = None,
        cache_interval: int | None = None,
        decoder: Literal["full", "small"] | None = None,
        preset: str | None = None,
        mask: Picture | None = None,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **removed: NoReturn,
    ) -> Result:
        """Repaint a picture; `lsast.Options` says what each option means.

        What is None is left to the preset, then to the style, then to the bundle.

        Args:
            picture: a path, the bytes of an image file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4]
                (uint8, uint16, or float in [0, 1]). EXIF orientation is applied.
            mask: where to paint, a picture of the same size: white is painted, black is left as it is to the bit.
            on_step: called with (steps done, steps in all, preview) before the first step and after each, in this
                thread; `preview()` gives a small PIL image of what the painting is about to be. An exception that it
                raises ends the painting and comes out here.
            cancel: ends the painting within one step once another thread turns it.
            removed: options of earlier versions, which are refused by name.

        Returns:
            The painting, in the picture's colour profile and, but with `fit` "squash", of its own size.

        Raises:
            UsageError: options that cannot be meant, all named at once; a style that the bundle has not, with a list
                of those it has; the stylizer is closed; or a call from inside `on_step`.
            StyleError: the style's file is damaged, or was made for another base.
            BundleError: options that need parts of the denoiser, or a small decoder, of which the bundle has none.
            PictureError: the picture or the mask cannot be read, or they differ in size.
            BackendError: a graph fails, or gives values that are not finite.
            CancelledError: `cancel` was turned.
        """
        given = {"style": style, "preset": preset, "steps": steps, "strength": strength, "guidance": guidance,
                 "control": control, "size": size, "solver": solver, "seed": seed, "alpha": alpha, "fit": fit,
                 "keep_colour": keep_colour, "feather": feather, "tile": tile, "cache_interval": cache_interval,
                 "decoder": decoder, **removed}  # fmt: skip
        return self._paint([self._read(picture, given, mask)], on_step, cancel)[0]

    async def stylize_async(self, picture: Picture, style: str | None = None, **options: Any) -> Result:
        """`stylize` for asyncio: the event loop goes on meanwhile, and a task that is cancelled stops painting.

        Args:
            picture: see `stylize`.
            style: see `stylize`.
            options: what else `stylize` takes, but for `cancel`; `on_step` is called in the painting thread, from
                where `loop.call_soon_threadsafe` leads back.

        Raises:
            LsastError: see `stylize`.
        """
        from .sessions.aio import in_queue

        return await in_queue(
            self._workshop.queue(), lambda cancel: self.stylize(picture, style, **options, cancel=cancel)
        )

    def stylize_many(
        self,
        pictures: Iterable[Picture],
        styles: str | Iterable[str | None] | None = None,
        *,
        rows: Iterable[Mapping[str, Any]] | None = None,
        batch: int = 4,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """Repaint many pictures; those of equal size go through the denoiser together.

        Pictures share a batch if they are painted at the same size, with as many steps, the same `control` and
        `cache_interval`, and all with a `guidance` of 1 or none; style, seed, mask and the rest may differ. A painting
        is what `stylize` gives to within the rounding of the backend, which may add up in another order for another
        batch.

        Args:
            pictures: as `stylize` takes them, of any size; they are read a few batches ahead.
            styles: one for all, or one for each picture.
            rows: for each picture, options of its own, a mapping of what `stylize` takes (`mask` too); they go
                before `styles` and `options`.
            batch: most pictures that are painted at once, at least 1; memory grows with it.
            cancel: see `stylize`.
            options: options of all pictures.

        Yields:
            The paintings in the order of the pictures, each as soon as it and those before it are done. `seconds` of
            a shared denoising are divided by the pictures that shared it.

        Raises:
            LsastError: see `stylize`; it comes out when its picture's turn is there, and ends the stream.
            UsageError: a batch below 1, or fewer or more styles or rows than pictures.
        """

        def read(picture: Picture, own: Mapping[str, Any]) -> Painting:
            given = {**options, **own}
            return self._read(picture, given, given.pop("mask", None))

        return batches.stream(
            batches.jobs(pictures, styles, rows), read, lambda paintings: self._paint(paintings, None, cancel), batch
        )

    def stylize_frames(
        self,
        frames: Iterable[Picture],
        style: str | None = None,
        *,
        follower: Follower | None = None,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """Repaint the frames of a video, each so that it follows the painting before it.

        Args:
            frames: in their order, as `stylize` takes pictures; those of another size than the one before start anew.
            style: see `stylize`.
            follower: what remembers the painting before; a new one if None. One serves one video.
            on_step: see `stylize`; called for every frame.
            cancel: see `stylize`.
            options: what else `stylize` takes.

        Yields:
            The paintings, each before the next frame is taken.

        Raises:
            LsastError: see `stylize`; it ends the stream.
        """
        from .video.optical_flow import Follower

        follower = follower or Follower()
        given = {**options, "style": style}
        mask = given.pop("mask", None)
        for frame in frames:
            yield self._paint([self._read(frame, given, mask, follower)], on_step, cancel)[0]

    def close(self) -> None:
        """Give the engines' memory and devices back; `stylize` cannot be called any more. Closing twice is fine."""
        self._workshop.close()

    def __enter__(self) -> Stylizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        opener = self._opener
        where = (self.bundle.path.resolve(), opener.backend, opener.device, opener.threads, opener.compute_dtype)
        return load, (*where, self._style_memory, False, self._preset)

    def _read(
        self, picture: Picture, given: Mapping[str, Any], mask: Picture | None, follower: Follower | None = None
    ) -> Painting:
        return Painting(self.bundle, picture, self._defaults.resolve(given), mask, follower)

    def _paint(self, paintings: Sequence[Painting], on_step: OnStep | None, cancel: CancelToken | None) -> list[Result]:
        """Paint a batch: the one way that every picture goes. All have one `batch_key`."""
        workshop = self._workshop
        with workshop.turn(cancel):
            rows = []
            for painting in paintings:
                rows.append(painting.begin(workshop.engines, workshop.shelf))
                if cancel:
                    cancel.check()

            def watch(step: int, total: int, guesses: Sequence[sampler.Floats]) -> None:
                if cancel:
                    cancel.check()
                if on_step:
                    on_step(step, total, lambda: paintings[0].previewer(guesses[0]))

            begin = time.perf_counter()
            control = paintings[0].options.control
            passes, grid = paintings[0].passes, paintings[0].grid
            denoiser = _denoiser(workshop, passes, grid)
            watching = watch if cancel or on_step else None
            latents = sampler.denoise(denoiser, rows, self.bundle.null_style, control, watching)
            shared = (time.perf_counter() - begin) / len(paintings)
            painted = []
            for painting, latent in zip(paintings, latents, strict=True):
                painting.clock.add("denoise", shared)
                with painting.clock("decode"):
                    canvas = _decode(workshop, decoder_of(painting.options), latent[None], painting.grid)
                    painted.append(painting.settle(latent, canvas))
                if cancel:
                    cancel.check()
            provenances = [painting.provenance(denoiser, workshop.shelf) for painting in paintings]
        return [
            Result(painting.finish(canvas), painting.clock.seconds, painting.options, provenance)
            for painting, canvas, provenance in zip(paintings, painted, provenances, strict=True)
        ]


def first_graphs(bundle: Bundle, options: Mapping[str, Any]) -> list[str]:
    """The graphs to open at once for paintings with `options`: without the whole denoiser, where its parts run instead,
    and with the small decoder where that is asked for.

    Raises:
        UsageError: options that cannot be meant.
    """
    resolved = Defaults(bundle).resolve(options)
    there = bundle.manifest.graphs.keys()
    parted = resolved.cache_interval > 1 and there >= set(UNET_SPLIT_GRAPHS)
    names = (
        [name for name in REQUIRED_GRAPHS if name != DENOISER] + list(UNET_SPLIT_GRAPHS)
        if parted
        else list(REQUIRED_GRAPHS)
    )
    decoder = decoder_of(resolved)
    return [decoder if name == VAE_DECODER and decoder in there else name for name in names]


def _denoiser(workshop: Workshop, passes: Sequence[Pass], grid: tiles.Grid) -> Engine:
    """The engine to denoise a canvas with: the whole denoiser, unless the plan leaves something out of it."""
    names = graphs_of(passes)
    if names == (DENOISER,):
        return tiles.denoiser(workshop.engine(DENOISER), grid)
    manifest = workshop.opener.bundle.manifest
    engines = {name: workshop.engine(name) for name in names}
    return PartedDenoiser(engines, manifest.graphs[DENOISER], passes, grid, manifest.noise)


def _decode(workshop: Workshop, name: str, latent: sampler.Floats, grid: tiles.Grid) -> npt.NDArray[np.uint8]:
    """Decode by the graph `name`; if that overflows below fp32, once more in fp32, in which it then stays."""
    engine = workshop.engine(name)
    scale = workshop.opener.bundle.manifest.latent_scale
    try:
        return tiles.decode(engine, latent, scale, grid)
    except sampler.NotFiniteError as error:
        if engine.compute_dtype == "fp32":
            raise
        _log.warning("%s; decoding again in fp32", error)
    workshop.engines[name] = workshop.opener(name, "fp32")
    engine.close()
    return tiles.decode(workshop.engines[name], latent, scale, grid)
