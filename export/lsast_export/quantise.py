"""A bundle in 8 bits, made from an exported one: for processors, and proven by what it paints.

The new bundle has graphs and weights of its own (`weight_file`) and the fingerprint of the base, so that every style
of the base fits it. It is no base: styles are learned and baked on the bundle that it was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from lsast_engines.bundle import NULL_STYLE, STYLES, Bundle
from lsast_engines.engine import Engine, open_engine
from lsast_engines.errors import ParityError, UsageError, fault_list
from lsast_engines.manifest import QUANTISED
from lsast_engines.spec import CONTROL, DECODER_SMALL, DEEP, DENOISER, PARTS, SHALLOW

from .calibration import Calibration, ends
from .layer_choice import choose_layers
from .plain_graph import Model
from .progress import Progress, silent
from .trial import Feeds, Floats, Pixels, Trial, decode_all, find_contents, make_trials, psnr, relative_error, run_trial
from .weight_file import WeightFile
from .weight_only import quantise_weights

PICTURE_PSNR = "picture_psnr_db"
"""Key of the mean PSNR of held-out paintings in the manifest's `parity`."""
PICTURE_PSNR_LEAST = "picture_psnr_least_db"
"""Key of the least of them."""

_PROBES = 8
"""Steps at which a denoiser's output is compared while layers are chosen."""

_log = logging.getLogger("lsast.export")


@dataclass(frozen=True)
class QuantiseOptions:
    """How a bundle is quantised."""

    precision: Literal["int8", "int8-weights"] = "int8"
    """``int8``: weights and activations, for speed; ``int8-weights``: weights alone, for memory."""
    images: Path | None = None
    """Folder of pictures to calibrate on and to judge by; None draws some."""
    pictures: int = 4
    """Pictures to calibrate on, and as many others to judge by."""
    size: int = 256
    """Their side in pixels, a multiple of the bundle's."""
    target: float = 30.0
    """Least mean PSNR in dB between held-out paintings by the quantised graphs and by the float ones. With ``int8``
    layers stay in float until it is reached (`layer_choice`)."""
    backend: str = "onnxruntime"
    """Backend to judge on."""


def quantise_bundle(
    source: Bundle, out: Path, options: QuantiseOptions | None = None, progress: Progress = silent
) -> Bundle:
    """Write the quantised bundle of `source` to the folder `out`, with its styles; a bundle there is replaced.

    Raises:
        UsageError: it is quantised already, has no style, or options that do not fit it; all at once.
        ParityError: its paintings fall short of the target.
        BundleError: `out` is taken by something else.
        MissingExtraError, BackendError: the backend is not there.
    """
    options = options or QuantiseOptions()
    _require(source, options)
    manifest = source.manifest
    out.parent.mkdir(parents=True, exist_ok=True)
    progress("painting to calibrate")
    contents, origin = find_contents(options.images, 2 * options.pictures, options.size)
    styles = [name for name, path in source.styles().items() if path.parent == source.path / STYLES]
    judges = _Judges(source, contents[1::2], styles, options.backend)
    feeds: list[Feeds] = []
    if options.precision == "int8":
        feeds = _recorded(source, contents[::2], styles, options.backend)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.quantise.") as scratch:
        folder = Path(scratch)
        progress("quantising")
        facts = _write_graphs(source, folder, options, feeds, judges, progress)
        progress("judging by paintings")
        figures = judges.figures(folder)
        _log.info("paintings: %s", figures)
        if figures[PICTURE_PSNR] < options.target:
            raise ParityError(
                f"found {figures[PICTURE_PSNR]:.1f} dB between paintings in {options.precision} and in float; expected "
                f"{options.target:g}: lower --target, or give --images like those to be painted"
            )
        progress("writing the bundle")
        written = dataclasses.replace(
            manifest,
            precision=options.precision,
            parity=figures,
            source={
                **manifest.source,
                **facts,
                "quantised_from": f"{manifest.name} ({manifest.precision})",
                "calibrated_on": f"{options.pictures} pictures ({origin}) at {options.size} pixels, "
                f"{len(feeds)} latents, styles {', '.join(styles)}",
                "judged_on": f"{options.pictures} other pictures, {options.backend}",
                "onnxruntime": importlib.metadata.version("onnxruntime"),
            },
        )
        sources: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        sources[NULL_STYLE] = source.path / NULL_STYLE
        sources |= {f"{STYLES}/{file.name}": file for file in sorted((source.path / STYLES).glob("*.safetensors"))}
        return Bundle.write(out, written, sources, replace=True)


def _require(source: Bundle, options: QuantiseOptions) -> None:
    manifest = source.manifest
    faults = []
    if manifest.precision in QUANTISED:
        faults.append(f"found a bundle in {manifest.precision}; expected the one that it was made from")
    if not any((source.path / STYLES).glob("*.safetensors")):
        faults.append("found no style in it; expected at least one to calibrate with: lsast-export --style NAME --out")
    if options.pictures < 1:
        faults.append(f"found {options.pictures} pictures; expected at least 1")
    if options.size < 1 or options.size % manifest.multiple:
        faults.append(f"found a size of {options.size}; expected a multiple of {manifest.multiple}")
    if faults:
        raise UsageError(fault_list(f"{source.path} cannot be quantised so:", faults))


def _recorded(source: Bundle, contents: Sequence[Pixels], styles: Sequence[str], backend: str) -> list[Feeds]:
    """What the denoiser is fed on paintings that begin at pure noise, so that every stage is among them."""
    feeds: list[Feeds] = []
    with closing(_denoiser(source, source.path, backend)) as denoiser:
        for trial in make_trials(source, contents, styles, [1.0], backend):
            run_trial(source, trial, denoiser, feeds.append)
    return feeds


