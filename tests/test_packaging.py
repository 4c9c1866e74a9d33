"""What pyproject.toml promises about installing: lean, one ONNX Runtime at a time, one version."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import lsast
from lsast_engines.backends.registry import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "engines": "lsast_engines",
    "eval": "lsast_eval",
    "export": "lsast_export",
    "runtime": "lsast",
    "train": "lsast_train",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded


def _names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", requirement).group().lower() for requirement in requirements}


def test_base_install_is_all_that_the_runtime_needs(project):
    assert _names(project["project"]["dependencies"]) == {
        "click", "numpy", "opencv-python-headless", "pillow", "safetensors", "tqdm",
    }  # fmt: skip


def test_no_extra_brings_two_onnx_runtimes(project):
    extras = {extra: _names(wanted) for extra, wanted in project["project"]["optional-dependencies"].items()}
    # Both wheels write into one folder. An extra that pulls in another one (lsast[cpu]) would hide a second wheel.
    carriers = {extra for extra, names in extras.items() if any(name.startswith("onnxruntime") for name in names)}
    assert carriers == {"cpu", "gpu"}
    assert not any("lsast" in names for names in extras.values())
    assert {name for name in extras["cpu"] | extras["gpu"] if name.startswith("onnxruntime")} == {
        "onnxruntime", "onnxruntime-gpu",
    }  # fmt: skip
    assert len(extras["cpu"]) == len(extras["gpu"]) == 1


def test_the_errors_name_extras_that_there_are(project):
    sources = [path for folder, package in PACKAGES.items() for path in (ROOT / folder / package).rglob("*.py")]
    calls = [
        re.findall(r"MissingExtraError\([^,)]+,\s*\"(\w+)\"", path.read_text(encoding="utf-8")) for path in sources
    ]
    named = {*EXTRAS.values(), *(extra for call in calls for extra in call)}
    assert {"cpu", "train"} <= named
    assert named <= project["project"]["optional-dependencies"].keys()


def test_there_is_one_version(project):
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "runtime/lsast/_version.py"
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [lsast.__version__]


def test_every_package_is_packaged_and_typed(project):
    folders = [f"{folder}/{package}" for folder, package in PACKAGES.items()]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == folders
    assert project["tool"]["pytest"]["ini_options"]["pythonpath"] == [*PACKAGES, ".", "tests/fakes", "tests/oracles"]
    for folder in folders:
        assert (ROOT / folder / "py.typed").is_file()
        assert (ROOT / folder / "__init__.py").is_file()


def test_the_readmes_test_command_is_the_one_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^<!-- test-command -->\n+```sh\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert "pip install -c constraints.txt -e '.[cpu,openvino,server,train,export,eval,dev]'" in command
    assert command.endswith("pytest")
    assert "<!-- test-command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
