import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lsast_engines.errors import UsageError
from lsast_engines.files import (
    FOR_OTHERS_TO_READ,
    NOWHERE,
    cache_home,
    data_home,
    file_sha256,
    is_own,
    make_folder,
    replace_file,
    scratch_folder,
    written_by_others,
)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the mask of new files' modes; it is as before at the end."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def break_off(target: Path, error: type[BaseException]) -> None:
    with replace_file(target) as handle:
        handle.write(b"half")
        raise error


def test_replace_file_writes_whole_files_or_nothing(tmp_path):
    target = tmp_path / "deep" / "file"
    with replace_file(target) as handle:
        handle.write(b"old")
        assert not target.exists()
    assert target.read_bytes() == b"old"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            break_off(target, error)
    assert target.read_bytes() == b"old"
    with replace_file(target) as handle:
        handle.write(b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file"]
    data = os.urandom((1 << 20) + 17)
    for name in ("a" * 255, "é" * 127, "b" * 251 + ".png"):  # up to the file system's limit
        with replace_file(tmp_path / name) as handle:
            handle.write(data)
        assert file_sha256(tmp_path / name) == hashlib.sha256(data).hexdigest()


def test_error_of_a_write_without_room_names_the_file_or_folder(tmp_path):
    for write, path in ((replace_file, tmp_path / "file"), (scratch_folder, tmp_path)):
        for number, name in ((errno.ENOSPC, str(path)), (errno.EDQUOT, str(path)), (errno.EIO, None)):
            with pytest.raises(OSError, match=os.strerror(number)) as caught, write(path):
                raise OSError(number, os.strerror(number), *(["hidden"] if number == errno.EDQUOT else []))
            assert caught.value.filename == name


def test_homes_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for home in (str(tmp_path / "home"), "home"):  # a relative one is found after a change of folder
        monkeypatch.setenv("LSAST_HOME", home)
        assert cache_home() == data_home() == tmp_path / "home"
    monkeypatch.setenv("LSAST_HOME", "~no-such-user-of-ours/x")
    with pytest.raises(UsageError, match=r"found LSAST_HOME=~no-such-user-of-ours/x"):
        cache_home()
    monkeypatch.delenv("LSAST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert (cache_home(), data_home()) == (tmp_path / "cache" / "lsast", tmp_path / "data" / "lsast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (cache_home(), data_home()) == (tmp_path / ".cache/lsast", tmp_path / ".local/share/lsast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification says
    assert cache_home() == tmp_path / ".cache/lsast"

    too_long = str(tmp_path / ("a" * 300))  # as the home of another user, for which this test would need two users
    monkeypatch.setenv("XDG_CACHE_HOME", too_long)
    monkeypatch.setenv("HOME", too_long)
    assert cache_home() == data_home() == NOWHERE
    (tmp_path / "file").touch()
    for wrong in (too_long, str(tmp_path / "file")):
        monkeypatch.setenv("LSAST_HOME", wrong)
        with pytest.raises(UsageError, match=r"found LSAST_HOME=.* \(.*\); expected a folder"):
            cache_home()


def test_replace_file_never_touches_the_umask(tmp_path, monkeypatch, umask):
    umask(0o027)
    with monkeypatch.context() as patch:
        patch.delattr(os, "umask")
        with replace_file(tmp_path / "new") as handle:
            handle.write(b"x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_replace_file_keeps_the_mode_and_the_link_of_what_it_replaces(tmp_path):
    real, link = tmp_path / "deep" / "real", tmp_path / "link"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(0o604)
    link.symlink_to(Path("deep/real"))
    with replace_file(link) as handle:
        handle.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert os.listdir(real.parent) == ["real"]


WRITER = """
import sys, time
from pathlib import Path
from lsast_engines.files import replace_file, scratch_folder
with replace_file(Path(sys.argv[1]) / "out") as handle, scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "part").write_bytes(b"x")
    print("ready", flush=True)
    time.sleep(600)
"""
NEXT = """
import sys
from pathlib import Path
from lsast_engines.files import replace_file
with replace_file(Path(sys.argv[1]) / "next"):
    pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_replace_file_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    other = tmp_path / ".lsast-mine.tmp"
    other.touch()
    (tmp_path / ".lsast-0123456789abcdef.tmp").symlink_to(other)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        subprocess.run([sys.executable, "-c", NEXT, str(tmp_path)], check=True)
        assert len(list(tmp_path.glob(".lsast-" + "[0-9a-f]" * 16 + ".tmp"))) == 3  # two of a process that lives
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    subprocess.run([sys.executable, "-c", NEXT, str(tmp_path)], check=True)
    assert sorted(os.listdir(tmp_path)) == [".lsast-0123456789abcdef.tmp", ".lsast-mine.tmp", "next"]


def test_homes_without_a_home_are_found_empty(monkeypatch):
    for name in ("LSAST_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    for home in (cache_home(), data_home()):
        assert not home.is_dir()
        assert not list(home.glob("*"))
        with pytest.raises(OSError, match=os.devnull):
            home.mkdir(parents=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_replace_file_of_its_own_lets_nobody_else_write_at_any_moment(tmp_path, umask):
    umask(0)
    file = tmp_path / "root" / "folder" / "file"
    with replace_file(file, own=True) as handle:
        assert written_by_others(file.parent, tmp_path / "root") is None
        handle.write(b"content")
    assert written_by_others(file.parent, tmp_path / "root") is None
    file.chmod(0o666)
    with replace_file(file, own=True) as handle:
        handle.write(b"content")
    assert written_by_others(file.parent, tmp_path / "root") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_written_by_others_finds_the_first_folder_or_file_that_others_may_write(tmp_path, monkeypatch, umask):
    root = tmp_path / "root"
    folder, file = root / "a" / "b", root / "a" / "b" / "file"
    assert written_by_others(folder, root) is None
    umask(0)
    make_folder(folder, FOR_OTHERS_TO_READ)
    file.touch(0o644)
    tmp_path.chmod(0o777)  # above the root
    assert written_by_others(folder, root) is None
    for path in (root, folder.parent, folder, file):
        usual = stat.S_IMODE(path.stat().st_mode)
        path.chmod(usual | 0o002)
        assert written_by_others(folder, root) == path
        path.chmod(usual | 0o020)  # a group that only its owner is in has the owner's number
        assert written_by_others(folder, root) == (None if path.stat().st_uid == path.stat().st_gid else path)
        path.chmod(usual)
    root.chmod(0o1777)
    assert written_by_others(folder, root) is None
    if os.geteuid() == 0:
        os.chown(root, 0, 12345)  # as Kubernetes gives volumes to the group `fsGroup`
        root.chmod(0o2775)
        assert written_by_others(folder, root) == root
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 12345)
            assert written_by_others(folder, root) is None
        os.chown(root, 0, 0)
    if os.geteuid() == 0:  # what belongs to root is trusted
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert written_by_others(folder, root) in (root, folder)
    assert not is_own(folder)
    assert is_own(root / "missing")
