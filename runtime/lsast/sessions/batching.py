"""Many pictures, grouped into batches, and their results in the order of the pictures."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsast_engines.errors import UsageError

if TYPE_CHECKING:
    from ..request import Picture, Request
    from ..result import Result

AHEAD = 4
"""Batches that are read ahead, to find pictures of one size among others."""

_MISSING = object()

Job = tuple["Picture", Mapping[str, Any]]
"""A picture and its own options."""


def require_iterable(name: str, values: object) -> None:
    """Raise a `UsageError` for an argument that is no list, nor anything else to iterate over; texts and bytes are
    refused, too."""
    with contextlib.suppress(TypeError):
        iter(values)  # type: ignore[call-overload]
        if not isinstance(values, (str, bytes, bytearray)):
            return
    raise UsageError(f"found {type(values).__name__} as {name}; expected a list, or anything to iterate over")


def jobs(
    pictures: Iterable[Picture], styles: str | Iterable[str | None] | None, rows: Iterable[Mapping[str, Any]] | None
) -> Iterator[Job]:
    """Every picture with its own options, see `Stylizer.stylize_many`; a `UsageError` where the shorter of pictures,
    styles and rows ends."""
    columns: dict[str, Iterable[Any]] = {"pictures": pictures}
    if styles is not None and not isinstance(styles, str):
        columns["styles"] = styles
    if rows is not None:
        columns["rows"] = rows
    for name, column in columns.items():
        require_iterable(name, column)
    for count, values in enumerate(itertools.zip_longest(*columns.values(), fillvalue=_MISSING)):
        found = dict(zip(columns, values, strict=True))
        ended = [name for name, value in found.items() if value is _MISSING]
        if ended:
            more = "more styles or rows" if "pictures" in ended else "more pictures"
            raise UsageError(f"found {count} {' and '.join(ended)} and {more}; expected as many of each")
        if not isinstance(found.get("rows", {}), Mapping):
            raise UsageError(f"found {type(found['rows']).__name__} in rows; expected a dict for each picture")
        style = found.get("styles", styles)
        yield found["pictures"], {**({} if style is None else {"style": style}), **found.get("rows", {})}


def stream(
    source: Iterator[Job],
    read: Callable[[Picture, Mapping[str, Any]], Request],
    paint: Callable[[Sequence[Request]], list[Result]],
    batch: int,
) -> Iterator[Result]:
    """Paint the jobs of `source` in batches of at most `batch`, and yield the results in the order of the jobs. `paint`
    gets requests of one `batch_key`. An error of `source` or `read` is raised after the results of earlier jobs, one of
    `paint` at the first picture of its batch."""
    window: list[tuple[Request, list[Result]]] = []
    """Requests in the order of the pictures, and their results: none yet, or one."""
    error: Exception | None = None
    more = True

    def first_batch() -> list[tuple[Request, list[Result]]]:
        """Those that are painted together with the first one that waits."""
        waiting = [(entry, entry[0].batch_key) for entry in window if not entry[1]]
        return [entry for entry, key in waiting if key == waiting[0][1]][:batch]

    while more or window:
        while more and len(window) < AHEAD * batch and len(first_batch()) < batch:
            try:
                window.append((read(*next(source)), []))
            except StopIteration:
                more = False
            except Exception as found:
                more, error = False, found
        if entries := first_batch():
            for (_, results), result in zip(entries, paint([request for request, _ in entries]), strict=True):
                results.append(result)
        while window and window[0][1]:
            yield window.pop(0)[1][0]
    if error:
        raise error
