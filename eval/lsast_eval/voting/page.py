"""A local web page on which people choose between two results, blind and in random order.

The browser gets random names of pictures only: it never learns which method made one.
"""

import io
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
from PIL import Image

from lsast_engines.bundle.json_fields import MAX_INTEGER, parse_json, read_object
from lsast_engines.declared_options import Range
from lsast_engines.errors import LsastError, UsageError, fault_list, shown
from lsast_engines.images import find_pictures, read_on_white

from ..matching import match_by_stem
from ..metrics.content import resized, shrunk
from .votes import Choice, Vote, append_vote, read_votes

log = logging.getLogger("lsast.eval")

_SHOWN = 768
"""Shorter side of a picture on the page, in pixels, at most."""
_WORKS = 3
"""Works beside a pair."""
_LARGEST = 4096
"""Largest request body, in bytes."""


@dataclass(frozen=True)
class Pair:
    """Two results of one content."""

    content: str
    """File stem."""
    left: str
    """Method."""
    right: str
    files: tuple[Path, Path, Path]
    """Content, left, right."""
    works: tuple[Path, ...]
    """Works of the artist shown beside it."""


@dataclass(frozen=True)
class _Answer:
    """What the page sends."""

    pair: Annotated[int, Range(0, MAX_INTEGER)]
    choice: Choice
    seconds: Annotated[float, Range(0)]


def draw_pairs(contents: Path, methods: Mapping[str, Path], works: Path | None, seed: int) -> list[Pair]:
    """Every content with every pair of methods, in random order and with random sides.

    `methods` has at least two folders of results by name. Works beside them are drawn from the folder `works`; None
    shows none. `seed` is that of the order, the sides and the works.

    Raises:
        UsageError: fewer than two methods.
        PictureError: folders that do not match.
    """
    if len(methods) < 2:
        raise UsageError(f"found {len(methods)} method; expected at least two to choose between")
    matches = match_by_stem(contents, methods)
    pool = [] if works is None else find_pictures(works)
    rng = np.random.default_rng(seed)
    pairs = []
    for index, stem in enumerate(matches.stems):
        for duo in combinations(matches.results, 2):
            left, right = duo if rng.integers(2) else duo[::-1]
            beside = rng.permutation(len(pool))[:_WORKS]
            trio = (matches.contents[index], matches.results[left][index], matches.results[right][index])
            pairs.append(Pair(stem, left, right, trio, tuple(pool[number] for number in beside)))
    return [pairs[number] for number in rng.permutation(len(pairs))]


class VoteSession:
    """The pairs that still need a vote, and the file that votes are written to.

    Args:
        pairs: the questions, in the order they are asked.
        out: votes file; its votes of this voter for this artist are not asked again.
    """

    def __init__(self, pairs: Sequence[Pair], artist: str, out: Path, voter: str) -> None:
        self._artist, self._out, self._voter = artist, out, voter
        said = {
            (vote.content, frozenset((vote.left, vote.right)))
            for vote in (read_votes([out]) if out.exists() else [])
            if (vote.voter, vote.artist) == (voter, artist)
        }
        self._pictures: dict[str, tuple[int, Path, Path]] = {}
        self._total = len(pairs)
        self._lock = Lock()
        self._open = {
            number: (pair, self._question(number, pair))
            for number, pair in enumerate(pairs)
            if (pair.content, frozenset((pair.left, pair.right))) not in said
        }

    @property
    def remaining(self) -> int:
        """Pairs without an answer."""
        return len(self._open)

    def next(self) -> dict[str, Any]:
        """The next pair to vote on, as JSON for the page."""
        with self._lock:
            if not self._open:
                return {"done": True}
            _, question = next(iter(self._open.values()))
            return {**question, "done": False, "number": self._total - len(self._open) + 1, "total": self._total}

    def answer(self, data: Any) -> None:
        """Write the vote that the page sent, as parsed JSON.

        Raises:
            UsageError: not a vote, or not for a pair that is open.
        """
        faults: list[str] = []
        answer = read_object(_Answer, data, "vote", faults)
        if answer is None:
            raise UsageError(fault_list("this is no vote:", faults))
        with self._lock:
            pair, _ = self._open.get(answer.pair, (None, None))
            if pair is None:
                raise UsageError(f"pair {answer.pair} has its vote, or does not exist; reload the page")
            time = datetime.now(timezone.utc).isoformat(timespec="seconds")
            names = (self._artist, pair.content, pair.left, pair.right)
            append_vote(self._out, Vote(*names, answer.choice, self._voter, round(answer.seconds, 2), time))
            del self._open[answer.pair]

    def picture(self, name: str) -> bytes | None:
        """The PNG that the page knows by this name, or None.

        It is encoded again at the size of its content: format, metadata and size would give the method away. A picture
        that cannot be read is logged, and its pair is left out.
        """
        if name not in self._pictures:
            return None
        number, path, like = self._pictures[name]
        try:
            height, width = shrunk(read_on_white(like), _SHOWN).shape[:2]
            pixels = resized(read_on_white(path), height, width)
        except LsastError as error:
            log.warning("the pair of %s is left out: %s", shown(path), error)
            with self._lock:
                self._open.pop(number, None)
            return None
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def _question(self, number: int, pair: Pair) -> dict[str, Any]:
        """A pair as JSON, its pictures by random names, new in every pair: people could remember one that stays."""

        def names(paths: Sequence[Path], like: Path | None) -> list[str]:
            made = {f"picture/{secrets.token_hex(8)}": (number, path, like or path) for path in paths}
            self._pictures |= made
            return list(made)

        content, left, right = names(pair.files, pair.files[0])
        works = names(pair.works, None)
        return {
            "pair": number, "artist": self._artist, "content": content, "left": left, "right": right, "works": works
        }  # fmt: skip


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request ended early", exc_info=True)  # the browser went away


def open_server(session: VoteSession, port: int = 0) -> ThreadingHTTPServer:
    """A server for one session on this machine alone; ``server_address`` tells the port that 0 chose.

    Raises:
        UsageError: the port is taken.
    """

    handler = type("Handler", (_Handler,), {"session": session})

    try:
        return _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise UsageError(f"cannot listen on port {port} ({error}); choose another, or 0 for any free one") from error


class _Handler(BaseHTTPRequestHandler):
    session: VoteSession

    def do_GET(self) -> None:
        if not self._is_local():
            return
        name = self.path.lstrip("/")
        if name == "":
            page = files(__package__).joinpath("page.html").read_bytes()
            self._reply(200, page, "text/html; charset=utf-8")
        elif name == "next":
            self._reply(200, json.dumps(self.session.next()).encode(), "application/json")
        elif (picture := self.session.picture(name)) is not None:
            self._reply(200, picture, "image/png")
        else:
            self._reply(404, b"nothing of that name")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/vote" or self.headers.get_content_type() != "application/json":
            self._reply(404, b"expected JSON for /vote")
        elif not length.isdigit() or int(length) > _LARGEST:
            self._reply(413, b"expected a short vote")
        else:
            try:
                self.session.answer(parse_json(self.rfile.read(int(length))))
            except (LsastError, ValueError) as error:
                self._reply(400, shown(error).encode())
            except OSError as error:
                self._reply(500, shown(error).encode())
            else:
                self._reply(200, b"{}", "application/json")

    def _is_local(self) -> bool:
        """Refuse requests of other web pages: DNS names that resolve to this machine, and foreign origins."""
        port = self.connection.getsockname()[1]
        allowed = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in allowed and (origin is None or origin.partition("://")[2] in allowed):
            return True
        self._reply(403, b"this page is for this machine alone")
        return False

    def _reply(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
