"""Painting from asyncio without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from .cancel import CancelToken

T = TypeVar("T")


async def run_in_executor(queue: Executor, work: Callable[[CancelToken], T]) -> T:
    """Run `work` in a thread of `queue` and wait for it without blocking the loop.

    If the task that waits is cancelled, work that is queued is dropped, and work that has begun is told by its token
    and waited for, so that nothing of it goes on unseen.

    Raises:
        BaseException: what `work` raises.
    """
    token = CancelToken()
    future = queue.submit(work, token)
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        token.cancel()
        if not future.cancel():
            await asyncio.wait([waiting])
            waiting.exception()  # it was told to stop: how it did is nobody's business, and asyncio would warn
        raise
