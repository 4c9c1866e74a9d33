"""The commands of ``lsast-train``."""
