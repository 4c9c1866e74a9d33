"""One stylizer and many threads, forks and processes: all get what they would get alone, and nobody waits for ever."""

import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from lsast import BundleError, Stylizer
from lsast.sessions import engine_pool
from lsast.sessions.engine_pool import StyleCache
from lsast.sessions.native_calls import native_call
from lsast_engines.backends.registry import available_backends
from lsast_engines.bundle.bundle import Bundle

MIXES = ["vangogh", "monet", "vangogh:0.6+monet:0.4", "monet@up+vangogh@0-4", "vangogh@down"]


@pytest.mark.parametrize("backend", sorted(available_backends()))
def test_stylize_in_eight_threads_gives_the_serial_bytes(bundle_path, photo, backend, monkeypatch):
    opened: list[str] = []
    open_style = Bundle.open_style
    monkeypatch.setattr(Bundle, "open_style", lambda self, name: opened.append(name) or open_style(self, name))
    several: dict[str, Any] = {"style": MIXES, "seed": range(24), "size": (64, 96, 128), "strength": (0.7, 0.6)}
    several |= {"guidance": (1.0, 2.0), "solver": ("ddim", "dpmpp2m", "unipc")}
    jobs = [{name: values[i % len(values)] for name, values in several.items()} for i in range(24)]
    with lsast.load(bundle_path, backend=backend) as alone:
        expected = [np.asarray(alone.stylize(photo, **job)) for job in jobs]
    opened.clear()
    barrier = threading.Barrier(8)

    def work(lane: int) -> list[np.ndarray]:
        barrier.wait()
        return [np.asarray(shared.stylize(photo, **job)) for job in jobs[lane::8]]

    with lsast.load(bundle_path, backend=backend) as shared, ThreadPoolExecutor(8) as pool:
        lanes = list(pool.map(work, range(8)))
    for lane, found in enumerate(lanes):
        for left, right in zip(found, expected[lane::8], strict=True):
            np.testing.assert_array_equal(left, right)
    assert sorted(opened) == ["monet", "vangogh"], "styles are opened once, not once a call"


