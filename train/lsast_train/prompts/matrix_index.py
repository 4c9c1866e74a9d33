"""Which of the matrices P_k serves a stage and layer group."""

import torch

from ..base.projection import GROUPS
from ..options import Generator, Layout, Variant

STAGES = 10
"""Equal parts of the noise schedule; stage 0 is the clean end (docs/method.md §1.4)."""


def matrix_index(variant: Variant, layout: Layout = "strided", stages: int = STAGES) -> torch.Tensor:
    """Index k of the matrix that serves each stage and layer group, int64 [stages, 3].

    ``step+layer`` gives 3s + l (30 matrices) or, overlapping, s + l: 12 matrices, each serving three stages in turn
    (the released code makes 30 and never reads the other 18, docs/method.md §8.1). ``step`` gives s, ``layer`` l and
    ``global`` 0.
    """
    stage = torch.arange(stages)[:, None].expand(stages, len(GROUPS))
    group = torch.arange(len(GROUPS))[None].expand(stages, len(GROUPS))
    if variant == "step+layer":
        return stage + group if layout == "overlap" else len(GROUPS) * stage + group
    tables = {"step": stage, "layer": group, "global": torch.zeros_like(stage)}
    return tables[variant].clone()


def matrix_count(variant: Variant, generator: Generator, layout: Layout, stages: int = STAGES) -> int:
    """Number of matrices: those that are read; with ``geglu`` also those that only the released generator makes."""
    if generator == "geglu" and variant == "step+layer":
        return len(GROUPS) * stages
    return int(matrix_index(variant, layout, stages).max()) + 1
