"""Repositories of the hub, by a stand-in for huggingface_hub's download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from lsast_engines.errors import LsastError, UsageError
from lsast_train.base.lazy_base import open_base
from lsast_train.checkpoints.source import BaseSource


@pytest.mark.parametrize("revision", [None, "main"])
def test_hub_name_without_a_pinned_revision_is_refused(revision: str | None) -> None:
    with pytest.raises(UsageError, match="expected a commit hash or tag"):
        open_base(BaseSource("someone/stable-diffusion", revision=revision))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> list[tuple[str, str, str, bool]]:
    """A hub with two repositories, one of which is in the cache already; lists what was asked for."""
    asked: list[tuple[str, str, str, bool]] = []
    folders = {"someone/tiny-v1-5": folder, "else/canny": tmp_path / "canny"}

    def cached(name: str, path: str, _: None, revision: str) -> str | None:
        asked.append((name, path, revision, True))
        file = folders[name] / path if name == "else/canny" else None
        return os.fspath(file) if file is not None and file.is_file() else None

    def download(name: str, path: str, *, revision: str) -> str:
        asked.append((name, path, revision, False))
        if name not in folders:
            raise LocalEntryNotFoundError("no connection")
        if not (folders[name] / path).is_file():
            raise EntryNotFoundError("no such file")
        return os.fspath(folders[name] / path)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_base_and_controlnet_are_read_from_the_cache_first(
    published: Any, hub: list[tuple[str, str, str, bool]]
) -> None:
    parts = open_base(BaseSource("someone/tiny-v1-5", "else/canny@v1.1", revision="0123abc"))
    assert published.same(parts.load("unet"), published.networks["ema"])
    assert published.same(parts.load("controlnet"), published.networks["controlnet"])
    assert {(name, revision) for name, _, revision, _ in hub} == {
        ("someone/tiny-v1-5", "0123abc"),
        ("else/canny", "v1.1"),
    }
    assert parts.config.name == "tiny-v1-5"
    assert parts.config.training["source"] == "someone/tiny-v1-5"
    assert (parts.config.training["revision"], parts.config.training["controlnet_revision"]) == ("0123abc", "v1.1")
    # What is in the cache is not asked for on the network.
    assert all(local for name, path, _, local in hub if (name, path) == ("else/canny", "config.json"))


def test_hub_without_a_network_says_how_to_download(hub: list[tuple[str, str, str, bool]]) -> None:
    with pytest.raises(LsastError, match="hf download no/where --revision 0123abc"):
        open_base(BaseSource("no/where", revision="0123abc"))
    assert sum(not local for *_, local in hub) == 1  # a dead network is tried once
