"""Contexts of a placeholder's embedding against transformers itself with that row of its token embedding replaced."""

import copy

import pytest
import torch
from transformers import CLIPTextModel

from lsast_engines.errors import UsageError
from lsast_train.prompts.text_encoder import PlaceholderEncoder

from ..conftest import tiny_clip

BOS, EOS, STAR = 998, 999, 265


def _encoder() -> CLIPTextModel:
    """The special ids of its configuration are wrong, as in that of Stable Diffusion 1.5."""
    return tiny_clip(1000, bos_token_id=0, eos_token_id=2)


def _by_transformers(encoder: CLIPTextModel, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [77, dim], and the token embedding of the copy that gave it; the placeholder's rows are `embedding`."""
    encoder = copy.deepcopy(encoder)
    table = encoder.get_input_embeddings().weight
    stars = list(range(STAR, STAR + len(embedding)))
    table[stars] = embedding.detach()
    table.requires_grad_()
    ids = [BOS, *stars]
    ids = torch.tensor([ids + [EOS] * (77 - len(ids))])
    return encoder(ids).last_hidden_state[0], table


@pytest.mark.parametrize("tokens", [1, 3, 75])
def test_placeholder_contexts_and_gradients_equal_those_of_a_new_token(tokens):
    encoder = _encoder()
    embeddings = torch.randn(2, tokens, 24, requires_grad=True)
    contexts = PlaceholderEncoder(encoder).contexts(embeddings)
    assert contexts.shape == (2, 77, 24)
    weights = torch.randn(contexts.shape)
    torch.autograd.backward((contexts * weights).sum())
    for index, embedding in enumerate(embeddings):
        expected, table = _by_transformers(encoder, embedding)
        torch.testing.assert_close(contexts[index], expected, rtol=1e-4, atol=1e-5)
        torch.autograd.backward((expected * weights[index]).sum())
        torch.testing.assert_close(embeddings.grad[index], table.grad[STAR : STAR + tokens], rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_placeholder_encoder_leaves_the_encoder_unchanged():
    encoder = _encoder()
    ids = torch.randint(0, 998, (1, 77))
    before = encoder(ids).last_hidden_state
    path = PlaceholderEncoder(encoder)
    path.contexts(torch.randn(1, 1, 24))
    assert torch.equal(encoder(ids).last_hidden_state, before)
    encoder.final_layer_norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        path.contexts(torch.randn(1, 1, 24))
    assert not encoder.get_input_embeddings()._forward_hooks
    assert copy.deepcopy([path])[0] is path


def test_embeddings_and_tokens_that_do_not_fit_raise():
    encoder = PlaceholderEncoder(_encoder())
    for shape in ((1, 1, 23), (1, 76, 24), (1, 0, 24)):
        with pytest.raises(UsageError, match=r"expected 1 to 75 tokens of 24 channels"):
            encoder.contexts(torch.zeros(shape))
    with pytest.raises(UsageError, match="found a text encoder of 1000 tokens"):
        encoder.token_embedding(998)
