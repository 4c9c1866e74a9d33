"""The worker: a process that paints what the server sends it over its standard input, and answers on its output.

A message is a length of 4 bytes, big-endian, that many bytes of JSON, and the bytes that the JSON's ``blobs`` counts.
Nothing is pickled: pictures of strangers are decoded here, and what comes out of here is data for the server.

==================== ============================================= ================================================
to the worker        facts and blobs                               answers
==================== ============================================= ================================================
``start``            `lsast.load`'s arguments, the limits           ``done`` when it is ready, or ``failed``
``paint``            `Work`; picture, mask                         `Event` …
``cancel``           the id of a ``paint``                         ``failed`` with CancelledError
``facts, styles``    none                                          ``done``
``thumbnail``        the name of a style                           ``done`` with a WebP
``record``           a painting's file                             ``done``
``convert``          a PNG that was painted here, a suffix          ``done`` with the file
==================== ============================================= ================================================
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from lsast_engines.errors import (
    BackendError,
    BundleError,
    CancelledError,
    LsastError,
    PictureError,
    StyleError,
    UnknownStyleError,
    UsageError,
)

from ..images.sample import SAMPLE, THUMBNAIL
from ..options.options import Options
from ..sessions.cancel import CancelToken

if TYPE_CHECKING:
    from PIL import Image

    from ..request import Request
    from ..result import Result

FORMATS = frozenset({"AVIF", "BMP", "GIF", "HEIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"})
"""Pillow's names of the formats that strangers may send: those of cameras, phones and browsers."""

PREVIEW_SECONDS = 0.15
"""Least time between two previews of one painting."""

_HEADER = struct.Struct(">I")
_log = logging.getLogger("lsast.server.worker")


@dataclass(frozen=True)
class Work:
    """One painting to be done."""

    id: str
    picture: bytes = field(repr=False)
    options: Mapping[str, Any]
    """What was given, under the names of `lsast.Options`."""
    mask: bytes = field(default=b"", repr=False)
    """Empty for none."""
    suffix: str = ".png"
    """Of the file that the painting is written as: one that `Result.write` takes."""
    previews: bool = False
    """Whether somebody looks at the previews."""
    alone: bool = False
    """Whether it shares no batch, because a worker died over it."""


