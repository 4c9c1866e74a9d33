import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsast_engines.bundle.bundle import Bundle, find_bundle, user_style_folder
from lsast_engines.bundle.graph_spec import GraphSpec, TensorSpec
from lsast_engines.errors import BundleError, StyleError, UsageError
from lsast_engines.files import exchange, file_sha256


def tree(folder: Path) -> dict[str, bytes]:
    """All files under a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_write_gives_a_bundle_that_opens(bundle, manifest, make_style, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = Bundle.open(Path("toy"))
    monkeypatch.chdir("/")
    assert opened.path == bundle.path
    graphs = [f"{name}.onnx" for name in manifest.graphs]
    assert set(opened.manifest.files) == {*graphs, "base.safetensors", "null.safetensors"}
    assert dataclasses.replace(opened.manifest, files={}) == manifest
    assert opened.manifest.files["base.safetensors"].sha256 == file_sha256(tmp_path / "sources" / "weights")
    assert opened.graph_path("controlnet_cond").read_bytes() == b"graph controlnet_cond"
    assert opened.null_style.stages == 1
    assert list(opened.styles()) == ["a"]
    np.testing.assert_array_equal(opened.style("a").kv_unet, make_style("a").kv_unet.astype(np.float16))
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "sources"}
    assert bundle.path.stat().st_mode & 0o777 == (tmp_path / "sources").stat().st_mode & 0o777
    with pytest.raises(
        BundleError, match="found no graph 'time'; expected one of vae_encoder, controlnet_cond, denoiser, vae_decoder"
    ):
        opened.graph_path("time")


def test_bundle_open_lists_all_faults(bundle, make_style):
    path = bundle.path
    (path / "controlnet_cond.onnx").unlink()
    (path / "vae_decoder.onnx").write_bytes(b"longer than it was")
    (path / "vae_encoder.onnx").write_bytes(b"graph vae_EncodeR")
    make_style("null", base="cd" * 32, stages=2, width=22).save(path / "null.safetensors")
    (path / "more.data").write_bytes(b"weights that no hash covers")
    with pytest.raises(BundleError) as error:
        Bundle.open(path)
    heading, *faults = str(error.value).split("\n  - ")
    assert str(path) in heading
    starts = [
        "more.data: not declared in files; expected an entry",
        "vae_encoder.onnx: found SHA-256",
        "controlnet_cond.onnx: found no such file; expected 21 bytes",
        "vae_decoder.onnx: found 18 bytes; expected 17",
        "null.safetensors: found base cdcdcdcdcdcd…; expected abababababab… of toy",
        "null.safetensors: found 2 stages; expected 10 or 1",
        "null.safetensors: found kv_unet rows of [3, 22]; expected [3, 20]",
    ]
    for start in starts:
        assert any(fault.startswith(start) for fault in faults), start
    # The null style's own size or checksum is the only other one.
    assert len(faults) == len(starts) + 1
    with pytest.raises(BundleError) as error:
        Bundle.open(path, verify_hashes=False)
    assert [size in str(error.value) for size in ("found 18 bytes", "SHA-256")] == [True, False]


def test_bundle_write_refuses_graphs_of_another_geometry(tmp_path, manifest, sources):
    graphs = {**manifest.graphs, "time": GraphSpec("time", (), ())}
    del graphs["controlnet_cond"]
    graphs["vae_decoder"] = dataclasses.replace(
        graphs["vae_decoder"], outputs=(TensorSpec("picture", "float32", ("B", 3, "H", "W")),)
    )
    with pytest.raises(BundleError) as error:
        Bundle.write(tmp_path / "toy", dataclasses.replace(manifest, graphs=graphs), sources)
    text = str(error.value)
    assert "graph controlnet_cond: found none" in text
    assert "graph time: unknown; expected " in text
    assert "time.onnx: not declared in files" in text
    assert "graph vae_decoder: found outputs picture float32 [B, 3, H, W]; expected image float32 [B, 3, H, W]" in text
    split = {name: GraphSpec(name, (), (TensorSpec("a", "float32", (1,)),) * 2) for name in ("controlnet", "unet_full")}
    with pytest.raises(BundleError, match="graph unet_full: found outputs a float32 "):
        Bundle.write(tmp_path / "toy", dataclasses.replace(manifest, graphs={**manifest.graphs, **split}), sources)
    assert not (tmp_path / "toy").exists()


def test_bundle_refuses_files_outside_its_folder(bundle, manifest, sources):
    text = (bundle.path / "manifest.json").read_text()
    (bundle.path / "manifest.json").write_text(text.replace('"base.safetensors"', '"../sources/weights"'))
    with pytest.raises(BundleError, match=r"\.\./sources/weights: found a path; expected the plain name"):
        Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"found file name '\.\./evil'; expected a plain name"):
        Bundle.write(bundle.path.parent / "other", manifest, {**sources, "../evil": b""})
    assert not list(bundle.path.parent.glob("**/evil"))


def test_bundle_open_of_another_folder_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"found no manifest.json in .*; expected a bundle, written by: lsast-export"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path)


def test_bundle_styles_lists_and_checks_its_own(bundle, make_style, caplog):
    make_style("b").save(bundle.path / "styles" / "b.safetensors")
    (bundle.path / "styles" / ".b.safetensors.tmp").write_bytes(b"")
    (bundle.path / "styles" / ".half.safetensors").write_bytes(b"")
    os.mkfifo(bundle.path / "styles" / "pipe.safetensors")
    (bundle.path / "styles" / "folder.safetensors").mkdir()
    (bundle.path / "styles" / "gone.safetensors").symlink_to("nothing")
    assert [list(bundle.styles()) for _ in range(2)] == [["a", "b"]] * 2
    assert [Path(line.split(" is no style")[0]).stem for line in caplog.messages] == ["folder", "gone", "pipe"]
    with pytest.raises(
        UsageError, match=r"found no style 'c' for .*; available: a, b; learn it with: .*lsast-export --style c"
    ):
        bundle.style("c")
    with pytest.raises(UsageError, match=r"found no style '\.\./null' for .*; available: a, b$"):  # nobody can learn it
        bundle.style("../null")
    make_style("b", base="cd" * 32, stages=1, tokens=2).save(bundle.path / "styles" / "b.safetensors")
    with pytest.raises(StyleError) as error:
        bundle.style("b")
    for part in ("base cdcdcdcdcdcd…", "found 1 stages; expected 10\n", "kv_unet rows of [2, 20]; expected [3, 20]"):
        assert part in str(error.value)


def test_bundle_styles_of_the_user_replace_its_own(bundle, make_style, tmp_path, monkeypatch):
    fingerprint = bundle.manifest.fingerprint
    assert user_style_folder(fingerprint) == tmp_path / "home" / "styles" / fingerprint[:16]
    mine = make_style("longer-name")
    for name in ("a", "b"):
        mine.save(user_style_folder(fingerprint) / f"{name}.safetensors")
    assert list(bundle.styles()) == ["a", "b"]
    np.testing.assert_array_equal(bundle.style("a").kv_unet, mine.kv_unet.astype(np.float16))
    monkeypatch.delenv("LSAST_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    bundle = Bundle.open(bundle.path)
    assert list(bundle.styles()) == ["a"]
    assert user_style_folder(fingerprint).is_relative_to(tmp_path / "data" / "lsast" / "styles")


def test_bundle_write_that_fails_leaves_nothing(tmp_path, manifest, sources):
    before = tree(tmp_path)
    with pytest.raises(FileNotFoundError):
        Bundle.write(tmp_path / "toy", manifest, {**sources, "zz.data": tmp_path / "absent"})
    with pytest.raises(BundleError, match=r"null.safetensors: not declared"):
        Bundle.write(tmp_path / "toy", manifest, {k: v for k, v in sources.items() if k != "null.safetensors"})
    assert tree(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


def test_bundle_write_with_consume_moves_files(tmp_path, manifest, sources):
    weights = tmp_path / "sources" / "weights"
    inode, content = weights.stat().st_ino, weights.read_bytes()
    bundle = Bundle.write(tmp_path / "new" / "toy", manifest, sources, consume=True)
    assert not weights.exists()
    assert (bundle.path / "base.safetensors").stat().st_ino == inode
    assert (bundle.path / "base.safetensors").read_bytes() == content
    Bundle.open(bundle.path)


def test_bundle_write_replaces_only_a_bundle_and_only_if_allowed(bundle, manifest, sources, make_style):
    with pytest.raises(BundleError, match=r"found a bundle at .*; name another folder, or allow to replace it"):
        Bundle.write(bundle.path, manifest, sources)
    make_style("mine").save(bundle.path / "styles" / "mine.safetensors")
    make_style("old").save(bundle.path / "styles" / "a.safetensors")
    written = Bundle.write(bundle.path, manifest, {**sources, "controlnet_cond.onnx": b"new hint"}, replace=True)
    assert written.graph_path("controlnet_cond").read_bytes() == b"new hint"
    assert list(written.styles()) == ["a", "mine"]
    assert written.style("a").name == "a"

    other = bundle.path.parent / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_bytes(b"years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        Bundle.write(other, manifest, sources, replace=True)
    assert tree(other) == {"chapter.tex": b"years of work"}


def fail_on_new(rename: Callable[[Path, Path], Path], error: BaseException) -> Callable[[Path, Path], Path]:
    """A `Path.rename` that fails where the new bundle takes its place."""

    def replacement(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    return replacement


def test_bundle_write_that_fails_to_replace_restores_the_old_one(bundle, manifest, sources, monkeypatch):
    before = tree(bundle.path.parent)
    monkeypatch.setattr(Path, "rename", fail_on_new(Path.rename, OSError("disk on fire")))
    monkeypatch.setattr("lsast_engines.bundle.bundle.exchange", lambda *paths: False)
    with pytest.raises(OSError, match="disk on fire"):
        Bundle.write(bundle.path, manifest, {**sources, "controlnet_cond.onnx": b"new hint"}, replace=True)
    assert tree(bundle.path.parent) == before
    Bundle.open(bundle.path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_bundle_write_replaces_in_one_step(bundle, manifest, sources, monkeypatch):
    moved: list[Path] = []
    rename = Path.rename

    def watch(self: Path, target: Path) -> Path:
        moved.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    Bundle.write(bundle.path, manifest, sources, replace=True)
    assert bundle.path not in moved
    assert not exchange(bundle.path, bundle.path / "missing")


def test_bundle_write_after_a_kill_between_two_renames_keeps_the_old_styles(
    bundle, manifest, sources, make_style, monkeypatch
):
    make_style("mine").save(bundle.path / "styles" / "mine.safetensors")
    monkeypatch.setattr("lsast_engines.bundle.bundle.exchange", lambda *paths: False)
    with monkeypatch.context() as patch:  # nothing is cleaned after SIGKILL
        patch.setattr("lsast_engines.bundle.bundle._restore", lambda path: None)
        patch.setattr(Path, "rename", fail_on_new(Path.rename, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            Bundle.write(bundle.path, manifest, sources, replace=True)
    assert not bundle.path.exists()
    written = Bundle.write(bundle.path, manifest, sources, replace=True)
    assert "mine" in written.styles()
    assert [path.name for path in bundle.path.parent.iterdir() if path.name.startswith(".")] == []


def test_find_bundle_searches_folders_in_order(tmp_path, monkeypatch):
    home, cwd, cache = tmp_path / "home", tmp_path / "cwd", tmp_path / "cache"
    places = (home / "engines/a", home / "engines/b", cwd / "engines/b", cwd / "engines/c", cache / "lsast/engines/d")
    for folder in places:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (cwd / "a").mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("LSAST_HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert find_bundle(home / "engines" / "a") == home / "engines" / "a"
    assert find_bundle("engines/c") == Path("engines/c")
    assert find_bundle("a") == home / "engines" / "a"
    assert find_bundle("b") == home / "engines" / "b"
    assert find_bundle("c").resolve() == cwd / "engines" / "c"
    with pytest.raises(BundleError) as error:
        find_bundle("d")
    assert str(home / "engines" / "d") in str(error.value)
    monkeypatch.delenv("LSAST_HOME")
    assert find_bundle("d") == cache / "lsast" / "engines" / "d"
    for name in ("x" * 300, "~no-such-user-of-ours/x", "a\0b"):
        with pytest.raises(BundleError, match="found no bundle"):
            find_bundle(name)
    with pytest.raises(BundleError, match="found an empty text as bundle; expected a folder or a name"):
        find_bundle("")
    package = tmp_path / "package" / "mini"
    monkeypatch.setattr("lsast_engines.bundle.location.EMBEDDED", package)
    with pytest.raises(BundleError, match=str(package)):
        find_bundle()
    package.mkdir(parents=True)
    (package / "manifest.json").write_text("{}")
    assert find_bundle() == find_bundle("mini") == package
    monkeypatch.setenv("LSAST_BUNDLE", "c")
    assert find_bundle().resolve() == cwd / "engines" / "c"
    assert find_bundle("d") == cache / "lsast" / "engines" / "d"
