"""Verifies a bundle where it will run: files, weights, styles, and parity with torch."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from lsast_engines.backends.base import ComputeDtype
from lsast_engines.backends.choice import LEAST_PSNR, Choice, choose
from lsast_engines.backends.registry import find_backend, open_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY
from lsast_engines.bundle.manifest import QUANTIZED
from lsast_engines.errors import BundleError, LsastError, fault_list
from lsast_engines.files import file_sha256
from lsast_engines.images import psnr
from lsast_train.base.lazy_base import LazyBase, open_base

from ..graphs.modules import base_on_meta, geometry
from ..graphs.small_decoder import WEIGHTS as SMALL_WEIGHTS
from ..graphs.small_decoder import read_small_decoder
from ..parity.parity import TOLERANCE, measure_parity, measure_small_parity
from ..progress import Progress, no_progress
from ..quantize.paintings import Pixels, load_calibration_images, paint
from ..styles.bake import KVProjector, bake_null_style
from .export import WEIGHTS

INT8_MARGIN = 1.5
"""How many dB of PSNR computing in bf16 may cost an int8 bundle, see `check_bundle`."""


@dataclass(frozen=True)
class CheckReport:
    """The result of checking a bundle whose files are sound."""

    bundle: Path
    backend: str
    figures: dict[str, float]
    """Largest relative error by graph, measured by this check."""
    recorded: dict[str, float]
    """The same, measured at export."""
    tolerance: float
    styles: tuple[str, ...]
    """Names of its styles, all of which fit."""
    auto: Choice | None = None
    """What ``auto`` takes here, where that is not float32."""
    auto_psnr: float | None = None
    """PSNR in dB of a picture that it paints to the same in float32."""
    auto_expected: float = LEAST_PSNR
    """The least that passes; for a bundle in int8 see `check_bundle`."""

    @property
    def faults(self) -> list[str]:
        """What is past the tolerance or not exact enough, and what to do, a line each."""
        faults = []
        if not all(error <= self.tolerance for error in self.figures.values()):
            faults.append("does not compute what torch computes here; export it again, or use another backend")
        if self.auto is not None and self.auto_psnr is not None and not self.auto_psnr >= self.auto_expected:
            faults.append(
                f"is {self.auto_psnr:.1f} dB from fp32 with {self.auto.backend} in {self.auto.compute_dtype} here; "
                f"expected {self.auto_expected:.3g}: paint with --compute-dtype fp32"
            )
        return faults

    @property
    def passed(self) -> bool:
        """Whether there are no `faults`."""
        return not self.faults


def check_bundle(
    path: Path,
    backend: str = "auto",
    device: str = "auto",
    progress: Progress = no_progress,
) -> CheckReport:
    """Verify the bundle at `path`: hashes, graphs, weights, every style, then parity on `backend`.

    Parity is that of float32. With the backend ``auto`` a picture in the dtype that the runtime takes here is compared,
    too.

    A quantized bundle has no weights for torch: its graphs are opened on `backend`, and the figures are those that were
    recorded when it was made. Two backends round int8 differently, which changes a picture more than bf16 does. So the
    pictures of ``auto`` and of its backend in float32 are both compared with the picture of another backend in float32;
    the PSNR of ``auto`` may be lower by at most `INT8_MARGIN`. Without another backend nothing is measured.

    Raises:
        BundleError: a file, graph or style that is damaged; all faults of a phase at once.
        MissingExtraError, BackendError: the backend is not installed or cannot run the graphs.
        ParityError: an output holds NaN or infinite values.
    """
    find_backend(backend, device, None)  # before long work
    progress("verifying files")
    bundle = Bundle.open(path)
    manifest, quantized = bundle.manifest, bundle.manifest.storage_dtype in QUANTIZED
    graphs = {name: bundle.graph_path(name) for name in manifest.graphs}
    progress("verifying graphs, weights and styles")
    base = None if quantized else open_base(path)
    faults = _graph_faults(graphs) + (_base_faults(bundle, base) if base is not None else []) + _style_faults(bundle)
    if faults:
        mend = "quantize" if quantized else "export"
        raise BundleError(fault_list(f"{path} is damaged; {mend} it again:", faults))
    figures: dict[str, float] = {}
    if base is None:
        for name, graph in graphs.items():
            open_engine(graph, manifest.graphs[name], backend, device).close()
    else:
        figures = measure_parity(base, graphs, manifest.graphs, backend, device, progress)
        if VAE_DECODER_TINY in graphs:
            small = read_small_decoder(path / SMALL_WEIGHTS, manifest)
            figures |= measure_small_parity(small, graphs[VAE_DECODER_TINY], manifest, backend, device, progress)
    tolerance = 0.0 if quantized else TOLERANCE
    report = CheckReport(path, backend, figures, manifest.parity, tolerance, tuple(bundle.styles()))
    return _with_auto(report, bundle, device, progress)


def _with_auto(report: CheckReport, bundle: Bundle, device: str, progress: Progress) -> CheckReport:
    """`report` with a generated picture of ``auto`` compared, if that was asked for and is not float32."""
    if {report.backend, device} != {"auto"} or (auto := choose(bundle)).compute_dtype == "fp32" or not report.styles:
        return report
    quantized = bundle.manifest.storage_dtype in QUANTIZED
    if quantized and find_backend("auto", device, "fp32")[0] == auto.backend:
        return report
    progress(f"painting with {auto.backend} in {auto.compute_dtype}")
    multiple = bundle.manifest.multiple
    size = max(bundle.manifest.defaults["size"] or 512, 64)  # 0 is a picture's own size, and a drawn one has none
    contents, _ = load_calibration_images(None, 1, -(-size // multiple) * multiple)

    def painted(backend: str, compute_dtype: ComputeDtype) -> Pixels:
        return paint(bundle, contents, [report.styles[0]], backend, compute_dtype=compute_dtype)[0]

    exact = painted("auto", "fp32")
    report = replace(report, auto=auto, auto_psnr=psnr(painted(auto.backend, auto.compute_dtype), exact))
    if quantized:
        report = replace(report, auto_expected=psnr(painted(auto.backend, "fp32"), exact) - INT8_MARGIN)
    return report


def _graph_faults(graphs: dict[str, Path]) -> list[str]:
    faults = []
    for path in graphs.values():
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, OSError) as error:
            faults.append(f"{path.name}: {error}")
    return faults


def _base_faults(bundle: Bundle, base: LazyBase) -> list[str]:
    """Differences between the weights and the fingerprint, the manifest and the null style."""
    manifest = bundle.manifest
    networks = base_on_meta(base)
    projector = KVProjector.of_base(networks, base)
    faults = []
    if (found := file_sha256(bundle.path / WEIGHTS)) != manifest.fingerprint:
        faults.append(f"{WEIGHTS}: found SHA-256 {found[:12]}…; expected the fingerprint {manifest.fingerprint[:12]}…")
    if base.fingerprint != manifest.fingerprint:
        faults.append(f"base.json: found fingerprint {base.fingerprint[:12]}…; expected {manifest.fingerprint[:12]}…")
    if geometry(networks) != manifest.geometry or projector.layers != manifest.attention_layers:
        faults.append("manifest.json: geometry or attention_layers are not those of base.json's networks")
        return faults
    null_style = bake_null_style(projector)
    for name in ("kv_unet", "kv_control"):
        expected = getattr(null_style, name)
        # Styles are stored in half precision, 2^-11 of each value; sums that cancel differ between machines.
        if not np.allclose(getattr(bundle.null_style, name), expected, rtol=2**-10, atol=1e-5 * np.abs(expected).max()):
            faults.append(f"null.safetensors: {name} is not the base's null context, baked")
    return faults


def _style_faults(bundle: Bundle) -> list[str]:
    faults = []
    for name in bundle.styles():
        try:
            bundle.style(name)
        except LsastError as error:
            faults.append(f"{error}")
    return faults