@dataclass(frozen=True)
class Event:
    """What happened to a `Work`."""

    kind: Literal["reading", "read", "begun", "progress", "done", "failed"]
    """``reading``: its picture is decoded; ``read``: it waits for the engines; ``begun``: it is being painted;
    ``progress``: facts `step` and `steps`, and a preview (WebP) or nothing; ``done``: facts of the painting, and its
    file; ``failed``: facts `error`, a class of `lsast_engines.errors`, and `text`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    blob: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, eq=False)
class Task:
    """A `Work` that was read."""

    work: Work
    request: Request
    token: CancelToken


Emit = Callable[[str, Event], None]
"""Takes the id of a `Work` and an event; called from any thread."""


def encode(kind: str, facts: Mapping[str, Any], blobs: Iterable[bytes] = ()) -> bytes:
    """A message of the protocol above."""
    parts = list(blobs)
    header = json.dumps({"kind": kind, "facts": dict(facts), "blobs": [len(part) for part in parts]}).encode()
    return b"".join([_HEADER.pack(len(header)), header, *parts])


def decode_header(header: bytes) -> tuple[str, dict[str, Any], list[int]]:
    """Kind, facts, and the lengths of the blobs that follow."""
    message = json.loads(header)
    return message["kind"], message["facts"], message["blobs"]


class BatchPainter:
    """Paints batches of pictures with one `Stylizer`, within limits; used by a worker and by a replica of Ray."""

    def __init__(self, load: Mapping[str, Any], limits: Mapping[str, float]) -> None:
        """Open the engines and run them once.

        Args:
            load: arguments of `lsast.load`.
            limits: `Settings.worker_limits`.

        Raises:
            LsastError: see `lsast.load`.
        """
        from ..stylizer import load as load_stylizer

        self.stylizer = load_stylizer(**load)
        self._limits = limits
        self.stylizer.stylize(SAMPLE, **THUMBNAIL | {"size": 64, "steps": 1})

    def facts(self) -> dict[str, Any]:
        """What the server tells its clients of the bundle."""
        from .._version import __version__

        bundle = self.stylizer.bundle
        declared = {option.name: option.default for option in fields(Options) if option.default is not MISSING}
        return {
            "version": __version__,
            "bundle": bundle.manifest.name,
            "stages": bundle.manifest.stages,
            "defaults": {**declared, **bundle.manifest.defaults},
        }

    def read(self, work: Work, token: CancelToken) -> Task:
        """Read the picture, and check all limits.

        Raises:
            LsastError: see `Stylizer.request`; or beyond a limit.
        """
        for data in filter(None, (work.picture, work.mask)):
            self._check_picture(data)
        options = {"tile": min(Options.tile, int(self._limits["max_tile"])), **work.options}
        options["size"] = min(self.stylizer.resolve(**options).size, int(self._limits["max_size"]))
        request = self.stylizer.request(work.picture, mask=work.mask or None, **options)
        self._check_canvas(request)
        return Task(work, request, token)

    def paint(self, tasks: Sequence[Task], emit: Emit) -> list[Result]:
        """Paint tasks of one `batch_key`; a batch ends early when all of its tasks are cancelled.

        Raises:
            LsastError: see `Stylizer.paint`.
        """
        shown = time.monotonic() - PREVIEW_SECONDS

        def on_step(step: int, steps: int, preview: Callable[[int], Image.Image]) -> None:
            nonlocal shown
            now = time.monotonic()
            show = now - shown >= PREVIEW_SECONDS or step == steps
            shown = now if show else shown
            for index, task in enumerate(tasks):
                if task.work.previews and not task.token.cancelled:
                    blob = _webp(preview(index)) if show else b""
                    emit(task.work.id, Event("progress", {"step": step, "steps": steps}, blob))

        for task in tasks:
            emit(task.work.id, Event("begun"))
        return self.stylizer.paint([task.request for task in tasks], on_step, _All(tasks))

    def finish(self, task: Task, result: Result) -> Event:
        """The event that ends a task: ``done`` with the file, or ``failed``."""
        try:
            task.token.check()
            handle = io.BytesIO()
            result.write(handle, task.work.suffix)
        except Exception as error:
            return self.failure(error)
        facts = {"options": asdict(result.options), "seconds": result.seconds, "size": result.image.size}
        return Event("done", facts, handle.getvalue())

    def failure(self, error: BaseException) -> Event:
        """The event of an error: its text without paths of this machine, or, of an unexpected one, none of it.

        Where another bundle has replaced this one, the process ends instead: the next one opens that.
        """
        if isinstance(error, (BundleError, StyleError, UnknownStyleError)) and self.stylizer.bundle.has_changed():
            _log.error("the bundle was changed or replaced; it is opened again")
            os._exit(1)
        if not isinstance(error, LsastError):
            _log.error("unexpected error", exc_info=error)
            memory = isinstance(error, MemoryError)
            text = "not enough memory for this painting; take a smaller size" if memory else "unexpected error"
            return Event("failed", {"error": "PictureError" if memory else "BackendError", "text": text})
        if isinstance(error, BackendError):
            _log.error("the backend failed: %s", error)
            return Event("failed", {"error": "BackendError", "text": "the backend failed; the server's log says more"})
        return Event("failed", {"error": type(error).__name__, "text": self._without_paths(str(error))})

    def answer(self, kind: str, facts: Mapping[str, Any], blob: bytes) -> Event:
        """The answer to a message that is no painting: ``done``, or ``failed``."""
        answers: dict[str, Callable[[], tuple[dict[str, Any], bytes]]] = {
            "facts": lambda: (self.facts(), b""),
            "styles": lambda: ({"styles": self.styles()}, b""),
            "thumbnail": lambda: ({}, self.thumbnail(facts["style"])),
            "record": lambda: (self.record(blob), b""),
            "convert": lambda: ({}, self.convert(blob, facts["suffix"])),
        }
        try:
            return Event("done", *answers[kind]())
        except Exception as error:
            return self.failure(error)

    def styles(self) -> list[dict[str, Any]]:
        """Name, fingerprint, distilled guidance and defaults of every style that can be read, as it is on disk now."""
        found = []
        for name in self.stylizer.styles:
            try:
                style = self.stylizer.bundle.open_style(name)
                facts = {"guidance": style.distilled_guidance, "defaults": dict(style.defaults)}
                found.append({"name": name, "fingerprint": style.fingerprint, **facts})
            except LsastError as error:  # damaged, or removed since
                _log.warning("%s", error)
        return found

    def thumbnail(self, style: str) -> bytes:
        """The sample in a style, a WebP.

        Raises:
            LsastError: see `Stylizer.stylize`.
        """
        image = self.stylizer.stylize(SAMPLE, style, **THUMBNAIL).image
        image.thumbnail((THUMBNAIL["size"], THUMBNAIL["size"]))
        return _webp(image)

    def record(self, data: bytes) -> dict[str, Any]:
        """The options of a painting and the name of its bundle, from its file.

        Raises:
            PictureError: no picture, or one without a record.
        """
        from ..images.metadata import read_record

        self._check_picture(data)
        record = read_record(data)
        return {"options": asdict(record.options), "bundle": record.provenance.bundle}

    def convert(self, data: bytes, suffix: str) -> bytes:
        """A PNG that was painted here as a file of another format, with its record.

        Raises:
            PictureError: the format cannot hold so large a picture.
        """
        from PIL import Image

        from ..images.metadata import read_record
        from ..result import Result

        record, handle = read_record(data), io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            Result(image, record.seconds, record.options, record.provenance).write(handle, suffix)
        return handle.getvalue()

    def _check_picture(self, data: bytes) -> None:
        """Look at the kind and the size of a picture's file, before anything of it is decoded."""
        from lsast_engines.picture_file import check_size, open_image

        try:
            image = open_image(io.BytesIO(data), "the picture")
        except LsastError:
            raise
        except Exception as error:  # Pillow raises many types for damaged files
            raise PictureError(f"the picture cannot be read ({error}); expected a whole file") from error
        if image.format not in FORMATS:
            raise PictureError(f"found a picture of format {image.format}; expected {', '.join(sorted(FORMATS))}")
        check_size(image, "the picture", self._limits["max_megapixels"])

    def _check_canvas(self, request: Request) -> None:
        from ..sampling.tiling import WHOLE_UP_TO

        (height, width), grid, limits = request.canvas_size, request.grid, self._limits
        found = f"found a canvas of {width} x {height} pixels"
        if request.options.size == 0 and height * width > limits["max_size"] ** 2:
            raise UsageError(f"{found}; this server paints about {limits['max_size']:g}²: give a size")
        if grid is None and height * width > WHOLE_UP_TO * limits["max_tile"] ** 2:
            raise UsageError(f"{found} in one piece; this server paints up to 1.5 tiles of {limits['max_tile']:g}²")
        if grid is not None and (tiles := len(grid.rows) * len(grid.columns)) > limits["max_tiles"]:
            raise UsageError(f"{found} in {tiles} tiles; this server paints {limits['max_tiles']:g}: take larger tiles")

    def _without_paths(self, text: str) -> str:
        bundle = self.stylizer.bundle
        for path, name in ((bundle.path, bundle.manifest.name), (bundle.user_style_folder, "the user's styles")):
            text = text.replace(str(path), name)
        return text


