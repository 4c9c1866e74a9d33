"""Painting from asyncio without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .cancel import CancelToken
from .engine_pool import LAPSE_SECONDS, EnginePool

T = TypeVar("T")


async def run_in_thread(pool: EnginePool, work: Callable[[CancelToken], T]) -> T:
    """Run `work` in the pool's thread of async callers, and wait for it without blocking the loop.

    When the waiting task is cancelled, work that is queued is dropped, and work that has begun is cancelled by its
    token and waited for, so that nothing goes on in the background.

    Raises:
        BaseException: what `EnginePool.submit` or `work` raises.
    """
    token = CancelToken()
    try:
        while True:
            future, lapsed = pool.submit(lambda: work(token))
            waiting = asyncio.wrap_future(future)
            # Fetched in any case, because asyncio warns of exceptions that were not.
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            while not waiting.done() and not (lapsed() and future.cancel()):
                await asyncio.wait([waiting], timeout=LAPSE_SECONDS)
            if not future.cancelled():
                return waiting.result()
    except asyncio.CancelledError:
        token.cancel()
        if not future.cancel():
            await asyncio.wait([waiting])
        raise
