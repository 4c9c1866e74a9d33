"""Painting from asyncio without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .cancel import CancelToken

T = TypeVar("T")


async def run_in_thread(submit: Callable[[Callable[[], T]], Future[T]], work: Callable[[CancelToken], T]) -> T:
    """Run `work` by `submit`, which gives it to a thread, and wait for it without blocking the loop.

    When the waiting task is cancelled, work that is queued is dropped, and work that has begun is cancelled by its
    token and waited for, so that nothing goes on in the background.

    Raises:
        BaseException: what `submit` or `work` raises.
    """
    token = CancelToken()
    future = submit(lambda: work(token))
    waiting = asyncio.wrap_future(future)
    # Fetched in any case, because asyncio warns of exceptions that were not.
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        token.cancel()
        if not future.cancel():
            await asyncio.wait([waiting])
        raise
