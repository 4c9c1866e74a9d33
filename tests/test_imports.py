"""The import contract: the runtime and the engines run where torch is not, and cost little to import.

Times are not asserted here (they belong to benchmarks/); what is loaded is what they depend on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAN = ("lsast", "lsast_engines")
FORBIDDEN = ("torch", "diffusers", "transformers", "accelerate", "onnx", "lsast_train", "lsast_export", "lsast_eval")
HEAVY = (*FORBIDDEN, "PIL", "cv2", "numpy", "onnxruntime", "openvino", "safetensors", "tqdm")

_PRELUDE = """
import json, sys
before = set(sys.modules)
def loaded():
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted(names - set(sys.stdlib_module_names) - {"__mp_main__"})
"""


def _python(code: str) -> list[str]:
    """Run code in a fresh interpreter; the JSON list that its last line prints."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ("engines", "export", "runtime", "train"))
    completed = subprocess.run(
        [sys.executable, "-c", _PRELUDE + code],
        env={**os.environ, "PYTHONPATH": rooms},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    found: list[str] = json.loads(completed.stdout.splitlines()[-1])
    return found


def test_every_lean_module_imports_where_torch_is_not() -> None:
    names = sorted(
        ".".join(path.relative_to(ROOT / room).with_suffix("").parts).removesuffix(".__init__")
        for room, package in (("runtime", "lsast"), ("engines", "lsast_engines"))
        for path in (ROOT / room / package).rglob("*.py")
    )
    assert {"lsast", "lsast.cli.main", "lsast.stylizer", "lsast_engines.backends.base"} <= set(names)
    loaded = _python(f"""
for name in {FORBIDDEN!r}:
    sys.modules[name] = None  # importing it raises ImportError
import importlib
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps([name for name in loaded() if sys.modules.get(name) is not None]))
""")
    # Backends are imported inside functions: what is there to import them is none of the module level's business.
    assert set(loaded) <= {*LEAN, "PIL", "click", "cv2", "numpy", "safetensors", "tqdm"}


LIGHT = {
    "import lsast": ("import lsast", {"lsast"}),
    "--help": (
        "from lsast.cli.main import main; main(['--help'], standalone_mode=False)",
        {"lsast", "lsast_engines", "click"},
    ),
    "--version": (
        "from lsast.cli.main import main; main(['--version'], standalone_mode=False)",
        {"lsast", "lsast_engines", "click"},
    ),
}


@pytest.mark.parametrize(("code", "allowed"), LIGHT.values(), ids=LIGHT)
def test_what_must_be_quick_loads_next_to_nothing(code: str, allowed: set[str]) -> None:
    loaded = set(_python(f"{code}\nprint(json.dumps(loaded()))"))
    assert not loaded & set(HEAVY)
    assert loaded <= allowed | {"colorama"}  # click's, on Windows


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_painting_on_a_cpu_loads_no_module_of_a_gpu(backend: str) -> None:
    pytest.importorskip(backend)
    loaded = set(
        _python(f"""
import lsast, numpy
with lsast.load(backend={backend!r}, threads=1) as stylizer:
    stylizer.stylize(numpy.zeros((64, 64, 3), "uint8"), size=64, steps=1)
print(json.dumps(sorted(sys.modules)))
""")
    )
    assert f"lsast_engines.backends.{backend}" in loaded
    gpu = (
        "cuda",
        "tensorrt",
        "lsast_engines.backends.tensorrt",
    )
    assert not [name for name in loaded if name.startswith(gpu)]


def test_the_probe_sees_what_it_forbids() -> None:
    """The tests above would pass in vain if a loaded library went unseen."""
    assert {"lsast", "lsast_engines", "numpy"} <= set(_python("import lsast; lsast.load\nprint(json.dumps(loaded()))"))


def test_all_is_sorted_and_complete() -> None:
    found = _python("import lsast\nprint(json.dumps([n for n in dir(lsast) if not n.startswith('_')]))")
    listed = _python("import lsast\nprint(json.dumps(lsast.__all__))")
    values = _python("import lsast\nprint(json.dumps([getattr(lsast, n).__name__ for n in lsast.__all__]))")
    assert listed == sorted(listed) == values
    # Names beyond __all__ that an import leaves behind are helpers of the module, not its face.
    assert set(found) - set(listed) <= {"annotations", "importlib", "TYPE_CHECKING", "Any", "cli", "errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lsast

    with pytest.raises(AttributeError, match="'lsast' has no attribute 'Painter'"):
        lsast.Painter  # noqa: B018
