"""Painting from asyncio without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from .cancel import CancelToken

T = TypeVar("T")


async def run_in_executor(executor: Executor, work: Callable[[CancelToken], T]) -> T:
    """Run `work` in a thread of `executor` and wait for it without blocking the loop.

    When the waiting task is cancelled, work that is queued is dropped, and work that has begun is cancelled by its
    token and waited for, so that nothing goes on in the background.

    Raises:
        BaseException: what `work` raises.
    """
    token = CancelToken()
    future = executor.submit(work, token)
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        token.cancel()
        if not future.cancel():
            await asyncio.wait([waiting])
            waiting.exception()  # fetched, because asyncio warns of exceptions that were not
        raise
