"""Who painted this? The classes, the training and the reliability of the classifier behind the deception score."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lsast_engines.errors import PictureError, UsageError
from lsast_engines.images import find_pictures

from ..options import EvalOptions
from ..report import Classifier
from .feature_cache import FeatureStore

if TYPE_CHECKING:
    from .probe import Probe

PHOTOS = "photos"
"""Class of the photographs."""


@dataclass(frozen=True)
class Judge:
    """The artist classifier, trained."""

    artist: str
    """Whose hand is looked for."""
    names: tuple[str, ...]
    """The classes, in the order of the probe's."""
    probe: Probe
    facts: Classifier

    @classmethod
    def train(
        cls,
        classes: Mapping[str, Sequence[Path]],
        artist: str,
        judged: Collection[str],
        store: FeatureStore,
        options: EvalOptions,
    ) -> Judge:
        """Cross-validate, then train on all pictures but those that are to be judged.

        Args:
            classes: class → pictures.
            artist: one of the classes.
            judged: SHA-256 of files that may not be trained on, in whatever class they lie.
            store: gives the vectors.
            options: folds and weight decay.

        Raises:
            UsageError: a class has fewer pictures than there are folds.
        """
        from .probe import Probe, assign_folds, held_out_predictions

        kept: dict[str, str] = {}  # digest → class; a picture in two classes belongs to the first
        paths: list[Path] = []
        for name, group in classes.items():
            for path in group:
                digest = store.digest(path)
                if digest not in kept and digest not in judged:
                    kept[digest] = name
                    paths.append(path)
        counts = {name: list(kept.values()).count(name) for name in classes}
        if few := [f"{name} ({count})" for name, count in counts.items() if count < options.folds]:
            raise UsageError(
                f"found too few pictures to cross-validate with {options.folds} folds: {', '.join(few)}; expected at "
                f"least {options.folds} in each class, not counting copies and those being judged"
            )
        names = tuple(classes)
        vectors = store.vectors(paths)
        labels = np.array([names.index(name) for name in kept.values()], dtype=np.int64)
        folds = assign_folds(list(kept), labels, options.folds)
        held_out = held_out_predictions(vectors, labels, len(names), folds, options.l2)
        target = names.index(artist)
        right = held_out == labels
        recalls = [float(right[labels == index].mean()) for index in range(len(names))]
        alarms = {
            name: float((held_out[labels == index] == target).mean())
            for index, name in enumerate(names)
            if index != target
        }
        facts = Classifier(counts, float(right.mean()), float(np.mean(recalls)), recalls[target], alarms, options.folds)
        return cls(artist, names, Probe.fit(vectors, labels, len(names), options.l2), facts)

    def classes_of(self, vectors: npt.NDArray[np.float32]) -> list[str]:
        """The class that each vector [N, D] is taken for."""
        return [self.names[index] for index in self.probe.predict(vectors)]


def find_classes(
    artists: Path, artist: str, photos: Path | None, leave_out: Collection[str]
) -> dict[str, Sequence[Path]]:
    """Class → its pictures: the folders of `artists` by name, and `photos`.

    Raises:
        PictureError: a folder that does not exist or is empty.
        UsageError: the artist is none of them, names that clash, or one class only.
    """
    if not artists.is_dir():
        raise PictureError(f"found no folder {artists}; expected a folder with a folder for each artist")
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
