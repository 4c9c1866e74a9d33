"""The API over real HTTP, against what the library paints."""

import base64
import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lsast
from hostile import png_file
from lsast_engines.bundle.bundle import Bundle

from .running_server import LONG, QUICK, Running, as_png, httpx, pixels, running


@pytest.fixture(scope="module")
def stylizer(split_path: Path) -> Iterator[lsast.Stylizer]:
    with lsast.load(split_path, threads=1) as opened:
        yield opened


def _events(server: Running, path: str) -> list[tuple[str, dict[str, Any]]]:
    return _parsed(server.client.get(path, headers={"Accept": "text/event-stream"}).text)


def _parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [
        dict(line.split(": ", 1) for line in block.split("\n"))
        for block in text.strip().split("\n\n")
        if not block.startswith(":")  # FastAPI sends such a comment after 15 s without an event
    ]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def test_post_form_json_and_raw_body_paint_what_the_library_paints(server, stylizer, photo, png):
    options = {**QUICK, "style": "monet@up+vangogh", "seed": 5, "keep_colour": True}
    expected = np.asarray(stylizer.stylize(photo, **options).image).astype(int)
    form = server.post(png, **options)
    raw = server.client.post("/v1/paintings", params=options, content=png)
    text = base64.b64encode(png).decode()
    pictures = (text, f"data:image/png;base64,{text}")
    answers = [server.client.post("/v1/paintings", json={**options, "picture": picture}) for picture in pictures]
    for answer in (form, raw, *answers):
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        np.testing.assert_array_equal(pixels(answer.content), expected)


def test_post_with_a_mask_keeps_the_black_part(server, photo, png):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[:, 80:] = 255
    painted = pixels(server.post(png, mask=as_png(mask), **QUICK).content)
    np.testing.assert_array_equal(painted[:, :80], photo[:, :80])
    assert np.abs(painted[:, 120:] - photo[:, 120:]).max() > 0


@pytest.mark.parametrize(
    ("accept", "media", "form"),
    [
        ("image/webp", "image/webp", "WEBP"),
        ("image/jpeg;q=0.9, image/png;q=0.2", "image/jpeg", "JPEG"),
        ("text/html, image/*;q=0.5", "image/png", "PNG"),
        ("image/png;q=0, image/*;q=0.5", "image/jpeg", "JPEG"),
    ],
)
def test_post_answers_in_the_format_of_accept_with_the_record(server, png, accept, media, form):
    answer = server.post(png, {"Accept": accept}, seed=9, **QUICK)
    assert answer.headers["content-type"] == media
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == form
    assert lsast.read_record(answer.content).options.seed == 9
    bodies: tuple[dict[str, Any], ...] = (
        {"content": answer.content},
        {"files": {"picture": answer.content}},
        {"json": {"picture": base64.b64encode(answer.content).decode()}},
    )
    for body in bodies:
        assert server.client.post("/v1/records", **body).json()["options"]["seed"] == 9


def test_post_with_another_accept_is_refused(server, png):
    answer = server.post(png, {"Accept": "text/html"})
    assert (answer.status_code, "image/png" in answer.json()["detail"]) == (406, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"styl": "monet"}, "styl: unknown; did you mean style?"),
        ({"solver": "unpic"}, "; did you mean unipc?"),
        ({"strength": 7, "size": 3}, "size: found '3'; expected a whole number, 0, or 64 to 2048"),
        ({"style": "picasso"}, "available: monet, vangogh"),
        ({"style": "monet@5-3"}, "expected 3-5"),
        ({"size": 4096, "tile": 1025}, "64 to 2048\n  - tile: found '1025'; expected a whole number, 0, or 64 to 1024"),
        ({"seed": "1e"}, "seed: found '1e'"),
        ({"picture": "text"}, "found picture more than once"),
    ],
)
def test_post_form_with_faulty_options_says_so_in_words(server, png, options, words):
    answer = server.post(png, **options)
    assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text


def test_post_with_a_mask_that_is_not_in_base64_paints_nothing(server, png):
    text = base64.b64encode(png).decode()
    answer = server.client.post("/v1/paintings", json={"picture": text, "mask": f"data:image/png,{text}"})
    assert (answer.status_code, "mask: expected a picture in base64" in answer.text) == (422, True)


