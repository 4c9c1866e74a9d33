"""The application: routes, and what guards them."""

import asyncio
import base64
import collections
import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsast_engines.errors import BackendError, CancelledError, LsastError

from .._version import __version__
from ..images.sample import SAMPLE
from ..options.options import PRESETS
from .jobs import ATTEMPTS, Job, Jobs, Painter, QueueFullError, TooSlowError
from .metrics import CONTENT_TYPE, Metrics
from .process import WorkerDiedError
from .schemas import Fault, OptionSheet, Painting, StyleCard, models, option_cards
from .settings import WORKER_LIMITS, Settings
from .uploads import FORM, JSON, RAW, read_painting

MEDIA = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
"""The media types of paintings, the first being the default, and their suffixes."""

EVENTS = "text/event-stream"

_PAGE = Path(__file__).parent / "static" / "page.html"
_BEARER = HTTPBearer(auto_error=False)
_HEARTBEAT = 15.0
"""Seconds of silence after which an event stream sends a comment, so that a proxy does not close it."""
_STATUS: dict[type[LsastError], int] = {QueueFullError: 429, TooSlowError: 504, CancelledError: 409, BackendError: 500}
"""Statuses of errors; all others are the client's: 422."""


def create_app(settings: Settings, make_painter: Callable[[], Painter]) -> FastAPI:
    """The application.

    Its `state` holds `painter`, `jobs` and `metrics` while it runs, and `draining`, which refuses new paintings.

    Args:
        settings: of the server.
        make_painter: makes what paints, when the application starts.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = app.state
        state.painter, state.metrics = make_painter(), Metrics()
        state.jobs = Jobs(settings, state.painter, state.metrics)
        state.thumbnails = _Thumbnails(state.painter)
        state.painter.start()
        try:
            yield
        finally:
            await state.jobs.close()
            state.thumbnails.close()
            await state.painter.close()

    app = FastAPIOffline(
        title="lsast",
        version=__version__,
        summary="Repaints pictures in the style of an artist.",
        lifespan=lifespan,
        redoc_url=None,
        responses={
            400: {"description": "Another name than this server's, or a body that breaks off."},
            403: {"model": Fault, "description": "The page of another site asks."},
        },
    )
    app.state.draining = False
    app.add_middleware(_SameOrigin)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.hosts, www_redirect=False)
    app.add_middleware(_CutOff)
    app.add_middleware(_Headers)  # the last one added is outermost: refusals get the headers, too
    app.add_exception_handler(LsastError, _answer_error)
    _add_routes(app, settings)
    return app


def _add_routes(app: FastAPI, settings: Settings) -> None:
    async def check_token(found: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        given = found.credentials if found else ""
        if not secrets.compare_digest(given.encode("latin-1"), settings.token.encode()):
            raise HTTPException(401, "expected the token of this server", {"WWW-Authenticate": "Bearer"})

    faults: dict[int | str, dict[str, Any]] = {
        status: {"model": Fault, "description": text}
        for status, text in {
            406: "None of the media types that Accept names.",
            408: "The request took too long.",
            413: "Too many bytes.",
            415: "A body of another media type.",
            422: "A picture or options that cannot be painted.",
            429: "The queue is full; Retry-After says when to try again.",
            500: "The backend failed.",
            503: "The server is about to end.",
            504: "The painting took too long.",
        }.items()
    }
    guarded = APIRouter(responses={status: faults[status] for status in (500, 503)})
    upload = {
        "required": True,
        "content": {
            FORM: {"schema": models(settings).form.model_json_schema()},
            JSON: {"schema": models(settings).json.model_json_schema()},
            **{media: {"schema": {"type": "string", "format": "binary"}} for media in RAW},
        },
    }
    pictures: dict[str, Any] = {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA}

    def state(request: Request) -> Any:
        return request.app.state

    def find(name: str, request: Request) -> Job:
        job: Job | None = state(request).jobs.get(name)
        if job is None:
            raise HTTPException(404, "found no such painting; it is forgotten some minutes after it is done")
        return job

    @guarded.post(
        "/v1/paintings",
        response_class=Response,
        responses={
            200: {"content": pictures, "description": "The painting."},
            202: {"model": Painting, "description": "The job, with `Prefer: respond-async`."},
            **faults,
        },
        openapi_extra={
            "parameters": [
                {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
                for name, schema in models(settings).options.model_json_schema()["properties"].items()
            ]
            + [{"name": "Prefer", "in": "header", "schema": {"type": "string", "enum": ["respond-async"]}}],
            "requestBody": upload,
        },
    )
    async def paint(request: Request) -> Response:
        """Paint a picture.

        The body is a form, JSON, or the picture itself; only in the last case do options stand in the address. The
        answer is the painting, in the format that `Accept` asks for, or with `Prefer: respond-async` a job. A client
        that goes away cancels its painting.
        """
        later = "respond-async" in request.headers.get("prefer", "").lower()
        media = "" if later else _accepted(request, MEDIA)
        if state(request).draining:
            raise _ending()
        jobs: Jobs = state(request).jobs
        with jobs.place():
            picture, mask, options = await read_painting(request, settings)
            job = jobs.submit(picture, mask, options, ".png" if later else MEDIA[media], later)
        if later:
            headers = {"Location": f"{request.scope.get('root_path', '')}/v1/paintings/{job.work.id}"}
            return JSONResponse(jobs.snapshot(job).model_dump(), 202, headers)
        try:
            await _until_over(request, jobs, job)
            if job.error:
                raise job.error
            if job.state == "cancelled":
                raise _ending()
            return Response(job.painting, media_type=media)
        finally:
            jobs.forget(job)

    @guarded.get(
        "/v1/paintings/{name}",
        response_model=Painting,
        responses={
            200: {"content": {**pictures, EVENTS: {"schema": {"type": "string"}}}},
            404: {"model": Fault, "description": "No such painting."},
            409: {"model": Fault, "description": "There is no picture: the painting is not done, failed or cancelled."},
            406: faults[406],
        },
    )
    async def follow(name: str, request: Request) -> Response:
        """A job: its state as JSON, its events as `text/event-stream`, or the painting in the format of `Accept`."""
        jobs, job = state(request).jobs, find(name, request)
        media = _accepted(request, {JSON: "", EVENTS: "", **MEDIA})
        if media == EVENTS:
            return _EventStream(jobs, job)
        if media == JSON:
            job.fetched = job.fetched or job.state == "failed"
            return JSONResponse(jobs.snapshot(job).model_dump())
        if job.state != "done":
            raise HTTPException(409, f"found a painting that is {job.state}; expected one that is done")
        painting = job.painting
        if MEDIA[media] != job.work.suffix:
            painting = (await state(request).painter.ask("convert", {"suffix": MEDIA[media]}, painting)).blob
        job.fetched = True
        return Response(painting, media_type=media)

    @guarded.delete(
        "/v1/paintings/{name}",
        status_code=204,
        responses={404: {"model": Fault, "description": "No such painting."}},
    )
    async def cancel(name: str, request: Request) -> None:
        """Cancel a painting, and forget it."""
        job = find(name, request)
        await state(request).jobs.cancel(job)
        state(request).jobs.forget(job)

    @guarded.get("/v1/styles")
    async def styles(request: Request) -> list[StyleCard]:
        """The styles that are there now, with thumbnails."""
        cards: list[StyleCard] = await state(request).thumbnails.cards()
        return cards

    @guarded.get("/v1/options")
    async def options(request: Request) -> OptionSheet:
        """The options with their ranges and defaults, the presets, and the limits of this server."""
        facts = await state(request).painter.ask("facts")
        names = (*WORKER_LIMITS, "max_bytes", "seconds", "queue")
        return OptionSheet(
            **{name: facts.facts[name] for name in ("version", "bundle", "stages")},
            options=option_cards(facts.facts["defaults"], settings),
            presets={str(name): given for name, given in PRESETS.items()},
            limits={name: getattr(settings, name) for name in names},
        )

    @guarded.post(
        "/v1/records",
        responses={status: faults[status] for status in (408, 413, 415, 422)},
        openapi_extra={"requestBody": upload},
    )
    async def record(request: Request) -> dict[str, Any]:
        """What the file of a painting, sent as to `/v1/paintings`, says of its options."""
        painting, *_ = await read_painting(request, settings)
        answer = await state(request).painter.ask("record", {}, painting)
        return {name: answer.facts[name] for name in ("options", "bundle")}

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def health() -> dict[str, Literal["ok"]]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"model": Fault, "description": "Not ready, or about to end."}})
    async def ready(request: Request) -> dict[str, Literal["ready"]]:
        """Whether the server would begin a painting now."""
        if state(request).draining or not state(request).painter.ready:
            raise HTTPException(503, "about to end" if state(request).draining else "getting ready")
        return {"status": "ready"}

    @guarded.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        return Response(state(request).metrics.text(), media_type=CONTENT_TYPE)

    refused = {"model": Fault, "description": "No token, or another one."}
    guard: dict[str, Any] = {"dependencies": [Depends(check_token)], "responses": {401: refused}}
    app.include_router(guarded, **(guard if settings.token else {}))
    page, policy = _page()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/sample.webp", include_in_schema=False)
    async def sample() -> FileResponse:
        return FileResponse(SAMPLE, media_type="image/webp")


async def _until_over(request: Request, jobs: Jobs, job: Job) -> None:
    """Wait for a job; a client that goes away cancels it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    assert job.task is not None
    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait([job.task, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        await jobs.cancel(job)


class _EventStream(StreamingResponse):
    """The changes of a job as server-sent events; it follows the job until the client has all of them or goes away."""

    def __init__(self, jobs: Jobs, job: Job) -> None:
        super().__init__(_events(jobs, job), media_type=EVENTS, headers={"Cache-Control": "no-store"})
        self._following = jobs.following(job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._following:  # not in the iterator: where a client stops to read and leaves, nobody closes that
            await super().__call__(scope, receive, send)


async def _events(jobs: Jobs, job: Job) -> AsyncIterator[str]:
    """The changes of a job, named by its state."""
    previewed = b""
    while True:
        changed, over = job.changed, job.over
        facts = jobs.snapshot(job).model_dump()
        if job.preview and job.preview is not previewed:
            facts["preview"], previewed = _data_url(job.preview), job.preview
        job.fetched = job.fetched or job.state == "failed"
        yield f"event: {job.state}\ndata: {json.dumps(facts)}\n\n"
        if over:
            return
        while not changed.is_set():
            with anyio.move_on_after(_HEARTBEAT) as silence:
                await changed.wait()
            if silence.cancelled_caught:
                yield ": still here\n\n"


class _Thumbnails:
    """The thumbnails of the styles; they are painted one after another while nothing else is."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._pictures: dict[str, bytes] = {}
        """By the fingerprint of the style."""
        self._tries: collections.Counter[str] = collections.Counter()
        self._task: asyncio.Task[None] | None = None

    async def cards(self) -> list[StyleCard]:
        """A card for every style that is there now; what has no thumbnail yet is painted afterwards."""
        styles = (await self._painter.ask("styles")).facts["styles"]
        self._pictures = {style["fingerprint"]: self._pictures.get(style["fingerprint"], b"") for style in styles}
        missing = {
            style["fingerprint"]: style["name"]
            for style in styles
            if not self._pictures[style["fingerprint"]] and self._tries[style["fingerprint"]] < ATTEMPTS
        }
        if missing and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._paint(missing))
        return [
            StyleCard(
                name=style["name"],
                guidance=style["guidance"],
                defaults=style["defaults"],
                thumbnail=_data_url(picture) if (picture := self._pictures[style["fingerprint"]]) else None,
            )
            for style in styles
        ]

    def close(self) -> None:
        """Paint no more of them."""
        if self._task:
            self._task.cancel()

    async def _paint(self, styles: dict[str, str]) -> None:
        for fingerprint, name in styles.items():
            self._tries[fingerprint] += 1
            with contextlib.suppress(LsastError):
                self._pictures[fingerprint] = (await self._painter.ask("thumbnail", {"style": name})).blob


def _data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _accepted(request: Request, offers: dict[str, str]) -> str:
    """The media type of `offers` that the header Accept prefers; the first one if it does not care.

    Raises:
        HTTPException: 406, none of them.
    """
    ranges: dict[str, tuple[float, int]] = {}
    for place, part in enumerate((request.headers.get("accept") or "*/*").lower().split(",")):
        name, *parameters = part.split(";")
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                with contextlib.suppress(ValueError):
                    quality = float(value)
        ranges.setdefault(name.strip(), (quality if quality > 0 else 0.0, -place))

    def welcome(offer: str) -> tuple[float, int]:
        """The quality of the most specific range that the offer is in (RFC 9110, section 12.5.1), and its place."""
        names = (offer, offer.partition("/")[0] + "/*", "*/*")
        return next((ranges[name] for name in names if name in ranges), (0.0, 0))

    best = max(offers, key=welcome)
    if not welcome(best)[0]:
        raise HTTPException(406, f"expected an Accept of {', '.join(offers)}")
    return best


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """An error of the tree in words, with its status."""
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, QueueFullError) else None
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 422)
    status = 503 if isinstance(error, WorkerDiedError) else status
    return JSONResponse({"detail": str(error)}, status, headers)


def _ending() -> HTTPException:
    return HTTPException(503, "the server is about to end", {"Retry-After": "10"})


def _page() -> tuple[str, str]:
    """The page, and a content security policy that runs its script and no other and loads nothing from elsewhere."""
    text = _PAGE.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


class _Headers:
    """Adds headers that keep browsers from guessing types, framing the page, and telling others its address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"x-frame-options", b"DENY"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _CutOff:
    """Answers a request that is cut off because the server ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or not scope["app"].state.draining:
                raise
            answer = await http_exception_handler(Request(scope), _ending())
            with contextlib.suppress(RuntimeError):  # another answer has begun
                await answer(scope, receive, send)


class _SameOrigin:
    """Refuses what the page of another site sends: without CORS headers it cannot read answers, but it can
    still ask."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            origin, host = headers.get(b"origin"), headers.get(b"host", b"")
            if origin is not None and origin.partition(b"://")[2] != host:
                refusal = JSONResponse({"detail": "found a request of another site; expected one of this page"}, 403)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
