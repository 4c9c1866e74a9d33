"""ComfyUI's nodes, the Gradio app and the notebook, each against what the library paints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lsast

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK: dict[str, Any] = {"steps": 2, "strength": 1.0, "size": 64, "guidance": 1.0}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, bundle_path: Path) -> None:
    monkeypatch.setenv("LSAST_BUNDLE", str(bundle_path))


def _default(spec: Any) -> Any:
    """What ComfyUI takes for an input that nobody sets: the first of a list of choices, or the default."""
    kind, *options = spec if isinstance(spec, tuple) else (spec,)
    return kind[0] if isinstance(kind, list) else options[0]["default"]


def test_comfyui_nodes_follow_its_conventions_and_paint(photo: np.ndarray, stylizer: lsast.Stylizer) -> None:
    package = _load(EXAMPLES / "comfyui" / "__init__.py")
    nodes = package.NODE_CLASS_MAPPINGS
    assert {*package.NODE_DISPLAY_NAME_MAPPINGS} == {*nodes}
    for node in nodes.values():
        assert callable(getattr(node, node.FUNCTION))
        assert all(kind.isupper() for kind in node.RETURN_TYPES)
        assert node.CATEGORY == "lsast"
    load, mix, stylize = (nodes[f"Lsast{name}"] for name in ("LoadBundle", "Mix", "Stylize"))
    inputs = {name: _default(spec) for name, spec in load.INPUT_TYPES()["required"].items()}
    (opened,) = getattr(load(), load.FUNCTION)(**inputs)
    assert {*mix.INPUT_TYPES()["required"]["first"][0]} == {*stylizer.styles}
    (style,) = mix().mix("monet", "vangogh", 0.7)
    assert style == "monet:0.7+vangogh:0.3"
    images = torch.from_numpy(np.stack([photo, photo[:, ::-1]]).astype(np.float32) / 255)
    mask = torch.zeros(1, *photo.shape[:2])
    mask[:, :, 80:] = 1
    with opened:
        (painted,) = stylize().stylize(opened, images, style, strength=0.9, size=64, seed=3, mask=mask)
    assert (painted.shape, painted.dtype) == (images.shape, torch.float32)
    assert 0 <= painted.min() <= painted.max() <= 1
    array = (np.asarray(mask[0]) * 255).astype(np.uint8)
    expected = stylizer.stylize(photo, style, strength=0.9, size=64, seed=3, mask=array).image
    assert np.abs(np.asarray(painted[0]) * 255 - np.asarray(expected)).max() <= 2
    np.testing.assert_allclose(painted[1, :, :80], images[1, :, :80], atol=1e-6)


def test_gradio_app_paints_and_is_short(
    photo: np.ndarray, stylizer: lsast.Stylizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    stub = ModuleType("gradio")
    widgets = {name: (lambda *values, **named: (values, named)) for name in ("Dropdown", "Slider", "Number")}
    stub.__dict__.update(widgets, Interface=lambda paint, *layout, **named: made.update(paint=paint, layout=layout))
    monkeypatch.setitem(sys.modules, "gradio", stub)
    path = EXAMPLES / "gradio" / "app.py"
    app = _load(path)
    assert len([line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]) < 20
    with app.stylizer:
        assert made["layout"][0][1] == ((stylizer.styles,), {})
        painted = made["paint"](photo, "monet", 0.5, 4.0)
    np.testing.assert_array_equal(painted, stylizer.stylize(photo, "monet", strength=0.5, seed=4).image)


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.needs("nbclient", "ipykernel")
def test_notebook_runs_from_top_to_bottom(photo: np.ndarray, tmp_path: Path, bundle_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "picture.png")
    source, executed = EXAMPLES / "paint.ipynb", tmp_path / "executed.ipynb"
    environment = {
        **os.environ,
        "LSAST_BUNDLE": str(bundle_path),
        "LSAST_PICTURE": "picture.png",
        "LSAST_SIZE": "64",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    # A process of its own: the client's event loop does not live with warnings that are errors.
    command = [sys.executable, "-c", EXECUTE, str(source), str(executed)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(not cell.get("outputs") for cell in json.loads(source.read_text())["cells"])  # committed without output
    shown = [json.dumps(cell.get("outputs")) for cell in json.loads(executed.read_text())["cells"]]
    assert sum("image/png" in text for text in shown) == 5
