"""The exceptions of all packages. Messages say what was found, what was expected, and how to mend it."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_NO_MEMORY = re.compile(
    "bad_alloc|bad allocation|(can't|cannot|unable to|failed to) alloc|(out of|insufficient|not enough) memory"
    "|failed to map segment",
    re.I,
)
"""How ONNX Runtime, OpenVINO, OpenCV, CUDA and the loader of libraries say that there is no memory, each in an
exception of its own."""


class Lines(str):
    """A message of several lines. In every other message of an `LsastError` a line break is part of a name."""


class LsastError(Exception):
    """Base class of all expected errors; `exit_code` is the exit status of a command line.

    What does not print is escaped (`shown`): names in messages can neither control a terminal nor add a line.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(message if isinstance(message, Lines) else shown(message))

    def __format__(self, spec: str) -> str:
        """The message for use in another one: one line."""
        return " ".join(map(str.strip, str(self).split("\n")))


class UsageError(LsastError):
    """An invalid option or argument: out of range, unknown, or in conflict with another."""

    exit_code = 2


class MissingExtraError(LsastError):
    """A library of an optional extra is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: {install_command(extra)}")
        self.library = library
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.library, self.extra)


class PictureError(LsastError):
    """A picture or a folder of pictures that cannot be read or written."""


class BundleError(LsastError):
    """A bundle that is incomplete, damaged, of another format, or different from its manifest."""


class UnknownStyleError(UsageError):
    """A bundle has no style of a name."""


class StyleError(LsastError):
    """A style or prompt file that is damaged, or that was made for another base."""


class BackendError(LsastError):
    """A backend or device that is not available, or that failed while running a graph."""


class OutOfMemoryError(LsastError, MemoryError):
    """There is less memory than what was asked for needs."""


class CancelledError(LsastError):
    """A painting that was cancelled."""

    exit_code = 130


class TrainingError(LsastError):
    """Training that cannot start, cannot resume, or does not converge."""


class ExportError(LsastError):
    """A base or style that cannot be exported."""


class ParityError(ExportError):
    """An exported graph whose outputs differ from torch by more than the tolerance."""


@contextlib.contextmanager
def enough_memory(
    task: str, mend: str = "take a smaller size, smaller tiles or a smaller batch, or close other programs"
) -> Iterator[None]:
    """Makes an `OutOfMemoryError` of what any library raises in the block when it gets no memory for `task`, e.g. "to
    read photo.jpg"; `mend` says what helps."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LsastError) or not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        raise OutOfMemoryError(f"found too little free memory {task}; expected more: {mend}") from error


def install_command(extra: str) -> str:
    """The command that installs an extra, for messages."""
    return f"pip install 'lsast[{extra}]'"


def shown(text: object) -> str:
    """A name or text out of a file for one line of a terminal.

    What does not print is escaped: control characters, line breaks, marks that turn the direction, lone surrogates.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def did_you_mean(found: object, known: Iterable[str]) -> str:
    """The end of a message: the name of `known` that `found` is likely to mean; empty if none is near."""
    near = difflib.get_close_matches(str(found), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def fault_list(heading: str, faults: list[str]) -> Lines:
    """An error message of several faults: the heading, then a line for each."""
    texts = [text if isinstance(text, Lines) else shown(text) for text in (heading, *faults)]
    return Lines("\n  - ".join(texts))


def shape_faults(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """Tensors by name that are missing, not expected, or of another shape; a line each."""
    faults = [f"{name}: missing; expected shape {list(shape)}" for name, shape in expected.items() if name not in found]
    faults += [f"{name}: not expected" for name in found if name not in expected]
    return faults + [
        f"{name}: found shape {list(shape)}; expected {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and list(shape) != list(expected[name])
    ]
