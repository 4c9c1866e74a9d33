"""What clients send: the body of a request, bounded in bytes and in time, as a picture with its options."""

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import anyio
from fastapi import HTTPException, Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from lsast_engines.errors import UsageError

from .schemas import PICTURE_FIELDS, given_options, in_words, models
from .settings import Settings

FORM, JSON = "multipart/form-data", "application/json"
RAW = ("image/*", "application/octet-stream")
"""Media types of a body that is the picture itself."""

Upload = tuple[bytes, bytes, dict[str, Any]]
"""A picture, a mask (empty for none), and the options that were given."""


async def read_painting(request: Request, settings: Settings) -> Upload:
    """The picture and the options of a request: a form, JSON, or the picture itself with options in the query.

    Raises:
        HTTPException: 408 too slow, 413 too many bytes, 415 another media type, 422 no picture.
        UsageError: unknown or invalid options, all at once.
    """
    kind = request.headers.get("content-type", RAW[1]).partition(";")[0].strip().lower()
    with _in_time(settings):
        if kind == FORM:
            _no_query(request)
            return await _form(request, settings)
        if kind == JSON:
            _no_query(request)
            return _json(await read_body(request, settings), settings)
        if kind.startswith("image/") or kind in (RAW[1], "application/x-www-form-urlencoded"):  # the last is curl's
            options = given_options(_once(request.query_params.multi_items()), settings)
            if picture := await read_body(request, settings):
                return picture, b"", options
            raise HTTPException(422, "found no picture; expected one in the body")
    raise HTTPException(415, f"found a body of type {kind:.80}; expected {FORM}, {JSON}, or {' or '.join(RAW)}")


async def read_body(request: Request, settings: Settings) -> bytes:
    """All bytes of a body.

    Raises:
        HTTPException: 413, as soon as there are too many.
    """
    return b"".join([chunk async for chunk in _stream(request, settings)])


async def _stream(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    found, declared = 0, request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_bytes:
        raise _too_large(settings)
    async for chunk in request.stream():
        found += len(chunk)
        if found > settings.max_bytes:
            raise _too_large(settings)
        yield chunk


@contextlib.contextmanager
def _in_time(settings: Settings) -> Iterator[None]:
    """Raises status 408 when the block takes longer than `upload_seconds`, 400 when the client goes away."""
    try:
        with anyio.fail_after(settings.upload_seconds):
            yield
    except TimeoutError:
        raise HTTPException(408, f"the request took more than {settings.upload_seconds:g} s to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, "the request broke off") from None


def _too_large(settings: Settings) -> HTTPException:
    # The connection stays open: uvicorn reads on. Closed with unread bytes, it would be reset, and the answer lost.
    detail = f"found more than {settings.max_bytes} bytes, the most that this server takes: scale the picture down"
    return HTTPException(413, detail)


def _no_query(request: Request) -> None:
    if request.query_params:
        raise UsageError("found options in the address; expected them in the body, beside the picture")


async def _form(request: Request, settings: Settings) -> Upload:
    parser = MultiPartParser(
        request.headers,
        _stream(request, settings),
        max_files=len(PICTURE_FIELDS),
        max_fields=len(models(settings).form.model_fields),
    )
    parser.spool_max_size = settings.max_bytes + 1  # in memory: the file system may be read-only
    try:
        form: FormData = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(422, f"the form cannot be read ({error.message}); expected a whole one") from None
    try:
        texts, pictures = {}, dict.fromkeys(PICTURE_FIELDS, b"")
        for name, value in _once(form.multi_items()).items():
            if isinstance(value, UploadFile):
                if name not in pictures:
                    raise UsageError(f"found a file named {name:.60}; expected {' or '.join(pictures)}")
                pictures[name] = await value.read()
            else:
                texts[name] = value
        for name in PICTURE_FIELDS:
            if name in texts and texts.pop(name):
                raise UsageError(f"found {name} as a text; expected a file")
        given = {name: text for name, text in texts.items() if text}  # a form sends empty fields
        options = given_options(given, settings)
    finally:
        await form.close()
    if not pictures["picture"]:
        raise UsageError("found no picture; expected a file named picture")
    return pictures["picture"], pictures["mask"], options


def _json(body: bytes, settings: Settings) -> Upload:
    try:
        given = models(settings).json.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise UsageError(in_words(error, settings)) from None
    json.loads(body, object_pairs_hook=_once)  # pydantic takes the last of two
    picture, mask = given.picture, given.mask or b""  # type: ignore[attr-defined]
    if not picture:
        raise UsageError("picture: found an empty text; expected a picture in base64")
    return picture, mask, given.model_dump(include=set(models(settings).rules), exclude_none=True)


def _once(items: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = sorted({name[:60] for name in names if names.count(name) > 1})
        raise UsageError(f"found {', '.join(twice)} more than once; expected each option once")
    return found
