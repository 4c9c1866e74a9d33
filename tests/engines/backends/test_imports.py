"""Imports of the backends' libraries: without telemetry, and an interrupted one is not a missing one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lsast_engines.backends.base import import_library
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.errors import BackendError

SCRIPT = """
import sys, time
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
bundle = Bundle.open(EMBEDDED)
open_engine(bundle.graph_path("vae_decoder"), bundle.manifest.graphs["vae_decoder"], sys.argv[1], threads=1)
time.sleep(2)  # ONNX Runtime looks up its collector after a while
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_open_engine_under_a_fresh_home_writes_no_file_and_looks_up_no_host(tmp_path: Path, backend: str) -> None:
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    hidden = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(home), "LSAST_HOME": str(tmp_path / "lsast"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, backend]
    strace = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
    traced = (
        shutil.which("strace") and not subprocess.run([*strace, "true"], capture_output=True, check=False).returncode
    )
    subprocess.run([*strace, *command] if traced else command, env=environment, check=True)
    assert not list(home.rglob("*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "lsast"] + ["trace"] * bool(traced)
    if traced:
        assert not [line for line in trace.read_text().splitlines() if "AF_INET" in line]


def fake_library(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "MemoryError"])
def test_open_engine_while_an_import_is_interrupted_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # as pybind11 reports an error of a module's initialisation
    fake_library(tmp_path, monkeypatch, "onnxruntime", f"raise ImportError('initialization failed') from {kind}()")
    bundle = Bundle.open(EMBEDDED)
    with pytest.raises({"KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}[kind]):
        open_engine(bundle.graph_path("vae_decoder"), bundle.manifest.graphs["vae_decoder"])


def test_open_engine_with_a_broken_library_does_not_take_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, "onnxruntime", "raise ImportError('failed to map segment from shared object')")
    bundle = Bundle.open(EMBEDDED)
    with pytest.raises(BackendError, match=r"onnxruntime is installed but cannot be imported \(failed to map"):
        open_engine(bundle.graph_path("vae_decoder"), bundle.manifest.graphs["vae_decoder"])


def test_import_library_of_a_folder_that_pip_left_raises_import_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lsast_left_behind").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="a folder without a library"):
        import_library("lsast_left_behind")


def test_import_library_keeps_the_users_choice_of_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_library("json")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