def test_post_of_json_with_a_key_twice_is_refused(server):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/paintings", "/v1/records"):
        answer = server.client.post(path, content=b'{"picture": "aGk=", "picture": "aGk="}', headers=headers)
        assert (answer.status_code, "found picture more than once" in answer.text) == (422, True)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"json": {"picture": "aGk=", "seed": "5"}}, 422),  # JSON has types
        ({"json": {"seed": 5}}, 422),
        ({"json": {"picture": "no base64"}}, 422),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422),
        ({"content": b"", "params": {"seed": 5}}, 422),
        ({"content": b"hi", "params": [("seed", 5), ("seed", 6)]}, 422),
        ({"content": b"hi", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"content": b"hi", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        ({"files": {"picture": b"hi"}, "params": {"seed": 5}}, 422),
        ({"files": {"file": b"hi"}}, 422),
        ({"content": b"not a picture"}, 422),
    ],
)
def test_post_with_a_faulty_body_is_refused(server, request_, status):
    answer = server.client.post("/v1/paintings", **request_)
    assert (answer.status_code, bool(answer.json()["detail"])) == (status, True)


def test_post_of_a_decompression_bomb_is_refused_before_it_is_decoded(server):
    answer = server.post(png_file(30_000, 30_000))
    assert (answer.status_code, "900 megapixels" in answer.json()["detail"]) == (422, True)
    assert server.post(as_png(np.zeros((64, 64, 3), np.uint8)), mask=png_file(30_000, 30_000)).status_code == 422


def test_answers_hold_no_path_of_the_machine(server, png, split_path):
    damaged = split_path / "styles" / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    try:
        for answer in (
            server.post(png, style="damaged"),
            server.post(png, decoder="small"),
            server.post(b"x", style="../../etc/passwd"),
            server.client.get("/v1/styles"),
            server.client.get("/v1/options"),
        ):
            assert str(split_path.parent) not in answer.text
            assert answer.status_code in (200, 422)
    finally:
        damaged.unlink()


def test_job_tells_its_progress_with_previews_and_keeps_the_painting(server, stylizer, photo, png):
    options = {**LONG, "steps": 100, "seed": 3}
    before = server.begin(png, **LONG)
    server.wait(before, "painting")
    path = server.begin(png, **options)
    with server.client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        server.client.delete(before)  # the other waits behind it, so that it is followed in time
        events = _parsed("\n".join([first, *lines]))
    assert [events[0][0], events[-1][0]] == ["queued", "done"]  # the worker has read it, but paints another one
    states = [state for state, _ in events]
    assert states == sorted(states, key=["queued", "painting", "done"].index)
    assert {facts["steps"] for _, facts in events if facts["step"]} == {100}
    last = events[-1][1]
    assert (last["size"], last["options"]["seed"]) == ([160, 96], 3)
    previews = [facts["preview"] for _, facts in events if "preview" in facts]
    assert pixels(base64.b64decode(previews[-1].partition(",")[2])).shape[2] == 3
    expected = np.asarray(stylizer.stylize(photo, **options).image)
    answer = server.client.get(path, headers={"Accept": "image/png"})
    np.testing.assert_array_equal(pixels(answer.content), expected)
    converted = server.client.get(path, headers={"Accept": "image/webp"})
    assert lsast.read_record(converted.content).options.seed == 3
    assert server.client.get(path).json()["state"] == "done"
    assert server.client.delete(path).status_code == 204
    assert server.client.get(path).status_code == 404


def test_job_that_fails_says_so(server):
    path = server.begin(b"no picture")
    facts = server.wait(path, "failed")
    assert "not a picture" in facts["error"]
    assert _events(server, path)[-1][0] == "failed"
    assert server.client.get(path, headers={"Accept": "image/png"}).status_code == 409


def test_delete_cancels_one_that_is_painted_and_one_that_waits(server, png):
    painted = server.begin(png, **LONG)
    waiting = [server.begin(png, **{**LONG, "seed": seed}) for seed in range(12)]
    server.wait(painted, "painting")
    for path in [*waiting, painted]:
        assert server.client.delete(path).status_code == 204
    assert server.post(png, **QUICK).status_code == 200  # the worker is free again


def test_client_that_leaves_cancels_its_painting(server, png, monkeypatch):
    monkeypatch.setattr("lsast.server.jobs.LEAVE_SECONDS", 0.5)
    counter = server.app.state.metrics.ended.labels("cancelled")
    before = counter._value.get()
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.address, timeout=1) as client:
        client.post("/v1/paintings", params=LONG, content=png)
    server.until(lambda: counter._value.get() == before + 1)
    # A client that followed the events of its job and went away.
    path = server.begin(png, **LONG)
    with server.client.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
        next(stream.iter_lines())
    server.wait(path, "cancelled")


