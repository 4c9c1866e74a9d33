import copy
import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from lsast_engines.errors import UsageError
from lsast_train.inversion import make_optimizer
from lsast_train.options import PRESETS, TrainOptions, Variant
from lsast_train.prompts.matrix_index import matrix_index
from lsast_train.prompts.prompt_space import PromptSpace, build_space, initial_context
from lsast_train.prompts.text_encoder import PlaceholderEncoder

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
    """docs/method.md §1.4 and the issue's list of variants, once more and by hand."""
    if variant == "step+layer":
        return stage + group if layout == "overlap" else 3 * stage + group
    return {"step": stage, "layer": group, "global": 0}[variant]


@pytest.mark.parametrize(("variant", "layout"), KINDS)
def test_matrix_index_gives_every_stage_and_group_its_matrix(variant, layout):
    table = matrix_index(variant, layout)
    expected = [[_expected_matrix(variant, layout, s, group) for group in range(3)] for s in range(10)]
    assert table.tolist() == expected
    matrices = 1 + max(map(max, expected))
    for generator in ("attention", "geglu"):
        space = _space(variant=variant, layout=layout, generator=generator)
        released = generator == "geglu" and variant == "step+layer"  # thirty for either layout
        assert space.embeddings().shape == (30 if released else matrices, 5, 16)
        assert torch.equal(space.prompts(), space.embeddings()[table])


@pytest.mark.parametrize("gradient", ["all", "decoder"])
@pytest.mark.parametrize("generator", ["attention", "direct", "geglu"])
def test_contexts_of_mixed_stages_equal_those_of_each_row(generator, gradient):
    space = _space(generator=generator, gradient=gradient)
    times = torch.tensor([999, 0, 99, 100, 450, 0])
    together = space.contexts(times)
    for row, time in zip(together, times, strict=True):
        torch.testing.assert_close(row, space.contexts(time[None])[0])
    torch.testing.assert_close(together, space.prompts()[times // 100])


@pytest.mark.parametrize(
    ("kind", "generator", "gradient"), list(itertools.product(KINDS, ["attention", "direct"], ["all", "decoder"]))
)
def test_gradient_reaches_only_the_matrices_of_the_stages(kind, generator, gradient):
    variant, layout = kind
    space = _space(variant=variant, layout=layout, generator=generator, gradient=gradient)
    contexts = space.contexts(torch.tensor([340, 999]))
    loss = (contexts * torch.randn(contexts.shape, generator=torch.Generator().manual_seed(1))).sum()
    torch.autograd.backward(loss)
    touched = set(space.matrices.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist())
    groups = (2,) if gradient == "decoder" else (0, 1, 2)
    assert touched == {_expected_matrix(variant, layout, stage, group) for stage in (3, 9) for group in groups}


def test_attention_generator_is_torchs():
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
def test_untrained_prompts_are_near_the_initial_context_and_differ(generator, initial):
    prompts = PromptSpace(initial, generator=generator).prompts()
    error = (prompts - initial).norm() / initial.expand_as(prompts).norm()
    # With more tokens than channels they cannot all be orthogonal for the attention.
    assert error < (0.35 if len(initial) > initial.shape[1] and generator == "attention" else 0.05)
    flat = prompts.flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(30)).min() > 0


def test_initial_context_of_zeros_has_a_finite_gradient():
    space = PromptSpace(torch.zeros(4, 8))
    torch.autograd.backward(space.contexts(torch.tensor([0])).square().sum())
    assert torch.isfinite(space.matrices.grad).all()
    assert space.matrices.grad[0].abs().max() > 0


def test_initial_context_is_the_mean_of_style_tokens_or_the_null_context(base):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    each = torch.stack([base.style_encoder(latent[None])[0] for latent in latents])
    torch.testing.assert_close(initial_context(base, lambda: latents), each.mean(0))
    base.style_encoder = None
    assert torch.equal(initial_context(base, _never), base.null_context)


@pytest.mark.parametrize("gradient", ["all", "decoder"])
def test_layer_groups_of_a_step_share_one_dropout(gradient):
    """Overlapping, stage 3's middle is stage 4's encoder: the same matrix, made once for the whole step."""
    space = _space(generator="geglu", layout="overlap", gradient=gradient)
    contexts = space.contexts(torch.tensor([340, 440]), torch.Generator().manual_seed(1))
    assert torch.equal(contexts[0, 1], contexts[1, 0])
    assert torch.equal(contexts[0, 2], contexts[1, 1])


def test_text_encoder_is_not_trained_saved_or_copied(text_base):
    space = PromptSpace(torch.randn(1, 24), text=PlaceholderEncoder(text_base.text_encoder))
    assert set(dict(space.named_parameters())) == {"matrices", "query", "key", "value"} == set(space.state_dict())
    assert copy.deepcopy(space).text is space.text


def _options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"generator": "direct", **changes})


