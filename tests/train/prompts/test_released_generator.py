"""The released generator against docs/method.md §1.3."""

import pytest
import torch
from torch import nn

import released_lsast
from lsast_train.prompts.released_generator import GegluGenerator

DIM = 12


def _generator(count: int = 5, tokens: int = 1, **sizes: int) -> GegluGenerator:
    generator = GegluGenerator(torch.randn(DIM, generator=torch.Generator().manual_seed(3)), count, tokens, **sizes)
    torch.manual_seed(4)
    for parameter in generator.parameters():  # norms too: untrained ones would hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return generator


@pytest.mark.parametrize("sizes", [{}, {"inner": 16, "hidden": 10}], ids=["release", "other"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_geglu_generator_equals_the_released_algorithm(sizes, tokens):
    generator = _generator(tokens=tokens, **sizes)
    found = generator()
    assert found.shape == (5, tokens, DIM)
    state = generator.state_dict()
    torch.testing.assert_close(found.flatten(0, 1), released_lsast.generator(state, state.pop("constant")))


def test_geglu_generator_has_as_many_weights_as_the_released_one():
    constant = torch.zeros(768)
    with torch.device("meta"):
        generator = GegluGenerator(constant, 30)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 78_678_528  # docs/method.md §1.3
    assert generator.ff.net[2].weight.shape == (30 * 768, 3072)


def test_geglu_generator_starts_with_torchs_default_weights():
    """The seed decides them; nobody else's random numbers are touched."""
    before = torch.get_rng_state()
    one, same, other = (GegluGenerator(torch.ones(DIM), 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one(), same())
    assert not torch.allclose(one(), other())
    weight = one.ff.net[2].weight
    assert weight.abs().max() <= (4 * DIM) ** -0.5  # Kaiming-uniform with a = √5: ±1/√fan_in
    assert weight.std().item() == pytest.approx((4 * DIM) ** -0.5 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("place", ["attn1", "attn2", "ff"])
def test_dropout_follows_each_attention_and_precedes_the_last_layer(place):
    generator = _generator()
    for other in {"attn1", "attn2"} - {place}:
        nn.init.zeros_(generator.get_submodule(f"{other}.to_out.0").weight)
        nn.init.zeros_(generator.get_submodule(f"{other}.to_out.0").bias)
    reader, before = (generator.ff.net[2], 0) if place == "ff" else (generator.norm3, generator.constant)
    seen: list[torch.Tensor] = []
    reader.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0] - before))
    with torch.no_grad():
        generator()
        for seed in range(200):
            generator(torch.Generator().manual_seed(seed))
    quiet, draws = seen[0], torch.stack(seen[1:])
    ratio = draws / quiet
    dropped = ratio.abs() < 1e-3
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.9), rtol=1e-3, atol=0)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
