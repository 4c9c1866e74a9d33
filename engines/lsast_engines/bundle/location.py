"""Where bundles lie; without NumPy, so that completion and a server find one at once."""

import os
from pathlib import Path

from ..errors import BundleError, fault_list
from ..files import cache_home

MANIFEST = "manifest.json"
"""Name of the manifest's file in a bundle."""

EMBEDDED = Path(__file__).parent.parent / "mini"
"""The bundle in the package."""


def find_bundle(name_or_path: str | Path | None = None) -> Path:
    """The folder of a bundle.

    Args:
        name_or_path: a folder; or a name, searched in ``engines`` of the cache folder (`files.cache_home`), in
            ``./engines``, and in the package; or None for ``$LSAST_BUNDLE``, and without that the embedded bundle.

    Raises:
        BundleError: no bundle found; the message lists the folders that were searched.
    """
    if not isinstance(name_or_path, (str, os.PathLike, type(None))) or name_or_path == "":
        found = "an empty text" if isinstance(name_or_path, str) else type(name_or_path).__name__
        raise BundleError(f"found {found} as bundle; expected a folder or a name")
    wanted = os.environ.get("LSAST_BUNDLE") or EMBEDDED if name_or_path is None else name_or_path
    folder = Path(os.path.expanduser(wanted))  # that of pathlib raises an error for an unknown user
    candidates = [folder]
    if folder.name == str(wanted) and not is_file(folder / MANIFEST):
        candidates += [home / folder.name for home in _homes()]
    for candidate in candidates:
        if is_file(candidate / MANIFEST):
            return candidate
    raise BundleError(
        fault_list(
            f"found no bundle {str(wanted)!r}; expected a folder with a {MANIFEST} (lsast-export writes it), one of:",
            [str(candidate) for candidate in candidates],
        )
    )


def bundle_names() -> list[str]:
    """The names that `find_bundle` finds."""
    return sorted({file.parent.name for home in _homes() for file in home.glob(f"*/{MANIFEST}")})


def _homes() -> tuple[Path, ...]:
    return cache_home() / "engines", Path("engines"), EMBEDDED.parent


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False also for a name that the system does not take."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not allowed to look, or with a null character
        return False
