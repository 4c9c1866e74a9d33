"""`lsast-export` as a user meets it."""

import importlib
import importlib.util
import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.style import Style, StyleFile
from lsast_engines.errors import UsageError
from lsast_export.cli.main import main
from lsast_train.base.lazy_base import save_base
from lsast_train.prompts.prompt_file import Prompts, load_prompts, save_prompts


def lsast_export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def learned(prompts: Prompts) -> Path:
    """A prompt file where lsast-train leaves it."""
    path = Path("runs", "hand", "hand.prompts.safetensors")
    save_prompts(prompts, path)
    return path


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("torch", ["--style", "x"]),  # which needs no more
        ("onnx", ["--style", "x", "--backend", "tensorrt-rtx"]),
        ("onnx", ["--style", "x", "--out", "x"]),
        ("onnx", ["check", "x"]),
        ("onnx", ["bundle", "--out", "x"]),
    ],
)
def test_missing_library_error_names_the_extra(monkeypatch, library, arguments):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    result = lsast_export(*arguments)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {library} is not installed; install it with: pip install 'lsast[export]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bundle, check, compile, decoder, import, quantize"),
        (["--style", "x", "check", "y"], "found options before 'check'"),
        (["--style", "x", "--precision", "fp16"], "expected it with the command: lsast-export bundle"),
        (["bundle", "--out", "x", "--backend", "tensorrt-rtx"], "lsast-export compile x --backend tensorrt-rtx"),
        (["--style", "x", "--precision", "int8"], "'int8' is not one of"),
        (["bundle"], "Missing option '-o' / '--out'"),
        (["check"], "Missing argument 'BUNDLE'"),
        (["compile"], "Missing option '--backend'. Choose from: tensorrt, tensorrt-rtx (--help lists all options)"),
        (["golden", "x"], "lsast-export golden was removed"),
        (["compile", "--backend", "tensorrt-rtx", "--sides", "1,2"], "expected three whole numbers"),
        (["--style", "x", "--backend", "openvino"], "found --backend, which belongs to a whole bundle"),
        (["compile", "--backend", "tensorrt-rtx", "--compute-dtype", "bf16"], "compiled in fp32 or fp16"),
        (["compile", "--backend", "tensorrt-rtx", "--compute-dtype", "fp8"], "--compute-dtype fp8 was removed"),
        (["compile", "--backend", "tensorrt", "--quantised", "x"], "--quantised was removed: no engine in 8 bits"),
        (["modelopt", "out", "--to", "fp8"], "lsast-export modelopt was removed: "),
        (["triton", "models"], "lsast-export triton was removed: no server was ever run; serve on many machines"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, message):
    result = lsast_export(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("command", [["bundle", "--out", "x"], ["--style", "x"]])
def test_wrong_defaults_are_all_listed(command):
    wrong = ("steps=many", "hue=1", "style", "guidance=inf", "hand.size=64", "palette=1")
    result = lsast_export(*command, *(part for pair in wrong for part in ("--default", pair)))
    assert result.exit_code == 2
    assert "steps=many: found 'many'; expected a whole number" in result.stderr
    assert "hue=1: found key 'hue'; expected one of style, steps" in result.stderr
    assert "style: expected KEY=VALUE" in result.stderr
    assert "guidance=inf: found 'inf'; expected a number" in result.stderr
    assert "hand.size=64: found key 'size'; expected one of steps" in result.stderr
    assert "palette=1: found key 'palette'; expected one of style, steps" in result.stderr


@pytest.mark.usefixtures("learned")
def test_style_option_bakes_a_style_that_the_bundle_finds(bundles):
    bundle = bundles["fp16"]
    shutil.copytree(bundle.path, "mine", ignore=shutil.ignore_patterns("styles"))
    result = lsast_export("--style", "hand", "--base", "mine")
    assert result.exit_code == 0, result.stderr
    path = Path(result.stdout.strip())
    assert path == Path("home/styles").resolve() / bundle.manifest.fingerprint[:16] / "hand.safetensors"
    opened = Bundle.open(Path("mine"))
    assert opened.styles() == {"hand": path}
    # the very tensors that the export of a whole bundle bakes
    assert path.read_bytes() == (bundle.path / "styles" / "hand.safetensors").read_bytes()


def test_style_option_takes_precedence_over_the_bundles_style(bundles, learned):
    result = lsast_export("--style", str(learned), "--base", bundles["fp32"].path, "--json")
    report = json.loads(result.stdout)
    assert report["fingerprint"] == bundles["fp32"].manifest.fingerprint
    opened = Bundle.open(bundles["fp32"].path)
    assert {name: str(path) for name, path in opened.styles().items()} == report["styles"]
    assert isinstance(opened.style("hand"), Style)


def test_style_option_of_the_embedded_styles_gives_their_values():
    """mini ships their prompts. They were recovered from the shipped values, so the smallest of these may differ."""
    names = sorted(path.stem for path in (EMBEDDED / "styles").glob("*.safetensors"))
    result = lsast_export(*(part for name in names for part in ("--style", name)))
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(EMBEDDED)
    for name in names:
        shipped, baked = StyleFile(EMBEDDED / "styles" / f"{name}.safetensors"), bundle.open_style(name)
        assert baked.meta | {"defaults": ""} == shipped.meta | {"defaults": ""}
        assert baked.defaults == shipped.defaults
        for tensor in ("kv_unet", "kv_control"):
            apart = np.abs(getattr(baked.load(), tensor) - getattr(shipped.load(), tensor))
            assert ((apart > 0).mean() < 1e-4, apart.max() < 1e-7) == (True, True)


def test_style_option_with_missing_or_repeated_prompts_fails(bundles, learned):
    result = lsast_export("--style", "hnad", "--base", bundles["fp16"].path)
    assert result.exit_code == 1
    assert "found no prompts at hnad or runs/hnad/hnad.prompts.safetensors" in result.stderr
    twice = lsast_export("--style", "hand", "--style", str(learned), "--base", bundles["fp16"].path)
    assert "more than one style named hand" in twice.stderr


def test_export_that_sigterm_ends_leaves_nothing(base, monkeypatch):
    save_base(base, Path("trained"))
    signal.signal(signal.SIGTERM, handler := lambda *_: pytest.fail("not handled"))  # it would end the tests
    monkeypatch.setattr("lsast_export.bundle.export.trace_graphs", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    try:
        result = lsast_export("bundle", "--base", "trained", "--out", "engines/mine")
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Error: interrupted")
    assert not list(Path("engines").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["bundle", "-o", "x"], ["check", "x"], ["decoder", "x", "--small", "x"], ["quantize", "-o", "x"], ["-s", "x"]],
)
def test_warning_of_a_command_is_escaped_and_quiet_hides_it(monkeypatch, arguments):
    def warn(*_: object) -> None:
        logging.getLogger("lsast.export").warning("a\x1b[2J")
        raise UsageError("stop")

    for module in ("lsast.stylizer", "lsast_export.bundle.check", "lsast_export.bundle.export"):
        importlib.import_module(module)  # imported only now, it would keep what is patched
    monkeypatch.setattr("lsast_engines.bundle.bundle.find_bundle", warn)
    monkeypatch.setattr("lsast_train.base.lazy_base.open_base", warn)
    for more in ([], ["-q"]):
        told = lsast_export(*arguments, *more).stderr
        assert ("a\\x1b[2J\n" in told, "\x1b" in told, "Error: stop" in told) == (not more, False, True)


@pytest.mark.usefixtures("learned")
def test_default_option_is_stored_in_the_style(bundles):
    base = bundles["fp16"].path
    asked = ("--default", "hand.guidance=8", "--default", "hand.steps=11")
    result = lsast_export("--style", "hand", "--base", base, *asked)
    assert result.exit_code == 0, result.stderr
    assert StyleFile(Path(result.stdout.strip())).defaults == {"guidance": 8.0, "steps": 11}
    for wrong, told in (
        ("hnad.steps=3", "defaults of hnad"),
        ("steps=3", "expected STYLE.KEY=VALUE"),
    ):
        refused = lsast_export("--style", "hand", "--base", base, "--default", wrong)
        assert refused.exit_code == 2
        assert told in refused.stderr


def test_style_option_with_a_distilled_style_keeps_its_guidance(bundles, prompts):
    bundle = bundles["fp16"]
    folder = Path("runs", "hand-g7")
    style = bundle.style("hand")
    meta = {"guidance_baked": "7", "defaults": json.dumps({"control": 0.8})}
    made = Style("hand-g7", style.base, 10, style.tokens, 2 * style.kv_unet, style.kv_control, meta)
    made.save(folder / "hand-g7.safetensors")
    result = lsast_export("--style", "hand-g7", "--base", bundle.path)
    assert result.exit_code == 0, result.stderr
    found = Bundle.open(bundle.path).open_style("hand-g7")
    assert Path(result.stdout.strip()) == found.path
    assert (found.distilled_guidance, found.defaults) == (7.0, {"control_scale": 0.8})
    np.testing.assert_array_equal(found.load().kv_unet, made.kv_unet)
    # Prompts carry it too, and go before a style file of that name.
    save_prompts(replace(prompts, name="hand-g7", meta={"guidance_baked": "5"}), folder / "hand-g7.prompts.safetensors")
    assert lsast_export("--style", "hand-g7", "--base", bundle.path).exit_code == 0
    assert Bundle.open(bundle.path).open_style("hand-g7").distilled_guidance == 5.0
    refused = lsast_export("--style", "hand-g7", "--base", bundle.path, "--default", "hand-g7.guidance=3")
    assert refused.exit_code == 2
    assert "found a default of guidance for hand-g7; expected none: it was distilled" in refused.stderr
    Style("hand-g7", "ab" * 32, 10, style.tokens, style.kv_unet, style.kv_control, meta).save(folder / "x.safetensors")
    assert "does not fit" in lsast_export("--style", folder / "x.safetensors", "--base", bundle.path).stderr


def test_bundle_command_exports_a_trained_base(base, learned, caplog):
    fingerprint = save_base(base, Path("trained"))
    refused = lsast_export("--style", "hand", "--base", "trained")
    assert refused.exit_code == 2
    assert "lsast-export bundle --base trained --out DIR" in refused.stderr

    out = Path("engines/mine")
    result = lsast_export(
        "bundle", "--base", "trained", "--out", out, "--default", "steps=9", "--default", "strength=0.5", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["storage_dtype"] == "fp16"
    assert report["styles"] == {}
    files = [file for file in out.iterdir() if file.is_file() and file.name != "manifest.json"]
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    manifest = Bundle.open(out).manifest
    assert (manifest.defaults["steps"], manifest.defaults["strength"], manifest.defaults["style"]) == (9, 0.5, "none")

    # prompts of the base before it was rounded fit what it was rounded to, and no other
    rewritten = replace(load_prompts(learned), base=fingerprint)
    save_prompts(rewritten, learned)
    assert lsast_export("--style", "hand", "--base", out).exit_code == 0
    save_prompts(replace(rewritten, base="3" * 64), learned)
    foreign = lsast_export("--style", "hand", "--base", out)
    assert foreign.exit_code == 1
    assert "333333333333" in foreign.stderr

    # written again with a style, from itself: its defaults are kept, but for the style
    save_prompts(rewritten, learned)
    again = lsast_export("--style", "hand", "--base", out, "--out", out)
    assert again.exit_code == 0, again.stderr
    assert Path(again.stdout.strip()) == out.resolve()
    renewed = Bundle.open(out).manifest
    assert renewed.fingerprint == manifest.fingerprint
    assert renewed.defaults == {**manifest.defaults, "style": "hand"}
    checked = lsast_export("check", out, "--json")
    assert checked.exit_code == 0, checked.stderr

    # in another precision, which is another base: its styles are baked again
    (out / "styles" / "lone.safetensors").write_bytes((out / "styles" / "hand.safetensors").read_bytes())
    described = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(described.replace('"style": "hand"', '"style": "lone"'))
    shutil.rmtree("runs")
    widened = lsast_export("bundle", "--base", out, "--out", "engines/wide", "--storage-dtype", "fp32")
    assert widened.exit_code == 0, widened.stderr
    wide = Bundle.open(Path("engines/wide"))
    assert wide.manifest.fingerprint != renewed.fingerprint
    assert (wide.manifest.defaults, list(wide.styles())) == (renewed.defaults, ["hand"])
    assert "have no prompts there are left out: lone" in caplog.text
    before, after = Bundle.open(out).style("hand").kv_unet, wide.style("hand").kv_unet
    np.testing.assert_allclose(after, before, rtol=0.01, atol=0.01 * np.abs(before).max())
