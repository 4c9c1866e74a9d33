"""What a run measured, and its picture: over-fitting is where the training curve falls and the held-out curve rises."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lsast_engines.files import replace_file

FORMAT = 1
"""Format number of the curve's JSON."""


@dataclass(frozen=True)
class Evaluation:
    """The losses after a number of steps: mean squared errors of the noise, one for each stage."""

    step: int
    held_out: Sequence[float]
    """On paintings that training never sees."""
    training: Sequence[float]
    """On paintings that it does see, measured in the same way."""
    loss: float | None = None
    """Mean (weighted) training loss since the evaluation before; None at step 0."""
    learning_rate: float | None = None
    """Of the last step."""


@dataclass
class Curve:
    """All evaluations of a run, the first one at step 0: the initial prompts."""

    evaluations: list[Evaluation] = field(default_factory=list)

    def relative(self, evaluation: Evaluation) -> float:
        """Held-out loss relative to that of the initial prompts, stage by stage, then averaged.

        Losses differ a hundredfold between stages; a plain mean would let the clean end decide alone.
        """
        return _relative(evaluation.held_out, self.evaluations[0].held_out)

    def relative_training(self, evaluation: Evaluation) -> float:
        """The same for the training paintings."""
        return _relative(evaluation.training, self.evaluations[0].training)

    def best(self) -> Evaluation:
        """The evaluation with the lowest relative held-out loss; the earliest of equals."""
        return min(self.evaluations, key=self.relative)


def save_curve(curve: Curve, path: Path, facts: dict[str, Any], stages: Sequence[int] | None = None) -> None:
    """Write ``path`` (JSON) and the same name with ``.png``, both whole.

    Args:
        facts: more to tell there; ``name`` is the picture's title.
        stages: numbers of the stages that the losses are of; None is 0, 1, 2 …
    """
    best = curve.best()
    rows = [
        {**asdict(row), "relative_held_out": curve.relative(row), "relative_training": curve.relative_training(row)}
        for row in curve.evaluations
    ]
    stages = list(range(len(best.held_out)) if stages is None else stages)
    document = {"format": FORMAT, **facts, "stages": stages, "best_step": best.step, "evaluations": rows}
    with replace_file(path) as handle:
        handle.write(json.dumps(document, indent=1).encode())
    with replace_file(path.with_suffix(".png")) as handle:
        handle.write(_plot(curve, best, facts.get("name", ""), stages))


def _plot(curve: Curve, best: Evaluation, title: str, stages: list[int]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no window system is asked for and no global state is left behind.
    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.88, wspace=0.25)
    over_steps, over_stages = figure.subplots(1, 2)
    steps = [evaluation.step for evaluation in curve.evaluations]
    over_steps.plot(steps, [curve.relative(e) for e in curve.evaluations], "o-", label="held out")
    over_steps.plot(steps, [curve.relative_training(e) for e in curve.evaluations], ".--", label="training")
    over_steps.axvline(best.step, color="grey", linewidth=0.8, label=f"kept: {best.step}")
    over_steps.set(xlabel="step", ylabel="noise error / initial", title=title)
    over_steps.legend()
    initial = curve.evaluations[0]
    parts = [100 * (new / old - 1) for new, old in zip(best.held_out, initial.held_out, strict=True)]
    over_stages.bar(stages, parts)
    over_stages.axhline(0, color="grey", linewidth=0.8)
    over_stages.set(
        xlabel="stage (0: clean end)", ylabel="change [%]", title=f"held-out noise error at step {best.step}"
    )
    over_stages.set_xticks(stages)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _relative(losses: Sequence[float], initial: Sequence[float]) -> float:
    return sum(new / old for new, old in zip(losses, initial, strict=True)) / len(initial)
