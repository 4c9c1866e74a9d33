"""Files that are written whole or not at all, and the user's folders for caches and data.

What is not finished has a hidden name that does not depend on the final one, and is locked by the process that writes
it. What a killed process left is not locked; the next one that writes in the same folder removes it.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError

_UNFINISHED = re.compile(r"\.lsast-[0-9a-f]{16}\.tmp")

NOWHERE = Path(os.devnull) / "lsast"
"""The user's folder where there is no home, or one of another user: nothing is found in it, and it cannot be made."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a full disk, of a full quota, and of a file that is larger than it allows."""

FOR_OTHERS_TO_READ = 0o755
"""The mode of a folder into which `written_by_others` lets nobody else write, whatever the umask is."""

MAKE_OWN = "change that (chmod -R go-w), or set LSAST_HOME to a folder of your own"
"""What to do about what `written_by_others` finds."""

_swept: set[Path] = set()  # no lock guards it: a fork might copy one that is held


@contextlib.contextmanager
def replace_file(path: Path, *, own: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it is renamed to `path` at the end, or deleted on an error.

    A file that is replaced keeps its mode; of a link, the file that it points to is replaced. With `own` nobody else
    may write it, nor into folders that are made for it, whatever the umask is.

    Raises:
        OSError: `path` is a folder, a device or a pipe, or cannot be written; it names `path` where there is no room.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "expected a file, or no such name", str(path))
    allowed = FOR_OTHERS_TO_READ if own else 0o777
    make_folder(path.parent, allowed)
    _sweep(path.parent)
    temporary, descriptor = _create_locked(path.parent, 0o666 & allowed)
    try:
        with _naming(path), os.fdopen(descriptor, "wb") as handle:
            with contextlib.suppress(OSError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) & allowed)
            yield handle
            if not handle.closed:
                handle.flush()
            if sys.platform != "win32":  # a file that is open cannot be renamed there
                temporary.replace(path)
        if sys.platform == "win32":
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, for what is renamed into `parent` when it is finished; deleted at the end."""
    make_folder(parent)
    _sweep(parent)
    folder, descriptor = _create_locked(parent)
    try:
        with _naming(parent):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name `path` in an error that says that there is no room: of a write it has no name, of a copy a hidden one."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            error.filename = str(path)
        raise


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it; `Path.mkdir` recurses, and fails a thousand folders deep."""
    missing = list(takewhile(lambda parent: not parent.exists(), (folder, *folder.parents)))
    for parent in reversed(missing):
        parent.mkdir(mode, exist_ok=True)
    folder.mkdir(mode, exist_ok=True)


def require_writable(folder: Path) -> None:
    """Check that a folder can hold the result of long work, before the work begins; nothing is made. A `UsageError` if
    it, or the nearest folder above it that is there, cannot be written."""
    for path in (folder, *folder.parents):
        try:
            path.lstat()
            number = errno.ENOTDIR if not path.is_dir() else 0 if os.access(path, os.W_OK | os.X_OK) else errno.EACCES
            fault = os.strerror(number) if number else ""
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name too long, or with a zero byte
            fault = getattr(error, "strerror", None) or str(error)
        if fault:
            raise UsageError(f"found {folder} to write to ({fault}); expected a folder that can be made and written")
        return


def is_own(path: Path) -> bool:
    """Whether `path` is not there, or belongs to this user or to root; True on Windows."""
    try:
        return sys.platform == "win32" or path.stat().st_uid in (os.geteuid(), 0)
    except FileNotFoundError:
        return True


def written_by_others(folder: Path, root: Path) -> Path | None:
    """The first of the folders from `root` down to `folder`, and of the files in it, that another user may have
    written; None if there is none, or the system does not tell (Windows).

    Root is no other user here, nor is a group with the number of the file's owner or of this user: most systems make
    such a group for each user, and Kubernetes gives volumes of root to it (``fsGroup``).
    """
    if sys.platform == "win32" or not root.is_dir():
        return None
    folders = (folder, *takewhile(lambda parent: parent != root.parent, folder.parents))
    with contextlib.suppress(OSError):  # not there, or not to be looked into
        for path in (*folders[::-1], *folder.glob("*")):
            found = path.stat()  # of a link, of what it leads to
            writable = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid not in (found.st_uid, os.geteuid()) else 0)
            if found.st_mode & stat.S_ISVTX and path.is_dir():
                writable = 0  # as /tmp: others may add to it, but not replace what is not theirs
            if not is_own(path) or found.st_mode & writable:
                return path
    return None


