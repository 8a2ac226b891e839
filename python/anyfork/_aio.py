"""Workers for event loops: one API for trio, asyncio and anyio.

Cancellation, checkpoints and names follow trio's rules on every loop. What waits for workers
is the loop's own; scopes, task groups and events are anyio's.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, Unpack

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import _request, _session, _template
from ._errors import SpawnError, WorkerDied
from ._heartbeat import Verdict
from ._link import (
    FORKED,
    STARTS,
    Chunks,
    Link,
    OpenStream,
    PoolState,
    checked_timeout,
    extras_of,
    pool_sizes,
)
from ._options import Options

if TYPE_CHECKING:
    import asyncio

GRACE = 0.5
"""Seconds that a cancelled call, or a worker that is to end, has to do so by itself."""

_AHEAD = 32  # results that are given without a turn of the loop
_CUT_OFF = 1.0  # seconds that a task has to notice that its worker was killed

_OTHER_LOOP = (
    "these workers are of another event loop: open others in this one, or use anyfork.sync, whose "
    "workers any thread may call"
)


class _Loop:
    """What every loop's way of waiting has."""

    _current: Callable[[], object]  # the running loop, as this kind names it
    _home: object  # that which these workers were opened in

    def check(self) -> None:
        """RuntimeError in another loop than that."""
        if self._current() is not self._home:
            raise RuntimeError(_OTHER_LOOP)

    def forget(self, link: Link) -> None:
        pass

    def shield(self) -> contextlib.AbstractContextManager[object]:
        return anyio.CancelScope(shield=True)


class _Trio(_Loop):
    """trio's way of waiting."""

    loop = "trio"

    def __init__(self) -> None:
        import trio

        self.now = trio.current_time
        self._current = trio.lowlevel.current_trio_token
        self._home = self._current()
        self._wait_readable = trio.lowlevel.wait_readable
        self._move_on_after = trio.move_on_after

    async def wait(self, link: Link, timeout: float | None) -> bool:
        if timeout is None:
            await self._wait_readable(link.fd)
            return True
        with self._move_on_after(timeout):
            await self._wait_readable(link.fd)
            return True
        return False


class _Asyncio(_Loop):
    """asyncio's. What it watches stays registered between waits: that is half of a wait."""

    loop = "asyncio"

    def __init__(self) -> None:
        import asyncio

        self._current = asyncio.get_running_loop
        self._home = self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._watches: dict[int, _Watch] = {}

    async def wait(self, link: Link, timeout: float | None) -> bool:
        watch = self._watches.get(link.fd)
        if watch is None:
            watch = self._watches[link.fd] = _Watch(self._loop, link.fd)
        came = watch.begin()
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, _resolve, came, False)
        try:
            return await came
        finally:
            watch.came = None
            if timer is not None:
                timer.cancel()

    def forget(self, link: Link) -> None:
        watch = self._watches.pop(link.fd, None)
        if watch is not None:
            watch.end()


