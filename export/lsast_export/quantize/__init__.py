"""Graphs in int8 for CPUs."""
