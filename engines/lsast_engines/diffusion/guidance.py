"""Classifier-free guidance (arXiv 2207.12598), for NumPy arrays and torch tensors alike."""

from __future__ import annotations

from typing import Any


def guide(eps: Any, guidance: Any) -> Any:
    """The guided noise: eps_null + guidance * (eps_style - eps_null), docs/method.md §4, step 5.

    Args:
        eps: predicted noise [G, ...], an array or a tuple of G arrays: (eps_null, eps_style), or (eps_style,) alone.
        guidance: scale, or the scales [B, 1, 1, 1] of a batch; 1 gives eps_style, larger values lead away from
            eps_null.

    Returns:
        The noise [...] of the same type; eps_style unchanged where it stands alone.
    """
    if len(eps) == 1:
        return eps[0]
    null, style = eps
    return null + guidance * (style - null)