def _never() -> torch.Tensor:
    raise AssertionError("hundreds of megabytes of latents for nothing")


def test_text_prompts_start_near_the_token_a(text_base):
    """docs/method.md §1.2: token 320; with more rows those of the letters that follow."""
    word = text_base.text_encoder.get_input_embeddings().weight[320]
    letters = text_base.text_encoder.get_input_embeddings().weight[320:330]
    space = build_space(text_base, _options(), _never)
    assert space.matrices.shape == (30, 10, 24)
    assert ((space.matrices - letters).norm() / letters.norm() / 30**0.5).item() == pytest.approx(0.01, rel=0.2)
    released = build_space(text_base, _options(generator="geglu"), _never)
    torch.testing.assert_close(released.geglu.constant, word)
    assert released.embeddings().shape == (30, 1, 24)


def test_paper_preset_trains_every_parameter_and_its_attention_starts_near_the_identity(text_base):
    """One row has one key, over which softmax is 1: W_Q and W_K would get no gradient (docs/method.md §7)."""
    space = build_space(text_base, PRESETS["paper"], _never)
    assert space.matrices.shape == (30, 10, 24)
    query, key = space.matrices @ space.query, space.matrices @ space.key
    attention = (query @ key.transpose(1, 2) / 24**0.5).softmax(2)
    assert attention.diagonal(dim1=1, dim2=2).min() > 0.9
    torch.testing.assert_close(space.embeddings(), space.matrices, rtol=0, atol=0.1 * space.matrices.std().item())
    weights = torch.randn(2, 3, 77, 24)
    torch.autograd.backward((space.contexts(torch.tensor([340, 999])) * weights).sum())
    gradients = {name: parameter.grad for name, parameter in space.named_parameters()}
    largest = {name: grad.abs().max().item() for name, grad in gradients.items() if grad is not None}
    assert largest.keys() == {"matrices", "query", "key", "value"}
    assert min(largest.values()) > 1e-3 * max(largest.values())


def test_rows_of_a_matrix_stay_apart_while_they_learn(text_base):
    """Rows that attend to all rows alike become equal, and equal rows get equal gradients (docs/method.md §7)."""
    space = build_space(text_base, PRESETS["paper"], _never)
    optimizer = make_optimizer(space, replace(PRESETS["paper"], lr=1e-2))
    times, target = torch.arange(50, 1000, 100), torch.randn(10, 3, 77, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(31):
        loss = (space.contexts(times) - target).square().mean()
        if step % 30 == 0:
            query, key = space.matrices @ space.query, space.matrices @ space.key
            attention = (query @ key.transpose(1, 2) / 24**0.5).softmax(2)
            found.append((loss.item(), space.embeddings().std(1).mean().item(), attention.amax(2).mean().item()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    before, after = found
    assert after[0] < 0.95 * before[0]
    assert after[1] > 0.5 * before[1]
    assert after[2] > 0.5  # 0.1 would be alike


def test_prompt_auto_takes_the_text_encoder_if_there_is_one(text_base, base, caplog):
    assert build_space(text_base, _options(), _never).text is not None
    assert build_space(base, _options(), lambda: torch.randn(3, 4, 8, 8)).text is None
    direct = build_space(text_base, _options(prompt="context"), _never)
    assert (direct.text, caplog.text) == (None, "")  # its base has an encoder
    assert direct.matrices.shape == (30, 77, 24)
    torch.testing.assert_close(direct.matrices.mean(0), text_base.null_context, rtol=0, atol=0.05)


def test_training_on_a_bundle_of_stable_diffusion_says_that_it_learns_contexts(text_base, caplog):
    text_base.text_encoder = None
    assert build_space(text_base, _options(), _never).matrices.shape == (30, 77, 24)
    assert "'tiny-sd' has no text encoder" in caplog.text
    assert "name the --base that the bundle was exported from" in caplog.text


def test_build_space_with_options_that_do_not_fit_the_base_raises(text_base, base):
    with pytest.raises(UsageError, match=r"prompt: found text on base 'mini', which has no text encoder"):
        build_space(base, _options(prompt="text"), _never)
    with pytest.raises(UsageError, match=r"placeholder_tokens: found 2 where contexts are learned"):
        build_space(base, _options(placeholder_tokens=2), _never)
    with pytest.raises(UsageError, match=r"placeholder_tokens: found 76; expected at most 75"):
        build_space(text_base, _options(placeholder_tokens=76), _never)


def test_geglu_generator_of_whole_contexts_is_too_large(text_base):
    """77 tokens of 768 channels, thirty times, from 3072: 5.4 billion weights."""
    with pytest.raises(UsageError, match=r"5\.4 billion weights; .* choose prompt text"):
        PromptSpace(torch.zeros(77, 768), generator="geglu")
