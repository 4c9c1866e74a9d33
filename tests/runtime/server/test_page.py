"""The page in a real browser, with the embedded bundle: what a person does, on a desktop and on a phone."""

import importlib.util
import io
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lsast

from .running_server import Running, running

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
]
PHOTO = Path(__file__).parents[3] / "docs" / "images" / "lighthouse.jpg"
SETTINGS = "#size=64&steps=2"
VIEWPORTS = {
    "desktop": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "is_mobile": True, "has_touch": True},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None or importlib.util.find_spec("playwright") is None,
        reason="needs Chromium (apt-get install chromium) and playwright (pip install playwright)",
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(params=VIEWPORTS)
def page(request: pytest.FixtureRequest, server: Running, browser: Any) -> Iterator[Any]:
    """The page, ready; afterwards nothing was asked of other servers, and nothing stands in the console."""
    faults: list[str] = []
    context = browser.new_context(**VIEWPORTS[request.param])
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    opened.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    own = (server.address, "blob:", "data:")
    opened.on("request", lambda asked: None if asked.url.startswith(own) else faults.append(asked.url))
    opened.goto(server.address + "/" + SETTINGS)
    opened.wait_for_selector(".sign.ready")
    yield opened
    context.close()
    assert faults == []


def _drop(page: Any, data: bytes, name: str, kind: str) -> None:
    """Drop a file on the page, as a file manager does."""
    handle = page.evaluate_handle(
        """([bytes, name, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return transfer;
        }""",
        [list(data), name, kind],
    )
    page.dispatch_event("#easel", "drop", {"dataTransfer": handle})
    page.wait_for_selector("#frame:not([hidden])")


def _paint(page: Any) -> None:
    page.click("#paint")
    page.wait_for_selector("#after:not([hidden])")


def _download(page: Any, form: str = "png") -> bytes:
    page.select_option("#format", form)
    with page.expect_download() as waiting:
        page.click("#download")
    return Path(waiting.value.path()).read_bytes()


def test_page_paints_in_two_styles_mixes_compares_and_downloads(page):
    _drop(page, PHOTO.read_bytes(), "lighthouse.jpg", "image/jpeg")
    page.click(".style[value=monet]")
    _paint(page)
    first = lsast.read_record(_download(page))
    assert (first.options.style, first.options.size, first.options.steps) == ("monet", 64, 2)
    page.click("label:has(#mixing)")
    page.click(".style[value=vangogh]")
    assert page.locator("#weights output").all_text_contents() == ["50 %", "50 %"]
    page.locator("#weights input").nth(1).focus()
    page.keyboard.press("Home")
    assert page.locator("#weights output").all_text_contents() == ["95 %", "5 %"]
    _paint(page)
    mixed = _download(page, "webp")
    assert lsast.read_record(mixed).options.style == "monet:1+vangogh:0.05"
    with Image.open(io.BytesIO(mixed)) as image:
        assert image.format == "WEBP"
        assert image.size == (768, 512)
    compare = page.locator("#compare")
    compare.focus()
    page.keyboard.press("End")
    assert page.locator("#frame").get_attribute("style") == "--cut: 100%;"
    assert page.locator("#history li").count() == 2
    page.locator("#history button").nth(1).click()
    assert page.locator(".style[aria-pressed=true]").all_text_contents() == ["monet✓"]
    page.click("#vary")
    page.wait_for_selector("#history li:nth-child(3)")
    assert lsast.read_record(_download(page)).options.seed == int(page.input_value("#option-seed"))


