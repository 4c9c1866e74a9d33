"""Baked keys and values against attention on the context itself, as diffusers' modules compute it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.errors import StyleError, UsageError
from lsast_export.styles.bake import KVProjector, bake_for_bundle, bake_null_style, bake_prompts, bake_style
from lsast_train.base.attention import cross_attention_layers
from lsast_train.base.base import Base
from lsast_train.base.projection import GROUPS


def random_contexts(base: Base, *leading: int) -> torch.Tensor:
    shape = (*leading, len(GROUPS), base.config.tokens, base.context_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_attention_layers_locate_the_columns_of_each_layer(base):
    projector = KVProjector.of_base(base)
    style = bake_style(projector, random_contexts(base, 4), "x")
    contexts = random_contexts(base, 4).numpy()
    networks = {"unet": (base.unet, style.kv_unet), "control": (base.controlnet, style.kv_control)}
    entries = projector.layers
    assert {entry.group for entry in entries} == set(GROUPS)
    for entry in entries:
        network, packed = networks[entry.network]
        attn = network.get_submodule(entry.name)
        context = contexts[:, GROUPS.index(entry.group)]
        middle, end = entry.offset + entry.width, entry.offset + 2 * entry.width
        np.testing.assert_allclose(
            packed[..., entry.offset : middle], context @ attn.to_k.weight.numpy().T, rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(packed[..., middle:end], context @ attn.to_v.weight.numpy().T, rtol=0, atol=1e-5)


def test_bake_null_style_projects_the_null_context(base):
    style = bake_null_style(KVProjector.of_base(base))
    assert (style.stages, style.base) == (1, base.fingerprint)
    entry = cross_attention_layers(base.unet)[-1]
    attn = base.unet.get_submodule(entry.name)
    expected = (base.null_context @ attn.to_v.weight.T).numpy()
    np.testing.assert_allclose(style.kv_unet[0, :, entry.offset + entry.width :], expected, rtol=0, atol=1e-5)


def test_bake_style_lists_every_fault_of_the_prompts(base, prompts):
    wrong = prompts.prompts[:, :2].clone()
    wrong[0, 0, 0, 0] = torch.nan
    with pytest.raises(StyleError) as caught:
        bake_style(KVProjector.of_base(base), wrong, "hand")
    assert "[10, 2, 4, 24]" in str(caught.value)
    assert "[stages, 3, 4, 24]" in str(caught.value)
    assert "NaN" in str(caught.value)


def test_bake_prompts_warns_of_a_style_that_learned_nothing(base, prompts, caplog):
    projector = KVProjector.of_base(base)
    bake_prompts(projector, replace(prompts, meta={"best_step": "60"}))
    assert not caplog.text
    bake_prompts(projector, replace(prompts, meta={"best_step": "0"}))
    assert "style 'hand' learned nothing" in caplog.text


def test_bake_into_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "styles").touch()
    monkeypatch.setenv("LSAST_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="to write to"):
        bake_for_bundle(Bundle.open(EMBEDDED), [])
