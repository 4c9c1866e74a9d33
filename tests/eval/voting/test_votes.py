import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsast_engines.errors import LsastError, UsageError
from lsast_eval.voting.page import Pair, VoteSession, draw_pairs, open_server
from lsast_eval.voting.votes import Vote, append_vote, left_bias, read_votes, win_rates

from ..conftest import save, scene

METHODS = ("ours", "magenta", "reinhard")
SHADE = {"ours": 40, "magenta": 120, "reinhard": 200}


def _vote(left: str, right: str, choice: Any, content: str = "c") -> Vote:
    return Vote("monet", content, left, right, choice, "me", 1.5, "2026-01-01T00:00:00+00:00")


def test_win_rates_of_known_votes():
    votes = [
        *[_vote("ours", "magenta", "left")] * 6,
        *[_vote("magenta", "ours", "right")] * 2,
        *[_vote("magenta", "ours", "left")] * 1,
        *[_vote("ours", "magenta", "tie")] * 1,
        *[_vote("reinhard", "magenta", "right")] * 4,
    ]
    rates = {(rate.method, rate.other): rate for rate in win_rates(votes)}
    pair = rates["ours", "magenta"]
    assert (pair.wins, pair.ties, pair.losses, pair.rate) == (8, 1, 1, 0.85)
    # Wilson's bounds are the shares p with (0.85 − p)² n = z² p (1 − p).
    for bound in (pair.low, pair.high):
        assert (0.85 - bound) ** 2 * 10 == pytest.approx(1.959964**2 * bound * (1 - bound), rel=1e-5)
    assert rates["magenta", None].rate == pytest.approx((4 + 1 + 0.5) / 14)
    assert rates["reinhard", None].rate == 0
    assert [rate.method for rate in win_rates(votes)[:3]] == ["ours", "magenta", "reinhard"]
    assert ("ours", "reinhard") not in rates
    share = left_bias(votes)
    assert share[0] == pytest.approx(7 / 13)
    assert left_bias([_vote("a", "b", "tie")]) is None
    with pytest.raises(UsageError, match="found no votes"):
        win_rates([])


@pytest.mark.parametrize("kept", [1, 5, 60, -1])
def test_append_vote_adds_what_read_votes_gives_and_removes_an_unfinished_line(tmp_path, caplog, kept):
    path = tmp_path / "deep" / "votes.jsonl"
    votes = [_vote("ours", "magenta", choice, "Æ\n\udce9") for choice in ("left", "tie", "right")]
    append_vote(path, votes[0])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: kept - (kept < 0)])
    assert read_votes([path]) == votes[:1]
    assert "line 2: left out, it is not finished" in caplog.text
    append_vote(path, votes[1])
    path.write_bytes(path.read_bytes()[:-1])  # as an editor may leave it
    append_vote(path, votes[2])
    assert read_votes([path]) == votes


def test_append_vote_on_a_full_disk_keeps_the_file_whole(tmp_path):
    program = """
import resource, sys
from pathlib import Path
from lsast_eval.voting.votes import Vote, append_vote

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for number in range(100):
        append_vote(Path(sys.argv[1]), Vote("monet", str(number), "x", "y", "tie", "me", 1, "t"))
except OSError:
    print(number)
"""
    pytest.importorskip("resource", reason="needs limits of POSIX")
    path = tmp_path / "votes.jsonl"
    ran = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert 0 < len(read_votes([path])) == int(ran.stdout)


def test_read_votes_lists_all_wrong_lines(tmp_path):
    good = {**vars(_vote("a", "b", "left")), "format": 1}
    bad = [
        '{"format": 1',
        json.dumps({**good, "format": 2}),
        json.dumps({**good, "choice": "both"}),
        json.dumps({**good, "right": "a"}),
        json.dumps({**good, "seconds": "1"}),
        json.dumps({name: value for name, value in good.items() if name != "voter"}),
    ]
    (tmp_path / "votes").write_text("\n".join([json.dumps(good), *bad]))
    with pytest.raises(LsastError) as caught:
        read_votes([tmp_path / "votes"])
    assert [f"line {number}:" in str(caught.value) for number in range(1, 8)] == [False] + [True] * 6
    with pytest.raises(UsageError, match="found no file"):
        read_votes([tmp_path / "none"])


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for seed in range(4):
        save(tmp_path / "contents", f"s{seed}", scene(seed))
        save(tmp_path / "works", f"w{seed}", scene(50 + seed))
        for method, shade in SHADE.items():
            side = 64 if method == "ours" else 128
            save(tmp_path / method, f"s{seed}", np.full((side, side, 3), shade, np.uint8))
    return {path.name: path for path in tmp_path.iterdir()}


def drawn(folders: dict[str, Path], works: Path | None, seed: int) -> list[Pair]:
    return draw_pairs(folders["contents"], {name: folders[name] for name in METHODS}, works, seed)