FORK = """
import hashlib, os, sys, threading, warnings
import numpy as np, lsast
warnings.simplefilter("ignore")  # of forks beside threads
bundle, backend = sys.argv[1:]
rng = np.random.default_rng(0)
photo = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
stylizer = lsast.load(bundle, backend=backend)
def digest(**options):
    return hashlib.sha256(np.asarray(stylizer.stylize(photo, **options).image)).hexdigest()
def child(**options):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, digest(**options).encode())
        stylizer.close()
        os._exit(0)  # as multiprocessing does: ONNX Runtime itself hangs in the exit of a forked process
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return found
expected = digest(style="monet", seed=3)
assert child(style="monet", seed=3) == expected
# What the threads of closed engines leave behind is no use to the child's.
for number in range(2):
    closed = lsast.load(bundle, backend=backend)
    if number:
        closed.close()
del closed
assert child(style="monet", seed=3) == expected
# A fork while another thread holds the turn: the child's turn is its own.
begun, go_on = threading.Event(), threading.Event()
def hold(step, total, preview):
    begun.set()
    go_on.wait()
busy = threading.Thread(target=lambda: stylizer.stylize(photo, on_step=hold))
busy.start()
begun.wait()
assert child(style="monet", seed=3) == expected
go_on.set()
busy.join()
assert digest(style="monet", seed=3) == expected
print("equal")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("backend", sorted(available_backends()))
def test_stylize_in_a_forked_process_gives_the_same_while_its_parent_paints(python, bundle_path, backend):
    done = python(FORK, bundle_path, backend)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


def test_stylizer_in_a_spawned_process_opens_the_bundle_again(bundle_path, photo):
    with lsast.load(bundle_path, threads=1, style_memory=1000) as stylizer:
        expected = np.asarray(stylizer.stylize(photo, style="monet", seed=5))
        assert stylizer.__reduce__() == (
            lsast.load,
            (bundle_path.resolve(), "auto", "auto", 1, "auto", 1000, False, None, None),
        )
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(stylizer.stylize, (photo,), {"style": "monet", "seed": 5})
    np.testing.assert_array_equal(np.asarray(result), expected)
    assert isinstance(result, lsast.Result)


@pytest.mark.parametrize("how", ["copied", "replaced", "removed", "overwritten", "overwritten meanwhile"])
def test_stylizer_whose_bundle_changes_paints_as_before_or_raises(split_path, photo, tmp_path, how):
    bundle = Path(shutil.copytree(split_path, tmp_path / "bundle"))
    with lsast.load(bundle) as stylizer:
        before = stylizer.stylize(photo).image
        if how in ("overwritten", "overwritten meanwhile"):

            def overwrite(*_: object) -> None:
                shutil.copyfile(split_path / "unet_full.onnx", bundle / "denoiser.onnx")

            if how == "overwritten":
                overwrite()
            with pytest.raises(BundleError, match="changed or replaced after it was opened"):
                stylizer.stylize(photo, on_step=overwrite)
            return
        bundle.rename(tmp_path / "old")
        if how != "removed":
            shutil.copytree(split_path, bundle, copy_function=shutil.copyfile)
        if how == "replaced":
            with (bundle / "unet_outer.onnx").open("r+b") as handle:
                handle.write(b"\x08\x7f")  # the IR version
        np.testing.assert_array_equal(stylizer.stylize(photo).image, before)
        if how == "copied":
            stylizer.stylize(photo, cache_interval=2)
            return
        with pytest.raises(BundleError, match="changed or replaced after it was opened"):
            stylizer.stylize(photo, cache_interval=2)  # of graphs that are not open yet


STAGE_BYTES = 4 * 3 * (24 + 16)  # float32, three tokens, the widths of the tiny bundle


def test_style_cache_evicts_the_least_recently_used(bundle_path):
    cache = StyleCache(Bundle.open(bundle_path), 3 * STAGE_BYTES)
    cache.get("vangogh").stage(0), cache.get("vangogh").stage(1)
    cache.get("monet").stage(0)
    cache.evict()
    assert list(cache._styles) == ["vangogh", "monet"]
    cache.get("vangogh")  # used again: monet is now the least recently used
    cache.get("monet").stage(1), cache.get("vangogh").stage(2)
    cache.evict()
    assert list(cache._styles) == ["vangogh"]
    assert cache.bytes == 3 * STAGE_BYTES


def test_style_cache_keeps_no_more_files_open_than_systems_allow(bundle_path, tmp_path):
    bundle = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    names = [f"monet{number}" for number in range(66)]
    for name in names:
        shutil.copyfile(bundle / "styles" / "monet.safetensors", bundle / "styles" / f"{name}.safetensors")
    cache = StyleCache(Bundle.open(bundle), 1 << 30)
    for name in names:
        cache.get(name).stage(0)
    cache.evict()
    assert list(cache._styles) == names[-64:]


def test_style_memory_changes_memory_and_no_picture(bundle_path, photo):
    def run(stylizer: Stylizer) -> str:
        digest = hashlib.sha256()
        for style in (*MIXES, *MIXES):
            digest.update(np.asarray(stylizer.stylize(photo, style, strength=0.5)).data)
        return digest.hexdigest()

    with lsast.load(bundle_path, style_memory=5 * STAGE_BYTES) as poor, lsast.load(bundle_path) as rich:
        assert run(poor) == run(rich)
        assert poor._pool.styles.bytes <= 5 * STAGE_BYTES < rich._pool.styles.bytes


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not tell what threads do")
def test_fork_waits_for_paintings_and_not_for_other_threads():
    end, inside = threading.Event(), threading.Event()

    def work() -> None:
        while not end.is_set():
            pass

    def paint() -> None:
        with native_call():
            inside.set()
            work()

    def soon(running: bool) -> bool:
        """Whether this is said within ten seconds: threads of other tests may still run at first."""
        for _ in range(1000):
            if engine_pool._other_threads_run() is running:
                return True
            time.sleep(0.01)
        return False

    busy = threading.Thread(target=work)
    busy.start()
    assert soon(running=False)
    painting = threading.Thread(target=paint)
    painting.start()
    inside.wait(20)
    assert soon(running=True)
    end.set()
    busy.join()
    painting.join()
