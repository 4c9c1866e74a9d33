"""An HTTP endpoint that paints, with FastAPI.

    pip install 'lsast[cpu]' fastapi uvicorn
    uvicorn --app-dir examples serve:app
    curl --data-binary @photo.jpg 'localhost:8000/paint?style=monet&preset=fast&seed=7' > painted.png

One process, one stylizer. Requests wait for the engines without a thread each, and one whose client has gone away
stops painting within a step. More processes (`uvicorn --workers 4`) each open their own.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response

import lsast

LOOK = 0.2
"""Seconds between two looks whether the client is still there."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the stylizer when the server starts, close it when it ends."""
    with lsast.load() as stylizer:
        app.state.stylizer = stylizer
        yield


app = FastAPI(title="lsast", lifespan=lifespan)


@app.get("/styles")
def styles(request: Request) -> list[str]:
    """Names of the styles."""
    names: list[str] = request.app.state.stylizer.styles
    return names


@app.post("/paint")
async def paint(
    request: Request,
    style: str | None = None,
    preset: str | None = None,
    strength: float | None = None,
    seed: int | None = None,
    size: int | None = None,
    keep_colour: bool | None = None,
) -> Response:
    """Paint the picture in the body; a PNG, or 422 with what is wrong."""
    picture = await request.body()
    stylizer: lsast.Stylizer = request.app.state.stylizer
    painting = asyncio.ensure_future(
        stylizer.stylize_async(
            picture, style, preset=preset, strength=strength, seed=seed, size=size, keep_colour=keep_colour
        )
    )
    try:
        while not (await asyncio.wait([painting], timeout=LOOK))[0]:
            if await request.is_disconnected():
                painting.cancel()
        result = await painting
    except (lsast.UsageError, lsast.PictureError) as error:
        raise HTTPException(422, str(error)) from error
    except asyncio.CancelledError:
        return Response(status_code=499)
    held = io.BytesIO()
    result.write(held, ".png")
    return Response(held.getvalue(), media_type="image/png")