def test_draw_pairs_covers_all_pairs_in_random_order(folders):
    pairs = drawn(folders, folders["works"], seed=1)
    questions = Counter((pair.content, frozenset((pair.left, pair.right))) for pair in pairs)
    assert len(questions) == len(pairs) == 4 * 3
    assert set(questions.values()) == {1}
    for pair in pairs:
        assert [path.parent.name for path in pair.files] == ["contents", pair.left, pair.right]
        assert {path.stem for path in pair.files} == {pair.content}
        assert len(set(pair.works)) == 3
    assert [pair.content for pair in pairs] != sorted(pair.content for pair in pairs)
    many = [pair for seed in range(30) for pair in drawn(folders, None, seed)]
    on_the_left = np.mean([pair.left == "ours" for pair in many if "ours" in (pair.left, pair.right)])
    assert 0.4 < on_the_left < 0.6
    with pytest.raises(UsageError, match="at least two"):
        draw_pairs(folders["contents"], {"ours": folders["ours"]}, None, 0)


def _ask(port: int, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body that the page answers to a GET, or to a POST of `data`."""
    kind = {} if data is None else {"Content-Type": "application/json"}
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET" if data is None else "POST", f"/{path}", data, {**kind, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def session(folders: dict[str, Path], tmp_path: Path) -> VoteSession:
    return VoteSession(drawn(folders, folders["works"], seed=3), "monet", tmp_path / "votes.jsonl", "me")


@pytest.fixture
def port(session: VoteSession) -> Iterator[int]:
    """Of a running page."""
    server = open_server(session)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def _shade(port: int, name: str) -> int:
    status, data = _ask(port, name)
    assert status == 200
    picture = Image.open(BytesIO(data))
    assert picture.format == "PNG"
    assert picture.size == (128, 128)  # also that of "ours", half as large
    assert not picture.info
    return int(np.asarray(picture)[0, 0, 0])


def test_page_writes_votes_for_the_shown_method(port, session, tmp_path):
    """The voter likes dark pictures, knows only what the page shows, and must elect the darkest method."""
    status, html = _ask(port, "")
    assert status == 200
    assert b"<!doctype html>" in html
    for number in range(12):
        status, answer = _ask(port, "next")
        question = json.loads(answer)
        assert (question["number"], question["total"], question["artist"]) == (number + 1, 12, "monet")
        assert not any(name.encode() in answer for name in (*METHODS, "s0", "s1", "s2", "s3"))
        left, right = (_shade(port, question[side]) for side in ("left", "right"))
        choice = "left" if left < right else "right"
        vote = {"pair": question["pair"], "choice": choice, "seconds": 0.5}
        assert _ask(port, "vote", json.dumps(vote).encode())[0] == 200
        assert _ask(port, "vote", json.dumps(vote).encode())[0] == 400  # no second vote on one pair
        assert len(read_votes([tmp_path / "votes.jsonl"])) == number + 1
    assert json.loads(_ask(port, "next")[1]) == {"done": True}
    assert session.remaining == 0
    rates = {rate.method: rate.rate for rate in win_rates(read_votes([tmp_path / "votes.jsonl"])) if rate.other is None}
    assert rates == {"ours": 1, "magenta": 0.5, "reinhard": 0}


def test_page_answers_this_machine_only(port, session, tmp_path):
    number = json.loads(_ask(port, "next")[1])["pair"]
    vote = json.dumps({"pair": number, "choice": "tie", "seconds": 1}).encode()
    assert _ask(port, "next", Host="evil.example")[0] == 403
    assert _ask(port, "vote", vote, Origin="https://evil.example")[0] == 403
    assert _ask(port, "vote", vote, **{"Content-Type": "text/plain"})[0] == 404
    assert _ask(port, "vote", b"x" * 5000)[0] == 413
    assert _ask(port, "picture/0000")[0] == 404
    assert _ask(port, "../votes.jsonl")[0] == 404
    for bad in (b"no json", b"[]", b'{"pair": 0}', vote.replace(b"tie", b"all"), vote.replace(b"1}", b"-1}"),
                vote.replace(b"1}", b"NaN}"), vote.replace(str(number).encode(), b"99")):  # fmt: skip
        assert _ask(port, "vote", bad)[0] == 400
    assert not (tmp_path / "votes.jsonl").exists()
    assert _ask(port, "vote", vote, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert session.remaining == 11


def test_page_leaves_out_a_pair_whose_picture_is_damaged(port, session, folders, caplog):
    question = json.loads(_ask(port, "next")[1])
    for method in METHODS:
        for file in folders[method].iterdir():
            file.write_bytes(b"no picture")
    assert _ask(port, question["left"])[0] == 404
    assert "is left out" in caplog.text
    assert json.loads(_ask(port, "next")[1])["pair"] != question["pair"]
    assert _ask(port, "vote", b"[" * 4000)[0] == 400


def test_vote_session_asks_each_voter_once(folders, session, tmp_path):
    out = tmp_path / "votes.jsonl"
    session.answer({"pair": session.next()["pair"], "choice": "left", "seconds": 2})
    (written,) = read_votes([out])
    assert (written.voter, written.artist, written.seconds) == ("me", "monet", 2)
    # Another seed: other order, other sides, the same questions.
    for artist, voter, left in (("monet", "me", 11), ("monet", "you", 12), ("hokusai", "me", 12)):
        assert VoteSession(drawn(folders, None, seed=8), artist, out, voter).remaining == left


def test_open_server_on_a_taken_port_fails(port, session):
    with pytest.raises(UsageError, match=f"cannot listen on port {port}"):
        open_server(session, port)
