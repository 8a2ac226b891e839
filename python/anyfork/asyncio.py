"""Workers that talk, for programs that run asyncio: see :mod:`anyfork.anyio`, whose API this is."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from . import _aio
from ._aio import Pool, Results, Stream, Worker

__all__ = ["Pool", "Results", "Stream", "Worker", "open_pool", "open_worker"]


def open_worker(method: str | None = None, **arguments: Any) -> AbstractAsyncContextManager[Worker]:
    """As :func:`anyfork.anyio.open_worker`; RuntimeError where no asyncio runs."""
    return _aio.open_worker(method, _loop="asyncio", **arguments)


def open_pool(size: int | None = None, **arguments: Any) -> AbstractAsyncContextManager[Pool]:
    """As :func:`anyfork.anyio.open_pool`; RuntimeError where no asyncio runs."""
    return _aio.open_pool(size, _loop="asyncio", **arguments)
