"""The command line ``lsast-run``."""
