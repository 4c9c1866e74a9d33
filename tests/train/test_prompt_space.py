from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsast_engines.errors import UsageError
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.options import Variant
from lsast_train.prompt_space import PromptSpace, initial_context, matrix_table

VARIANTS = get_args(Variant)
KINDS = [(variant, "strided") for variant in VARIANTS] + [("step+layer", "overlap")]


def _context(tokens: int = 5, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """Tokens like a text encoder's: a large common part, and a first token ten times as long as the others."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(dim, generator=generator) + 0.3 * torch.randn(tokens, dim, generator=generator)
    context[0] *= 10
    return context


def _space(**options: Any) -> PromptSpace:
    return PromptSpace(_context(), **options)


def _expected_matrix(variant: str, layout: str, stage: int, group: int) -> int:
    """method.md §1.4 and the issue's list of variants, once more and by hand."""
    if variant == "step+layer":
        return stage + group if layout == "overlap" else 3 * stage + group
    return {"step": stage, "layer": group, "global": 0}[variant]


@pytest.mark.parametrize(
    ("variant", "layout", "matrices"),
    [
        ("step+layer", "strided", 30),
        ("step+layer", "overlap", 12),
        ("step", "strided", 10),
        ("layer", "strided", 3),
        ("global", "strided", 1),
    ],
)
def test_every_stage_and_group_reads_its_matrix_and_no_matrix_is_dead(variant: Any, layout: Any, matrices: int) -> None:
    table = matrix_table(variant, layout)
    expected = [[_expected_matrix(variant, layout, s, group) for group in range(3)] for s in range(10)]
    assert table.tolist() == expected
    assert sorted(set(table.flatten().tolist())) == list(range(matrices))
    assert len(_space(variant=variant, layout=layout).matrices) == matrices


@pytest.mark.parametrize(("time", "stage"), [(0, 0), (1, 0), (99, 0), (100, 1), (681, 6), (701, 7), (999, 9)])
def test_contexts_are_those_of_the_timesteps_stage(time: int, stage: int) -> None:
    space = _space(generator="direct")
    context = space.contexts(torch.tensor([time]))
    assert torch.equal(context[0], space.matrices[[3 * stage, 3 * stage + 1, 3 * stage + 2]])


@pytest.mark.parametrize("generator", ["attention", "direct"])
def test_a_batch_of_mixed_stages_is_its_rows_one_by_one(generator: Any) -> None:
    space = _space(generator=generator)
    times = torch.tensor([990, 5, 450, 5])
    together = space.contexts(times)
    for row, time in zip(together, times, strict=True):
        torch.testing.assert_close(row, space.contexts(time[None])[0])
    torch.testing.assert_close(together, space.prompts()[times // 100])


@pytest.mark.parametrize(
    ("kind", "generator", "gradient"), list(itertools.product(KINDS, ["attention", "direct"], ["all", "decoder"]))
)
def test_only_the_matrices_of_the_batchs_stages_get_a_gradient(kind: Any, generator: Any, gradient: Any) -> None:
    variant, layout = kind
    space = _space(variant=variant, layout=layout, generator=generator, gradient=gradient)
    contexts = space.contexts(torch.tensor([340, 999]))
    loss = (contexts * torch.randn(contexts.shape, generator=torch.Generator().manual_seed(1))).sum()
    torch.autograd.backward(loss)
    assert space.matrices.grad is not None
    touched = set(space.matrices.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist())
    groups = (2,) if gradient == "decoder" else (0, 1, 2)
    assert touched == {_expected_matrix(variant, layout, stage, group) for stage in (3, 9) for group in groups}


def test_attention_is_torchs_and_the_written_formula() -> None:
    torch.manual_seed(0)
    space = _space().double()
    for parameter in space.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found = space.prompts()
    for stage, group in ((0, 0), (4, 1), (9, 2)):
        matrix = space.matrices[3 * stage + group]
        query, key, value = (matrix @ weight for weight in (space.query, space.key, space.value))
        torch.testing.assert_close(
            found[stage, group],
            F.scaled_dot_product_attention(query[None], key[None], value[None])[0],
            rtol=1e-12,
            atol=1e-12,
        )
        q, k, v = (tensor.detach().numpy() for tensor in (query, key, value))
        weights = np.exp(q @ k.T / np.sqrt(16))
        by_hand = (weights / weights.sum(1, keepdims=True)) @ v
        np.testing.assert_allclose(found[stage, group].detach().numpy(), by_hand, rtol=1e-10)


def test_direct_prompts_are_the_matrices() -> None:
    space = _space(generator="direct", layout="overlap")
    assert torch.equal(space.prompts()[4], space.matrices[4:7])
    assert space.maps() == {}


@pytest.mark.parametrize("generator", ["attention", "direct"])
@pytest.mark.parametrize(
    "initial",
    [
        _context(),
        _context(77, 32),  # more tokens than channels
        _context(1, 16),
        torch.ones(6, 1) * torch.randn(16, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["few", "many", "one", "alike"],
)
def test_untrained_prompts_are_near_the_initial_context_but_differ(generator: Any, initial: torch.Tensor) -> None:
    prompts = PromptSpace(initial, generator=generator).prompts()
    error = (prompts - initial).norm() / initial.expand_as(prompts).norm()
    # With more tokens than channels they cannot all be orthogonal for the attention.
    assert error < (0.35 if len(initial) > initial.shape[1] and generator == "attention" else 0.05)
    flat = prompts.flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(30)).min() > 0


def test_a_null_context_of_zeros_can_be_learned_from() -> None:
    space = PromptSpace(torch.zeros(4, 8))
    torch.autograd.backward(space.contexts(torch.tensor([0])).square().sum())
    assert space.matrices.grad is not None
    assert torch.isfinite(space.matrices.grad).all()
    assert space.matrices.grad[0].abs().max() > 0


def test_the_seed_decides_the_start() -> None:
    assert torch.equal(_space(seed=3).prompts(), _space(seed=3).prompts())
    assert not torch.equal(_space(seed=3).prompts(), _space(seed=4).prompts())


def test_all_that_cannot_be_meant_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        _space(variant="layers", generator="mlp", layout="overlap", gradient="none")
    message = str(caught.value)
    assert all(part in message for part in ("'layers'", "'mlp'", "'none'", "overlap with variant"))


@pytest.mark.parametrize("variant", ["step", "layer", "global"])
def test_overlap_is_for_step_and_layer_only(variant: Any) -> None:
    with pytest.raises(UsageError, match="leave the layout strided"):
        _space(variant=variant, layout="overlap")


def test_prompts_start_at_the_mean_of_the_artists_style_tokens_or_at_the_null_context() -> None:
    base = build_mini(MiniConfig.tiny())
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert base.style_encoder is not None
    each = torch.stack([base.style_encoder(latent[None])[0] for latent in latents])
    torch.testing.assert_close(initial_context(base, latents), each.mean(0))
    base.style_encoder = None
    assert torch.equal(initial_context(base, latents), base.null_context)
