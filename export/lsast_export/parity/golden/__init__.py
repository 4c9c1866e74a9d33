"""Comparison with recordings of the released LSAST code."""
