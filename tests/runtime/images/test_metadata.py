"""What a painting's file says, what it keeps to itself, and repeating it: read by Pillow and by hand, not by lsast."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import lsast
from lsast import LsastError, PictureError
from lsast.images.metadata import Record, read_record
from lsast_engines.bundle.bundle import Bundle, user_style_folder
from lsast_engines.bundle.style import Style

FORMS = ["png", "jpg", "webp", "avif", "tif"]
MIX = "vangogh:0.6@up+monet@0-4"


@pytest.fixture(scope="module")
def painted(stylizer: lsast.Stylizer, photo: np.ndarray) -> lsast.Result:
    return stylizer.stylize(photo, MIX, seed=7, guidance=3.5, strength=0.7, size=96)


def _held(path: Path) -> tuple[dict[str, Any], str]:
    """JSON and settings of a file, found as others would find them."""
    with Image.open(path) as image:
        if path.suffix == ".png":
            return json.loads(image.text["lsast"]), image.text["parameters"]  # type: ignore[attr-defined]
        tags = image.getexif().get_ifd(0x8769)
    assert tags[0x927C].startswith(b"lsast\0")
    assert tags[0x9286].startswith(b"UNICODE\0")
    return json.loads(tags[0x927C][6:]), tags[0x9286][8:].decode("utf-16-be")


@pytest.mark.parametrize("form", FORMS)
def test_record_in_a_file_says_what_it_was_made_of(painted, bundle_path, photo, tmp_path, form):
    painted.save(tmp_path / f"a.{form}", seconds=True)
    held, settings = _held(tmp_path / f"a.{form}")
    assert held["format"] == 1
    assert held["bundle"] == "tiny"
    assert held["bundle_sha256"] == hashlib.sha256((bundle_path / "manifest.json").read_bytes()).hexdigest()
    assert held["picture_sha256"] == hashlib.sha256(f"{photo.shape}".encode() + photo.tobytes()).hexdigest()
    assert held["mask_sha256"] is None
    assert held["styles"].keys() == {"vangogh", "monet"}
    assert held["styles"]["monet"] != held["styles"]["vangogh"]
    assert held["options"] == dataclasses.asdict(painted.options)
    assert held["seconds"] == pytest.approx(painted.seconds, abs=1e-4)
    assert held["versions"]["lsast"] == lsast.__version__
    assert held["versions"]["numpy"] == np.__version__
    assert held["backend"] in held["versions"]
    assert (held["painted"], held["compute_dtype"], held["device"]) == ([128, 128], "fp32", "cpu")
    record = read_record(tmp_path / f"a.{form}")
    assert (record.options, record.provenance) == (painted.options, painted.provenance)
    # The reader of AUTOMATIC1111's web UI: pairs by this pattern on the last line, a prompt before it.
    prompt, last = settings.rsplit("\n", 1)
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert prompt == MIX
    expected = {"Steps": "10", "Sampler": "ddim", "CFG scale": "3.5", "Seed": "7", "Size": "128x128", "Model": "tiny"}
    assert {name: pairs[name] for name in expected} == expected
    assert pairs["Denoising strength"] == "0.7"
    assert re.fullmatch("[0-9a-f]{10}", pairs["Model hash"])
    # Without `seconds`, equal paintings are equal files.
    for name, result in (("b", painted), ("c", dataclasses.replace(painted, seconds={"read": 7.0}))):
        result.save(tmp_path / f"{name}.{form}")
    assert (tmp_path / f"b.{form}").read_bytes() == (tmp_path / f"c.{form}").read_bytes()
    assert read_record(tmp_path / f"b.{form}").seconds == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", ["jpg", "png"])
def test_save_writes_nothing_private_of_the_picture(stylizer, photo, tmp_path, form, given):
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x8298], exif[0x010E] = "Secretmake", "Secretcam", "Secretname", "Secretplace"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0Secretcomment"
    source = tmp_path / f"Secretfile.{given}"
    extra: dict[str, Any] = {"comment": b"Secretcom"} if given == "jpg" else {}
    if given == "png":
        extra["pnginfo"] = PngImagePlugin.PngInfo()
        extra["pnginfo"].add_text("Author", "Secretauthor")
    Image.fromarray(photo).save(source, exif=exif, xmp=b"<x>Secretxmp</x>", **extra)
    assert source.read_bytes().count(b"Secret") >= 6
    stylizer.stylize(source).save(tmp_path / f"out.{form}")
    assert b"Secret" not in (tmp_path / f"out.{form}").read_bytes()
    with Image.open(tmp_path / f"out.{form}") as image:
        assert not image.getexif().get_ifd(0x8825)
        assert form == "tif" or set(image.getexif()) <= {0x0131, 0x8769}  # those of TIFF say how pixels lie
        texts = [value for value in image.info.values() if isinstance(value, str)]
    assert not any(str(tmp_path) in text for text in texts)


def test_read_record_of_a_file_without_a_record_raises(painted, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name, words in (("plain", "not say how it was painted"), ("nothing", "no file"), ("broken", "not a picture")):
        with pytest.raises(PictureError, match=words):
            read_record(tmp_path / f"{name}.png")
    assert painted.provenance is not None
    text = Record(painted.provenance, painted.options, {}).to_json()
    for wrong, words in (
        (text.replace('"format": 1', '"format": 2'), "format 2; this version reads format 1"),
        (text.replace('"bundle_sha256"', '"bundle_md5"'), "bundle_sha256"),
        (text[:-5], "cannot be read"),
        (text.replace('"styles": {', '"styles": 5, "others": {'), "cannot be read"),
        (text.replace('"versions": {"lsast"', '"versions": {"other"'), "versions: found no lsast"),
    ):
        with pytest.raises(PictureError, match=words):
            Record.from_json(wrong, "a.png")
    with pytest.raises(LsastError, match="steps: found 0"):
        Record.from_json(text.replace('"steps": 10', '"steps": 0'), "a.png")


@pytest.fixture
def folder(folder: Path, photo: np.ndarray) -> Path:
    """A working folder with in.png and mask.png."""
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[30:, 50:] = 255
    Image.fromarray(mask).save("mask.png")
    return folder


@pytest.mark.parametrize("form", ["png", "tif"])
def test_from_repeats_a_painting_to_the_bit(run, form):
    made = run("in.png", f"out.{form}", "--style", MIX, "--seed", "3", "--mask", "mask.png", "--keep-colour")
    assert made.exit_code == 0, made.stderr
    alone = run("--from", f"out.{form}")
    assert (alone.exit_code, alone.stdout.count("are here")) == (0, 1), alone.stderr
    again = run("--from", f"out.{form}", "in.png", "--mask", "mask.png")
    assert (again.exit_code, again.stderr) == (0, "")
    assert again.stdout == f"out.{form}: in.png paints the same again, to the last bit\n"
    written = run("--from", f"out.{form}", "in.png", f"again.{form}", "--mask", "mask.png")
    assert written.stdout == f"again.{form}\n"
    with Image.open(f"again.{form}") as second_image, Image.open(f"out.{form}") as first_image:
        np.testing.assert_array_equal(second_image, first_image)
    first, second = read_record(Path(f"out.{form}")), read_record(Path(f"again.{form}"))
    assert (first.provenance, first.options) == (second.provenance, second.options)


def test_from_with_other_inputs_names_them_before_painting(run, photo, bundle_path, monkeypatch):
    assert run("in.png", "out.png", "--style", MIX, "--mask", "mask.png").exit_code == 0
    photo = photo.copy()
    photo[0, 0, 0] ^= 1
    Image.fromarray(photo).save("other.png")
    Image.new("L", (160, 96), 255).save("other_mask.png")
    monkeypatch.setattr("lsast.stylizer.Stylizer.stylize", lambda *_, **__: pytest.fail("it was painted"))
    wrong = run("--from", "out.png", "other.png", "--mask", "other_mask.png")
    assert wrong.exit_code == 1
    heading, *faults = wrong.stderr.splitlines()
    assert "from something else than is here" in heading
    assert [fault.split(":")[0] for fault in faults] == ["  - picture other.png", "  - mask other_mask.png"]
    unmasked = run("--from", "out.png", "in.png")
    assert (unmasked.exit_code, "give it with --mask" in unmasked.stderr) == (2, True)

    users = user_style_folder(Bundle.open(bundle_path).manifest.fingerprint)
    style = Bundle.open(bundle_path).style("monet")
    monkeypatch.setenv("LSAST_HOME", "home")
    Style("monet", style.base, 10, 3, style.kv_unet / 2, style.kv_control).save(
        Path("home") / "styles" / users.name / "monet.safetensors"
    )
    changed = run("--from", "out.png")
    assert (changed.exit_code, "style monet: found" in changed.stderr) == (1, True)
    monkeypatch.delenv("LSAST_BUNDLE")
    elsewhere = run("--from", "out.png")
    assert (elsewhere.exit_code, "another bundle; name it with --bundle" in elsewhere.stderr) == (1, True)


def test_from_with_another_result_says_by_how_much_and_what_changed(run, monkeypatch):
    assert run("in.png", "out.png").exit_code == 0
    with Image.open("out.png") as image:
        text, pixels = image.text, np.array(image)  # type: ignore[attr-defined]
    pixels[3, 5, 1] ^= 2
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("lsast", text["lsast"].replace(f'"numpy": "{np.__version__}"', '"numpy": "1.0"'))
    Image.fromarray(pixels).save("out.png", pnginfo=chunks)
    result = run("--from", "out.png", "in.png")
    assert result.exit_code == 1
    assert "by up to 2 of 255" in result.stderr
    assert f"numpy 1.0, now {np.__version__}" in result.stderr


def test_from_with_options_changes_the_picture_and_needs_out(run, photo):
    assert run("in.png", "out.png", "--style", "monet", "--guidance", "3").exit_code == 0
    refused = run("--from", "out.png", "in.png", "--seed", "5")
    assert (refused.exit_code, "options and no OUT" in refused.stderr) == (2, True)
    Image.fromarray(photo[:50]).save("other.png")
    result = run("--from", "out.png", "other.png", "new.png", "--seed", "5", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    options = json.loads(result.stdout)["options"]
    assert (options["style"], options["guidance"], options["seed"]) == ("monet", 3.0, 5)
    with Image.open("new.png") as image:
        assert image.size == (160, 50)
    other = json.loads(run("--from", "out.png", "other.png", "new.png", "--style", "vangogh", "--json").stdout)
    made = dataclasses.asdict(read_record("new.png").provenance)
    assert {key: other[key] for key in made} == json.loads(json.dumps(made))
    assert list(other["styles"]) == ["vangogh"]


def test_from_recognises_a_transparent_picture_on_white(run, photo):
    alpha = np.full(photo.shape[:2], 90, np.uint8)
    Image.fromarray(np.dstack([photo, alpha])).save("clear.png")
    assert run("clear.png", "out.png", "--alpha", "composite").exit_code == 0
    again = run("--from", "out.png", "clear.png")
    assert (again.exit_code, again.stderr) == (0, "")
    opaque = run("--from", "out.png", "in.png")
    assert (opaque.exit_code, "picture in.png: found" in opaque.stderr) == (1, True)


def test_record_of_an_earlier_version_is_read(painted, tmp_path):
    painted.save(tmp_path / "a.png")
    held, _ = _held(tmp_path / "a.png")
    held["arithmetic"] = held.pop("compute_dtype")
    idle = {"control_low": 0, "control_interval": 1, "guidance_low": 0, "guidance_high": 1000}
    renamed = {"control": held["options"].pop("control_scale"), "solver": "released", "fit": "squash"}
    held["options"] |= idle | renamed
    record = Record.from_json(json.dumps(held), "a.png")
    assert record.options == dataclasses.replace(painted.options, solver="ddim_lsast", fit="stretch")
    assert record.provenance == painted.provenance
    held["options"] |= {"control_low": 200}
    with pytest.raises(lsast.UsageError, match="control_low was removed: use a smaller control_scale"):
        Record.from_json(json.dumps(held), "a.png")
