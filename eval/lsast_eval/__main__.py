"""Entry of ``python -m lsast_eval``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="lsast-eval")
