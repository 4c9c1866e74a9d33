"""Entry of ``lsast-eval`` and ``python -m lsast_eval``."""

from __future__ import annotations

from .cli import command


def main(arguments: list[str] | None = None) -> None:
    """Run ``lsast-eval`` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    command.main(args=arguments, prog_name="lsast-eval")


if __name__ == "__main__":
    main()
