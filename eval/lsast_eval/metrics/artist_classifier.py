"""The artist classifier behind the deception score: multinomial logistic regression on features of a fixed network."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lsast_engines.errors import PictureError, UsageError
from lsast_engines.images import find_pictures

from .feature_cache import FeatureCache

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

PHOTOS = "photos"
"""Class of the photographs."""

FOLDS = 5
"""Folds of the cross-validation."""

_L2 = 0.01
"""Weight decay."""
_ITERATIONS = 60
_SCALE = 10.0
"""Norm of a typical standardised vector; it only sets the unit of `l2`."""


@dataclass(frozen=True)
class ClassifierQuality:
    """How far to trust the artist classifier; all shares are of held-out pictures."""

    classes: Mapping[str, int]
    """Class → pictures it was trained on."""
    accuracy: float
    """Share of pictures in the right class."""
    balanced_accuracy: float
    """The same, as a mean over classes."""
    recall: float
    """Share of the artist's works that are recognised: what a perfect method would score."""
    false_alarms: Mapping[str, float]
    """Class → share of its pictures that are assigned to the artist."""


@dataclass(frozen=True)
class ArtistClassifier:
    """The trained classifier."""

    artist: str
    """The class that counts as a success."""
    names: tuple[str, ...]
    """The classes, in the order of the probe's."""
    probe: LinearProbe
    quality: ClassifierQuality
    cache: FeatureCache
    """Gives the vectors of pictures."""

    @classmethod
    def train(
        cls,
        classes: Mapping[str, Sequence[Path]],
        artist: str,
        scored: Collection[str],
        cache: FeatureCache,
    ) -> ArtistClassifier:
        """Cross-validate, then train on all pictures but those that will be scored.

        Args:
            scored: SHA-256 of files that may not be trained on, in whatever class they lie.

        Raises:
            UsageError: a class has fewer pictures than there are folds.
        """
        kept: dict[str, str] = {}  # digest → class; a picture in two classes belongs to the first
        paths: list[Path] = []
        for name, group in classes.items():
            for path in group:
                digest = cache.digest(path)
                if digest not in kept and digest not in scored:
                    kept[digest] = name
                    paths.append(path)
        counts = {name: list(kept.values()).count(name) for name in classes}
        if few := [f"{name} ({count})" for name, count in counts.items() if count < FOLDS]:
            raise UsageError(
                f"found too few pictures to cross-validate with {FOLDS} folds: {', '.join(few)}; expected at "
                f"least {FOLDS} in each class, not counting copies and pictures that are scored"
            )
        names = tuple(classes)
        vectors = cache.vectors(paths)
        labels = np.array([names.index(name) for name in kept.values()], dtype=np.int64)
        folds = assign_folds(list(kept), labels, FOLDS)
        held_out = held_out_predictions(vectors, labels, len(names), folds, _L2)
        target = names.index(artist)
        right = held_out == labels
        recalls = [float(right[labels == index].mean()) for index in range(len(names))]
        alarms = {
            name: float((held_out[labels == index] == target).mean())
            for index, name in enumerate(names)
            if index != target
        }
        quality = ClassifierQuality(counts, float(right.mean()), float(np.mean(recalls)), recalls[target], alarms)
        return cls(artist, names, LinearProbe.fit(vectors, labels, len(names), _L2), quality, cache)

    def classes_of(self, paths: Sequence[Path]) -> list[str]:
        """The predicted class of each picture."""
        return [self.names[index] for index in self.probe.predict(self.cache.vectors(paths))]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on standardised vectors."""

    mean: Vectors
    scale: Vectors
    weight: Vectors
    """[D, classes]."""
    bias: Vectors
    """[classes]."""

    @classmethod
    def fit(cls, vectors: Vectors, labels: Labels, classes: int, l2: float) -> LinearProbe:
        """Minimise the mean cross-entropy plus ``l2 / 2 · |W|²``; every class weighs the same, however many it has.

        `vectors` are [N, D], `labels` [N]: each below `classes`, each class at least once.
        """
        import torch
        import torch.nn.functional as F

        x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
        # Without the addend a feature that hardly ever varies would dominate.
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
        return cls(mean.numpy(), scale.numpy(), weight.detach().numpy(), bias.detach().numpy())

    def predict(self, vectors: Vectors) -> Labels:
        """The most likely class of each vector [N, D], [N]."""
        logits = ((vectors - self.mean) * self.scale) @ self.weight + self.bias
        return np.asarray(logits.argmax(1), dtype=np.int64)


def assign_folds(digests: Sequence[str], labels: Labels, folds: int) -> Labels:
    """A fold for each picture, [N]: as even as can be within a class, by the file's hash and nothing else."""
    rank = [hashlib.sha256(digest.encode()).hexdigest() for digest in digests]
    assigned = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label), key=lambda row: rank[row])
        assigned[rows] = np.arange(len(rows)) % folds
    return assigned


def held_out_predictions(vectors: Vectors, labels: Labels, classes: int, folds: Labels, l2: float) -> Labels:
    """The class that a probe trained without a picture's fold predicts for it, [N]."""
    predicted = np.full(len(labels), -1, dtype=np.int64)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = LinearProbe.fit(vectors[~out], labels[~out], classes, l2).predict(vectors[out])
    return predicted


def find_classes(
    artists: Path, artist: str, photos: Path | None, leave_out: Collection[str]
) -> dict[str, Sequence[Path]]:
    """Class → its pictures: the folders of `artists` by name, and `photos`.

    Raises:
        PictureError: a folder that does not exist or is empty.
        UsageError: the artist is none of them, names that clash, or one class only.
    """
    if not artists.is_dir():
        found = "the file" if artists.exists() else "no folder"
        raise PictureError(f"found {found} {artists}; expected a folder with a folder for each artist")
    folders = {path.name: path for path in sorted(artists.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if unknown := sorted(set(leave_out) - folders.keys()):
        raise UsageError(f"found no {', '.join(unknown)} to leave out; the artists are {', '.join(folders)}")
    classes: dict[str, Sequence[Path]] = {
        name: find_pictures(folder) for name, folder in folders.items() if name not in leave_out
    }
    if artist not in classes:
        raise UsageError(f"found no artist {artist!r}; expected one of the folders of {artists}: {', '.join(classes)}")
    if photos is not None:
        if PHOTOS in classes:
            raise UsageError(f"found photos twice: {artists / PHOTOS} and {photos}; expected one of them")
        classes[PHOTOS] = find_pictures(photos)
    if len(classes) < 2:
        raise UsageError(f"found one class, {artist}; expected others to tell the artist from (and photos)")
    return classes
