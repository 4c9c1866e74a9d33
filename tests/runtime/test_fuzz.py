"""Input that is almost right, by hypothesis: every reader gives an error of ours, or what can be painted with."""

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import hostile
import lsast
from lsast import LsastError
from lsast.images.metadata import Record, read_record
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.bundle.manifest import MANIFEST, Manifest
from lsast_engines.bundle.style import LatentStatistics, Style, encode_defaults
from lsast_engines.images import read_picture
from lsast_train.prompts.prompt_file import load_prompts

Check = Callable[[Any], object]
QUICK, MANY = 50, 10_000


@pytest.fixture(scope="module")
def stylizer(bundle_path: Path) -> Iterator[lsast.Stylizer]:
    logging.getLogger("lsast").setLevel(logging.ERROR)
    with lsast.load(bundle_path) as opened:
        yield opened
    logging.getLogger("lsast").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def targets(
    stylizer: lsast.Stylizer, photo: np.ndarray, bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[st.SearchStrategy[Any], Check]]:
    """What is read, and by what; an input that is not refused must give something to paint with."""
    folder = tmp_path_factory.mktemp("fuzz")

    def in_file(read: Callable[[Path], object]) -> Check:
        def check(data: bytes) -> object:
            (folder / "file").unlink(missing_ok=True)
            (folder / "file").write_bytes(data)
            return read(folder / "file")

        return check

    def tensors(path: Path) -> st.SearchStrategy[bytes]:
        return hostile.safetensors_files(path.read_bytes(), "lsast")

    def painted(style: str) -> object:
        return stylizer.stylize(photo[:8, :8], style, size=0, steps=1, strength=1.0, seed=1).image.getbbox()

    def picture(source: Any) -> None:
        found = read_picture(source)
        assert found.rgb.dtype == np.uint8
        assert found.rgb.shape == (*found.size, 3)
        assert min(found.size) > 0
        assert found.alpha is None or found.alpha.shape == found.size

    def record(text: str) -> None:
        held, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
        chunks.add_itxt("lsast", text.encode("utf-8", "replace").decode())
        Image.new("L", (1, 1)).save(held, "PNG", pnginfo=chunks)
        for found in (read_record(held.getvalue()), Record.from_json(text, "text")):
            assert stylizer.resolve(**dataclasses.asdict(found.options)).steps > 0

    style = folder / "style.safetensors"
    meta = {
        **encode_defaults({"steps": 3}),
        **LatentStatistics((0.1,) * 4, (0.5,) * 4).to_meta(),
        "guidance_baked": "7",
    }
    dataclasses.replace(Style.load(bundle_path / "styles" / "monet.safetensors"), meta=meta).save(style)
    prompts = min((EMBEDDED / "prompts").iterdir(), key=lambda file: file.stat().st_size)
    manifest = json.loads((bundle_path / MANIFEST).read_text())
    result = stylizer.stylize(photo[:8, :8], size=0, steps=1, strength=1.0)
    assert result.provenance
    made = json.loads(Record(result.provenance, result.options, {"read": 1.0}).to_json())
    words = st.sampled_from(["vangogh", "monet", "up", "down", "mid", "0", "9", "0-4", "1e3", "nan", "0.5", "picasso"])
    signs = st.sampled_from(["+", ":", "@", "-", " ", "", "0", "\0", "é", "²", "1" * 5000])
    mixes = st.lists(st.tuples(words, signs | st.text(max_size=2)), max_size=6).map(
        lambda pairs: "".join(word + sign for word, sign in pairs)
    )
    names, weights = st.sampled_from(["vangogh", "monet"]), st.just("") | st.floats(0.01, 99).map(":{:.3}".format)
    places = st.sampled_from(["", "@up", "@mid", "@0-4", "@7", "@down@2-9"])
    right = st.lists(st.tuples(names, weights, places).map("".join), min_size=1, max_size=4).map("+".join)
    arrays = hnp.arrays(
        hnp.scalar_dtypes() | st.sampled_from([np.dtype("u1"), np.dtype(">u2"), np.dtype("f4"), np.dtype(bool)]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
    return {
        "manifest": (hostile.json_texts(manifest), lambda text: Manifest.from_json(text).noise.alphas_cumprod),
        "style": (tensors(style), in_file(lambda path: Style.load(path).stage(0))),
        "prompts": (tensors(prompts), in_file(lambda path: load_prompts(path).tensors())),
        "record": (hostile.json_texts(made), record),
        "mix": (mixes | right | right, painted),
        "picture": (hostile.picture_files() | arrays, picture),
    }


@pytest.mark.parametrize("examples", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["manifest", "style", "prompts", "record", "mix", "picture"])
def test_hostile_input_is_refused_or_painted(targets, name, examples):
    (inputs, read), refused, taken = targets[name], 0, 0

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == QUICK,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def check(given: Any) -> None:
        nonlocal refused, taken
        try:
            read(given)
            taken += 1
        except LsastError:
            refused += 1

    check()
    assert min(refused, taken) > 0
    print(f"{name}: {refused} refused, {taken} taken")  # noqa: T201 - figures of docs/results.md, by pytest -s
