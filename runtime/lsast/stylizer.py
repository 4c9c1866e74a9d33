"""A bundle with its engines open, ready to repaint one picture after another."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle import Bundle, find_bundle
from lsast_engines.engine import Arithmetic, Engine, open_engine
from lsast_engines.errors import UsageError
from lsast_engines.pictures import edge_map, read_picture
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.spec import DECODER, DENOISER, ENCODER, HINT
from lsast_engines.style_file import StyleFile

from . import sampler
from .canvas import Pixels, canvas_for, on_white
from .options import Options
from .result import Result

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("lsast.runtime")


def load(
    bundle: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    arithmetic: Arithmetic = "fp32",
) -> Stylizer:
    """Open a bundle and compile its graphs, once for any number of pictures.

    Args:
        bundle: a bundle's folder or name; None is the one of the environment's LSAST_BUNDLE, else the embedded `mini`.
        backend: `onnxruntime`, `openvino`, or `auto` for one that is installed.
        device: `cpu`, `cuda` …, or `auto` for the CPU.
        threads: threads to compute with; None leaves it to the backend.
        arithmetic: `fp32`, or with `openvino` where the processor has it `bf16` or `fp16`: about twice as fast, and
            off by a grey level or two. If the decoder overflows in it, it is opened in `fp32` and asked again.

    Raises:
        UsageError: fewer threads than 1, or an unknown arithmetic.
        BundleError: there is no such bundle, or it is damaged.
        BackendError: the backend, the device or the arithmetic cannot be had here; the message lists what can.
        MissingExtraError: no backend is installed.
    """
    opened = Bundle.open(find_bundle(bundle))

    def open_graph(name: str, arithmetic: Arithmetic) -> Engine:
        return open_engine(opened.graph_path(name), opened.manifest.graphs[name], backend, device, threads, arithmetic)

    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in opened.manifest.graphs:
            engines[name] = open_graph(name, arithmetic)
            stack.callback(engines[name].close)
        stack.pop_all()
    return Stylizer(opened, engines, lambda name: open_graph(name, "fp32"))


class Stylizer:
    """A bundle's engines and styles, kept open; a context manager. Made by `load`.

    What `stylize` gives depends on the picture, the options and the bundle alone, never on what was painted before.
    Calls from several threads take turns.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], in_fp32: Callable[[str], Engine]) -> None:
        self.bundle = bundle
        self._engines = dict(engines)
        self._in_fp32 = in_fp32
        self._styles: dict[str, StyleFile] = {}
        self._turn = threading.Lock()

    @property
    def styles(self) -> list[str]:
        """Names of the styles there are, sorted."""
        return list(self.bundle.styles())

    @property
    def backend(self) -> str:
        """Name of the backend that the denoiser runs on."""
        return self._engines[DENOISER].backend

    def stylize(
        self,
        picture: str | Path | bytes | Image.Image | npt.NDArray[Any],
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
        on_step: sampler.OnStep | None = None,
    ) -> Result:
        """Repaint a picture; `Options` says what each option means, None is the bundle's default.

        Args:
            picture: a path, the bytes of an image file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4]
                (uint8, uint16, or float in [0, 1]). EXIF orientation is applied.
            on_step: called with (steps done, steps in all) before the first step and after each; an exception that it
                raises ends the painting and comes out here.

        Returns:
            The painting, in the picture's colour profile and, but with `fit` "squash", of its own size.

        Raises:
            UsageError: options that cannot be meant, all named at once; a style that the bundle has not, with a list
                of those it has; or the stylizer is closed.
            StyleError: the style's file is damaged, or was made for another base.
            PictureError: the picture cannot be read.
            BackendError: a graph fails, or gives values that are not finite.
        """
        manifest = self.bundle.manifest
        given = {"style": style, "steps": steps, "strength": strength, "guidance": guidance, "control": control,
                 "size": size, "solver": solver, "seed": seed, "alpha": alpha, "fit": fit}  # fmt: skip
        options = Options.resolve(given, manifest.defaults)
        schedule = Schedule.build(manifest.noise, options.steps, options.strength, manifest.stages, options.solver)
        clock = _Clock()
        with self._turn:
            if not self._engines:
                raise UsageError("the stylizer is closed; open another one with lsast.load()")
            hand = self._style(options.style)

            with clock("read"):
                source = read_picture(picture)
                rgb = source.rgb if options.alpha == "keep" else on_white(source.rgb, source.alpha)
                canvas = canvas_for(source.size, options.size, manifest.multiple, options.fit)
                content, outlined = canvas.views(rgb)
            with clock("edges"):
                hint = sampler.hint_features(self._engines[HINT], edge_map(outlined))
            with clock("encode"):
                rng = np.random.Generator(np.random.PCG64(options.seed))
                z0 = sampler.encode(self._engines[ENCODER], content, manifest.latent_scale, rng)
            with clock("denoise"):
                noise = rng.standard_normal(z0.shape, dtype=np.float32)
                z = sampler.denoise(
                    self._engines[DENOISER],
                    make_solver(options.solver, manifest.noise, schedule),
                    schedule,
                    schedule.add_noise(z0, noise, schedule.start_t),
                    hint,
                    hand,
                    self.bundle.null_style,
                    options.guidance,
                    options.control,
                    on_step,
                )
            with clock("decode"):
                painted = self._decode(z)
            with clock("finish"):
                cover = canvas.cover(source.alpha if options.alpha == "keep" else None)
                image = _finish(canvas.cut(painted), cover, source.icc)
        return Result(image, clock.seconds, options)

    def close(self) -> None:
        """Give the engines' memory and devices back; `stylize` cannot be called any more. Closing twice is fine."""
        with self._turn:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def __enter__(self) -> Stylizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _style(self, name: str) -> StyleFile:
        if name not in self._styles:
            self._styles[name] = self.bundle.open_style(name)
        return self._styles[name]

    def _decode(self, latent: sampler.Floats) -> npt.NDArray[np.uint8]:
        """Decode; if that overflows below fp32, once more in fp32, in which the decoder then stays."""
        engine = self._engines[DECODER]
        scale = self.bundle.manifest.latent_scale
        try:
            return sampler.decode(engine, latent, scale)
        except sampler.NotFiniteError as error:
            if engine.arithmetic == "fp32":
                raise
            _log.warning("%s; decoding again in fp32", error)
        self._engines[DECODER] = self._in_fp32(DECODER)
        engine.close()
        return sampler.decode(self._engines[DECODER], latent, scale)


class _Clock:
    """Wall time of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin


def _finish(rgb: Pixels, alpha: Pixels | None, icc: bytes | None) -> Image.Image:
    """The painting as a PIL image, with the transparency and the colour profile given."""
    from PIL import Image

    image = Image.fromarray(rgb if alpha is None else np.dstack([rgb, alpha]))
    if icc:
        image.info["icc_profile"] = icc
    return image
