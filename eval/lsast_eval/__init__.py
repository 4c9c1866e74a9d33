"""Scores for folders of stylised pictures: style, content, and votes of people."""

from .evaluation import evaluate
from .metrics.intervals import Score
from .report import EvalOptions, Report
from .voting.votes import Vote, read_votes, win_rates

__all__ = ["EvalOptions", "Report", "Score", "Vote", "evaluate", "read_votes", "win_rates"]
