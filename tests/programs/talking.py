"""The worker API on every loop, and without one, under one form: checks are written once.

Without a loop its methods are called by coroutines that are never suspended.
"""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import anyio

import anyfork.anyio
import anyfork.asyncio
import anyfork.sync
import anyfork.trio


class Api:
    """One way to wait: ``run(check, *args)`` runs a check; the rest is the API."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: Any = getattr(anyfork, name)
        self.backend = {"trio": "trio", "asyncio": "asyncio", "anyio": "trio"}.get(name)
        self.end_of_stream: type[Exception] = anyio.EndOfStream
        self.closed: type[Exception] = anyio.ClosedResourceError
        self.broken: type[Exception] = anyio.BrokenResourceError

    def run(self, check: Callable[..., Coroutine[Any, Any, Any]], *args: object) -> Any:
        return anyio.run(check, *args, backend=self.backend or "asyncio")

    def open_worker(self, method: str | None = None, **options: Any) -> Any:
        return self.module.open_worker(method, **options)

    def open_pool(self, size: int | None = None, **options: Any) -> Any:
        return self.module.open_pool(size, **options)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def within(self, seconds: float, call: Callable[[], Awaitable[Any]]) -> bool:
        """Cancel the call after so long; whether that ended it."""
        with anyio.move_on_after(seconds) as scope:
            await call()
        return scope.cancelled_caught


class _Facade:
    """A blocking object with methods that are awaited."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name in ("statistics", "pids") or not callable(value):
            return value
        if name == "open_stream":
            return lambda *args, **named: _block(value(*args, **named))
        if name == "map":
            return lambda *args, **named: _iterate(value(*args, **named))

        async def method(*args: Any, **named: Any) -> Any:
            return value(*args, **named)

        return method

    def __aiter__(self) -> AsyncIterator[Any]:
        return _iterate(iter(self._inner))


async def _iterate(iterator: Any) -> AsyncIterator[Any]:
    for item in iterator:
        yield item


@contextlib.asynccontextmanager
async def _block(manager: Any) -> AsyncIterator[_Facade]:
    with manager as inner:
        yield _Facade(inner)


class Sync(Api):
    def __init__(self) -> None:
        super().__init__("sync")
        self.end_of_stream, self.closed, self.broken = EOFError, ValueError, BrokenPipeError

    def run(self, check: Callable[..., Coroutine[Any, Any, Any]], *args: object) -> Any:
        try:
            check(*args).send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it was suspended")

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def open_worker(self, method: str | None = None, **options: Any) -> Any:
        return _block(self.module.open_worker(method, **options))

    def open_pool(self, size: int | None = None, **options: Any) -> Any:
        return _block(self.module.open_pool(size, **options))


APIS = [Sync(), Api("trio"), Api("asyncio")]


@types.coroutine
def stepping(coroutine: Coroutine[Any, Any, Any], at: int, then: Callable[[], object]) -> Any:
    """Run it, and call ``then()`` when it is suspended for the so-manieth time. Returns its
    value; AssertionError if it was never suspended that often."""
    value: Any = None
    error: BaseException | None = None
    steps = 0
    while True:
        try:
            waits = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return steps, stop.value
        steps += 1
        if steps == at:
            then()
        value = error = None
        try:
            value = yield waits
        except BaseException as exc:
            error = exc
