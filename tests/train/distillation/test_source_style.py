from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lsast_engines.bundle.style import Style
from lsast_engines.errors import StyleError
from lsast_train.base.base import Base
from lsast_train.distillation.source_style import SourceStyle, find_style, read_source
from lsast_train.prompts.prompt_file import Prompts, save_prompts


def _save(source: SourceStyle, base: str, path: Path, meta: dict[str, str] | None = None) -> Path:
    kv_unet, kv_control = source.kv_unet.numpy(), source.kv_control.numpy()
    Style("hand", base, 10, kv_unet.shape[1], kv_unet, kv_control, meta or {}).save(path)
    return path


def test_find_style_takes_a_file_or_the_prompts_of_a_run(tmp_path: Path) -> None:
    file, run = tmp_path / "hand.safetensors", tmp_path / "runs" / "hand" / "hand.prompts.safetensors"
    run.parent.mkdir(parents=True)
    for path in (file, run):
        path.touch()
    assert find_style(str(file), None) == file
    assert find_style("hand", None).resolve() == run
    with pytest.raises(StyleError, match="found no style 'nobody'"):
        find_style("nobody", None)


def test_read_source_of_a_style_and_of_its_prompts_gives_the_same_keys_and_values(
    base: Base, source: SourceStyle, prompts: torch.Tensor, tmp_path: Path
) -> None:
    file = _save(source, base.fingerprint, tmp_path / "hand.safetensors", {"licence": "CC0"})
    run = tmp_path / "hand.prompts.safetensors"
    kind = ("step+layer", "direct", "strided", "all")
    save_prompts(Prompts("hand", base.fingerprint, *kind, prompts), run)
    left, right = read_source(file, base), read_source(run, base)
    torch.testing.assert_close(left.kv_unet, right.kv_unet, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(left.kv_control, right.kv_control, rtol=2e-3, atol=2e-3)
    assert (left.meta["licence"], right.meta["variant"]) == ("CC0", "step+layer")


def test_read_source_of_another_base_or_with_guidance_raises(base: Base, source: SourceStyle, tmp_path: Path) -> None:
    with pytest.raises(StyleError, match="was learned on base abab"):
        read_source(_save(source, "ab" * 32, tmp_path / "other.safetensors"), base)
    baked = _save(source, base.fingerprint, tmp_path / "baked.safetensors", {"guidance_baked": "7"})
    with pytest.raises(StyleError, match="guidance 7 baked in already"):
        read_source(baked, base)
