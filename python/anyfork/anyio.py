"""Workers that talk, for programs that run anyio, trio or asyncio."""

from __future__ import annotations

from ._aio import Pool, Results, Stream, Worker, open_pool, open_worker
from ._aio_supervise import Supervisor, open_supervisor

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

for _public in (open_worker, open_pool, open_supervisor, Worker, Pool, Stream, Results, Supervisor):
    _public.__module__ = __name__
