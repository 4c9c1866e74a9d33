"""What all command lines share: how a failure ends."""

import errno
import json
import math
import os
import pickle
import subprocess
import sys
import warnings

import click
import pytest
from click.testing import CliRunner

from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.errors import LsastError, fault_list


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
        (OSError(errno.ENOSPC, "No room", "x"), "x: No room; expected a folder with room"),
        (MemoryError("3 TiB"), "not enough memory (3 TiB); close other programs, or ask for less"),
    ],
)
def test_command_of_a_system_error_says_it_without_surprise(error, message):
    assert run(error) == (1, f"Error: {message}\n")


def test_command_escapes_only_what_does_not_print_and_breaks_lines_only_between_faults():
    name = "Ünïcødé 日本 א\n  - forged\x9b1m\x1b[2J\u202e\udcff"
    escaped = "Ünïcødé 日本 א\\n  - forged\\x9b1m\\x1b[2J\\u202e\\udcff"
    assert run(LsastError(f"no {name}")) == (1, f"Error: no {escaped}\n")
    error = LsastError(fault_list(f"in {name}:", [name, "b"]))
    assert run(error) == (1, f"Error: in {escaped}:\n  - {escaped}\n  - b\n")
    assert run(LsastError(f"all: {error}")) == (1, f"Error: all: in {escaped}: - {escaped} - b\n")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # a pool of processes


def test_print_result_has_null_for_numbers_that_json_lacks():
    @click.command(cls=Command)
    @json_option
    def command() -> None:
        print_result({"psnr": math.inf, "rows": [{"mean": math.nan}, (-math.inf, 1.5)], "n": 3}, "text")

    printed = CliRunner().invoke(command, ["--json"]).stdout
    facts = json.loads(printed, parse_constant=lambda name: pytest.fail(name))
    assert facts == {"psnr": None, "rows": [{"mean": None}, [None, 1.5]], "n": 3}


NAMES = """
import click
from lsast_engines.cli import Command, echo

@click.command(cls=Command)
def names():
    echo("caf\\udce9")
    echo("\\u65e5")
    echo("a\\nb\\x1b\\u202e")
    echo("caf\\udce9", err=True)

names()
"""
LINE, ASCII_LINE, ERR = "a\\nb\\x1b\u202e\n", "a\\nb\\x1b\\u202e\n", "caf\\udce9\n"
OUT = f"caf\udce9\n日\n{LINE}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "encoding", "expected"),
    [
        ("", "utf-8:strict", (0, OUT, ERR)),
        ("", "ascii", (0, f"caf\udce9\n\\u65e5\n{ASCII_LINE}", ERR)),
        ("<&- >&-", "utf-8", (0, "", ERR)),
        ("2>&-", "utf-8", (0, OUT, "")),
        ("2>/dev/full", "utf-8", (0, OUT, "")),
        (">/dev/full", "utf-8", (1, "", ERR + "Error: standard output: No space left on device\n")),
        ("| true", "utf-8", (141, "", ERR)),
        ("--help | true", "utf-8", (141, "", "")),
        ("--help >/dev/full", "utf-8", (1, "", "Error: standard output: No space left on device\n")),
    ],
)
def test_command_whose_streams_take_nothing_goes_on_and_tells_it(redirection, encoding, expected):
    line = f'set -o pipefail; "{sys.executable}" -c "$NAMES" {redirection}'
    environment = {**os.environ, "NAMES": NAMES, "PYTHONIOENCODING": encoding}
    ran = subprocess.run(["bash", "-c", line], env=environment, capture_output=True)
    assert (ran.returncode, os.fsdecode(ran.stdout), os.fsdecode(ran.stderr)) == expected


def test_command_refuses_an_empty_argument():
    @click.command(cls=Command)
    @click.argument("name")
    @click.option("--out")
    def command(name: str, out: str | None) -> None:
        raise AssertionError

    for arguments in ([""], ["a", "--out", ""], ["a", "--out="]):
        result = CliRunner().invoke(command, arguments)
        assert (result.exit_code, "found an empty argument" in result.stderr) == (2, True)


def test_command_does_not_show_pillows_warnings():
    @click.command(cls=Command)
    def command() -> None:
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")

    assert CliRunner().invoke(command).exit_code == 0