def test_paintings_asked_for_together_are_those_of_single_calls(server, stylizer, photo, png):
    wide = as_png(np.concatenate([photo, photo], axis=1))
    answers: dict[int, bytes] = {}
    blocker = server.begin(png, **LONG)

    def ask(seed: int) -> None:
        style = ("monet", "vangogh")[seed % 2]
        answers[seed] = server.post(wide if seed == 5 else png, seed=seed, style=style, **QUICK).content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(7)]
    for thread in threads:
        thread.start()
    server.client.delete(blocker)
    for thread in threads:
        thread.join()
    for seed in range(7):
        style = ("monet", "vangogh")[seed % 2]
        source = np.concatenate([photo, photo], axis=1) if seed == 5 else photo
        expected = np.asarray(stylizer.stylize(source, style, seed=seed, **QUICK).image).astype(int)
        assert np.abs(pixels(answers[seed]) - expected).max() <= 2  # a batch adds up in another order


def test_worker_that_dies_is_replaced_and_nothing_is_lost(server, png):
    painter = server.app.state.painter
    restarts = painter.restarts
    paths = [server.begin(png, seed=seed, **{**QUICK, "steps": 300}) for seed in range(6)]
    for expected in (1, 2):
        server.until(lambda: any(server.client.get(path).json()["step"] for path in paths))
        painter.kill()
        server.until(lambda expected=expected: painter.restarts == restarts + expected and painter.ready)
    for path in paths:
        assert server.wait(path, "done", "failed")["state"] == "done"


def test_bundle_that_is_replaced_is_opened_when_it_is_needed(split_path, png, tmp_path):
    bundle = Path(shutil.copytree(split_path, tmp_path / "bundle"))
    with running(bundle=str(bundle), threads=1) as opened:
        before = opened.post(png, **QUICK).content
        bundle.rename(tmp_path / "old")
        part = (split_path / "unet_full.onnx").read_bytes() + b"\x32\x01x"  # the text that ONNX has for people
        files = {str(file.relative_to(split_path)): file for file in split_path.rglob("*.*") if file.suffix != ".json"}
        Bundle.write(bundle, Bundle.open(split_path).manifest, {**files, "unet_full.onnx": part})
        assert opened.post(png, **QUICK).content == before
        assert opened.app.state.painter.restarts == 0
        assert opened.post(png, **QUICK, cache_interval=2).status_code == 200
        assert opened.app.state.painter.restarts == 1


def test_styles_follow_the_folder_without_a_restart(server, split_path, png):
    def cards() -> dict[str, Any]:
        return {card["name"]: card["thumbnail"] for card in server.client.get("/v1/styles").json()}

    server.until(lambda: all(cards().values()))
    old = cards()
    assert {*old} == {"monet", "vangogh"}
    assert pixels(base64.b64decode(old["monet"].partition(",")[2])).shape == (256, 256, 3)
    added = split_path / "styles" / "added.safetensors"
    shutil.copyfile(split_path / "styles" / "monet.safetensors", added)
    try:
        assert {*cards()} == {"added", "monet", "vangogh"}
        assert server.post(png, style="added", **QUICK).status_code == 200
    finally:
        added.unlink()
    assert cards() == old


def test_options_are_those_of_the_library(server, stylizer):
    from lsast.options.options import PRESETS, rules

    sheet = server.client.get("/v1/options").json()
    assert [card["name"] for card in sheet["options"]] == list(rules())
    defaults = vars(stylizer.resolve())
    assert {card["name"]: card["default"] for card in sheet["options"]} == defaults
    assert sheet["presets"] == PRESETS
    body = server.client.get("/openapi.json").json()["paths"]["/v1/paintings"]["post"]["requestBody"]["content"]
    form = body["multipart/form-data"]["schema"]["properties"]
    assert [*form] == [*rules(), "picture", "mask"]
    assert form["picture"]["format"] == "binary"


def test_host_and_origin_of_others_are_refused(server):
    get = server.client.get
    assert get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    assert get("/healthz", headers={"Origin": "http://evil.example"}).status_code == 403
    assert get("/healthz", headers={"Origin": "null"}).status_code == 403
    assert get("/healthz", headers={"Origin": server.address}).status_code == 200
    answer = get("/v1/options")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in get("/").headers["content-security-policy"]


def test_documentation_page_loads_nothing_from_elsewhere(server):
    text = server.client.get("/docs").text
    assert "swagger-ui" in text
    assert "https://" not in text
    assert server.client.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200


