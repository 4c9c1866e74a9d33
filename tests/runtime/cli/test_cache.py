"""The caches: what is listed, and what pruning and clearing remove."""

import json
import shutil
from pathlib import Path

from click.testing import CliRunner

from lsast.cli.main import main
from lsast_engines.backends import fp32_weights


def _list(*arguments: str) -> list[tuple[str, str, bool]]:
    result = CliRunner().invoke(main, ["--cache", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return [(entry["kind"], entry["source"], entry["used"]) for entry in json.loads(result.stdout)["entries"]]


def test_cache_lists_prunes_and_clears(run, folder, bundle_path, monkeypatch):
    monkeypatch.setenv("LSAST_HOME", str(folder / "home"))
    monkeypatch.setattr(fp32_weights, "MIN_BYTES", 1)
    assert _list("list") == []
    for name in ("here", "gone"):
        shutil.copytree(bundle_path, name)
        assert run("in.png", "out.png", "--bundle", name, "--size", "64", "--backend", "onnxruntime").exit_code == 0
    shutil.copytree(bundle_path, "home/engines/mine")
    shutil.copytree("home/compiled/onnxruntime", "home/compiled/mini-0123/rtx")
    shutil.rmtree("gone")

    kind, here, gone = "graphs of onnxruntime", str(folder / "here"), str(folder / "gone")
    engines = ("compiled engines", "mini-0123", True)
    assert set(_list("list")) == {(kind, here, True), (kind, gone, False), engines}
    assert f"{gone} (gone or changed" in run("--cache", "list").stdout
    assert set(_list("prune")) == {(kind, here, True), engines}
    assert _list("clear") == []
    assert Path("home/engines/mine/manifest.json").is_file()