class _All(CancelToken):
    """Cancelled when all tasks of a batch are."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self._tasks = tasks

    @property
    def cancelled(self) -> bool:
        return all(task.token.cancelled for task in self._tasks)


class Worker:
    """The loop of the process: threads read and finish pictures, and one paints them."""

    def __init__(self, painter: BatchPainter, batch: int, send: Callable[[str, Event], None]) -> None:
        """Start the thread that paints.

        Args:
            painter: what paints.
            batch: most pictures that are painted together.
            send: takes an id and an event of it; called from any thread.
        """
        self._painter = painter
        self._batch = batch
        self._send = send
        self._tokens: dict[str, CancelToken] = {}
        self._waiting: list[Task | Callable[[], None]] = []
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(2)
        threading.Thread(target=self._run, daemon=True).start()

    def take(self, kind: str, facts: Mapping[str, Any], blobs: Sequence[bytes]) -> None:
        """Begin what a message asks for; returns at once."""
        if kind == "paint":
            work = Work(picture=blobs[0], mask=blobs[1], **facts)
            self._tokens[work.id] = CancelToken()
            self._pool.submit(self._read, work, self._tokens[work.id])
        elif kind == "cancel":
            if token := self._tokens.get(facts["id"]):
                token.cancel()
                self._drop_cancelled()
            else:  # it has ended already, but the server waits for an answer
                self._send(facts["id"], Event("failed", {"error": "CancelledError", "text": ""}))
        elif kind == "thumbnail":  # it needs the engines, and waits for all paintings
            self._add(lambda: self._answer(kind, facts, blobs[0]))
        else:
            self._pool.submit(self._answer, kind, facts, blobs[0])

    def _answer(self, kind: str, facts: Mapping[str, Any], blob: bytes) -> None:
        self._end(facts["id"], self._painter.answer(kind, facts, blob))

    def _read(self, work: Work, token: CancelToken) -> None:
        try:
            token.check()
            self._send(work.id, Event("reading"))
            self._add(self._painter.read(work, token))
        except Exception as error:
            self._end(work.id, self._painter.failure(error))

    def _add(self, entry: Task | Callable[[], None]) -> None:
        if isinstance(entry, Task):
            self._send(entry.work.id, Event("read"))
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify()

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [entry for entry in self._waiting if isinstance(entry, Task) and entry.token.cancelled]
            self._waiting = [entry for entry in self._waiting if entry not in dropped]
        for task in dropped:
            self._end(task.work.id, self._painter.failure(CancelledError("the painting was cancelled")))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                entries = self._next()
                self._waiting = [entry for entry in self._waiting if entry not in entries]
            tasks = [entry for entry in entries if isinstance(entry, Task)]
            if tasks:
                self._paint(tasks)
            elif not isinstance(entries[0], Task):
                entries[0]()

    def _next(self) -> list[Task | Callable[[], None]]:
        """What is done next: paintings before thumbnails, the oldest first, with those that share its batch."""
        tasks = [entry for entry in self._waiting if isinstance(entry, Task)]
        if not tasks:
            return self._waiting[:1]
        first = tasks[0]
        if first.work.alone:
            return [first]
        same = [task for task in tasks if task.request.batch_key == first.request.batch_key and not task.work.alone]
        return [*same[: self._batch]]

    def _paint(self, tasks: Sequence[Task]) -> None:
        try:
            results = self._painter.paint(tasks, self._send)
        except Exception as error:
            for task in tasks:
                self._end(task.work.id, self._painter.failure(error))
            return
        for task, result in zip(tasks, results, strict=True):
            self._pool.submit(self._finish, task, result)

    def _finish(self, task: Task, result: Result) -> None:
        self._end(task.work.id, self._painter.finish(task, result))

    def _end(self, name: str, event: Event) -> None:
        self._tokens.pop(name, None)
        self._send(name, event)


def _webp(image: Image.Image) -> bytes:
    handle = io.BytesIO()
    image.convert("RGB").save(handle, "WEBP", quality=80)
    return handle.getvalue()


def _messages(stream: BinaryIO) -> Iterable[tuple[str, dict[str, Any], list[bytes]]]:
    while len(length := stream.read(_HEADER.size)) == _HEADER.size:
        kind, facts, sizes = decode_header(stream.read(*_HEADER.unpack(length)))
        yield kind, facts, [stream.read(size) for size in sizes]


def main() -> None:
    """Run a worker until its standard input ends."""
    for name in ("SIGINT", "SIGTERM"):  # sent to the whole group; the server says when to end
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.basicConfig(format="%(message)s")
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message
    lock = threading.Lock()

    def send(name: str, event: Event) -> None:
        with lock:
            output.write(encode(event.kind, {**event.facts, "id": name}, [event.blob]))
            output.flush()

    messages = iter(_messages(sys.stdin.buffer))
    _, start, _ = next(messages)
    try:
        painter = BatchPainter(start["load"], start["limits"])
    except LsastError as error:
        send("", Event("failed", {"error": type(error).__name__, "text": str(error)}))
        return
    send("", Event("done", painter.facts()))
    worker = Worker(painter, start["limits"]["batch"], send)
    for kind, facts, blobs in messages:
        worker.take(kind, facts, blobs)
    os._exit(0)  # the server is gone: nobody waits for what is being painted


if __name__ == "__main__":
    main()
