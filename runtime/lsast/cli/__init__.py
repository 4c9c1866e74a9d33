"""The command lines ``lsast`` and ``lsast-run``."""
