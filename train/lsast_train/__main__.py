"""Entry of ``lsast-train`` and ``python -m lsast_train``."""

from .cli.main import command


def main(arguments: list[str] | None = None) -> None:
    """Run ``lsast-train`` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    command.main(args=arguments, prog_name="lsast-train")


if __name__ == "__main__":
    main()
