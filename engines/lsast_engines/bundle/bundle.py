"""A bundle: the folder of an exported base and its styles.

::

    NAME/
    ├── manifest.json            describes and checks the other files
    ├── base.safetensors         the weights, to which the graphs refer
    ├── vae_encoder.onnx, controlnet_cond.onnx, denoiser.onnx, vae_decoder.onnx
    ├── controlnet.onnx, unet_full.onnx, unet_outer.onnx: the split graphs, for step caching
    ├── vae_decoder_tiny.onnx, vae_decoder_tiny.safetensors: a smaller decoder (optional)
    ├── *.fp16.onnx              each graph for GPUs, in fp16 (the encoder's computes in float32); none in int8
    ├── null.safetensors         the unconditional keys and values, in the format of a style
    ├── styles/*.safetensors     not in the manifest: styles are added and removed, and carry their own checksums
    └── prompts/*.prompts.safetensors  what these styles were baked from (optional): for another export of the base
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..errors import BundleError, StyleError, UnknownStyleError, did_you_mean, fault_list, shown
from ..files import data_home, exchange, file_sha256, require_writable, scratch_folder
from .graph_spec import graph_specs, optional_specs
from .location import EMBEDDED as EMBEDDED
from .location import MANIFEST, is_file
from .location import bundle_names as bundle_names
from .location import find_bundle as find_bundle
from .manifest import FileEntry, Manifest
from .style import Style, StyleFile, style_name_faults

NULL_STYLE_FILE = "null.safetensors"
STYLES, PROMPTS = "styles", "prompts"

_WEIGHT_SUFFIXES = (".safetensors", ".data", ".bin")

_log = logging.getLogger("lsast.bundle")


class Bundle:
    """An exported base on disk that agrees with its manifest."""

    def __init__(self, path: Path, manifest: Manifest, null_style: Style, stats: dict[str, os.stat_result]) -> None:
        self.path, self.manifest = path, manifest
        self.null_style = null_style
        """The unconditional keys and values: one stage for all, or as many as the styles have."""
        self.user_style_folder = user_style_folder(manifest.fingerprint)
        """The folder into which `lsast-export` writes styles for a bundle that is not the user's own."""
        self._stats = stats  # of the files, before they were checked

    @classmethod
    def open(cls, path: Path, verify_hashes: bool = True) -> Bundle:
        """Open a bundle and check everything that its manifest declares: of every file the SHA-256, or with
        `verify_hashes` False the size only. A `BundleError` lists all faults."""
        path = path.absolute()  # so that it is still found when the process changes its folder
        if not is_file(path / MANIFEST):
            raise BundleError(f"found no {MANIFEST} in {path}; expected a bundle, written by: lsast-export")
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BundleError(f"{path / MANIFEST} cannot be read ({error}); export the bundle again") from error
        manifest = Manifest.from_json(text, where=str(path / MANIFEST))

        stats = {name: os.stat(path / name) for name in manifest.files if is_file(path / name)}
        faults = _file_faults(path, manifest, verify_hashes) + _graph_faults(manifest)
        null_style: Style | None = None
        if (path / NULL_STYLE_FILE).is_file():
            try:
                null_style = Style.load(path / NULL_STYLE_FILE)
                faults += [f"{NULL_STYLE_FILE}: {fault}" for fault in _style_faults(null_style, manifest, is_null=True)]
            except StyleError as error:
                faults.append(f"{NULL_STYLE_FILE}: {error}")
        if faults or null_style is None:
            raise BundleError(fault_list(f"{path} differs from its manifest; export it again:", faults))
        return cls(path, manifest, null_style, stats)

    def has_changed(self, *, in_place: bool = False) -> bool:
        """Whether something has replaced, removed or overwritten a file since it was checked.

        With `in_place` only whether a file was overwritten: a backend that mapped a file keeps its content when the
        file is replaced or removed. If only the time or the number of a file differs, its hash decides: some network
        file systems change the numbers.
        """
        for name, before in self._stats.items():
            file = self.path / name
            try:
                now = os.stat(file)
                is_same = os.path.samestat(now, before)
                same_state = is_same and (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
                if same_state or (in_place and not is_same):
                    continue
                if now.st_size != before.st_size or file_sha256(file) != self.manifest.files[name].sha256:
                    return True
                self._stats[name] = now
            except OSError:
                if not in_place:
                    return True
        return False

    def check_unchanged(self, *, in_place: bool = False) -> None:
        """Raises a `BundleError` if it `has_changed`."""
        if self.has_changed(in_place=in_place):
            raise BundleError(f"{self.path} was changed or replaced after it was opened; open it again")

    def graph_path(self, name: str) -> Path:
        """The ONNX file of graph `name`, one of `manifest.graphs`."""
        if name not in self.manifest.graphs:
            raise BundleError(f"found no graph {name!r}; expected one of {', '.join(self.manifest.graphs)}")
        return self.path / f"{name}.onnx"

    def styles(self) -> dict[str, Path]:
        """The style files for this bundle by name: its own, sorted, then those in the user's folder, sorted; these
        replace those of the bundle with the same name."""
        own, users = (_style_files(folder) for folder in (self.path / STYLES, self.user_style_folder))
        for name in own.keys() & users.keys():
            _log.info("style %s: %s replaces the bundle's own", name, users[name])
        return {**own, **users}

    def style(self, name: str) -> Style:
        """Load all stages of the style `name`; raises as `open_style`, and for every damaged stage."""
        return self.open_style(name).load()

    def open_style(self, name: str) -> StyleFile:
        """Open the style `name`; its stages are read when they are asked for.

        Raises:
            UnknownStyleError: no style of that name; the message lists the available ones.
            StyleError: the file is damaged, or was baked for another base.
        """
        styles = self.styles()
        if name not in styles:
            base = "" if self.path == EMBEDDED else f" --base {self.path}"
            make = f"; learn it with: lsast-train --style {name} --images DIR{base}, and then bake it with: "
            make = "" if style_name_faults(name) else f"{make}lsast-export --style {name}{base}"
            near = did_you_mean(name, styles) or make
            available = ", ".join(styles) or "none"
            raise UnknownStyleError(f"found no style {name!r} for the bundle {self.path}; available: {available}{near}")
        style = StyleFile(styles[name])
        self.check_style(style)
        return style

    def check_style(self, style: Style | StyleFile) -> None:
        """Check that `style` fits this base; a `StyleError` lists all faults: another base, other shapes."""
        if faults := _style_faults(style, self.manifest, is_null=False):
            raise StyleError(fault_list(f"style {style.name!r} does not fit {self.path}; bake it again:", faults))

    @classmethod
    def write(
        cls,
        path: Path,
        manifest: Manifest,
        sources: Mapping[str, Path | bytes],
        *,
        replace: bool = False,
        consume: bool = False,
    ) -> Bundle:
        """Write a whole bundle, or nothing: it is built in a hidden folder, opened there as a check, and renamed.

        Args:
            path: the new folder.
            manifest: its `files` are filled in here.
            sources: every file except the manifest, by name: a file to copy, or contents. Names under ``styles/`` are
                styles, names under ``prompts/`` their prompts.
            replace: replace a bundle at `path`; its other styles and prompts are kept.
            consume: move the files of `sources` instead of copying them, so that gigabytes of weights are written once.
                Files that were moved before a failure are lost.

        Raises:
            BundleError: `path` exists, or the result is not a valid bundle; then `path` is unchanged.
        """
        path = Path(os.path.realpath(path))
        _restore(path)
        require_free(path, replace)
        with scratch_folder(path.parent) as scratch:
            fresh = scratch / "new"
            folders = [fresh / name for name in (STYLES, PROMPTS)]
            for folder in folders:
                folder.mkdir(parents=True)
            files = {}
            for name, source in sources.items():
                target = fresh / name
                if target.parent not in (fresh, *folders):
                    expected = f"a plain name, or one under {STYLES}/ or {PROMPTS}/"
                    raise BundleError(f"found file name {name!r}; expected {expected}")
                if isinstance(source, bytes):
                    target.write_bytes(source)
                elif consume:
                    shutil.move(source, target)
                else:
                    shutil.copyfile(source, target)
                if target.parent == fresh:
                    files[name] = FileEntry(file_sha256(target), target.stat().st_size)
            manifest = dataclasses.replace(manifest, files=files)
            (fresh / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            for folder in folders:
                for file in (path / folder.name).glob("*"):
                    if not (folder / file.name).exists():
                        shutil.copyfile(file, folder / file.name)
            cls.open(fresh, verify_hashes=False)
            _replace(path, fresh)
        return cls.open(path, verify_hashes=False)


def user_style_folder(fingerprint: str) -> Path:
    """The user's folder for styles of the base with this fingerprint, in `files.data_home`; it may not exist."""
    return data_home() / STYLES / fingerprint[:16]


def _style_files(folder: Path) -> dict[str, Path]:
    found = {file.stem: file for file in sorted(folder.glob("[!.]*.safetensors"))}
    for name in [name for name, file in found.items() if not is_file(file)]:
        _tell_left_out(found.pop(name))
    return found


@functools.cache  # once: a server looks for styles again and again
def _tell_left_out(path: Path) -> None:
    _log.warning("%s is no style: it is no file that can be read", shown(str(path)))


def _file_faults(path: Path, manifest: Manifest, verify_hashes: bool) -> list[str]:
    required = [f"{name}.onnx" for name in manifest.graphs] + [NULL_STYLE_FILE]
    # A graph finds its weights by their name beside it.
    required += [file.name for file in sorted(path.iterdir()) if file.suffix in _WEIGHT_SUFFIXES]
    faults = [
        f"{shown(name)}: not declared in files; expected an entry"
        for name in dict.fromkeys(required)
        if name not in manifest.files
    ]
    for name, entry in manifest.files.items():
        file = path / name
        name = shown(name)
        if Path(file.name) != Path(name) or name in ("", ".", ".."):
            faults.append(f"{name}: found a path; expected the plain name of a file in the bundle")
        elif not is_file(file):
            faults.append(f"{name}: found no such file; expected {entry.bytes} bytes")
        elif file.stat().st_size != entry.bytes:
            faults.append(f"{name}: found {file.stat().st_size} bytes; expected {entry.bytes}")
        elif verify_hashes and (found := file_sha256(file)) != entry.sha256:
            faults.append(f"{name}: found SHA-256 {found[:12]}…; expected {entry.sha256[:12]}…")
    return faults


def _graph_faults(manifest: Manifest) -> list[str]:
    expected = {**graph_specs(manifest.geometry), **optional_specs(manifest.geometry, manifest.graphs)}
    faults = [f"graph {name}: found none; expected {', '.join(expected)}" for name in expected.keys() - manifest.graphs]
    faults += [f"graph {name}: unknown; expected {', '.join(expected)}" for name in manifest.graphs.keys() - expected]
    for name in expected.keys() & manifest.graphs.keys():
        for side in ("inputs", "outputs"):
            found, wanted = ("; ".join(map(str, getattr(specs[name], side))) for specs in (manifest.graphs, expected))
            if found != wanted:
                faults.append(f"graph {name}: found {side} {found}; expected {wanted}")
    return sorted(faults)


def _style_faults(style: Style | StyleFile, manifest: Manifest, *, is_null: bool) -> list[str]:
    geometry = manifest.geometry
    faults = []
    if style.base != manifest.fingerprint:
        faults.append(f"found base {style.base[:12]}…; expected {manifest.fingerprint[:12]}… of {manifest.name}")
    if style.stages != manifest.stages and not (is_null and style.stages == 1):
        faults.append(f"found {style.stages} stages; expected {manifest.stages}{' or 1' if is_null else ''}")
    for name, width in (("kv_unet", geometry.unet_width), ("kv_control", geometry.control_width)):
        found = [style.tokens, style.width(name)]
        if found != [geometry.tokens, width]:
            faults.append(f"found {name} rows of {found}; expected {[geometry.tokens, width]}")
    return faults


def require_free(path: Path, replace: bool) -> None:
    """Check that a bundle can be written to `path`, with `replace` also in the place of one.

    Raises:
        BundleError: something else is there, or a bundle without `replace`.
        UsageError: the folder around it cannot be written.
    """
    require_writable(Path(os.path.realpath(path)).parent)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path} exists and is not a bundle; name another folder, or remove it")
    if not replace:
        raise BundleError(f"found a bundle at {path}; name another folder, or allow to replace it")


def _replace(path: Path, fresh: Path) -> None:
    """Move `fresh` to `path`, and what is there to `fresh`: in one step where the system can, so that there is always
    a bundle at `path`."""
    if not path.exists() or not any(path.iterdir()):
        fresh.rename(path)
    elif not exchange(fresh, path):
        path.rename(_kept(path))
        try:
            fresh.rename(path)
        finally:
            _restore(path)


def _restore(path: Path) -> None:
    """Bring back the bundle that a process put aside that ended before it moved the new one in."""
    if _kept(path).is_dir():
        if path.exists():
            shutil.rmtree(_kept(path), ignore_errors=True)
        else:
            _kept(path).rename(path)


def _kept(path: Path) -> Path:
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.lsast-old")
