"""The examples run, and give what the library gives: also ComfyUI's nodes, the Gradio app, the notebook and Ray."""

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
from lsast.options.style_mix import Mix
from lsast.request import resolve_options
from lsast_engines.bundle.bundle import Bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("folder")


def _example(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_all_have_a_test():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("**/test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in text or f"{path.stem}.py" in text, f"no test names {path.name}"


QUICK: dict[str, Any] = {"steps": 2, "strength": 1.0, "size": 64, "guidance": 1.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stylizers take two steps at 64 x 64 whatever they are asked."""

    def resolve_quick(bundle: Bundle, given: dict[str, Any], *others: Any) -> Any:
        return resolve_options(bundle, {**given, **QUICK}, *others)

    monkeypatch.setattr("lsast.stylizer.resolve_options", resolve_quick)


def test_paint_example_paints_each_picture_in_each_style(photo, stylizer, tmp_path, quick):
    for name, rgb in (("a", photo), ("b", photo[:, ::-1])):
        Image.fromarray(rgb).save(tmp_path / f"{name}.png")
    example = _example("paint")
    example.main(tmp_path / "out", [tmp_path / "a.png", tmp_path / "b.png"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}-{index}.png" for name in "ab" for index in range(3)
    ]
    for name, index in (("a", 1), ("b", 2)):
        alone = stylizer.stylize(tmp_path / f"{name}.png", example.STYLES[index], seed=7, **QUICK)
        with Image.open(tmp_path / "out" / f"{name}-{index}.png") as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(alone.image)).max() <= 2


def test_paint_example_without_pictures_says_the_usage():
    done = subprocess.run([sys.executable, str(EXAMPLES / "paint.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "python examples/paint.py OUT_FOLDER PICTURE …" in done.stderr
    assert "Traceback" not in done.stderr


def _news(painter: Any) -> list[tuple[str, Any]]:
    found = []
    while not painter.news.empty():
        found.append(painter.news.get())
    return found


@pytest.fixture
def window() -> ModuleType:
    pytest.importorskip("tkinter", reason="this Python has no Tk")
    return _example("window")


def test_window_example_painter_reports_previews_and_the_end(window, photo, stylizer):
    painter = window.Painter(stylizer)
    painter.start(photo, **QUICK).join()
    news = _news(painter)
    assert [kind for kind, _ in news] == ["preview", "preview", "preview", "done"]
    assert [share for kind, (share, _) in news[:3]] == [0, 0.5, 1]
    np.testing.assert_array_equal(news[-1][1].image, stylizer.stylize(photo, **QUICK).image)
    painter.start(photo, style="picasso").join()
    ((kind, message),) = _news(painter)
    assert (kind, "picasso" in message) == ("failed", True)


def test_window_example_painter_stops_for_the_next(window, photo, stylizer):
    painter = window.Painter(stylizer)
    first = painter.start(photo, steps=500, strength=1.0, size=64)
    second = painter.start(photo, **QUICK)
    first.join()
    second.join()
    kinds = [kind for kind, _ in _news(painter)]
    assert kinds.count("stopped") == 1
    assert kinds[-1] == "done" or kinds[-2:] == ["done", "stopped"]


def test_frames_example_writes_pictures(photo, stylizer, tmp_path, quick):
    import cv2

    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 10, photo.shape[1::-1])
    for shift in range(5):
        writer.write(np.ascontiguousarray(np.roll(photo, shift, axis=1)[..., ::-1]))
    writer.release()
    if not clip.stat().st_size:
        pytest.skip("this OpenCV writes no MJPG")
    example = _example("frames")
    read = list(example.frames(clip, every=2))
    assert len(read) == 3
    assert np.abs(read[1].astype(int) - np.roll(photo, 2, axis=1)).mean() < 8  # JPEG, half the chroma
    assert example.main(clip, tmp_path / "out", 2, {"style": "monet"}) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{n:05d}.png" for n in range(3)]
    with Image.open(tmp_path / "out" / "00000.png") as image:
        np.testing.assert_array_equal(image, stylizer.stylize(read[0], "monet", **QUICK).image)


def _default(spec: Any) -> Any:
    """What ComfyUI takes for an input that nobody sets: the first of a list of choices, or the default."""
    kind, *options = spec if isinstance(spec, tuple) else (spec,)
    return kind[0] if isinstance(kind, list) else options[0]["default"]


def test_comfyui_nodes_follow_its_conventions_and_paint(photo, stylizer):
    package = _example("comfyui/__init__")
    nodes = package.NODE_CLASS_MAPPINGS
    assert {*package.NODE_DISPLAY_NAME_MAPPINGS} == {*nodes}
    for node in nodes.values():
        assert callable(getattr(node, node.FUNCTION))
        assert all(kind.isupper() for kind in node.RETURN_TYPES)
        assert node.CATEGORY == "lsast"
    load, mix, stylize = (nodes[f"Lsast{name}"] for name in ("LoadBundle", "Mix", "Stylize"))
    inputs = {name: _default(spec) for name, spec in load.INPUT_TYPES()["required"].items()}
    (opened,) = getattr(load(), load.FUNCTION)(**inputs)
    given = {name: _default(spec) for name, spec in mix.INPUT_TYPES()["required"].items()}
    assert given["first"] in stylizer.styles
    assert mix.INPUT_TYPES()["required"]["first"][0] == mix.RETURN_TYPES[0]  # else ComfyUI refuses the link
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


@pytest.mark.parametrize(
    ("first", "second", "share", "expected"),
    [
        ("vangogh:0.6+monet:0.4", "koson", 0.5, "vangogh:0.3+monet:0.2+koson:0.5"),
        ("koson", "vangogh:3+monet", 0.2, "koson:0.2+vangogh:0.6+monet:0.2"),
        ("vangogh@up", "koson:2@down@0-4", 0.5, "vangogh:0.5@up+koson:0.5@down@0-4"),
    ],
)
def test_comfyui_mix_of_mixes_is_a_style(first, second, share, expected):
    assert _example("comfyui/__init__").Mix().mix(first, second, share) == (expected,)
    Mix.parse(expected)


def test_gradio_app_paints_and_is_short(photo, stylizer, monkeypatch):
    made: dict[str, Any] = {}
    stub = ModuleType("gradio")
    widgets = {name: (lambda *values, **named: (values, named)) for name in ("Dropdown", "Slider", "Number")}
    stub.__dict__.update(widgets, Interface=lambda paint, *layout, **named: made.update(paint=paint, layout=layout))
    monkeypatch.setitem(sys.modules, "gradio", stub)
    app = _example("gradio/app")
    text = (EXAMPLES / "gradio" / "app.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) < 20
    with app.stylizer:
        assert made["layout"][0][1] == ((stylizer.styles,), {})
        painted, other = (made["paint"](photo, "monet", 0.5, seed) for seed in (4.0, None))  # None is an empty field
    np.testing.assert_array_equal(painted, stylizer.stylize(photo, "monet", strength=0.5, seed=4).image)
    np.testing.assert_array_equal(other, stylizer.stylize(photo, "monet", strength=0.5, seed=0).image)


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.needs("nbclient", "ipykernel")
def test_notebook_runs_from_top_to_bottom(tmp_path):
    source, executed = EXAMPLES / "paint.ipynb", tmp_path / "executed.ipynb"
    environment = {
        **os.environ,
        "LSAST_PICTURE": "in.png",
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


@pytest.mark.slow
@pytest.mark.needs("ray")
def test_ray_example_paints_what_one_stylizer_paints(photo, tmp_path):
    for index in range(4):
        path = tmp_path / "in" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(photo, 9 * index, axis=1)).save(path)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    options = ("--style", "monet", "--size", "64", "--actors", "1")
    command = [sys.executable, str(EXAMPLES / "ray_dataset.py"), "in", "out", *options]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 1, done.stderr  # bad.png
    assert "painted 4, failed 1" in done.stderr
    assert "bad.png" in done.stderr
    with lsast.load(threads=1) as stylizer:
        for index in range(4):
            name = Path(f"{index % 2}", f"{index}.png")
            alone = stylizer.stylize(tmp_path / "in" / name, style="monet", size=64).image
            np.testing.assert_array_equal(Image.open(tmp_path / "out" / name), alone)
    (tmp_path / "in" / "bad.png").unlink()
    assert run().stdout == "nothing left to paint\n"
