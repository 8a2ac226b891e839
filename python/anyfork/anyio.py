"""Workers that talk, for programs that run anyio, trio or asyncio."""

from __future__ import annotations

from ._aio import Pool, Results, Stream, Worker, open_pool, open_worker

__all__ = ["Pool", "Results", "Stream", "Worker", "open_pool", "open_worker"]

for _public in (open_worker, open_pool, Worker, Pool, Stream, Results):
    _public.__module__ = __name__