class _Watch:
    """A descriptor that an asyncio loop watches, for one task at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self.came: asyncio.Future[bool] | None = None
        self._loop = loop
        self._fd = fd
        self._added = False
        self._in_vain = 0

    def begin(self) -> asyncio.Future[bool]:
        self.came = came = self._loop.create_future()
        self._in_vain = 0
        if not self._added:
            self._added = True
            self._loop.add_reader(self._fd, self._readable)
        return came

    def _readable(self) -> None:
        if self.came is not None:
            _resolve(self.came, True)
        else:
            # Once more than it was waited for is usual: it was looked at before it was read.
            self._in_vain += 1
            if self._in_vain > 1:
                self.end()

    def end(self) -> None:
        if self._added:
            self._added = False
            self._loop.remove_reader(self._fd)


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


def running_loop() -> str | None:
    """ "trio" or "asyncio": whose code this is."""
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return "trio"
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        return "asyncio"
    return None


def check_loop(wanted: str | None) -> str:
    """Which loop runs. RuntimeError, if it is another one than that."""
    loop = running_loop()
    if loop is None or wanted not in (None, loop):
        where = "outside of an event loop" if loop is None else f"in a program that runs {loop}"
        other = "anyfork.sync" if loop is None else f"anyfork.{loop}"
        raise RuntimeError(f"anyfork.{wanted or 'anyio'} was called {where}: use {other} there")
    return loop


def _io(wanted: str | None) -> _Trio | _Asyncio:
    return _Trio() if check_loop(wanted) == "trio" else _Asyncio()


class _Turns:
    """So many at once; who comes first is served first."""

    def __init__(self, free: int) -> None:
        self._all = self._free = free
        self._waiting: deque[anyio.Event] = deque()

    async def acquire(self) -> None:
        """Not always a checkpoint: what follows is one."""
        if self._free:
            self._free -= 1
            return
        event = anyio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():  # it had its turn, and does not take it
                self.release()
            else:
                self._waiting.remove(event)
            raise

    def release(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1

    def all_free(self) -> bool:
        return self._free == self._all

    async def acquire_all(self, seconds: float) -> None:
        """Wait until nobody has a turn, for so long at most; and nobody gets one any more."""
        with anyio.move_on_after(seconds, shield=True):
            for _ in range(self._all):
                await self.acquire()


async def _warm(method: str | None, options: Any) -> None:
    """Make the template in a thread, if there is none: it takes as long as its preloads."""
    if method in (None, _request.DEFAULT):
        _request.check_options(_request.DEFAULT, options)  # before anything is made
        template = options.get("template") or _template.default()
        if isinstance(template, _template.Template) and not template.is_made():
            await _in_thread(template.warm)
    await checkpoint()


async def _in_thread(function: Callable[[], object]) -> None:
    """Call it in a thread. Not one of the loop's, which a program that is interrupted while it
    ends would wait for, and for ever."""
    r, w = os.pipe()
    failure: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as exc:
            failure.append(exc)
        finally:
            os.close(w)

    try:
        threading.Thread(target=call, daemon=_thread.daemon_threads_allowed()).start()
        await anyio.wait_readable(r)
    finally:
        os.close(r)
    if failure:
        raise failure[0]


class Stream(OpenStream):
    """A running call that sends and receives; made by :meth:`Worker.open_stream`. It is an
    async iterator of what the target sends.

    What the target raises is raised by :meth:`receive`, once its items are taken, by
    :meth:`result`, or else at the end of the block. One task may send while another receives.
    """

    def __init__(self, io: Any, link: Link, call: _session.Call) -> None:
        super().__init__(io, link, call)
        self._reading = False
        self._news = anyio.Event()

    async def _wait(self) -> None:
        """Until something has come, for whichever task it is."""
        self._link.check_ours()
        if self._reading:
            await self._news.wait()
            return
        self._reading = True
        try:
            await self._io.wait(self._link, None)
            self._link.advance()
            if self._call.failure is not None:
                raise self._call.failure
            if self._link.over and not self._call.done:
                await self._link.lost(self._call)
        finally:
            self._reading = False
            news, self._news = self._news, anyio.Event()
            news.set()

    async def _say(self, kind: int, parts: Any = (), fds: Any = ()) -> None:
        message = kind, self._call.first, parts, fds
        with contextlib.suppress(ConnectionError):  # its end is told by receive()
            while not self._call.done and not self._link.channel.send(*message):
                with self._link.writable():
                    await self._wait()

    async def send(self, value: object) -> None:
        """Send an item to the target; waits while a window full of them has not been taken.

        Raises: TypeError, if it cannot be pickled; anyio.ClosedResourceError after
        :meth:`send_eof`; anyio.BrokenResourceError, if the target has ended.
        """
        await checkpoint()
        if self._sent_eof:
            raise anyio.ClosedResourceError
        while not self._stream.credit and not self._call.done:
            await self._wait()
        if self._call.done:
            raise anyio.BrokenResourceError
        kind, _first, parts, fds = self._link.session.item(value)
        await self._say(kind, parts, fds)

    async def send_eof(self) -> None:
        """There will be no more items from this side. The second time nothing happens."""
        await checkpoint()
        if not self._sent_eof:
            self._sent_eof = True
            await self._say(_session.END)

    async def receive(self) -> Any:
        """The target's next item; waits for it.

        Raises: anyio.EndOfStream: there will be none; what the target raised, once its items
        are taken, WorkerDied and CallCancelled among that.
        """
        await checkpoint()
        while not self._stream.items:
            if self._call.done and not self._told:
                self._outcome()
            if self._stream.ended or self._call.done:
                raise anyio.EndOfStream
            await self._wait()
        item, credit = self._stream.take()
        if credit and not self._call.done:
            await self._say(_session.CREDIT, _session.number(credit))
        return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def result(self) -> Any:
        """Wait for the target's end; what it returned, or raised. Its items that were not
        received are dropped."""
        await checkpoint()
        while not self._call.done:
            while self._stream.items:
                _item, credit = self._stream.take()
                if credit:
                    await self._say(_session.CREDIT, _session.number(credit))
            if not self._call.done:
                await self._wait()
        return self._outcome()

    async def _close(self) -> None:
        """The block has ended: so does the call."""
        try:
            if not self._call.done:
                await self._link.leave(self._call)
        finally:
            self._stream.drop()


class Worker:
    """A worker process that is called. Made by ``open_worker()``.

    One call at a time: who calls meanwhile waits for its turn. For the tasks of its event loop.
    """

    def __init__(self, io: Any, link: Link) -> None:
        self._io = io
        self._link = link
        self._turns = _Turns(1)
        self._streaming: int | None = None  # the task whose stream is open
        self._closed = False

    async def _acquire(self) -> None:
        self._link.check_ours()
        self._io.check()
        if self._closed:
            raise anyio.ClosedResourceError
        if self._streaming is not None and self._streaming == anyio.get_current_task().id:
            raise RuntimeError(
                "this task has a stream of this worker open, which does one thing at a time: use "
                "another worker, or a pool"
            )
        await self._turns.acquire()

    @property
    def pid(self) -> int | None:
        """Its process id; None for a thread of this process."""
        return self._link.child.pid

    async def heartbeat(self) -> Verdict:
        """What the worker does at this moment, as its heartbeat shows within some beats:
        "running": it gets on, in Python; "in_c": it computes, in a C function that holds the
        GIL; "waiting": for a system call or a lock; "stopped": nothing of it runs. While a call
        runs too. ValueError, if it was opened without ``heartbeat``."""
        return await self._link.heartbeat(anyio.sleep)

    def statistics(self) -> dict[str, Any]:
        """Counts so far. "calls", and how many of them "failed"; "cancelled"; messages "sent"
        and "received"; "bytes_sent", "bytes_received", and how many of them by shared memory,
        "shared_sent", "shared_received"; "segments" of it now, and "segment_bytes"."""
        return self._link.figures()

    async def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout: float | None = None,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> Any:
        """Call ``fn(*args)`` in the worker; return its result.

        Args:
          fn: a function, or a coroutine function, which runs in a loop of its own there. Pickled,
            by reference where it is in a module, else by value.
          args: its arguments. Buffers that they give out of band (PEP 574) arrive as read-only
            views; so do those of the result.
          timeout: seconds that the call may take; it is cancelled then.
          context: context variables whose values it is to have.
          on_progress: called, here, with what :func:`anyfork.report_progress` is called with
            there.

        Raises: what it raises, with the worker's traceback as a note; TimeoutError; WorkerDied,
        with which the worker is of no use any more; CallCancelled, if it was cancelled there;
        TypeError, if something cannot be pickled.

        Cancelled, the worker is asked to leave the call (:class:`anyfork.Cancelled` is raised
        where it is), and killed if it does not within ``grace``.
        """
        await self._acquire()
        try:
            await self._check()
            return await self._link.run(fn, args, timeout, extras_of(context), on_progress)
        finally:
            self._turns.release()

    @contextlib.asynccontextmanager
    async def open_stream(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> AsyncIterator[Stream]:
        """Call ``fn(stream, *args)`` in the worker, and talk with it meanwhile.

        There, ``stream`` has ``send()``, ``receive()``, ``send_eof()`` and iteration; awaited
        ones, if ``fn`` is a coroutine function. At the end of the block a call that has not
        ended is cancelled: await :meth:`Stream.result` to have it end by itself.

        Args and errors: as of :meth:`run`; what the target raises is raised by the stream, or at
        the end of the block.
        """
        await self._acquire()
        try:
            await self._check()
            call = await self._link.open_stream(fn, args, extras_of(context) or {})
            call.on_progress = on_progress
            stream = Stream(self._io, self._link, call)
            self._streaming = anyio.get_current_task().id
            try:
                yield stream
                if not (call.done or self._link.over):
                    self._link.advance()  # what it raised may be there
                if call.done and not stream._told:
                    stream._outcome()
            finally:
                self._streaming = None
                await stream._close()
        finally:
            self._turns.release()

    async def _check(self) -> None:
        self._link.check_ours()
        if self._closed:
            raise anyio.ClosedResourceError
        if self._link.over:
            await self._link.raise_death()

    async def _close(self) -> None:
        """A call of another task that still runs is cut off."""
        if self._link.child._foreign:
            return
        self._closed = True
        if not self._turns.all_free():
            self._link.kill()
            await self._turns.acquire_all(_CUT_OFF)
        await self._link.close()


@contextlib.asynccontextmanager
async def open_worker(
    method: str | None = None,
    *,
    loop: str | None = None,
    grace: float = GRACE,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    log_level: int | None = None,
    stderr_tail: bool = True,
    heartbeat: float | None = None,
    start_timeout: float | None = 60,
    _loop: str | None = None,
    **options: Unpack[Options],
) -> AsyncIterator[Worker]:
    """A worker for the time of this block, at the end of which it has gone.

    Args:
      method: a name of :func:`anyfork.methods`; ``zygote`` unless it is given.
      loop: "trio" or "asyncio", for targets that are coroutine functions; else this one.
      grace: seconds that a cancelled call, and at the end the worker, has to end by itself.
      initializer, initargs: called first in the worker.
      log_level: have log records of that level and above logged here.
      stderr_tail: keep the end of what it writes to its standard error, for WorkerDied; it
        goes by a pipe then, to this program's. Not where ``stderr`` is given.
      heartbeat: seconds between beats, of which :meth:`Worker.heartbeat` tells what it does.
      start_timeout: seconds until it must be ready; the initializer's time is part of it.
      options: the state of the worker: see :class:`anyfork.Options`.

    Raises: as :func:`anyfork.spawn`; what the initializer raised; TimeoutError.
    """
    io = _io(_loop)
    await _warm(method, options)
    link = Link.start(
        io,
        method=method,
        grace=grace,
        loop=loop,
        initializer=None if initializer is None else (initializer, initargs),
        log_level=log_level,
        stderr_tail=stderr_tail,
        heartbeat=heartbeat,
        options=options,
    )
    await link.ready(start_timeout)
    worker = Worker(io, link)
    try:
        yield worker
    finally:
        await worker._close()


# ---- pools ------------------------------------------------------------------------


class Pool(PoolState[Link]):
    """Workers that calls are shared among. Made by ``open_pool()``. For the tasks of its event
    loop; as many calls run at once as there are workers, others wait for their turn.

    Attributes:
      size: how many workers there may be.
    """

    def __init__(self, io: Any, group: Any, low: int, high: int, spec: dict[str, Any]) -> None:
        super().__init__(io, low, high, spec)
        self._group = group
        self._cancelled = anyio.get_cancelled_exc_class()
        self._turns = _Turns(high)

    # ---- workers -----------------------------------------------------------------------

    def _start(self) -> Link:
        """A worker that will be ready before long."""
        link = Link.start(self._io, **self._spec)
        self._links.add(link)
        self._counts["started"] += 1
        return link

    async def _await_ready(self, link: Link) -> None:
        try:
            await link.ready(self._start_timeout)
        except BaseException:
            self._links.discard(link)
            raise

    async def _open(self) -> None:
        """The first ones, all at once."""
        await _warm(self._spec["method"], self._spec["options"])
        self._idle = [(self._start(), self._io.now()) for _ in range(self._low)]
        for link, _since in list(self._idle):
            await self._await_ready(link)
        if self.size > self._low:
            self._group.start_soon(self._shrink)

    async def _shrink(self) -> None:
        """End those that had nothing to do for long."""
        while True:
            await anyio.sleep(self._idle_time / 2)
            since = self._io.now() - self._idle_time
            while len(self._links) > self._low and self._idle and self._idle[0][1] < since:
                await self._end(self._idle.pop(0)[0])

    async def _take(self) -> Link:
        """A worker that is ready, for one call; to be given back."""
        if os.getpid() != self._owner:
            raise ValueError(FORKED)
        self._io.check()
        if self._closed:
            raise anyio.ClosedResourceError
        await self._turns.acquire()
        try:
            if self._closed:
                raise anyio.ClosedResourceError
            while self._idle:
                link, _since = self._idle.pop()
                if await self._is_good(link):
                    return link
            return await self._start_ready()
        except BaseException:
            self._turns.release()
            raise

    async def _start_ready(self) -> Link:
        """A new one. That somebody has killed it meanwhile is no call's failure."""
        for attempt in range(1, STARTS + 1):
            link = self._start()
            try:
                await self._await_ready(link)
            except (SpawnError, WorkerDied):
                self._counts["died"] += 1
                if attempt == STARTS or not link.was_killed:
                    raise
            else:
                return link
        raise AssertionError

    async def _is_good(self, link: Link) -> bool:
        """Whether one that had nothing to do is fit for a call."""
        if not link.session.ready:
            try:
                await self._await_ready(link)
            except (SpawnError, WorkerDied):
                self._counts["died"] += 1
                return False
        if link.over:  # also one that has died right after it was ready
            await self._bury(link)
        return not link.over

    async def _give(self, link: Link) -> None:
        try:
            if link.over or link.killed:
                await self._bury(link)
            elif self._is_worn(link):
                self._counts["recycled"] += 1
                await self._end(link)
            else:
                self._idle.append((link, self._io.now()))
            if len(self._links) < self._low and not self._closed:
                with contextlib.suppress(Exception):  # the next call is told
                    self._idle.append((self._start(), self._io.now()))
        finally:
            self._turns.release()

    async def _bury(self, link: Link) -> None:
        if not link.killed:
            self._counts["died"] += 1
        await self._end(link)

    async def _end(self, link: Link) -> None:
        self._forget(link)
        await link.close()

    async def _close(self) -> None:
        """Calls of other tasks that still run are cut off."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        idle = [link for link, _since in self._idle]
        self._idle.clear()
        for link in self._links.difference(idle):
            link.kill()
        for link in idle:  # so that they end together
            link.channel.close()
        try:
            for link in idle:
                await self._end(link)
            # Those that are cut off see to their workers themselves.
            await self._turns.acquire_all(_CUT_OFF)
        finally:
            for link in self._links:
                link.drop()

    # ---- calls -------------------------------------------------------------------------

    async def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout: float | None = None,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> Any:
        """Call ``fn(*args)`` in a worker of the pool: see :meth:`Worker.run`.

        A worker that dies fails its own call only, by WorkerDied, and another takes its place.
        ``timeout`` counts from when a worker is free.

        Raises: as :meth:`Worker.run`; what starting a worker raises, where one has to be
        started; anyio.ClosedResourceError after the pool's block.
        """
        extras = extras_of(context)
        attempts = self.size + STARTS  # all those that have nothing to do may have died
        for attempt in range(1, attempts + 1):
            link = await self._take()
            try:
                return await link.run(fn, args, timeout, extras, on_progress)
            except WorkerDied:
                # It died while it had nothing to do: this call never began.
                if link.began or attempt == attempts:
                    raise
            finally:
                await self._give(link)
        raise AssertionError

    def map(
        self,
        fn: Callable[[Any], Any],
        iterable: Iterable[Any] | AsyncIterable[Any],
        /,
        *,
        chunks: int | None = None,
        ordered: bool = True,
        return_exceptions: bool = False,
        deadline: float | None = None,
    ) -> Results:
        """``fn(item)`` of each item, as an async iterator of the results.

        Args:
          iterable: of any length; taken from as results are.
          chunks: how many calls to send to a worker together; else what takes about a
            millisecond. A worker that dies fails only the call it was at; those behind it
            go to another.
          ordered: results come in the order of the items; else as they are done.
          return_exceptions: what a call raises is its result; else it is raised, and the
            iteration is over.
          deadline: seconds, after which TimeoutError is raised and what runs is cancelled.

        Nothing is sent before the first result is asked for.
        """
        limit = None if deadline is None else self._io.now() + checked_timeout(deadline, "deadline")
        mapping = _Mapping(self, fn, iterable, Chunks(chunks), ordered)
        return Results(mapping, return_exceptions, limit)

    def statistics(self) -> dict[str, Any]:
        """Counts: "workers" now, and how many of them are "idle"; so far "started", "died" and
        "recycled" ones; "calls", how many of them "failed", and "cancelled"."""
        return self._figures()

    def pids(self) -> list[int | None]:
        """The workers' process ids; None for one that is a thread of this process."""
        return [link.child.pid for link in self._links]


