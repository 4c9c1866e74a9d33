"""Makes a bundle in int8 from an exported one, for CPUs, and evaluates it by its pictures.

The new bundle has graphs and weights of its own (`weights`) and the fingerprint of the base, so that every style
of the base fits it. It is no base itself: styles are learned and baked with the bundle that it was made from.
"""

import contextlib
import copy
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from lsast.request import resolve_options
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import NULL_STYLE_FILE, STYLES, Bundle, require_free
from lsast_engines.bundle.graph_spec import DENOISER, UNET_SPLIT_GRAPHS
from lsast_engines.bundle.manifest import QUANTIZED
from lsast_engines.declared_options import option_faults, rules_of
from lsast_engines.environment import package_version
from lsast_engines.errors import LsastError, ParityError, UsageError, fault_list
from lsast_engines.files import NOWHERE, scratch_folder
from lsast_engines.images import psnr

from ..progress import Progress, no_progress
from .calibration import Calibration
from .options import OPTIONAL_GRAPHS, QuantizeOptions
from .paintings import Pixels, load_calibration_images, paint
from .qdq import Ranges
from .weights import NAME, WeightFile

PICTURE_PSNR, PICTURE_PSNR_LEAST = "picture_psnr_db", "picture_psnr_least_db"
"""Keys of the mean PSNR of held-out pictures, and of the lowest, in the manifest's `parity`."""

_log = logging.getLogger("lsast.export")


def quantize_bundle(
    source: Bundle, out: Path, options: QuantizeOptions | None = None, progress: Progress = no_progress
) -> Bundle:
    """Write the quantized bundle of `source` to the folder `out`, with its styles; a bundle there is replaced.

    Raises:
        UsageError: `source` lies at `out`, is quantized already or has no style, or invalid options; all at once.
        ParityError: the pictures miss the target.
        BundleError: `out` is no bundle and not empty.
        MissingExtraError, BackendError: the backend is not installed.
    """
    options = options or QuantizeOptions()
    require_free(out, replace=True)
    source = copy.copy(source)
    source.user_style_folder = NOWHERE  # a user's style of the same name would be painted in place of the bundle's
    styles = list(source.styles())
    _require(source, out, styles, options)
    manifest = source.manifest
    progress("calibrating")
    contents, origin = load_calibration_images(options.images, 2 * options.pictures, options.size)
    with scratch_folder(out.parent) as scratch:
        (folder := scratch / "bundle").mkdir()
        facts = _write_graphs(source, folder, contents[::2], styles, options, progress)
        progress("evaluating")
        # With several styles, each is evaluated on other pictures than it was calibrated on.
        turned = [*styles[1:], *styles[:1]]
        engines = {
            name: open_engine(folder / f"{name}.onnx", manifest.graphs[name], options.backend, "cpu")
            for name in (DENOISER, *options.also)
        }
        found, expected = (
            paint(source, contents[1::2], turned, options.backend, graphs, seed=1000, progress=progress)
            for graphs in (engines, {})
        )
        # That of equal pictures is infinite, which a manifest cannot hold.
        ratios = [min(psnr(*pair), 100.0) for pair in zip(found, expected, strict=True)]
        figures = {PICTURE_PSNR: round(sum(ratios) / len(ratios), 2), PICTURE_PSNR_LEAST: round(min(ratios), 2)}
        _log.info("held-out pictures: %s", figures)
        if figures[PICTURE_PSNR] < options.target:
            raise ParityError(
                f"found {figures[PICTURE_PSNR]:.1f} dB between pictures in int8 and in float; expected "
                f"{options.target:g}: lower --target, or calibrate on --images like those that will be repainted"
            )
        progress("writing the bundle")
        written = dataclasses.replace(
            manifest,
            storage_dtype="int8",
            parity=figures,
            source={
                **manifest.source,
                **facts,
                "quantized_from": f"{manifest.name} ({manifest.storage_dtype})",
                "calibrated_on": f"{options.pictures} pictures ({origin}) at {options.size} pixels, "
                f"styles {', '.join(styles)}",
                "evaluated_on": f"{options.pictures} other pictures, {options.backend}",
                "onnxruntime": package_version("onnxruntime"),
            },
        )
        sources: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        sources[NULL_STYLE_FILE] = source.path / NULL_STYLE_FILE
        sources |= {f"{STYLES}/{file.name}": file for file in sorted((source.path / STYLES).glob("*.safetensors"))}
        return Bundle.write(out, written, sources, replace=True)


