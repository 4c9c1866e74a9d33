"""A bundle with its engines open, ready to repaint one picture after another."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lsast_engines.bundle import Bundle, find_bundle
from lsast_engines.engine import Engine, open_engine
from lsast_engines.errors import UsageError
from lsast_engines.pictures import Picture, edge_map, read_picture
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.spec import DECODER, DENOISER, ENCODER, HINT
from lsast_engines.style import Style

from . import sampler
from .canvas import Canvas, on_white
from .options import Options
from .result import Result

if TYPE_CHECKING:
    from PIL import Image


def load(
    bundle: str | Path | None = None, backend: str = "auto", device: str = "auto", threads: int | None = None
) -> Stylizer:
    """Open a bundle and compile its graphs, once for any number of pictures.

    Args:
        bundle: a bundle's folder or name; None is the one of the environment's LSAST_BUNDLE, else the embedded `mini`.
        backend: `onnxruntime`, `openvino`, or `auto` for one that is installed.
        device: `cpu`, `cuda` …, or `auto` for the CPU.
        threads: threads to compute with; None leaves it to the backend.

    Raises:
        BundleError: there is no such bundle, or it is damaged.
        BackendError: the backend or the device cannot be had here; the message lists what can.
        MissingExtraError: no backend is installed.
    """
    opened = Bundle.open(find_bundle(bundle))
    with contextlib.ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, spec in opened.manifest.graphs.items():
            engines[name] = open_engine(opened.graph_path(name), spec, backend, device, threads)
            stack.callback(engines[name].close)
        stack.pop_all()
    return Stylizer(opened, engines)


class Stylizer:
    """A bundle's engines and styles, kept open; a context manager. Made by `load`.

    What `stylize` gives depends on the picture, the options and the bundle alone, never on what was painted before.
    Calls from several threads take turns.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        self.bundle = bundle
        self._engines = dict(engines)
        self._styles: dict[str, Style] = {}
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
        on_step: sampler.OnStep | None = None,
    ) -> Result:
        """Repaint a picture; `Options` says what each option means, None is the bundle's default.

        Args:
            picture: a path, the bytes of an image file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4]
                (uint8, uint16, or float in [0, 1]). EXIF orientation is applied.
            on_step: called with (steps done, steps in all) before the first step and after each; an exception that it
                raises ends the painting and comes out here.

        Returns:
            The painting, of the picture's own size and in its colour profile.

        Raises:
            UsageError: options that cannot be meant, all named at once; a style that the bundle has not, with a list
                of those it has; or the stylizer is closed.
            StyleError: the style's file is damaged, or was made for another base.
            PictureError: the picture cannot be read.
            BackendError: a graph fails, or gives values that are not finite.
        """
        manifest = self.bundle.manifest
        given = {"style": style, "steps": steps, "strength": strength, "guidance": guidance, "control": control,
                 "size": size, "solver": solver, "seed": seed, "alpha": alpha}  # fmt: skip
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
                canvas = Canvas.fit(source.size, options.size, manifest.multiple)
                content = canvas.place(rgb)
            with clock("edges"):
                hint = sampler.hint_features(self._engines[HINT], edge_map(content))
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
                painted = sampler.decode(self._engines[DECODER], z, manifest.latent_scale)
            with clock("finish"):
                image = _finish(canvas.cut(painted), source, options)
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

    def _style(self, name: str) -> Style:
        if name not in self._styles:
            self._styles[name] = self.bundle.style(name)
        return self._styles[name]


class _Clock:
    """Wall time of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin


def _finish(rgb: npt.NDArray[np.uint8], source: Picture, options: Options) -> Image.Image:
    """The painting as a PIL image, with the source's transparency and colour profile."""
    from PIL import Image

    layers = rgb if source.alpha is None or options.alpha == "composite" else np.dstack([rgb, source.alpha])
    image = Image.fromarray(layers)
    if source.icc:
        image.info["icc_profile"] = source.icc
    return image
