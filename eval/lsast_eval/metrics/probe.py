"""The artist classifier behind the deception score: multinomial logistic regression on features of a fixed network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_ITERATIONS = 60
_SCALE = 10.0
"""Norm of a typical standardised vector; it only sets the unit of `l2`."""


@dataclass(frozen=True)
class Probe:
    """A trained linear probe."""

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    """[D, classes]."""
    bias: torch.Tensor
    """[classes]."""

    @classmethod
    def fit(cls, vectors: Vectors, labels: Labels, classes: int, l2: float) -> Probe:
        """Minimise the mean cross-entropy plus ``l2 / 2 · |W|²``; every class weighs the same, however many it has.

        Args:
            vectors: [N, D].
            labels: [N], each below `classes`, each class at least once.
            classes: how many.
            l2: weight decay.
        """
        x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
        # A feature that hardly ever varies must not become the loudest one.
        mean, deviation = x.mean(0), x.std(0) + 1e-3
        scale = _SCALE / x.shape[1] ** 0.5 / deviation
        x = (x - mean) * scale
        share = 1 / torch.bincount(y, minlength=classes).float()[y] / classes
        weight = torch.zeros(x.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            entropy = (F.cross_entropy(x @ weight + bias, y, reduction="none") * share).sum()
            total: torch.Tensor = entropy + l2 / 2 * weight.square().sum()
            total.backward()
            return total

        optimiser.step(loss)
        return cls(mean, scale, weight.detach(), bias.detach())

    def predict(self, vectors: Vectors) -> Labels:
        """The most likely class of each vector [N, D], [N]."""
        logits = (torch.from_numpy(vectors) - self.mean) * self.scale @ self.weight + self.bias
        return logits.argmax(1).numpy().astype(np.int64)


def assign_folds(digests: Sequence[str], labels: Labels, folds: int) -> Labels:
    """A fold for each picture, [N]: as even as can be within a class, by the file's hash and nothing else."""
    rank = [hashlib.sha256(digest.encode()).hexdigest() for digest in digests]
    assigned = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label), key=lambda row: rank[row])
        assigned[rows] = np.arange(len(rows)) % folds
    return assigned


def held_out_predictions(vectors: Vectors, labels: Labels, classes: int, folds: Labels, l2: float) -> Labels:
    """The class that a probe trained without a picture's fold gives it, [N]."""
    predicted = np.full(len(labels), -1, dtype=np.int64)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = Probe.fit(vectors[~out], labels[~out], classes, l2).predict(vectors[out])
    return predicted
