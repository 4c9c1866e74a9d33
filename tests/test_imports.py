"""Imports: the runtime and the engines run without torch and load little, and no package has an import cycle.

Times are not asserted here (they belong to benchmarks/), only what is loaded.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
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


def _modules(package: str) -> dict[str, Path]:
    """The files of a package by module name."""
    files = (PACKAGES[package] / package).rglob("*.py")
    return {
        ".".join(file.relative_to(PACKAGES[package]).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def _import_graph(package: str) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports anywhere, but for type checking."""
    modules = _modules(package)
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        parent = name if file.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in _run_nodes(ast.parse(file.read_text(encoding="utf-8"))):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*parts, *([node.module] if node.module else [])])
                children = [f"{source}.{alias.name}" for alias in node.names]
                imported = [child if child in modules else source for child in children]
            graph[name] |= {other for other in imported if other in modules and other != name}
    return graph


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_nodes(node)


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One cycle of the graph, [] without any."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_import_graph_has_no_cycle_of_files(package: str) -> None:
    assert _cycle(_import_graph(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_import_graph_has_no_cycle_of_folders(package: str) -> None:
    """In every folder, its files and subfolders import each other in one direction only."""
    graph = _import_graph(package)
    folders = {name.rpartition(".")[0] for name in graph} - {""}
    for folder in folders:
        siblings: dict[str, set[str]] = {}
        depth = folder.count(".") + 2
        for name, imported in graph.items():
            for other in imported:
                if name.startswith(f"{folder}.") and other.startswith(f"{folder}."):
                    child, other_child = (".".join(module.split(".")[:depth]) for module in (name, other))
                    if child != other_child:
                        siblings.setdefault(child, set()).add(other_child)
        assert _cycle(siblings) == []


def test_cycle_finds_one_where_there_is_one() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}}) == []
    assert "lsast_engines.bundle.manifest" in _import_graph("lsast_engines")["lsast_engines.bundle.bundle"]


def test_server_process_loads_nothing_that_decodes_pictures() -> None:
    pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: pip install '.[server]'")
    loaded = _python("import lsast.server.app, lsast.server.process, lsast.server.cli\nprint(json.dumps(loaded()))")
    assert {"fastapi", "pydantic"} <= set(loaded)
    assert not {"numpy", "PIL", "cv2", "onnxruntime", "torch"} & set(loaded)
    for module in ("cli", "settings", "worker"):
        assert "fastapi" not in _python(f"import lsast.server.{module}\nprint(json.dumps(loaded()))")


def test_every_lean_module_imports_where_torch_is_not() -> None:
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


@pytest.mark.parametrize(
    ("backend", "missing", "runs"),
    [("onnxruntime", (), "onnxruntime"), ("openvino", (), "openvino"), ("auto", ("openvino",), "onnxruntime")],
)
def test_painting_on_a_cpu_loads_no_module_of_a_gpu(backend: str, missing: tuple[str, ...], runs: str) -> None:
    pytest.importorskip(runs)
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
