"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lsast_engines.declared_options import Range, option_faults
from lsast_engines.errors import UsageError, fault_list
from lsast_engines.files import cache_home


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Raises:
        UsageError: invalid values; all at once.
    """

    size: Annotated[int, Range(64)] = 512
    """Shorter side, in pixels, at which a result is compared with its content.

    A content is only ever shrunk to it, and a result is brought to the content's height and width.
    """
    bootstrap: Annotated[int, Range(20)] = 300
    """Resamplings behind an interval."""
    seed: Annotated[int, Range(0)] = 0
    """Seed of the resampling, and of the draw of works in the reference row."""
    cache: Path | None = None
    """Folder for features by file hash. [default: ``eval`` in ``$LSAST_HOME``, else in lsast's XDG cache folder]"""

    def __post_init__(self) -> None:
        if faults := option_faults(EvalOptions, vars(self)):
            raise UsageError(fault_list("invalid options:", faults))

    def cache_folder(self) -> Path:
        """Where features are kept; it need not exist."""
        return self.cache or cache_home() / "eval"