class _Mapping:
    """What :meth:`Pool.map` is at. Its tasks hold it, not the user's iterator, which may go."""

    def __init__(
        self,
        pool: Pool,
        fn: Callable[[Any], Any],
        iterable: Iterable[Any] | AsyncIterable[Any],
        chunks: Chunks,
        ordered: bool,
    ) -> None:
        self.pool = pool
        self._fn = fn
        self._items: Iterator[Any] | AsyncIterator[Any]
        if isinstance(iterable, AsyncIterable):
            self._items = aiter(iterable)
        else:
            self._items = iter(iterable)
        self._chunks = chunks
        self._ordered = ordered
        self.scopes: set[anyio.CancelScope] = set()
        self._pulling = anyio.Lock()
        self.exhausted = False
        self._left: deque[list[tuple[int, Any]]] = deque()
        self.pulled = 0  # items taken from the iterable
        self.given = 0  # results that the user has
        self._in_vain = 0  # how many workers were dead, one after the other
        self.done: dict[int, _session.Outcome] = {}
        self._order: deque[int] = deque()  # as completed
        self._news = anyio.Event()
        self._waiting = 0
        self.feeding = 0
        self.failure: BaseException | None = None

    # ---- feeding -----------------------------------------------------------------------

    async def _pull(self) -> list[tuple[int, Any]] | None:
        """The next chunk; None: there is none."""
        if self._left:
            return self._left.popleft()
        async with self._pulling:
            # As much as may be under way while nobody takes results.
            while self.pulled - self.given > 4 * self.pool.size * self._chunks.size:
                await self.wait()
            chunk: list[tuple[int, Any]] = []
            while len(chunk) < self._chunks.size and not self.exhausted:
                try:
                    if isinstance(self._items, AsyncIterator):
                        item = await anext(self._items)
                    else:
                        item = next(self._items)
                except (StopIteration, StopAsyncIteration):
                    self.exhausted = True
                    break
                chunk.append((self.pulled, item))
                self.pulled += 1
                if isinstance(self._items, AsyncIterator):
                    break  # the next one may be long in coming
            return chunk or None

    async def _feed(self) -> None:
        """One of as many tasks as there are workers."""
        try:
            with self._scope_of_feeder():
                while (chunk := await self._pull()) is not None or self._left:
                    if chunk is None:
                        chunk = self._left.popleft()
                    link = await self.pool._take()
                    try:
                        await self._perform(link, chunk)
                    finally:
                        await self.pool._give(link)
        except self.pool._cancelled:
            raise
        except BaseException as exc:  # the iterable's, or no worker can be started
            self.failure = self.failure or exc
        finally:
            self.feeding -= 1
            self.tell()

    @contextlib.contextmanager
    def _scope_of_feeder(self) -> Iterator[None]:
        scope = anyio.CancelScope()
        self.scopes.add(scope)
        try:
            with scope:
                yield
        finally:
            self.scopes.discard(scope)

    async def _perform(self, link: Link, chunk: list[tuple[int, Any]]) -> None:
        try:
            call, message = link.begin_many(self._fn, [(item,) for _index, item in chunk])
        except Exception as exc:
            if len(chunk) == 1:
                self._answer(chunk[0][0], (False, exc))
            else:  # one by one: it is only one of them, perhaps
                self._left.extend([one] for one in chunk)
            return
        indices = iter([index for index, _item in chunk])

        def answer(outcome: _session.Outcome) -> None:
            if call.started:
                self._answer(next(indices), outcome)

        call.on_answer = answer
        began = self.pool._io.now()
        left = 0
        try:
            await link.perform(call, message)
        finally:
            left = call.unbegun if call.started else len(chunk)
            link.statistics["calls"] += len(chunk) - left
            call.on_answer = call.outcomes.append  # the link keeps the call, not this
        self._in_vain = 0 if call.started else self._in_vain + 1
        if self._in_vain > self.pool.size + STARTS:
            raise link.death()
        if left:
            self._left.append(chunk[-left:])
        elif not link.over:
            self._chunks.took(self.pool._io.now() - began, len(chunk))

    def _answer(self, index: int, outcome: _session.Outcome) -> None:
        self.done[index] = outcome
        if not self._ordered:
            self._order.append(index)
        self.tell()

    def tell(self) -> None:
        if self._waiting:
            news, self._news = self._news, anyio.Event()
            news.set()

    async def wait(self) -> None:
        self._waiting += 1
        try:
            await self._news.wait()
        finally:
            self._waiting -= 1

    # ---- taking ------------------------------------------------------------------------

    def begin(self) -> None:
        self.feeding = self.pool.size
        for _ in range(self.pool.size):
            self.pool._group.start_soon(self._feed)

    def next_index(self) -> int | None:
        if self._ordered:
            return self.given if self.given in self.done else None
        return self._order.popleft() if self._order else None

    def cancel(self) -> None:
        for scope in self.scopes:
            scope.cancel()


