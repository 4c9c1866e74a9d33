from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lsast_engines.bundle.style import Style
from lsast_engines.errors import StyleError
from lsast_train.base.base import Base
from lsast_train.distillation.student import read_style
from lsast_train.prompts.prompt_file import Prompts, save_prompts


def test_read_style_of_a_style_file_and_of_a_run_gives_the_same_keys_and_values(
    base: Base, source: Style, prompts: torch.Tensor, tmp_path: Path
) -> None:
    file, run = tmp_path / "hand.safetensors", tmp_path / "runs" / "red" / "red.prompts.safetensors"
    replace(source, meta={"licence": "CC0"}).save(file)
    save_prompts(Prompts("red", base.fingerprint, "step+layer", "direct", "strided", "all", prompts), run)
    left, right = read_style(str(file), base), read_style("red", base)
    np.testing.assert_allclose(left.kv_unet, right.kv_unet, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(left.kv_control, right.kv_control, rtol=2e-3, atol=2e-3)
    assert (left.meta["licence"], right.name, right.meta["variant"]) == ("CC0", "red", "step+layer")


def test_read_style_refuses_another_base_baked_guidance_and_unknown_names(
    base: Base, source: Style, tmp_path: Path
) -> None:
    file = tmp_path / "hand.safetensors"
    for changes, message in (
        ({"base": "ab" * 32}, "was learned on base abab"),
        ({"meta": {"guidance_baked": "7"}}, "guidance 7 baked in already"),
    ):
        replace(source, **changes).save(file)  # type: ignore[arg-type]
        with pytest.raises(StyleError, match=message):
            read_style(str(file), base)
    with pytest.raises(StyleError, match=r"no prompts at nobody or runs/nobody/nobody\.prompts.*the base: it has none"):
        read_style("nobody", base)