def test_readiness_and_metrics(server, png):
    assert server.client.get("/healthz").json() == {"status": "ok"}
    server.until(lambda: server.client.get("/readyz").status_code == 200)
    server.post(png, **QUICK)
    lines = server.client.get("/metrics").text.splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert found['lsast_paintings_total{state="done"}'] >= 1
    assert (found["lsast_worker_ready"], found["lsast_queued"]) == (1, 0)


def test_token_is_asked_for_by_all_but_page_and_probes(split_path, png):
    with running(bundle=str(split_path), token="sésame") as server:
        for path in ("/", "/healthz", "/docs", "/openapi.json"):
            assert httpx.get(server.address + path).status_code == 200
        for path in ("/v1/styles", "/v1/options", "/v1/paintings/x", "/metrics"):
            assert httpx.get(server.address + path).status_code == 401
            assert httpx.get(server.address + path, headers={"Authorization": "Bearer x"}).status_code == 401
        encoded = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(server.address + "/metrics", headers=encoded).status_code == 200


@pytest.mark.parametrize("kind", [b"image/png", b"multipart/form-data; boundary=x"])
def test_upload_that_breaks_off_is_the_clients_fault(server, kind):
    import asyncio

    messages: list[Any] = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", kind)]
    scope = {"type": "http", "method": "POST", "path": "/v1/paintings", "query_string": b"", "headers": headers}
    asyncio.run(
        server.app(scope | {"server": ("localhost", 80), "scheme": "http", "http_version": "1.1"}, receive, send)
    )
    assert sent[0]["status"] == 400


def test_limits_hold(split_path, png):
    limits: dict[str, Any] = {"queue": 2, "batch": 1, "max_bytes": 4 * len(png), "seconds": 0.8, "upload_seconds": 1.0}
    limits |= {"max_size": 1500, "max_tile": 1000, "max_tiles": 100, "max_megapixels": 0.02}
    with running(bundle=str(split_path), **limits) as server:
        sheet = {card["name"]: card for card in server.client.get("/v1/options").json()["options"]}
        assert (sheet["size"]["high"], sheet["tile"]["high"], sheet["tile"]["default"]) == (1500, 1000, 1000)
        for options, words in (
            ({"size": 1501}, "64 to 1500"),
            ({"tile": 1001}, "64 to 1000"),
            ({"size": 1500, "tile": 0}, "in one piece"),
            ({"size": 1024, "tile": 64}, "tiles"),
        ):
            answer = server.post(png, **{**QUICK, **options})
            assert (answer.status_code, words in answer.text) == (422, True), (options, answer.text)
        assert "megapixels" in server.post(as_png(np.zeros((200, 200, 3), np.uint8))).text
        assert server.client.post("/v1/paintings", content=bytes(5 * len(png))).status_code == 413
        chunks = (bytes(len(png)) for _ in range(5))
        assert server.client.post("/v1/paintings", content=chunks).status_code == 413
        with closing(HTTPConnection(server.address.removeprefix("http://"))) as client:
            client.auto_open = False  # one connection, which no refusal resets
            client.connect()
            client.putrequest("POST", "/v1/paintings")
            client.putheader("Content-Length", str(10 * len(png)))
            client.endheaders(png)
            refused = client.getresponse()
            assert (refused.status, b"scale the picture down" in refused.read()) == (413, True)
            client.send(9 * png)
            client.request("GET", "/healthz")
            assert client.getresponse().status == 200
        long = {**LONG, "size": 1100, "guidance": 7.0, "tile": 256}
        slow = server.post(png, **long)
        assert (slow.status_code, "more than 0.8 s" in slow.text) == (504, True)
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as stalled:
            stalled.sendall(b"POST /v1/paintings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
            assert b" 408 " in stalled.recv(1000)
        answers = [server.post(png, {"Prefer": "respond-async"}, seed=seed, **long) for seed in range(8)]
        assert {answer.status_code for answer in answers} == {202, 429}  # two are with the worker, two wait
        full = next(answer for answer in answers if answer.status_code == 429)
        assert int(full.headers["retry-after"]) >= 1
        for answer in answers:
            if answer.status_code == 202:
                server.client.delete(answer.headers["location"])
        assert server.post(png, **QUICK).status_code == 200


def test_finished_jobs_are_forgotten(split_path, png):
    for limits in ({"keep_bytes": 0}, {"keep_seconds": 0.1}):
        with running(bundle=str(split_path), **limits) as server:
            path = server.begin(png, **QUICK)
            done = server.app.state.metrics.ended.labels("done")
            server.until(lambda done=done: done._value.get() == 1)
            kept = server.app.state.jobs._jobs  # nobody asks for anything
            server.until(lambda kept=kept: not kept)
            assert server.client.get(path).status_code == 404
