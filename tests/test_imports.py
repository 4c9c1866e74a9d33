"""What imports load: the runtime and the engines run without torch, and a command line starts with little.

The contracts in pyproject.toml (lint-imports) hold what the source may import, and that it has no import cycle.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lsast": ROOT / "runtime",
    "lsast_engines": ROOT / "engines",
    "lsast_eval": ROOT / "eval",
    "lsast_export": ROOT / "export",
    "lsast_train": ROOT / "train",
}
LEAN = ("lsast", "lsast_engines")
FORBIDDEN = ("torch", "diffusers", "transformers", "accelerate", "onnx", "lsast_train", "lsast_export", "lsast_eval")

_PRELUDE = """
import json, sys
before = set(sys.modules)
def loaded():
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted(names - set(sys.stdlib_module_names) - {"__mp_main__"})
"""


def _python(code: str) -> list[str]:
    """Run code in a fresh interpreter; the JSON list that its last line prints."""
    paths = os.pathsep.join(map(str, PACKAGES.values()))
    completed = subprocess.run(
        [sys.executable, "-c", _PRELUDE + code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    found: list[str] = json.loads(completed.stdout.splitlines()[-1])
    return found


def _modules(package: str) -> list[str]:
    """The names of the modules of a package."""
    files = (PACKAGES[package] / package).rglob("*.py")
    names = (".".join(file.relative_to(PACKAGES[package]).with_suffix("").parts) for file in files)
    return [name.removesuffix(".__init__") for name in names]


def test_server_process_loads_nothing_that_decodes_pictures():
    pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: pip install '.[server]'")
    loaded = _python("import lsast.server.app, lsast.server.process, lsast.server.cli\nprint(json.dumps(loaded()))")
    assert {"fastapi", "pydantic"} <= set(loaded)
    assert not {"numpy", "PIL", "cv2", "onnxruntime", "torch"} & set(loaded)
    for module in ("cli", "settings", "worker"):
        assert "fastapi" not in _python(f"import lsast.server.{module}\nprint(json.dumps(loaded()))")


def test_every_lean_module_imports_where_torch_is_not():
    names = sorted(name for package in LEAN for name in _modules(package) if not name.startswith("lsast.server"))
    assert {"lsast", "lsast.cli.main", "lsast.stylizer", "lsast_engines.backends.registry"} <= set(names)
    loaded = _python(f"""
for name in {FORBIDDEN!r}:
    sys.modules[name] = None  # importing it raises ImportError
import importlib
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps([name for name in loaded() if sys.modules.get(name) is not None]))
""")
    # Backends are imported inside functions, so that no installed backend is loaded here.
    assert set(loaded) <= {*LEAN, "PIL", "click", "cv2", "numpy", "safetensors", "tqdm"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import lsast", {"lsast"}),
        ("from lsast.cli.commands import main; main(['--help'], standalone_mode=False)", {*LEAN, "click"}),
        ("from lsast.cli.main import main; main(['--help'], standalone_mode=False)", {*LEAN, "click"}),
        ("from lsast.cli.main import main; main(['--version'], standalone_mode=False)", {*LEAN, "click"}),
    ],
)
def test_what_must_be_quick_loads_next_to_nothing(code, allowed):
    loaded = set(_python(f"{code}\nprint(json.dumps(loaded()))"))
    assert loaded <= allowed | {"colorama"}  # click's, on Windows


@pytest.mark.parametrize(
    "code",
    [
        "from lsast_export.cli.main import main; main(['--help'], standalone_mode=False)",
        "from lsast_train.cli.main import command; command(['--help'], standalone_mode=False)",
        "from lsast_eval.cli import main; main(['--help'], standalone_mode=False)",
        "import lsast_eval.voting.page",
    ],
)
def test_help_and_voting_load_no_torch(code):
    loaded = set(_python(f"{code}\nprint(json.dumps(loaded()))"))
    assert not loaded & {"torch", "diffusers", "accelerate", "onnx", "onnxscript", "efficientnet_lite_pytorch", "scipy"}


def test_baking_a_style_needs_no_library_but_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("LSAST_HOME", str(tmp_path))
    example = str(ROOT / "examples" / "malevich.prompts.safetensors")
    loaded = _python(f"""
sys.modules.update(dict.fromkeys(["diffusers", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript"]))
from lsast_export.cli.main import main
main(["--style", {example!r}], standalone_mode=False)
print(json.dumps(loaded()))
""")
    assert "torch" in loaded
    assert list(tmp_path.rglob("malevich.safetensors"))


@pytest.mark.parametrize(
    ("backend", "missing", "runs"),
    [("onnxruntime", (), "onnxruntime"), ("openvino", (), "openvino"), ("auto", ("openvino",), "onnxruntime")],
)
def test_painting_on_a_cpu_loads_no_module_of_a_gpu(backend, missing, runs):
    loaded = set(
        _python(f"""
import lsast, numpy
sys.modules.update(dict.fromkeys({missing!r}))
with lsast.load(backend={backend!r}, threads=1) as stylizer:
    stylizer.stylize(numpy.zeros((64, 64, 3), "uint8"), size=64, steps=1)
print(json.dumps(sorted(sys.modules)))
""")
    )
    assert f"lsast_engines.backends.{runs}" in loaded
    assert not [name for name in loaded if name.startswith(("cuda", "tensorrt", "lsast_engines.backends.tensorrt"))]


def test_the_probe_sees_what_it_forbids():
    """The tests above would pass in vain if a loaded library went unseen."""
    assert {"lsast", "lsast_engines", "numpy"} <= set(_python("import lsast; lsast.load\nprint(json.dumps(loaded()))"))


def test_all_is_sorted_and_complete():
    found = _python("import lsast\nprint(json.dumps([n for n in dir(lsast) if not n.startswith('_')]))")
    import lsast

    listed = lsast.__all__
    assert listed == sorted(listed) == [getattr(lsast, name).__name__ for name in listed]
    # Names beyond __all__ that an import leaves behind are helpers of the module, not its face.
    assert set(found) - set(listed) <= {"annotations", "importlib", "TYPE_CHECKING", "Any", "cli", "errors"}


def test_an_unknown_name_is_an_attribute_error():
    import lsast

    with pytest.raises(AttributeError, match="'lsast' has no attribute 'Painter'"):
        lsast.Painter  # noqa: B018
