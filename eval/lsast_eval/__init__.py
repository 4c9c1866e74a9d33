"""Does it look like the artist, and is the content still there? Scores for folders of stylised pictures."""

from __future__ import annotations

from .distances import Score
from .evaluation import evaluate
from .options import EvalOptions
from .report import Report
from .votes import Vote, read_votes, win_rates

__all__ = ["EvalOptions", "Report", "Score", "Vote", "evaluate", "read_votes", "win_rates"]
