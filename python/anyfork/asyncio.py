"""Workers that talk, for programs that run asyncio: see :mod:`anyfork.anyio`, whose API this is."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from . import _aio, _aio_supervise
from ._aio import Pool, Results, Stream, Worker
from ._aio_supervise import Supervisor
from ._supervise import SupervisorSpec

__all__ = [
    "Pool",
    "Results",
    "Stream",
    "Supervisor",
    "Worker",
    "open_pool",
    "open_supervisor",
    "open_worker",
]


def open_worker(method: str | None = None, **arguments: Any) -> AbstractAsyncContextManager[Worker]:
    """As :func:`anyfork.anyio.open_worker`; RuntimeError where no asyncio runs."""
    return _aio.open_worker(method, _loop="asyncio", **arguments)


def open_pool(size: int | None = None, **arguments: Any) -> AbstractAsyncContextManager[Pool]:
    """As :func:`anyfork.anyio.open_pool`; RuntimeError where no asyncio runs."""
    return _aio.open_pool(size, _loop="asyncio", **arguments)


def open_supervisor(spec: SupervisorSpec) -> AbstractAsyncContextManager[Supervisor]:
    """As :func:`anyfork.anyio.open_supervisor`; RuntimeError where no asyncio runs."""
    _aio.check_loop("asyncio")
    return _aio_supervise.open_supervisor(spec)
