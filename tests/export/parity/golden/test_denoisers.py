"""Golden sets through the exported graphs, on every backend that is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from golden_sets import GoldenFiles, both_sets
from lsast_engines.backends.registry import available_backends
from lsast_engines.errors import MissingExtraError
from lsast_export.cli.golden import golden_command
from lsast_export.parity.golden import compare as golden
from lsast_export.parity.golden import denoisers as golden_denoisers
from lsast_export.parity.golden.golden_set import read_golden

BACKENDS = sorted(available_backends())

SHALLOW: dict[str, Any] = {"channel_mult": (1,), "num_heads": 2}
"""One level: the smallest network that has every kind of layer but those that change the resolution."""

RUNS: dict[str, dict[str, Any]] = {
    "not square": {"size": (8, 4)},
    "31 points, all of them but one": {"steps": 30, "strength": 1.0, "size": (3, 5)},
    "unguided": {"guidance": 1.0, "steps": 10, "strength": 0.7},
    "a batch": {"batch": 2, "steps": 7, "strength": 0.9, "size": (5, 4)},
}


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Stands for `export_graphs`: all runs of this module have the same networks, and tracing takes nearly all time."""
    kept = tmp_path_factory.mktemp("graphs")
    export = golden_denoisers.export_graphs

    def export_graphs(base: Any, folder: Path, progress: Any) -> None:
        if not any(kept.iterdir()):
            export(base, kept, progress)
        shutil.copytree(kept, folder, dirs_exist_ok=True)

    return export_graphs


# A second backend computes the same graphs: two of the runs are enough for it.
@pytest.mark.parametrize(
    ("run", "backend"),
    [
        pytest.param(run, backend, id=f"{name}-{backend}")
        for name, run in RUNS.items()
        for backend in (BACKENDS if name in ("not square", "a batch") else BACKENDS[:1])
    ],
)
def test_check_golden_on_a_backend_repeats_the_recording(
    record: Any, run: dict[str, Any], backend: str, exported_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "export_graphs", exported_once)
    prefix = record(**SHALLOW, **run)
    report = golden.check_golden(read_golden(prefix), backend)
    assert report.passed, report.errors
    assert max(report.errors.values()) < 3e-5
    assert report.backend == backend
    in_torch = golden.check_golden(read_golden(prefix))
    assert report.errors.keys() == in_torch.errors.keys()
    # The graphs were run, and not torch again: sums in another order.
    residuals = [name for name in report.errors if name.startswith("control_residual_")]
    assert [report.errors[name] for name in residuals] != [in_torch.errors[name] for name in residuals]


def test_check_golden_on_a_backend_names_what_differs(
    record: Any, exported_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "export_graphs", exported_once)

    def change(tensors: dict[str, Any]) -> None:
        tensors["contexts"][1] *= 1.5  # at the last steps, stage 0, that of the middle
        tensors["control_residual_01"][0, 3, 1, 1] += 0.01

    errors = golden.check_golden(read_golden(record(**SHALLOW, change=change)), BACKENDS[0]).errors
    past = {name for name, error in errors.items() if error > 1e-4}
    assert past >= {"control_residual_01", "eps_cond", "eps_uncond", "final_latent"}
    assert not past & {"timesteps", "start_latent", "control_residual_00"}


def test_check_golden_without_the_backend_fails_at_once(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsast_engines.backends.registry.available_backends", lambda: {"onnxruntime": ["cpu"]})
    monkeypatch.setattr(golden, "golden_base", lambda _: pytest.fail("work was begun"))
    with pytest.raises(MissingExtraError, match=r"lsast\[openvino\]"):
        golden.check_golden(read_golden(record(**SHALLOW)), "openvino")


DEEP: dict[str, dict[str, Any]] = {
    "four levels, not square": {
        "channel_mult": (1, 2, 2, 4), "attending": (0, 1, 2), "num_heads": 8, "size": (8, 24), "steps": 30,
        "strength": 0.5, "guidance": 10.0,
    },
    "two levels, a batch": {"channel_mult": (1, 2), "attending": (1,), "num_res_blocks": 2, "batch": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", DEEP.values(), ids=DEEP)
def test_golden_command_of_deep_networks_passes(record: Any, recipe: dict[str, Any], backend: str) -> None:
    result = CliRunner().invoke(golden_command, [str(record(**recipe)), "--backend", backend])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@both_sets
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_command_of_a_released_run_passes_on_a_backend(golden: GoldenFiles, backend: str) -> None:
    result = CliRunner().invoke(golden_command, [str(golden.prefix), "--backend", backend])
    assert result.exit_code == 0, result.output