class Results:
    """The async iterator of :meth:`Pool.map`.

    What still runs is cancelled by :meth:`aclose`, by an exception in the middle of it (a
    cancellation, too), when it is dropped, and at the end of the pool's block.
    """

    def __init__(self, mapping: _Mapping, return_exceptions: bool, deadline: float | None) -> None:
        self._mapping = mapping
        self._return_exceptions = return_exceptions
        self._deadline = deadline
        self._begun = self._finished = False
        self._ahead = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._finished:
            raise StopAsyncIteration
        mapping = self._mapping
        if mapping.pool._closed:  # what was under way then has been cancelled
            self._finished = True
            raise anyio.ClosedResourceError
        if not self._begun:
            mapping.begin()
            self._begun = True
        try:
            index = await self._next(mapping)
        except BaseException:
            self._finished = True
            mapping.cancel()
            raise
        mapping.given += 1
        mapping.tell()
        returned, value = mapping.done.pop(index)
        if returned or self._return_exceptions:
            return value
        await self.aclose()
        raise value

    async def _next(self, mapping: _Mapping) -> int:
        # Every item could be cancelled; others get their turn with every so many, and whenever
        # there is none yet. A whole checkpoint takes longer than a small call.
        self._ahead += 1
        await (checkpoint_if_cancelled() if self._ahead % _AHEAD else checkpoint())
        while (index := mapping.next_index()) is None:
            if mapping.failure is not None:
                await self.aclose()
                raise mapping.failure
            if not mapping.feeding:
                if mapping.given == mapping.pulled and mapping.exhausted:
                    raise StopAsyncIteration
                raise anyio.ClosedResourceError  # the pool has
            await self._wait_in_time(mapping)
        return index

    async def _wait_in_time(self, mapping: _Mapping) -> None:
        if self._deadline is None:
            await mapping.wait()
            return
        left = max(0.0, self._deadline - mapping.pool._io.now())
        with anyio.move_on_after(left) as scope:
            await mapping.wait()
        if scope.cancelled_caught:
            await self.aclose()
            raise TimeoutError("the results were not there by the deadline")

    async def aclose(self) -> None:
        """Cancel what still runs; returns when it does no more."""
        self._finished = True
        self._mapping.cancel()
        with anyio.CancelScope(shield=True):
            while self._mapping.feeding:
                await self._mapping.wait()
        await checkpoint()

    def __del__(self) -> None:
        if self._begun and not self._finished:
            self._mapping.cancel()


