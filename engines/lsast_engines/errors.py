"""The one exception tree of every room.

::

    LsastError                 exit 1   anything we expect to go wrong
    ├── UsageError             exit 2   an option or argument that cannot be meant
    ├── MissingExtraError      exit 1   a library that an extra installs is not there
    ├── PictureError           exit 1   a picture or folder that cannot be read or written
    ├── BundleError            exit 1   a bundle that is not what its manifest says
    ├── StyleError             exit 1   a style or prompt file that is damaged or does not fit the bundle
    ├── BackendError           exit 1   a backend or device that cannot be had, or fails while running
    ├── CancelledError         exit 130 a painting that was asked to stop
    ├── TrainingError          exit 1   training that cannot start, resume or converge
    └── ExportError            exit 1   a graph that cannot be exported
        └── ParityError        exit 1   an exported graph that does not compute what torch computes

Messages say what was found, what was expected, and how to mend it.
"""

from __future__ import annotations


class LsastError(Exception):
    """Root of all expected errors; `exit_code` is what a command line returns for it."""

    exit_code = 1


class UsageError(LsastError):
    """An option or argument that cannot be meant: out of range, unknown, or at odds with another."""

    exit_code = 2


class MissingExtraError(LsastError):
    """A library that an optional extra installs is not importable."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'lsast[{extra}]'")
        self.library = library
        self.extra = extra


class PictureError(LsastError):
    """A picture or a folder of pictures that cannot be read or written."""


class BundleError(LsastError):
    """A bundle that is incomplete, damaged, of another format, or not what its manifest says."""


class StyleError(LsastError):
    """A style or prompt file that is damaged, or that was made for another base."""


class BackendError(LsastError):
    """A backend or device that cannot be had here, or that failed while running a graph."""


class CancelledError(LsastError):
    """A painting that was asked to stop, and did."""

    exit_code = 130


class TrainingError(LsastError):
    """Training that cannot start, cannot resume, or does not converge."""


class ExportError(LsastError):
    """A base or style that cannot be exported."""


class ParityError(ExportError):
    """An exported graph whose outputs differ from torch by more than the tolerance."""


def fault_list(heading: str, faults: list[str]) -> str:
    """Join several faults under one heading, a line each, so that all are mended in one go."""
    return heading + "".join(f"\n  - {fault}" for fault in faults)
