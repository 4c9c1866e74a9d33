from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lsast_engines.files import cache_home, data_home, file_sha256, replace_file


def break_off(target: Path, error: type[BaseException]) -> None:
    with replace_file(target) as handle:
        handle.write(b"half")
        raise error


def test_replace_file_writes_whole_files_or_nothing(tmp_path: Path) -> None:
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


def test_file_sha256_matches_hashlib(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_homes_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSAST_HOME", str(tmp_path))
    assert cache_home() == data_home() == tmp_path
    monkeypatch.delenv("LSAST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert (cache_home(), data_home()) == (tmp_path / "cache" / "lsast", tmp_path / "data" / "lsast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (cache_home(), data_home()) == (tmp_path / ".cache/lsast", tmp_path / ".local/share/lsast")
