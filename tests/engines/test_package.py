from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lsast_engines import errors
from lsast_engines.files import file_sha256, replace_file


def test_docstring_draws_the_tree_of_errors() -> None:
    assert errors.__doc__
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LsastError)]
    assert len(kinds) > 8
    for kind in kinds:
        (line,) = (line for line in errors.__doc__.splitlines() if kind.__name__ in line)
        assert f"exit {kind.exit_code}" in line
        if kind is not errors.LsastError:
            (base,) = (line for line in errors.__doc__.splitlines() if kind.__bases__[0].__name__ in line)
            assert line.index(kind.__name__) > base.index(kind.__bases__[0].__name__)


def test_messages_of_errors() -> None:
    error = errors.MissingExtraError("onnxruntime", "cpu")
    assert str(error) == "onnxruntime is not installed; install it with: pip install 'lsast[cpu]'"
    assert errors.fault_list("two:", ["a", "b"]) == "two:\n  - a\n  - b"


def break_off(target: Path, error: type[BaseException]) -> None:
    with replace_file(target) as handle:
        handle.write(b"half")
        raise error


def test_replace_file_writes_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with replace_file(target) as handle:
        handle.write(b"old")
        assert not target.exists()
    assert target.read_bytes() == b"old"
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert target.stat().st_mode == plain.stat().st_mode
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            break_off(target, error)
    assert target.read_bytes() == b"old"
    with replace_file(target) as handle:
        handle.write(b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file"]


def test_file_sha256(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
