import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lsast_engines.errors import StyleError
from lsast_train.prompts.prompt_file import Prompts, load_prompts, save_prompts
from lsast_train.prompts.prompt_space import PromptSpace
from lsast_train.prompts.text_encoder import PlaceholderEncoder

FINGERPRINT = "ab" * 32


def _prompts(**options: Any) -> Prompts:
    space = PromptSpace(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), **options)
    return Prompts.of(space, "red", FINGERPRINT, {"licence": "public domain", "works": "7"})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file, tensors untouched."""
    with safe_open(str(path), "pt") as opened:
        header = json.loads(opened.metadata()["lsast"])
    change(header)
    save_file(load_file(path), path, {"lsast": json.dumps(header)})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "red.prompts.safetensors"
    save_prompts(_prompts(), path)
    return path


@pytest.mark.parametrize("options", [{}, {"generator": "geglu", "layout": "overlap", "gradient": "decoder"}])
def test_load_prompts_gives_what_save_prompts_wrote(tmp_path, options):
    saved, path = _prompts(**options), tmp_path / "a"
    save_prompts(saved, path)
    found = load_prompts(path)
    assert {name: getattr(found, name) for name in ("name", "base", "variant", "generator", "layout", "gradient")} == {
        "name": "red", "base": FINGERPRINT, "variant": "step+layer", "generator": "attention", "layout": "strided",
        "gradient": "all", **options,
    }  # fmt: skip
    assert found.meta == {"licence": "public domain", "works": "7"}
    assert torch.equal(found.prompts, saved.prompts)
    with safe_open(str(path), "pt") as opened:  # as docs/formats.md lists it
        header = json.loads(opened.metadata()["lsast"])
        assert set(opened.keys()) == {"prompts"}
    kinds = {"name", "base", "variant", "generator", "layout", "gradient"}
    assert (set(header), header["format"]) == ({"format", *kinds, "meta", "sha256"}, 2)
    save_prompts(saved, tmp_path / "b")
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("generator", "layout", "tokens"), [("geglu", "overlap", 1), ("attention", "strided", 2)])
def test_save_prompts_through_a_text_encoder_keeps_its_input(text_base, tmp_path, generator, layout, tokens):
    text = PlaceholderEncoder(text_base.text_encoder)
    space = PromptSpace(text.token_embedding().expand(tokens, -1), generator=generator, layout=layout, text=text)
    save_prompts(Prompts.of(space, "red", FINGERPRINT, {}), tmp_path / "a")
    found = load_prompts(tmp_path / "a")
    assert found.prompt == "text"
    assert found.prompts.shape == (10, 3, 77, 24)
    assert found.embeddings.shape == (30, tokens, 24)
    expected = text.contexts(found.embeddings)
    for stage, group in ((0, 0), (4, 1), (9, 2)):
        matrix = stage + group if layout == "overlap" else 3 * stage + group
        torch.testing.assert_close(found.prompts[stage, group], expected[matrix])


def test_load_prompts_of_another_base_raises(file, base):
    with pytest.raises(StyleError, match=r"learned on base abababababab.*; the base 'mini' is 000000000000"):
        load_prompts(file, base)
    base.fingerprint = FINGERPRINT
    assert load_prompts(file, base).name == "red"


def test_load_prompts_of_another_file_raises(file, tmp_path):
    raw = file.read_bytes()
    (tmp_path / "half").write_bytes(raw[:-1])
    (tmp_path / "changed").write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    save_file({"prompts": torch.zeros(1)}, tmp_path / "other")
    save_file({"prompts": torch.zeros(1)}, tmp_path / "nested", {"lsast": "[" * 100_000})
    _rewrite(file, lambda header: header.update(format=1))
    for name, message in (
        ("nowhere", "learn one with: lsast-train"),
        ("half", "cannot be read"),
        ("changed", "SHA-256 differs"),
        ("other", "holds no prompts"),
        ("nested", "cannot be read"),
        (file.name, "has format 1; this version reads format 2"),
    ):
        with pytest.raises(StyleError, match=message):
            load_prompts(tmp_path / name)


def test_load_prompts_with_an_invalid_header_reports_all_faults(file):
    _rewrite(file, lambda header: header.update(name=3, base=None, generator=[], meta={"works": 7}, sha256="0"))
    with pytest.raises(StyleError) as caught:
        load_prompts(file)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  - name", "  - base", "  - generator", "  - meta.works", "  - tensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd"])
def test_load_prompts_with_a_path_as_name_raises(file, name):
    _rewrite(file, lambda header: header.update(name=name))
    with pytest.raises(StyleError, match="letters, digits"):
        load_prompts(file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompts": torch.zeros(10, 2, 4, 8)}, r"expected \[stages, 3, tokens, dim\]"),
        ({"prompts": torch.zeros(0, 3, 4, 8)}, r"expected \[stages, 3, tokens, dim\]"),
        ({"prompts": torch.tensor(1.0)}, r"expected \[stages, 3, tokens, dim\]"),
        ({"prompts": torch.full((10, 3, 4, 8), float("nan"))}, "NaN"),
        ({"prompts": torch.zeros(10, 3, 4, 8, dtype=torch.float16)}, r"expected torch\.float32"),
        ({"embeddings": torch.zeros(29, 4, 8)}, r"embeddings: found shape \[29, 4, 8\]; expected \[30, tokens, 8\]"),
        ({"embeddings": torch.full((30, 4, 8), float("nan"))}, "embeddings: found NaN"),
    ],
)
def test_prompts_with_tensors_that_do_not_fit_raise(change, expected):
    with pytest.raises(StyleError, match=expected):
        replace(_prompts(), **change)
