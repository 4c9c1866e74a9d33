"""From an embedding of the placeholder to a context, through a frozen CLIP text encoder (docs/method.md §2).

The caption is the placeholder alone. Its ids are BOS, the placeholder's n tokens, then EOS to the end; the
placeholder's rows of the token embedding are replaced by P_k, position embeddings are added, and the encoder's causal
layers and its last layer norm give the context. The padding is not masked, neither here nor in the U-Net.
"""

from __future__ import annotations

from typing import Any

import torch

from lsast_engines.errors import UsageError

A_TOKEN = 320
"""CLIP's id of the word ``a``, the constant that the released generator starts from (docs/method.md §1.2); those of the
other letters and of some signs follow."""


class PlaceholderEncoder:
    """A frozen CLIPTextModel of transformers that takes the embedding of the placeholder.

    Its vocabulary ends with BOS and EOS; the configuration of Stable Diffusion 1.5 names other ids, so it is not used.
    """

    def __init__(self, text_encoder: Any) -> None:
        self._encoder = text_encoder
        self._table = text_encoder.get_input_embeddings()
        vocabulary = int(self._table.weight.shape[0])
        self.bos, self.eos = vocabulary - 2, vocabulary - 1
        self.tokens = int(text_encoder.config.max_position_embeddings)
        """Tokens of a context, 77 for CLIP."""

    def __deepcopy__(self, _: dict[int, Any]) -> PlaceholderEncoder:
        """Itself: copies of a prompt space share the frozen encoder."""
        return self

    def token_embedding(self, token: int = A_TOKEN) -> torch.Tensor:
        """The encoder's own embedding of a token, [dim] float32; `UsageError` if the vocabulary has none."""
        if not 0 <= token < self.bos:
            raise UsageError(
                f"found a text encoder of {self.eos + 1} tokens; expected CLIP's vocabulary, which has a token {token}"
            )
        word: torch.Tensor = self._table.weight[token].detach().float()
        return word

    def contexts(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [N, n, dim] of the placeholder to contexts [N, tokens, dim] float32; gradients flow through.

        `UsageError` for embeddings of another width, or more tokens than fit between BOS and EOS.
        """
        (count, placeholders, dim), width = embeddings.shape, self._table.weight.shape[1]
        if dim != width or not 1 <= placeholders <= self.tokens - 2:
            raise UsageError(
                f"found embeddings of {placeholders} tokens of {dim} channels; expected 1 to {self.tokens - 2} tokens "
                f"of {width} channels for this text encoder"
            )
        ids = torch.full((count, self.tokens), self.eos, device=self._table.weight.device)
        ids[:, 0] = self.bos

        def replace(_: Any, __: Any, words: torch.Tensor) -> torch.Tensor:
            return torch.cat([words[:, :1], embeddings.to(words), words[:, 1 + placeholders :]], dim=1)

        hook = self._table.register_forward_hook(replace)
        try:
            context: torch.Tensor = self._encoder(input_ids=ids).last_hidden_state
        finally:
            hook.remove()
        return context.float()
