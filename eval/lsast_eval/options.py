"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lsast_engines.errors import UsageError, fault_list
from lsast_engines.files import cache_home


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Raises:
        UsageError: invalid values; all at once.
    """

    size: int = 512
    """Shorter side, in pixels, at which a result is compared with its content; at least 64.

    A content is only ever shrunk to it, and a result is brought to the content's height and width.
    """
    bootstrap: int = 300
    """Resamplings behind an interval, at least 20."""
    seed: int = 0
    """Seed of the resampling, and of the draw of works in the reference row."""
    cache: Path | None = None
    """Folder for features by file hash. [default: ``eval`` in ``$LSAST_HOME``, else in lsast's XDG cache folder]"""

    def __post_init__(self) -> None:
        rules = {
            f"size {self.size}; expected at least 64": self.size >= 64,
            f"bootstrap {self.bootstrap}; expected at least 20": self.bootstrap >= 20,
            f"seed {self.seed}; expected 0 or more": self.seed >= 0,
        }
        if faults := [text for text, holds in rules.items() if not holds]:
            raise UsageError(fault_list("invalid options:", faults))

    def cache_folder(self) -> Path:
        """Where features are kept; it need not exist."""
        return self.cache or cache_home() / "eval"
