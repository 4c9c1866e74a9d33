"""`python -m lsast` is `lsast-run`, for where scripts are not on the path."""

from .cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m lsast")