def test_page_cancels_and_reports_faults_in_words(page, server):
    _drop(page, PHOTO.read_bytes(), "lighthouse.jpg", "image/jpeg")
    page.click("summary")
    page.fill("#option-steps", "900")
    page.locator("#option-steps").blur()
    page.click("#paint")
    page.wait_for_selector("#preview:not([hidden])", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#working[hidden]", state="attached")
    assert page.locator("#fault").is_hidden()
    server.until(lambda: server.app.state.metrics.ended.labels("cancelled")._value.get() >= 1)
    page.fill("#mixtext", "monet@up+picasso")
    page.locator("#mixtext").blur()
    page.click("#paint")
    page.wait_for_selector("#fault:not([hidden])")
    assert "found no style 'picasso'" in page.locator("#fault").inner_text()


def test_page_restores_a_painting_and_keeps_settings_in_a_link(page, server):
    data = PHOTO.read_bytes()
    options = {"style": "monet@0-4+vangogh@5-9", "seed": 2**64 + 1, "strength": 0.4, "keep_colour": True}
    painted = server.post(data, size=64, steps=2, **options).content
    _drop(page, painted, "painted.png", "image/png")
    page.click("#restore")
    page.wait_for_selector("#found[hidden]", state="attached")
    page.wait_for_selector("#custom:not([hidden])")
    assert page.input_value("#option-seed") == str(2**64 + 1)
    assert page.input_value("#option-strength") == "0.4"
    assert page.is_checked("#option-keep_colour")
    assert page.locator("#custom").inner_text().endswith("monet@0-4+vangogh@5-9")
    page.click("#link")
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(".sign.ready")
    assert page.input_value("#mixtext") == "monet@0-4+vangogh@5-9"
    assert page.input_value("#option-seed") == str(2**64 + 1)


def test_page_names_what_it_leaves_out(page, server):
    page.goto("about:blank")
    page.goto(server.address + "/" + SETTINGS + "&seed=many&colour=7&strength=0.5")
    page.wait_for_selector("#fault:not([hidden])")
    assert "Left out of the link: seed=many, colour=7." in page.locator("#fault").inner_text()
    assert page.input_value("#option-strength") == "0.5"
    two = """(bytes) => { const transfer = new DataTransfer();
        const data = new Uint8Array(bytes), type = "image/jpeg";
        for (const name of ["one.jpg", "two.jpg"]) transfer.items.add(new File([data], name, { type }));
        return transfer; }"""
    page.dispatch_event("#easel", "drop", {"dataTransfer": page.evaluate_handle(two, list(PHOTO.read_bytes()))})
    assert "2 files were dropped; this is one.jpg." in page.locator("#fault").inner_text()
    page.dblclick("#paint")
    page.wait_for_selector("#after:not([hidden])")


def test_page_paints_styles_on_the_matrix_with_the_keyboard(page):
    page.click("summary")
    page.click(".brush[value=monet]")
    page.click("#fill")
    assert page.input_value("#mixtext") == "monet"
    page.click(".brush[value=roerich]")
    page.locator(".cell[data-group=up][data-stage='9']").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    text = page.input_value("#mixtext")
    assert sorted(text.split("+")) == ["monet@down", "monet@mid", "monet@up@0-7", "roerich@up@8-9"]
    label = page.locator(".cell[data-group=up][data-stage='8']").get_attribute("aria-label")
    assert label == "up, stage 8: roerich"


def test_page_paints_only_where_the_mask_is_brushed(page):
    _drop(page, PHOTO.read_bytes(), "lighthouse.jpg", "image/jpeg")
    page.click("#masking")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    _paint(page)
    with Image.open(io.BytesIO(_download(page))) as painted, Image.open(PHOTO) as photo:
        left, right = (0, 0, 300, 512), (560, 200, 590, 330)
        assert painted.convert("RGB").crop(left).tobytes() == photo.convert("RGB").crop(left).tobytes()
        assert painted.convert("RGB").crop(right).tobytes() != photo.convert("RGB").crop(right).tobytes()
    assert page.locator("#mask").is_hidden()  # the painting is shown, not what was brushed
    page.click("#masking")
    page.click("#clear")
    page.click("#paint")
    page.wait_for_selector("#fault:not([hidden])")
    page.locator("#mask").focus()  # brushed again, with the keyboard
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowRight")
    count = """() => { const { width, height } = mask;
        const alpha = mask.getContext("2d").getImageData(0, 0, width, height).data.filter((_, at) => at % 4 === 3);
        return alpha.filter((value) => value).length / alpha.length; }"""
    dot = math.pi / 4 * 0.12**2 * 1.5  # of the brush, 12 % of the longer side
    assert page.evaluate(count) == pytest.approx(dot + 0.03 * 0.12 * 1.5, rel=0.05)


def test_page_shows_the_defaults_of_the_chosen_style(page, server):
    defaults = {card["name"]: card["default"] for card in server.client.get("/v1/options").json()["options"]}
    for card in server.client.get("/v1/styles").json():
        page.click(f".style[value={card['name']}]")
        for name in ("guidance", "palette"):
            shown = float(page.input_value(f"#option-{name}"))
            assert shown == card["defaults"].get(name, defaults[name]), (card["name"], name)


def test_page_has_a_name_for_every_control(page):
    page.click("summary")
    snapshot = page.locator("body").aria_snapshot()
    nameless = re.findall(
        r"^\s*- (?:button|slider|textbox|spinbutton|combobox|switch|checkbox)(?::| \[|$).*", snapshot, re.M
    )
    assert [line for line in nameless if not re.search(r'"[^"]+"', line)] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_page_asks_for_the_token_until_it_is_right(browser, split_path):
    with running(bundle=str(split_path), threads=1, token="sésame") as server:
        page = browser.new_page()
        page.goto(server.address)
        page.wait_for_selector("#door[open]")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#refused:not([hidden])")
        page.fill("#token", "sésame")
        page.keyboard.press("Enter")
        page.wait_for_selector(".sign.ready")
        assert page.locator(".style").count() == 2
        page.close()
