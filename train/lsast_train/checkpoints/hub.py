"""Where the files of a model lie: a local folder, or a repository of the Hugging Face hub at a pinned revision."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lsast_engines.errors import TrainingError, UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BRANCHES = ("main", "master", "HEAD")


class Repository:
    """The files of a model by their path inside of its folder: a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        resolved = path.resolve()
        # The cache of the hub: models--OWNER--NAME/snapshots/REVISION.
        cached = resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--")
        self.name = resolved.parent.parent.name.rpartition("--")[2] if cached else resolved.name
        """The model's name in messages and in `BaseInspection.origin`; no path of this machine."""

    def first(self, *paths: str) -> Path | None:
        """The local file of the first of `paths` that is there; None if none is.

        Raises:
            TrainingError: whether they are there cannot be found out.
        """
        return next((self.path / path for path in paths if (self.path / path).is_file()), None)


class HubRepository(Repository):
    """A repository of the hub. Files that were downloaded before are taken without asking the network."""

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision

    def first(self, *paths: str) -> Path | None:
        """See `Repository`."""
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        where = f"{self.name} at revision {self.revision}"
        try:
            for path in paths:
                found = huggingface_hub.try_to_load_from_cache(self.name, path, None, self.revision)
                if isinstance(found, str):
                    return Path(found)
            for path in paths:
                try:
                    return Path(huggingface_hub.hf_hub_download(self.name, path, revision=self.revision))
                except LocalEntryNotFoundError:  # no answer from the network
                    raise
                except EntryNotFoundError:
                    continue
        except LocalEntryNotFoundError as error:
            raise TrainingError(
                f"{where} is not in the cache and cannot be downloaded now ({error}); download it where there is a "
                f"network, with: hf download {self.name} --revision {self.revision} --local-dir FOLDER, and name "
                "FOLDER instead"
            ) from error
        # No such repository or revision, no permission, a broken connection: the library's message says which.
        except (OSError, ValueError) as error:
            raise TrainingError(f"{where} cannot be downloaded: {error}") from error
        return None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME or OWNER/NAME@REVISION and is no local file or folder."""
    return _HUB_ID.fullmatch(name.partition("@")[0]) is not None and not Path(name).expanduser().exists()


def open_hub(name: str, revision: str | None) -> HubRepository:
    """The repository OWNER/NAME or OWNER/NAME@REVISION; `revision` is for names without one of their own.

    Raises:
        UsageError: no revision, or a branch.
    """
    owner, _, own = name.partition("@")
    pinned = own or revision
    if pinned is None or pinned in _BRANCHES:
        found = "no revision" if pinned is None else f"the branch {pinned!r}"
        raise UsageError(
            f"found no local file or folder {name!r}, and for the hub's {owner} {found}; expected a commit hash or tag "
            f"(--revision, or {owner}@REVISION): what a branch holds changes, and styles are bound to exact weights"
        )
    return HubRepository(owner, pinned)


def weight_files(*names: str, marks: Iterable[str] = ("", ".fp16")) -> list[str]:
    """The names under which diffusers and transformers store the weights of a network, most wanted first.

    Args:
        names: names of one file, e.g. ``model.safetensors``.
        marks: variants, e.g. ``.fp16`` for ``model.fp16.safetensors``. A name that ends in ``.json`` is an index of
            shards.
    """
    found: list[str] = []
    for stem, _, ending in (name.rpartition(".") for name in names):
        for mark in marks:
            indices = {f"{stem}{mark}.{ending}.index.json": None, f"{stem}.{ending}.index{mark}.json": None}
            found += [f"{stem}{mark}.{ending}", *indices]
    return found