def keep_from_others(folder: Path) -> None:
    """Let nobody else write the files in `folder`, whatever the umask is."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has just removed it
            file.chmod(stat.S_IMODE(file.stat().st_mode) & FOR_OTHERS_TO_READ)


def _create_locked(parent: Path, file_mode: int | None = None) -> tuple[Path, int]:
    """A new hidden file, or without `file_mode` a folder, with a random name; its locked descriptor, -1 for a folder on
    Windows."""
    while True:
        path = parent / f".lsast-{secrets.token_hex(8)}.tmp"
        if file_mode is None:
            path.mkdir(0o700)
            descriptor = -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY)
        else:
            # The system subtracts the umask; reading it would change it for other threads.
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
            descriptor = os.open(path, flags, file_mode)
        # Another process may have removed it before it was locked.
        if try_lock(descriptor) and path.exists():
            return path, descriptor
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; whether no other process holds it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # others: a file system without locks
    return True


def lock_file(path: Path) -> int:
    """Make a file if there is none, and lock it until the descriptor that is returned is closed; -1 if another process
    holds it, or has just removed it. On Windows nothing is locked (`try_lock`)."""
    descriptor = -1
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    if descriptor >= 0:
        os.close(descriptor)
    return -1


def _sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`; once in this process."""
    if folder in _swept or sys.platform == "win32":
        return
    _swept.add(folder)
    import fcntl

    with contextlib.suppress(OSError):
        for path in (folder / name for name in filter(_UNFINISHED.fullmatch, os.listdir(folder))):
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                stack.callback(os.close, descriptor)
                found = os.fstat(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError while its writer lives
                if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode):
                    shutil.rmtree(path, ignore_errors=True)
                elif found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode):
                    path.unlink()


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system cannot."""
    import ctypes

    if sys.platform == "win32":
        return False
    old, new, library = os.fsencode(first), os.fsencode(second), ctypes.CDLL(None)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(-100, old, -100, new, 2) == 0)  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    # RENAME_SWAP of macOS's sys/stdio.h
    return hasattr(library, "renamex_np") and bool(library.renamex_np(old, new, 2) == 0)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file; an OSError if it cannot be read, or is a pipe or a device, which may never end."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "found no file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_home() -> Path:
    """``$LSAST_HOME``, else ``lsast`` in the XDG cache folder; it may not exist. `engines` in it, and with
    ``LSAST_HOME`` `styles`, are the user's; all else may be deleted at any time.

    `NOWHERE` for a user without a home, or who may not look into it: containers run as a number, with the home of root.

    Raises:
        UsageError: ``LSAST_HOME`` is in the home of an unknown user, a file, or may not be looked into.
    """
    return _home("XDG_CACHE_HOME", ".cache")


def data_home() -> Path:
    """``$LSAST_HOME``, else ``lsast`` in the XDG data folder, for what took hours to make. Else as `cache_home`."""
    return _home("XDG_DATA_HOME", ".local/share")


def _home(variable: str, default: str) -> Path:
    if home := os.environ.get("LSAST_HOME"):
        try:
            folder = Path(home).expanduser().absolute()  # the process may change its folder
            _look_into(folder)
        except (RuntimeError, OSError) as error:
            raise UsageError(f"found LSAST_HOME={home} ({error}); expected a folder") from error
        return folder
    base = os.environ.get(variable, "")
    try:
        # The XDG specification has relative ones ignored.
        folder = Path(base) / "lsast" if os.path.isabs(base) else Path.home() / default / "lsast"
        with contextlib.suppress(NotADirectoryError):  # told where something is written to it
            _look_into(folder)
    except (RuntimeError, OSError):  # neither HOME nor an entry in the list of users; or the home of another user
        return NOWHERE
    return folder


def _look_into(folder: Path) -> None:
    """Raises OSError for a file, or a folder that this user may not look into; not for one that is not there."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(folder / "anything")