@contextlib.asynccontextmanager
async def open_pool(
    size: int | None = None,
    *,
    min: int | None = None,
    max: int | None = None,
    method: str | None = None,
    loop: str | None = None,
    grace: float = GRACE,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    max_calls: int | None = None,
    max_rss: int | None = None,
    idle: float = 60.0,
    log_level: int | None = None,
    stderr_tail: bool = True,
    heartbeat: float | None = None,
    start_timeout: float | None = 60,
    _loop: str | None = None,
    **options: Unpack[Options],
) -> AsyncIterator[Pool]:
    """Workers for the time of this block, at the end of which they have gone.

    Args:
      size: how many; else as many as this process may use CPUs. Or
      min, max: it grows to ``max`` while calls wait, and shrinks to ``min`` when workers had
        nothing to do for ``idle`` seconds.
      max_calls: a worker is replaced after so many.
      max_rss: a worker that holds more bytes after a call is replaced.
      Others: as of ``open_worker()``.

    Raises: as ``open_worker()``.
    """
    low, high = pool_sizes(size, min, max)
    spec = {
        "method": method,
        "loop": loop,
        "grace": grace,
        "initializer": None if initializer is None else (initializer, initargs),
        "log_level": log_level,
        "stderr_tail": stderr_tail,
        "heartbeat": heartbeat,
        "options": options,
        "max_calls": max_calls,
        "max_rss": max_rss,
        "idle": idle,
        "start_timeout": start_timeout,
    }
    io = _io(_loop)
    failure: BaseException | None = None
    pool: Pool | None = None
    try:
        async with anyio.create_task_group() as group:
            pool = Pool(io, group, low, high, spec)
            try:
                await pool._open()
                yield pool
            except BaseException as exc:
                failure = exc
                if isinstance(exc, anyio.get_cancelled_exc_class()):
                    raise
            finally:
                group.cancel_scope.cancel()
    finally:
        if pool is not None:
            await pool._close()
    if failure is not None:
        # As it is: the group would wrap it.
        raise failure
