"""What an exported engine is, and how one is run. Never imports torch."""

from __future__ import annotations

from .bundle import Bundle, find_bundle
from .engine import Engine, available_backends, open_engine
from .manifest import AttentionLayer, FileEntry, Manifest
from .noise import NoiseSpec
from .schedule import Schedule, Step
from .solvers import SOLVERS, Solver, make_solver
from .spec import Geometry, GraphSpec, TensorSpec, graph_specs
from .style import Style
from .style_file import StyleFile

__all__ = [
    "SOLVERS",
    "AttentionLayer",
    "Bundle",
    "Engine",
    "FileEntry",
    "Geometry",
    "GraphSpec",
    "Manifest",
    "NoiseSpec",
    "Schedule",
    "Solver",
    "Step",
    "Style",
    "StyleFile",
    "TensorSpec",
    "available_backends",
    "find_bundle",
    "graph_specs",
    "make_solver",
    "open_engine",
]
