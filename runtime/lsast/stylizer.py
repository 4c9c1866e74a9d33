"""A bundle with its engines open, which repaints one picture after another."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from lsast_engines.backends.choice import Choice, DtypeOrAuto
from lsast_engines.bundle.bundle import Bundle, find_bundle
from lsast_engines.bundle.graph_spec import CONTROLNET_COND, DENOISER, REQUIRED_GRAPHS, VAE_ENCODER
from lsast_engines.bundle.manifest import QUANTIZED
from lsast_engines.declared_options import Range, Rule, option_faults, rules_of
from lsast_engines.errors import UsageError, enough_memory, fault_list
from lsast_engines.images import pixels_sha256

from .images.metadata import Provenance, bundle_sha256, versions
from .options.options import Options, PresetName, SolverName, preset_options, rules
from .request import Request, graphs_of, resolve_options
from .result import Result
from .sampling import networks, sampler, tiling
from .sampling.batch import Batch
from .sampling.networks import CachedDenoiser, CheckedEngine, Denoiser, Floats, GraphDenoiser, Networks, Pixels
from .sessions import batching
from .sessions.cancel import CancelToken
from .sessions.engine_pool import STYLE_MEMORY, EnginePool

if TYPE_CHECKING:
    from PIL import Image

    from .images.canvas import Previewer
    from .request import Picture
    from .video.optical_flow import TemporalState

_log = logging.getLogger("lsast.runtime")

Preview = Callable[..., "Image.Image"]
"""Makes a small preview of the painting, one pixel for a latent cell of 8 x 8; computes nothing until it is called. Of
a batch, `preview(index)` makes that of the picture `index`."""

OnStep = Callable[[int, int, Preview], None]
"""Called with the number of steps done, the number there are, and a preview."""


@dataclass(frozen=True)
class _Arguments:
    """What arguments of `load` may be."""

    backend: str
    device: str
    threads: Annotated[int | None, Range(1, 4096)]
    compute_dtype: str
    style_memory: Annotated[float, Range(0)]
    build: bool
    preset: PresetName | None
    max_megapixels: Annotated[float | None, Range(0, above=True)]


def load(
    bundle: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    compute_dtype: DtypeOrAuto = "auto",
    style_memory: int = STYLE_MEMORY,
    build: bool = False,
    preset: str | None = None,
    max_megapixels: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Stylizer:
    """Open a bundle and load its graphs, once for any number of pictures.

    Args:
        bundle: a bundle's folder or name; None takes the one in the environment variable LSAST_BUNDLE, else the
            embedded `mini`.
        backend: `onnxruntime`, `openvino`, `tensorrt-rtx`, `tensorrt`, or `auto` for the fastest here
            (`Stylizer.choice` says why).
        device: `cpu`, `cuda` …, or `auto`: the GPU for `tensorrt-rtx` and `tensorrt`, else the CPU.
        threads: CPU threads; None leaves it to the backend.
        compute_dtype: `fp32`; with `openvino` also `bf16` or `fp16` if the processor has it: faster, and off by a grey
            level or two; on GPUs also `fp16`. `auto` is `bf16` where that is faster, else `fp32`, and on GPUs `fp16`.
            If the decoder overflows, it decodes again in `fp32`.
        style_memory: bytes of styles to keep in memory between paintings; the least recently used are dropped first.
        build: with `tensorrt-rtx` or `tensorrt`, first compile the engines that `preset` and `options` run and that are
            missing. It takes minutes and needs the extra `export`; otherwise a missing engine is an error.
        preset: the preset of all paintings that do not give their own, see `lsast.Options`.
        max_megapixels: most pixels of a picture's file, in millions; None refuses what takes more than 850 MB decoded:
            121 megapixels of RGB, 212 of grey.
        options: arguments of `Stylizer.stylize` for the first paintings: the graphs that they run are opened now, the
            others when a painting needs them.

    Raises:
        UsageError: arguments of another type or out of range, all at once; an unknown dtype, `build` with a backend
            that needs none, or invalid `options`.
        StyleError: the file of a style in `options` is damaged.
        BundleError: there is no such bundle, it is damaged, or lacks graphs that `options` need.
        BackendError: the backend, the device or the dtype is not available here; the message lists what is.
        MissingExtraError: no backend is installed.
    """
    compute_dtype = "auto" if compute_dtype is None else compute_dtype  # None was the default of earlier versions
    given = {name: rule.plain(value) for name, value in locals().items() if (rule := rules_of(_Arguments).get(name))}
    faults = option_faults(_Arguments, given)
    if not isinstance(options, (Mapping, type(None))):
        faults.append(f"options: found {type(options).__name__}; expected a dict of arguments of stylize")
    if faults:
        raise UsageError(fault_list("invalid arguments of load:", faults))
    found = Bundle.open(find_bundle(bundle))
    if (stored := found.manifest.storage_dtype) in QUANTIZED and compute_dtype == "fp16":  # was not tried
        raise UsageError(
            f"found compute_dtype fp16 for {found.path}, which is stored in {stored}; "
            "expected fp32, or bf16 with OpenVINO: leave the option out"
        )
    if options is not None:
        resolve_options(found, options, preset, found.open_style)
    graphs = first_graphs(found, {"preset": preset, **(options or {})})
    if build:
        from .sessions.build_engines import build_engines

        build_engines(found, backend.lower(), "fp16" if compute_dtype == "auto" else compute_dtype, graphs)
    pool = EnginePool(found, backend, device, given["threads"], compute_dtype, graphs, style_memory)
    return Stylizer(pool, preset, max_megapixels)


class Stylizer:
    """A bundle with its engines and styles open; a context manager, made by `load`.

    What `stylize` gives depends on its arguments, the bundle, the styles, the backend and the compute dtype, not on
    earlier paintings; but a decoder whose values overflowed stays in fp32.

    Any number of threads may share a stylizer: they read and finish pictures side by side and take turns at the
    engines. A forked process opens engines of its own at its first call. A pickled stylizer opens its bundle again
    where it is unpickled, so that a pool of processes can be given one.
    """

    def __init__(self, pool: EnginePool, preset: str | None = None, max_megapixels: float | None = None) -> None:
        self.bundle = pool.bundle
        self._pool = pool
        self._preset = preset
        self.max_megapixels = max_megapixels
        """See `load`."""
        self._bundle_sha256 = bundle_sha256(self.bundle)
        self._versions = versions(self.choice.backend)

    @property
    def styles(self) -> list[str]:
        """Names of the available styles: the bundle's own, sorted, then the user's."""
        return list(self.bundle.styles())

    @property
    def choice(self) -> Choice:
        """The backend, the device and the compute dtype of all paintings, and why they were chosen."""
        return self._pool.choice

    @property
    def backend(self) -> str:
        """Name of the backend that runs the graphs."""
        return self.choice.backend

    def resolve(self, **options: Any) -> Options:
        """Complete the options of a call; arguments and errors as of `stylize`."""
        return resolve_options(self.bundle, options, self._preset, self._pool.styles.get)[0]

    def stylize(
        self,
        picture: Picture,
        style: str | None = None,
        *,
        steps: int | None = None,
        strength: float | None = None,
        guidance: float | None = None,
        control_scale: float | None = None,
        size: int | None = None,
        solver: SolverName | None = None,
        seed: int | None = None,
        alpha: Literal["keep", "composite"] | None = None,
        fit: Literal["aspect", "stretch"] | None = None,
        palette: float | None = None,
        keep_colour: bool | None = None,
        feather: int | None = None,
        tile: int | None = None,
        cache_interval: int | None = None,
        decoder: Literal["full", "small"] | None = None,
        preset: PresetName | None = None,
        mask: Picture | None = None,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **earlier: Any,
    ) -> Result:
        """Repaint a picture.

        The options are those of `lsast.Options`; one that is None is taken from the preset, else from the style, else
        from the bundle.

        Args:
            picture: a path, the bytes of an image file, a binary file object, a PIL image, or an array [H, W],
                [H, W, 3] or [H, W, 4] in the order RGB: bool, uint8, uint16, or float in [0, 1]; also what NumPy can
                view as one, such as a tensor on the CPU. EXIF orientation is applied. OpenCV's arrays are BGR: give
                `array[..., ::-1]`.
            mask: where to paint, a picture of the same size: white is painted, black keeps its pixels exactly.
            on_step: called with (steps done, steps in all, preview) before the first step and after each, in this
                thread; `preview()` makes a small PIL image. An exception that it raises ends the painting. If it takes
                longer than a second, paintings of other threads go on meanwhile.
            cancel: ends the painting within one step when another thread cancels it.
            earlier: options by their names in earlier versions; removed ones are refused with what to use instead.

        Returns:
            The painting, in the picture's colour profile and, except with `fit` "stretch", of its size.

        Raises:
            UsageError: invalid options, all at once; an unknown style, with the available ones; the stylizer is closed;
                or a call from inside `on_step`.
            StyleError: the style's file is damaged, or was made for another base.
            BundleError: options that need graphs which the bundle lacks, or another bundle is in its place meanwhile.
            PictureError: the picture or the mask cannot be read, or they differ in size.
            BackendError: a graph fails, or gives values that are not finite.
            OutOfMemoryError: there is not enough memory; it is a `MemoryError`, too.
            CancelledError: `cancel` was cancelled.
        """
        given = {name: value for name, value in locals().items() if name in rules()} | earlier
        return self._paint([self._request(picture, {**given, "mask": mask})], on_step, cancel)[0]

    def request(self, picture: Picture, *, mask: Picture | None = None, **options: Any) -> Request:
        """Read a picture: the first half of `stylize`, which needs no engine, so that threads do it side by side.
        Arguments and errors as of `stylize`."""
        return self._request(picture, {**options, "mask": mask})

    def paint(
        self, requests: Iterable[Request], on_step: OnStep | None = None, cancel: CancelToken | None = None
    ) -> list[Result]:
        """Paint a batch: the second half of `stylize`, and all of it that needs the engines.

        `on_step` is called once a step for the batch, and `cancel` ends all of it. Errors as of `stylize`; a
        `UsageError` for requests of more than one `batch_key`, or of another bundle.

        Args:
            requests: from `request`, all of one `batch_key`.

        Returns:
            The paintings in the order of the requests. The `seconds` of a batch are divided by its pictures.
        """
        batching.require_iterable("requests", requests)
        requests = [*requests]
        if strange := [type(entry).__name__ for entry in requests if not isinstance(entry, Request)]:
            raise UsageError(f"found {strange[0]} in requests; expected what Stylizer.request gives")
        if any(request.bundle.manifest != self.bundle.manifest for request in requests):
            raise UsageError("found a request of another bundle; expected those of this stylizer")
        found = Counter(name for name, _ in {pair for request in requests for pair in request.batch_key})
        if unlike := sorted(name for name, values in found.items() if values > 1):
            raise UsageError(
                f"found requests that differ in {', '.join(unlike)}; expected one batch_key: paint them in two calls"
            )
        return self._paint(requests, on_step, cancel)

    @enough_memory("to paint")
    def _paint(self, requests: Sequence[Request], on_step: OnStep | None, cancel: CancelToken | None) -> list[Result]:
        """Paint requests of this bundle, all of one `batch_key`."""
        if not (on_step is None or callable(on_step)):
            raise UsageError(f"found {type(on_step).__name__} as on_step; expected a function of three arguments")
        if not isinstance(cancel, (CancelToken, type(None))):
            raise UsageError(f"found {type(cancel).__name__} as cancel; expected a lsast.CancelToken")
        if not requests:
            return []
        first = requests[0]
        times: list[float] = []
        previewers: list[Previewer] = []

        def callback(step: int, steps: int, x0: Floats) -> None:
            times.append(time.perf_counter())
            if on_step:
                if not previewers:  # at step 0, x0 is the picture's own latent
                    previewers.extend(request.previewer(z0) for request, z0 in zip(requests, x0, strict=True))
                with self._pool.callback(cancel):
                    on_step(step, steps, lambda index=0: previewers[index](x0[index]))

        with self._pool.exclusive(cancel):
            self.bundle.check_unchanged(in_place=True)
            times.append(time.perf_counter())
            samples = [request.prepare() for request in requests]
            batch = Batch(samples, self.bundle.null_style, first.options.control_scale)
            latents, pictures = sampler.sample(self._networks(first, cancel), batch, callback)
            painted = [
                request.blend_with_previous(latent, picture)
                for request, latent, picture in zip(requests, latents, pictures, strict=True)
            ]
            self.bundle.check_unchanged(in_place=True)  # a backend may have mapped what was written over
            times.append(time.perf_counter())
            if cancel:
                cancel.check()
            provenances = [self._provenance(request) for request in requests]
        phases = {"encode": times[1] - times[0], "denoise": times[-2] - times[1], "decode": times[-1] - times[-2]}
        results = []
        for request, canvas, provenance in zip(requests, painted, provenances, strict=True):
            request.seconds |= {phase: seconds / len(requests) for phase, seconds in phases.items()}
            image = request.compose(canvas)
            results.append(Result(image, request.seconds, request.options, provenance, self.choice))
        return results

    async def stylize_async(self, picture: Picture, style: str | None = None, **options: Any) -> Result:
        """`stylize` for asyncio: it does not block the event loop, and cancelling the task cancels the painting.
        Arguments and errors as of `stylize`, but no `cancel`; `on_step` is called in another thread, from which
        `loop.call_soon_threadsafe` leads back."""
        if options.get("cancel") is not None:
            raise UsageError("found cancel in stylize_async; expected none: cancel the task instead")
        paint = partial(self.stylize, picture, style, **options)
        return await self._pool.run_async(lambda cancel: paint(cancel=cancel))

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
        """Repaint many pictures in batches.

        Pictures share a batch if they have the same painted size, number of steps, `control_scale`, `tile`,
        `cache_interval` and `decoder`, and if all or none have a `guidance` of 1; other options may differ. A painting
        equals that of `stylize` up to rounding: a backend may add up in another order for another batch size.

        Args:
            pictures: see `stylize`; of any size, read a few batches ahead.
            styles: one for all, or one for each picture.
            rows: options of each picture, arguments of `stylize` (also `mask`); they win over `styles` and `options`.
            batch: most pictures in a batch, at least 1; memory grows with it.
            options: arguments of `stylize` for all pictures.

        Yields:
            The paintings in the order of the pictures, each as soon as it and those before it are done. The `seconds`
            of a batch are divided by its pictures.

        Raises:
            LsastError: see `stylize`; raised in the place of its picture, and ends the stream. So does an exception
                that `pictures` raises.
            UsageError: a batch below 1, or fewer or more styles or rows than pictures.
        """
        rule = Rule(int, "", range=Range(1))
        if not rule.accepts(batch := rule.plain(batch)):
            raise UsageError(f"found a batch of {batch!r}; expected {rule.expected}")
        return batching.stream(
            batching.jobs(pictures, styles, rows),
            read=lambda picture, own: self._request(picture, {**options, **own}),
            paint=lambda requests: self._paint(requests, None, cancel),
            batch=batch,
        )

    def stylize_frames(
        self,
        frames: Iterable[Picture],
        style: str | None = None,
        *,
        temporal: TemporalState | None = None,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """Repaint the frames of a video, each so that it follows the painting of the frame before; yields a painting
        before the next frame is read. The other arguments are those of `stylize`, with `on_step` called for every
        frame; an error ends the stream.

        Args:
            frames: in their order; a frame of another size than the one before starts anew.
            temporal: the frame before and its painting; None starts a video. One state serves one video.
        """
        from .video.optical_flow import TemporalState

        batching.require_iterable("frames", frames)
        if not isinstance(temporal, (TemporalState, type(None))):
            raise UsageError(f"found {type(temporal).__name__} as temporal; expected a TemporalState, or None")
        temporal = temporal or TemporalState()
        for frame in frames:
            yield self._paint([self._request(frame, {**options, "style": style}, temporal)], on_step, cancel)[0]

    def provenance(self, picture: Picture, style: str | None = None, **options: Any) -> Provenance:
        """What the painting of a picture would be made of; arguments and errors as of `stylize`, nothing is painted."""
        request = self._request(picture, {**options, "style": style})
        with self._pool.exclusive():
            return self._provenance(request)

    def close(self) -> None:
        """End the paintings under way and free the memory of the engines; the stylizer cannot paint any more. Paintings
        of other threads, queued ones too, end within one run of a graph with `UsageError`. Any thread and any callback
        may call it, and more than once."""
        self._pool.close()

    def __enter__(self) -> Stylizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        where = (self.bundle.path.resolve(), *self._pool.arguments)
        return load, (*where, False, self._preset, self.max_megapixels)

    def _request(self, picture: Picture, given: Mapping[str, Any], temporal: TemporalState | None = None) -> Request:
        """Resolve the options of a picture, among which `given` may have its mask, open its styles and read it."""
        self._pool.check(None)
        options, styles = resolve_options(self.bundle, given, self._preset, self._pool.styles.get)
        with enough_memory("to lay out the picture"):
            return Request(self.bundle, picture, options, styles, given.get("mask"), temporal, self.max_megapixels)

    def _networks(self, request: Request, cancel: CancelToken | None) -> Networks:
        """The networks that paint a request: tiled if its canvas is large, cached if its options say so."""
        manifest, grid, interval = self.bundle.manifest, request.grid, request.options.cache_interval
        denoisers, decoder = graphs_of(request.options)

        def graph(name: str) -> CheckedEngine:
            return CheckedEngine(self._pool.engine(name), partial(self._pool.check, cancel))

        def denoiser() -> Denoiser:
            return CachedDenoiser(graphs, interval, manifest.noise) if interval > 1 else GraphDenoiser(graphs[DENOISER])

        def decode_once(latents: Floats) -> Pixels:
            decode_rgb = partial(networks.decode_rgb, graph(decoder))
            return tiling.tiled_decoder(decode_rgb, grid)(latents) if grid else networks.decode(graph(decoder), latents)

        def decode(latents: Floats) -> Pixels:
            """Decode; if values overflow below fp32, decode again in fp32, and stay there."""
            try:
                return decode_once(latents)
            except networks.NotFiniteError as error:
                if self._pool.engine(decoder).compute_dtype == "fp32":
                    raise
                _log.warning("%s; decoding again in fp32", error)
            self._pool.reopen(decoder, "fp32")
            return decode_once(latents)

        graphs = {name: graph(name) for name in denoisers}
        encode = partial(networks.encode, graph(VAE_ENCODER))
        cond = partial(networks.embed_edges, graph(CONTROLNET_COND))
        return Networks(
            vae_encoder=tiling.tiled_encoder(encode, grid) if grid else encode,
            controlnet_cond=tiling.tiled_encoder(cond, grid) if grid else cond,
            denoiser=tiling.TiledDenoiser(denoiser, grid) if grid else denoiser(),
            vae_decoder=decode,
            latent_scale=np.float32(manifest.latent_scale),
        )

    def _provenance(self, request: Request) -> Provenance:
        engine = self._pool.engine(graphs_of(request.options)[0][0])
        return Provenance(
            bundle=self.bundle.manifest.name,
            bundle_sha256=self._bundle_sha256,
            styles={name: style.fingerprint for name, style in request.styles.items()},
            picture_sha256=pixels_sha256(request.source.rgb, request.source.alpha),
            mask_sha256=None if request.mask is None else pixels_sha256(request.mask),
            painted=request.canvas_size,
            backend=engine.backend,
            device=engine.device,
            compute_dtype=engine.compute_dtype,
            versions=self._versions,
        )


def first_graphs(bundle: Bundle, options: Mapping[str, Any]) -> list[str]:
    """The graphs that paint pictures with `options`, which are opened before the first; `REQUIRED_GRAPHS` if the bundle
    lacks one."""
    denoisers, decoder = graphs_of({**preset_options(options.get("preset")), **options})
    names = (VAE_ENCODER, CONTROLNET_COND, *denoisers, decoder)
    return list(names if bundle.manifest.graphs.keys() >= {*names} else REQUIRED_GRAPHS)
