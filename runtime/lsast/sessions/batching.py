"""Many pictures, grouped into batches and given back in their own order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import LsastError, UsageError

if TYPE_CHECKING:
    from ..request import Picture, Request
    from ..result import Result

AHEAD = 4
"""Batches that are read ahead, so that pictures of one size are found among others."""

_MISSING = object()

Job = tuple["Picture", Mapping[str, Any]]
"""A picture and its own options."""


@dataclass
class _Place:
    """One picture's place in the stream: what is to be painted, then what came of it."""

    request: Request | None = None
    outcome: Result | LsastError | None = None


def jobs(
    pictures: Iterable[Picture],
    styles: str | Iterable[str | None] | None,
    rows: Iterable[Mapping[str, Any]] | None,
) -> Iterator[Job]:
    """Every picture with its own options; see `Stylizer.stylize_many`.

    Raises:
        UsageError: fewer or more styles or rows than pictures, at the place where that shows.
    """
    every: Iterable[str | None] = itertools.repeat(styles) if styles is None or isinstance(styles, str) else styles
    own: Iterable[Mapping[str, Any]] = itertools.repeat({}) if rows is None else rows
    for place, (picture, style, row) in enumerate(itertools.zip_longest(pictures, every, own, fillvalue=_MISSING)):
        ended = [name for name, value in (("styles", style), ("rows", row)) if value is _MISSING]
        if picture is _MISSING:
            if (styles is None or isinstance(styles, str) or style is _MISSING) and (rows is None or row is _MISSING):
                return
            raise UsageError(f"found {place} pictures and more styles or rows; expected as many of each")
        if ended:
            raise UsageError(f"found {place} {' and '.join(ended)} and more pictures; expected as many of each")
        yield picture, {**({} if style is None else {"style": style}), **row}  # type: ignore[dict-item, misc]


def stream(
    source: Iterable[Job],
    read: Callable[[Picture, Mapping[str, Any]], Request],
    paint: Callable[[Sequence[Request]], list[Result]],
    batch: int,
) -> Iterator[Result]:
    """Paint what `source` gives, most `batch` at once, and give the results in its order.

    Args:
        source: pictures and their options; never read further ahead than `AHEAD` batches.
        read: reads one.
        paint: paints some that have one `batch_key`.
        batch: at least 1.

    Raises:
        UsageError: a batch below 1.
        LsastError: what `read`, `paint` or `source` raised, at the place of its picture.
    """
    if batch < 1:
        raise UsageError(f"found a batch of {batch}; expected at least 1")
    return _stream(iter(source), read, paint, batch)


def _stream(
    source: Iterator[Job],
    read: Callable[[Picture, Mapping[str, Any]], Request],
    paint: Callable[[Sequence[Request]], list[Result]],
    batch: int,
) -> Iterator[Result]:
    window: deque[_Place] = deque()
    more = True
    while True:
        while more and not _enough(window, batch):
            try:
                picture, options = next(source)
            except StopIteration:
                more = False
                break
            except LsastError as error:
                window.append(_Place(outcome=error))
                more = False
                break
            window.append(_read(picture, options, read))
        if not window:
            return
        if window[0].outcome is None:
            together = _first_batch(window, batch)
            _paint(together, paint)
        while window and window[0].outcome is not None:
            outcome = window.popleft().outcome
            if isinstance(outcome, LsastError):
                raise outcome
            assert outcome is not None
            yield outcome


def _read(
    picture: Picture, options: Mapping[str, Any], read: Callable[[Picture, Mapping[str, Any]], Request]
) -> _Place:
    try:
        return _Place(read(picture, options))
    except LsastError as error:
        return _Place(outcome=error)


def _paint(places: Sequence[_Place], paint: Callable[[Sequence[Request]], list[Result]]) -> None:
    results = paint([place.request for place in places if place.request])
    for place, result in zip(places, results, strict=True):
        place.request, place.outcome = None, result


def _first_batch(window: Iterable[_Place], batch: int) -> list[_Place]:
    """The places that are painted with the first of those that wait."""
    waiting = [place for place in window if place.request]
    key = waiting[0].request.batch_key if waiting and waiting[0].request else None
    return [place for place in waiting if place.request and place.request.batch_key == key][:batch]


def _enough(window: deque[_Place], batch: int) -> bool:
    """Whether the first batch is full, or as much was read ahead as may be."""
    waiting = any(place.request for place in window)
    return len(window) >= AHEAD * batch or (waiting and len(_first_batch(window, batch)) >= batch)