def _fed_to_parts(source: Bundle, feeds: Sequence[Feeds], backend: str) -> dict[str, list[Feeds]]:
    """What the denoiser's parts are fed where it is fed `feeds`, by name; nothing for a bundle without parts."""
    specs = source.manifest.graphs
    if DEEP not in specs:
        return {}
    fed: dict[str, list[Feeds]] = {name: [] for name in PARTS}

    def taken(name: str, values: Feeds) -> Feeds:
        fed[name].append({tensor.name: values[tensor.name] for tensor in specs[name].inputs})
        return fed[name][-1]

    with contextlib.ExitStack() as stack:
        control, deep = (
            stack.enter_context(closing(open_engine(source.graph_path(name), specs[name], backend, "cpu")))
            for name in (CONTROL, DEEP)
        )
        # Ranges change little from step to step, and a part's inputs are larger than the denoiser's.
        for given in feeds[::2]:
            values = dict(given)
            for name, engine in ((CONTROL, control), (DEEP, deep)):
                values |= {output: value.copy() for output, value in engine(taken(name, values)).items()}
            taken(SHALLOW, values)
    return fed


def _write_graphs(
    source: Bundle,
    folder: Path,
    options: QuantiseOptions,
    feeds: Sequence[Feeds],
    judges: _Judges,
    progress: Progress,
) -> dict[str, str]:
    """Write all graphs and the weight file to `folder`; → facts for the manifest's `source`."""
    facts = {}
    # By their weights: nodes of the parts have other names than the denoiser's.
    kept_weights: frozenset[str] = frozenset()
    fed = {DENOISER: feeds, **_fed_to_parts(source, feeds, options.backend)} if feeds else {}
    with WeightFile(folder) as weights:
        for name in sorted(source.manifest.graphs, key=lambda name: name != DENOISER):
            path = source.graph_path(name)
            kept = ends(path)
            if options.precision == "int8-weights" and name != DECODER_SMALL:  # no painting judges that one
                model = quantise_weights(path, kept)
            elif name in fed:
                calibration = Calibration(path, fed[name])
                if name == DENOISER:
                    choice = choose_layers(
                        calibration, kept, judges.psnr_of, judges.error_of(feeds), options.target, progress
                    )
                    model, kept = choice.graph, choice.kept
                    kept_weights = frozenset(calibration.weights[layer] for layer in kept & set(calibration.layers))
                else:
                    kept |= {layer for layer, weight in calibration.weights.items() if weight in kept_weights}
                    model = calibration.quantised(kept)
                facts[f"{name}_in_float"] = f"{len(kept & set(calibration.layers))} of {len(calibration.layers)} layers"
            else:
                model = onnx.load(str(path), load_external_data=False)
            weights.save(model, source.path, f"{name}.onnx")
    return facts


class _Judges:
    """Held-out paintings: made by the float graphs once, then by others for comparison."""

    def __init__(self, source: Bundle, contents: Sequence[Pixels], styles: Sequence[str], backend: str) -> None:
        self._source, self._backend = source, backend
        # Other styles come to other pictures than in calibration where there are several.
        turned = [*styles[1:], *styles[:1]]
        self._trials: list[Trial] = make_trials(source, contents, turned, [None], backend, seed=1000)
        self._expected = self._paint(source.path, source.path)

    def figures(self, folder: Path) -> dict[str, float]:
        """How near the paintings by the denoiser and decoder of `folder` come."""
        found = [psnr(*pair) for pair in zip(self._paint(folder, folder), self._expected, strict=True)]
        return {PICTURE_PSNR: round(sum(found) / len(found), 2), PICTURE_PSNR_LEAST: round(min(found), 2)}

    def psnr_of(self, denoiser: Model) -> float:
        """Mean PSNR in dB of paintings by `denoiser` and the float decoder."""
        with _saved(denoiser) as folder:
            painted = self._paint(folder, self._source.path)
        return sum(psnr(*pair) for pair in zip(painted, self._expected, strict=True)) / len(painted)

    def error_of(self, feeds: Sequence[Feeds]) -> Callable[[Model], float]:
        """What tells the relative error of a denoiser's output over some of `feeds`, of early and of late steps."""
        chosen = feeds[:: max(1, len(feeds) // _PROBES)]
        with closing(_denoiser(self._source, self._source.path, self._backend)) as engine:
            expected = {str(place): engine(given)["eps"].copy() for place, given in enumerate(chosen)}

        def error(denoiser: Model) -> float:
            with _saved(denoiser) as folder, closing(_denoiser(self._source, folder, self._backend)) as engine:
                found = {str(place): engine(given)["eps"].copy() for place, given in enumerate(chosen)}
            return relative_error(found, expected)

        return error

    def _paint(self, denoiser_folder: Path, decoder_folder: Path) -> list[Pixels]:
        with closing(_denoiser(self._source, denoiser_folder, self._backend)) as denoiser:
            latents: list[Floats] = [run_trial(self._source, trial, denoiser) for trial in self._trials]
        return decode_all(self._source, decoder_folder, latents, self._backend)


@contextlib.contextmanager
def _saved(denoiser: Model) -> Iterator[Path]:
    """A folder with `denoiser`, as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="lsast-quantise.") as scratch:
        folder = Path(scratch)
        copied = onnx.ModelProto()
        copied.CopyFrom(denoiser)
        with WeightFile(folder) as weights:
            weights.save(copied, folder, f"{DENOISER}.onnx")
        yield folder


def _denoiser(source: Bundle, folder: Path, backend: str) -> Engine:
    return open_engine(folder / f"{DENOISER}.onnx", source.manifest.graphs[DENOISER], backend, "cpu")
