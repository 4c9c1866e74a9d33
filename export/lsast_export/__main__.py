"""Entry of ``python -m lsast_export``."""

from .cli.main import main

if __name__ == "__main__":
    main(prog_name="lsast-export")
