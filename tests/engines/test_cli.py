"""What all command lines share: how a failure ends."""

from __future__ import annotations

import errno
import os
import warnings

import click
import pytest
from click.testing import CliRunner

from lsast_engines.cli import Command, debug_option
from lsast_engines.errors import LsastError, shown


def run(error: BaseException) -> tuple[int, str]:
    @click.command(cls=Command)
    @debug_option
    def command() -> None:
        raise error

    result = CliRunner().invoke(command)
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 9), "xxxxxxxxx: File name too long"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (MemoryError("3 TiB"), "not enough memory (3 TiB); close other programs, or ask for less"),
    ],
)
def test_command_of_a_system_error_says_it_without_surprise(error: Exception, message: str) -> None:
    assert run(error) == (1, f"Error: {message}\n")


def test_command_escapes_what_does_not_print_in_messages() -> None:
    status, text = run(LsastError("two:\n  - a\x1b[2Jb\u202e\udcff\r"))
    assert (status, text) == (1, "Error: two:\n  - a\\x1b[2Jb\\u202e\\udcff\\r\n")


def test_shown_keeps_letters_and_escapes_lines() -> None:
    assert shown("Ünïcødé 日本 א") == "Ünïcødé 日本 א"
    assert shown("a\nError: forged\x9b1m") == "a\\nError: forged\\x9b1m"


def test_command_does_not_show_pillows_warnings() -> None:
    @click.command(cls=Command)
    def command() -> None:
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")

    assert CliRunner().invoke(command).exit_code == 0