def _require(source: Bundle, out: Path, styles: Sequence[str], options: QuantizeOptions) -> None:
    manifest = source.manifest
    faults = []
    if out.exists() and out.samefile(source.path):
        faults.append("out: found the folder of the bundle itself; expected another, as styles are learned on it only")
    if manifest.storage_dtype in QUANTIZED:
        faults.append(f"found a bundle in {manifest.storage_dtype}; expected the one that it was made from")
    if not styles:
        faults.append("found no style in it; expected at least one to calibrate with: lsast-export bundle --style NAME")
    rules = rules_of(QuantizeOptions).items()
    declared = {name: rule.plain(getattr(options, name)) for name, rule in rules if rule.help}
    faults += (wrong := option_faults(QuantizeOptions, declared))
    if not any(fault.startswith("size:") for fault in wrong) and options.size % manifest.multiple:
        faults.append(f"size: found {options.size}; expected a multiple of {manifest.multiple}")
    if unknown := sorted(options.also - set(OPTIONAL_GRAPHS)):
        faults.append(f"found also {', '.join(unknown)}; expected of {', '.join(OPTIONAL_GRAPHS)}")
    for name in styles:
        try:
            resolve_options(source, {"style": name}, None, source.open_style)
        except LsastError as error:
            faults.append(f"style {name}: {error}")
    if faults:
        raise UsageError(fault_list(f"{source.path} cannot be quantized:", faults))


def _write_graphs(
    source: Bundle,
    folder: Path,
    contents: Sequence[Pixels],
    styles: Sequence[str],
    options: QuantizeOptions,
    progress: Progress,
) -> dict[str, str]:
    """Write the denoiser, the split graphs and the graphs of `also` in int8, calibrated on `contents`; copy the rest.

    Returns entries for the manifest's `source`.
    """
    facts = {"smoothed": "no" if options.smooth is None else f"alpha {options.smooth:g}"}
    graphs = source.manifest.graphs

    @contextlib.contextmanager
    def calibrated(name: str) -> Iterator[Calibration]:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as scratch:
            yield Calibration(source.graph_path(name), graphs[name], Path(scratch))

    with (folder / NAME).open("wb") as file:
        weights = WeightFile(file)

        def save(name: str, calibration: Calibration, ranges: Ranges | None = None) -> None:
            progress(f"quantizing {name}")
            kept = calibration.float_layers
            weights.save(calibration.quantized(kept, ranges), calibration.folder, f"{name}.onnx")
            facts[f"{name}_in_float"] = f"{len(kept)} of {len(calibration.layers)} layers"

        with contextlib.ExitStack() as stack:
            engines = {name: stack.enter_context(calibrated(name)) for name in (DENOISER, *sorted(options.also))}
            # From pure noise, which visits every stage.
            paint(source, contents, styles, options.backend, engines, strength=1.0, progress=progress)
            denoiser = engines[DENOISER]
            factors = denoiser.smoothing_factors(options.smooth) if options.smooth is not None else {}
            denoiser.smooth(factors)
            ranges = denoiser.ranges
            for name, calibration in engines.items():
                save(name, calibration)
        for name in sorted(graphs.keys() - engines):
            if name in UNET_SPLIT_GRAPHS:
                # A part has the layers of the whole denoiser, with the same inputs, and so the same ranges.
                with calibrated(name) as calibration:
                    calibration.smooth(factors)
                    save(name, calibration, ranges)
            else:
                model = onnx.load(str(source.graph_path(name)), load_external_data=False)
                weights.save(model, source.path, f"{name}.onnx")
    return facts
