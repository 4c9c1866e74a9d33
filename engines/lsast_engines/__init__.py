"""Bundles and styles on disk, backends that run their graphs, solvers, images; it never imports torch."""
