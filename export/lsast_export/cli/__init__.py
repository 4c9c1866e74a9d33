"""The commands of ``lsast-export``."""
