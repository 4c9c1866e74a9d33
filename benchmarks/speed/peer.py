"""What every peer of `compare.py` paints, and how its time is taken.

It imports no library of a peer: that would count as memory of another.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from lsast_engines.environment import peak_memory

STEPS, STRENGTH, GUIDANCE = 50, 0.7, 10.0
"""As LSAST's released code paints."""

RUN = int(STEPS * STRENGTH)
"""Steps of a picture."""

Paint = Callable[[int], list[float]]
"""Paints with so many of the steps, the last ones of the schedule; gives the times between the steps' ends."""


def timed(task: dict[str, Any], paint: Paint, opened: float, first: float) -> dict[str, Any]:
    """Paint the `repeats` of `task`, each with its `steps_measured` or all steps; the report of a peer.

    Args:
        task: see above.
        paint: what is measured, warmed up.
        opened: seconds that opening took.
        first: seconds that warming up took.
    """
    count = min(RUN, task["steps_measured"] or RUN)
    pictures, steps = [], []
    for _ in range(task["repeats"]):
        begin = time.perf_counter()
        steps.append(paint(count))
        pictures.append(time.perf_counter() - begin)
    times = os.times()
    return {
        "open": opened,
        "first": first,
        "pictures": pictures,
        "steps": steps,
        "counted_steps": count,
        "run_steps": RUN,
        "macs_step": None,
        "macs_picture": None,
        "cpu_s": times.user + times.system,
        "peak_bytes": peak_memory(),
    }
