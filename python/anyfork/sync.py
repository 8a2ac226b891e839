"""Workers that talk, without an event loop: what blocks here blocks the calling thread.

The same as :mod:`anyfork.anyio`, without ``async`` and ``await``.
"""

from __future__ import annotations

import contextlib
import os
import select
import sysconfig
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Unpack

from . import _session
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
    cpus,
    extras_of,
    pool_sizes,
)
from ._options import Options

__all__ = ["Pool", "Stream", "Worker", "open_pool", "open_worker"]

GRACE = 0.5
"""Seconds that a cancelled call, or a worker that is to end, has to do so by itself."""

_LOOK_SECONDS = 0.1  # between looks at maps that another thread may have left alone
_CUT_OFF = 1.0  # seconds that a thread has to notice that its worker was killed

# Waiting for an answer without giving up the GIL saves its way back, which takes 5 ms for
# each thread that wants it; and keeps the other threads from running. So only where an answer
# is about to come, and from another CPU.
_POLLED = 200e-6  # seconds at most
_MOST_WAITS = 64  # so many calls are not polled for, after several that were in vain


class _Blocking:
    """The way of waiting without a loop; its coroutines are never suspended."""

    loop = None
    now = staticmethod(time.monotonic)

    def __init__(self, polling: bool | None) -> None:
        if polling is None:
            polling = sysconfig.get_config_var("Py_GIL_DISABLED") != 1 and cpus() > 1
        self.polling = polling

    async def wait(self, link: Link, timeout: float | None) -> bool:
        if link.channel.closed:
            return _readable(link.fd, timeout)
        return bool(link.channel.wait(timeout, 0.0, link.fd))

    def forget(self, link: Link) -> None:
        pass

    def shield(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class _Link(Link):
    """With calls whose answer is polled for, if it is about to come."""

    _waits = 0  # calls that are not polled for, after one that was in vain
    _in_vain = 0

    def call(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float | None,
        context: Iterable[ContextVar[Any]],
        on_progress: Callable[[Any], object] | None,
    ) -> Any:
        """:meth:`run`, for a thread that may be blocked."""
        extras = extras_of(context)
        deadline = None if timeout is None else time.monotonic() + checked_timeout(timeout)
        call, message = self.begin(fn, args, extras, on_progress)
        if self._polling and (timeout is None or timeout > _POLLED):
            self._poll(call, message)
        if not call.done or call.failure is not None:
            _drive(self.perform(call, message, deadline))
        return self.outcome(call)

    @property
    def _polling(self) -> bool:
        io: Any = self._io
        if self._waits:
            self._waits -= 1
            return False
        return bool(io.polling)

    def _poll(self, call: _session.Call, message: _session.Message) -> None:
        """Send it, and take the answer if it comes at once. All else is perform()'s."""
        channel = self.channel
        try:
            call.started = True  # before it is: an interrupt may come right behind that
            if not channel.send(*message):
                call.started = False
            elif channel.wait(_POLLED, _POLLED):
                self.advance()
        except ConnectionError:
            call.started = False  # perform() meets it too
            return
        except BaseException:
            _drive(self.leave(call))
            raise
        if call.done:
            self._in_vain = 0
        else:
            self._waits = self._in_vain = min(2 * self._in_vain + 1, _MOST_WAITS)


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _drive[T](coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one that never waits for a loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("it waits for a loop")


class Stream(OpenStream):
    """A running call that sends and receives; made by :meth:`Worker.open_stream`. It is an
    iterable of what the target sends. Of one thread at a time."""

    def _wait(self) -> None:
        self._link.check_ours()
        _drive(self._io.wait(self._link, None))
        self._link.advance()
        if self._call.failure is not None:
            raise self._call.failure
        if self._link.over and not self._call.done:
            _drive(self._link.lost(self._call))

    def _say(self, kind: int, parts: Any = (), fds: Any = ()) -> None:
        message = kind, self._call.first, parts, fds
        with contextlib.suppress(ConnectionError):  # its end is told by receive()
            while not self._call.done and not self._link.channel.send(*message):
                with self._link.writable():
                    _readable(self._link.fd, None)
                    self._link.advance()

    def send(self, value: object) -> None:
        """Send an item to the target; waits while a window full of them has not been taken.
        ValueError after :meth:`send_eof`; BrokenPipeError, if the target has ended."""
        if self._sent_eof:
            raise ValueError("send() after send_eof()")
        while not self._stream.credit and not self._call.done:
            self._wait()
        if self._call.done:
            raise BrokenPipeError("the target has ended")
        kind, _first, parts, fds = self._link.session.item(value)
        self._say(kind, parts, fds)

    def send_eof(self) -> None:
        """There will be no more items from this side."""
        if not self._sent_eof:
            self._sent_eof = True
            self._say(_session.END)

    def receive(self) -> Any:
        """The target's next item; waits for it.

        Raises: EOFError: there will be none; what the target raised, once its items are taken.
        """
        while not self._stream.items:
            if self._call.done:
                self._outcome()
            if self._stream.ended or self._call.done:
                raise EOFError("the target sends no more")
            self._wait()
        item, credit = self._stream.take()
        if credit and not self._call.done:
            self._say(_session.CREDIT, _session.number(credit))
        return item

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                item = self.receive()
            except EOFError:
                return
            yield item

    def result(self) -> Any:
        """Wait for the target's end; what it returned, or raised. Its items that were not
        received are dropped."""
        while not self._call.done:
            while self._stream.items:
                _item, credit = self._stream.take()
                if credit:
                    self._say(_session.CREDIT, _session.number(credit))
            if not self._call.done:
                self._wait()
        return self._outcome()

    def _close(self) -> None:
        try:
            _drive(self._link.leave(self._call))
        finally:
            self._stream.drop()


class Worker:
    """A worker process that is called. Made by :func:`open_worker`. Safe from any thread; one
    call at a time."""

    def __init__(self, io: _Blocking, link: _Link) -> None:
        self._io = io
        self._link = link
        self._turn = threading.Lock()
        self._thread: int | None = None  # whose call it is
        self._closed = False

    @contextlib.contextmanager
    def _own_turn(self) -> Iterator[None]:
        self._link.check_ours()  # before it waits for threads that are not here
        me = threading.get_ident()
        if self._thread == me:
            raise RuntimeError(
                "this thread is in a call of this worker already, in a stream's block or beneath a "
                "signal handler: use another worker, or a pool"
            )
        with self._turn:
            self._thread = me
            try:
                if self._closed:
                    raise ValueError("this worker is closed: its block has ended")
                if self._link.over:
                    _drive(self._link.raise_death())
                yield
            finally:
                self._thread = None

    @property
    def pid(self) -> int | None:
        """Its process id; None for a thread of this process."""
        return self._link.child.pid

    def heartbeat(self) -> Verdict:
        """What the worker does at this moment, as its heartbeat shows within some beats:
        "running": it gets on, in Python; "in_c": it computes, in a C function that holds the
        GIL; "waiting": for a system call or a lock; "stopped": nothing of it runs. While a call
        runs too. ValueError, if it was opened without ``heartbeat``."""

        async def sleep(seconds: float) -> None:
            time.sleep(seconds)

        return _drive(self._link.heartbeat(sleep))

    def statistics(self) -> dict[str, Any]:
        """As :meth:`anyfork.anyio.Worker.statistics`."""
        return self._link.figures()

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout: float | None = None,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> Any:
        """Call ``fn(*args)`` in the worker; return its result.

        As :meth:`anyfork.anyio.Worker.run`. An exception in the caller meanwhile, Ctrl-C say,
        cancels the call.
        """
        with self._own_turn():
            return self._link.call(fn, args, timeout, context, on_progress)

    @contextlib.contextmanager
    def open_stream(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> Iterator[Stream]:
        """Call ``fn(stream, *args)`` in the worker, and talk with it meanwhile: as
        :meth:`anyfork.anyio.Worker.open_stream`."""
        with self._own_turn():
            call = _drive(self._link.open_stream(fn, args, extras_of(context) or {}))
            call.on_progress = on_progress
            stream = Stream(self._io, self._link, call)
            try:
                yield stream
                if not (call.done or self._link.over):
                    self._link.advance()  # what it raised may be there
                if call.done:
                    stream._outcome()
            finally:
                stream._close()

    def _close(self) -> None:
        """A call of another thread that still runs is cut off."""
        if self._link.child._foreign:
            return
        self._closed = True
        mine = self._turn.acquire(blocking=False)
        if not mine:
            self._link.kill()
            mine = self._turn.acquire(timeout=_CUT_OFF)
        try:
            _drive(self._link.close())
        finally:
            if mine:
                self._turn.release()


@contextlib.contextmanager
def open_worker(
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
    polling: bool | None = None,
    **options: Unpack[Options],
) -> Iterator[Worker]:
    """A worker for the time of this block, at the end of which it has gone.

    Args:
      polling: whether an answer that is about to come is waited for, for 200 us at most,
        without letting other threads of this interpreter run. None: where it pays: with more
        than one CPU, and a GIL.
      Others: as of :func:`anyfork.anyio.open_worker`; ``loop`` has to be given for targets that
        are coroutine functions.

    Raises: as :func:`anyfork.spawn`; what the initializer raised; TimeoutError.
    """
    io = _Blocking(polling)
    link = _Link.start(
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
    _drive(link.ready(start_timeout))
    worker = Worker(io, link)
    try:
        yield worker
    finally:
        worker._close()


# ---- pools ------------------------------------------------------------------------


class Pool(PoolState[_Link]):
    """Workers that calls are shared among. Made by :func:`open_pool`. Safe from any thread:
    the calls of several threads run at once.

    Attributes:
      size: how many workers there may be.
    """

    def __init__(self, io: _Blocking, low: int, high: int, spec: dict[str, Any]) -> None:
        super().__init__(io, low, high, spec)
        self._changed = threading.Condition()
        self._free = high
        self._starting = low  # that are not among the links yet
        self._maps: weakref.WeakSet[_Mapping] = weakref.WeakSet()

    # ---- workers -----------------------------------------------------------------------

    def _open(self) -> None:
        """The first ones, all at once."""
        self._idle = [(self._start(), self._io.now()) for _ in range(self._low)]
        for link, _since in list(self._idle):
            self._await_ready(link)

    def _start(self) -> _Link:
        """One that counts as starting already."""
        link = None
        try:
            link = _Link.start(self._io, **self._spec)
        finally:
            with self._changed:
                self._starting -= 1
                if link is not None:
                    self._links.add(link)
                    self._counts["started"] += 1
        return link

    def _idle_one(self) -> _Link | None:
        """One that has nothing to do, else one is to be started. The lock is held."""
        if self._idle:
            return self._idle.pop()[0]
        self._starting += 1
        return None

    def _await_ready(self, link: _Link) -> None:
        try:
            _drive(link.ready(self._start_timeout))
        except BaseException:
            with self._changed:
                self._links.discard(link)
            raise

    def _take(self, wait: bool = True) -> _Link | None:
        """A worker that is ready, for one call; to be given back. None: there is none now."""
        if os.getpid() != self._owner:
            raise ValueError(FORKED)
        with self._changed:
            while not self._free and not self._closed:
                if not wait:
                    return None
                # Maps that nobody takes from at this moment have workers, perhaps, whose
                # answers nobody looks at.
                maps = [m for m in self._maps if m.is_at_rest()]
                if not maps:
                    self._changed.wait(_LOOK_SECONDS if self._maps else None)
                    continue
                self._changed.release()
                try:
                    _advance_any(maps)
                finally:
                    self._changed.acquire()
            if self._closed:
                raise ValueError("this pool is closed")
            self._free -= 1
            link = self._idle_one()
        try:
            while link is not None:
                if self._is_good(link):
                    return link
                with self._changed:
                    link = self._idle_one()
            return self._start_ready()
        except BaseException:
            self._release()
            raise

    def _start_ready(self) -> _Link:
        """A new one. That somebody has killed it meanwhile is no call's failure."""
        for attempt in range(1, STARTS + 1):
            link = self._start()
            try:
                self._await_ready(link)
            except (SpawnError, WorkerDied):
                self._count("died")
                if attempt == STARTS or not link.was_killed:
                    raise
                with self._changed:
                    self._starting += 1
            else:
                return link
        raise AssertionError

    def _is_good(self, link: _Link) -> bool:
        """Whether one that had nothing to do is fit for a call."""
        if not link.session.ready:
            try:
                self._await_ready(link)
            except (SpawnError, WorkerDied):
                self._count("died")
                return False
        if link.over:  # also one that has died right after it was ready
            self._bury(link)
        return not link.over

    def _count(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def _release(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify()

    def _give(self, link: _Link) -> None:
        if os.getpid() != self._owner:
            return
        try:
            if link.over or link.killed:
                self._bury(link)
            elif self._is_worn(link):
                self._count("recycled")
                self._end(link)
            else:
                with self._changed:
                    self._idle.append((link, self._io.now()))
            with self._changed:
                missing = len(self._links) + self._starting < self._low and not self._closed
                self._starting += missing
            if missing:
                with contextlib.suppress(Exception):  # the next call is told
                    link = self._start()
                    with self._changed:
                        self._idle.append((link, self._io.now()))
            self._shrink()
        finally:
            self._release()

    def _shrink(self) -> None:
        """End those that had nothing to do for long; looked at whenever a call has ended."""
        since = self._io.now() - self._idle_time
        old: list[_Link] = []
        with self._changed:
            while (
                len(self._links) - len(old) > self._low and self._idle and self._idle[0][1] < since
            ):
                old.append(self._idle.pop(0)[0])
        for link in old:
            self._end(link)

    def _bury(self, link: _Link) -> None:
        if not link.killed:
            self._count("died")
        self._end(link)

    def _end(self, link: _Link) -> None:
        with self._changed:
            self._forget(link)
        _drive(link.close())

    def _close(self) -> None:
        """Calls of other threads that still run are cut off."""
        if os.getpid() != self._owner:
            return
        for mapping in list(self._maps):
            if mapping.is_at_rest():
                mapping.stop()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            idle = [link for link, _since in self._idle]
            busy = self._links.difference(idle)
            self._idle.clear()
        for link in busy:
            link.kill()
        for link in idle:  # so that they end together
            link.channel.close()
        for link in idle:
            self._end(link)
        with self._changed:
            while self._free < self.size and self._changed.wait(10):
                pass
        for link in list(self._links):
            link.drop()

    # ---- calls -------------------------------------------------------------------------

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout: float | None = None,
        context: Iterable[ContextVar[Any]] = (),
        on_progress: Callable[[Any], object] | None = None,
    ) -> Any:
        """Call ``fn(*args)`` in a worker of the pool: as :meth:`anyfork.anyio.Pool.run`. Waits
        for a worker that is free. ValueError after the pool's block."""
        attempts = self.size + STARTS  # all those that have nothing to do may have died
        for attempt in range(1, attempts + 1):
            link = self._take()
            assert link is not None
            try:
                return link.call(fn, args, timeout, context, on_progress)
            except WorkerDied:
                # It died while it had nothing to do: this call never began.
                if link.began or attempt == attempts:
                    raise
            finally:
                self._give(link)
        raise AssertionError

    def map(
        self,
        fn: Callable[[Any], Any],
        iterable: Iterable[Any],
        /,
        *,
        chunks: int | None = None,
        ordered: bool = True,
        return_exceptions: bool = False,
        deadline: float | None = None,
    ) -> Iterator[Any]:
        """``fn(item)`` of each item, as an iterator of the results: as
        :meth:`anyfork.anyio.Pool.map`. The thread that takes results sees to all of them;
        nothing is sent while it does something else."""
        mapping = _Mapping(self, fn, iter(iterable), Chunks(chunks), ordered)
        limit = None if deadline is None else self._io.now() + checked_timeout(deadline, "deadline")
        return mapping.results(return_exceptions, limit)

    def statistics(self) -> dict[str, Any]:
        """As :meth:`anyfork.anyio.Pool.statistics`."""
        with self._changed:
            return self._figures()

    def pids(self) -> list[int | None]:
        """The workers' process ids; None for one that is a thread of this process."""
        with self._changed:
            return [link.child.pid for link in self._links]


class _Running:
    """A chunk that a worker is at."""

    def __init__(self, link: _Link, call: _session.Call, chunk: list[tuple[int, Any]]) -> None:
        self.link = link
        self.call = call
        self.chunk = chunk
        self.began = time.monotonic()


class _Mapping:
    """What :meth:`Pool.map` is at."""

    def __init__(
        self,
        pool: Pool,
        fn: Callable[[Any], Any],
        items: Iterator[Any],
        chunks: Chunks,
        ordered: bool,
    ) -> None:
        self._pool = pool
        self._fn = fn
        self._items = items
        self._chunks = chunks
        self._ordered = ordered
        self._left: deque[list[tuple[int, Any]]] = deque()
        self._exhausted = False
        self._pulled = 0
        self._given = 0
        self._done: dict[int, _session.Outcome] = {}
        self._order: deque[int] = deque()
        self._in_vain = 0  # how many workers were dead, one after the other
        self._running: dict[int, _Running] = {}  # by the descriptor of their links
        self._epoll = select.epoll()
        self._lock = threading.RLock()  # of whoever looks after it
        pool._maps.add(self)

    def results(self, return_exceptions: bool, limit: float | None) -> Iterator[Any]:
        try:
            while True:
                with self._lock:
                    if self._pool._closed:
                        raise ValueError("this pool is closed: its block has ended")
                    outcome = self._next(limit)
                if outcome is None:
                    return
                returned, value = outcome
                if not returned and not return_exceptions:
                    raise value
                yield value
        finally:
            self.stop()

    def _next(self, limit: float | None) -> _session.Outcome | None:
        """The next outcome; None: there is no more."""
        while True:
            self._fill()
            index = self._next_index()
            if index is not None:
                self._given += 1
                return self._done.pop(index)
            if self._running:
                self._advance(limit)
            elif self._exhausted and not self._left:
                return None

    def is_at_rest(self) -> bool:
        """Whether it has workers, and nobody looks after them."""
        if not self._running or not self._lock.acquire(blocking=False):
            return False
        self._lock.release()
        return True

    def look(self) -> None:
        """Take in what its workers have answered, for whoever wants a worker."""
        if self._lock.acquire(blocking=False):
            try:
                if self._running:
                    self._take_in(0)
            finally:
                self._lock.release()

    @property
    def wait_fd(self) -> int:
        return self._epoll.fileno()

    def _next_index(self) -> int | None:
        if self._ordered:
            return self._given if self._given in self._done else None
        return self._order.popleft() if self._order else None

    def _pull(self) -> list[tuple[int, Any]] | None:
        if self._left:
            return self._left.popleft()
        # As much as may be under way while nobody takes results.
        if self._pulled - self._given > 4 * self._pool.size * self._chunks.size:
            return None
        chunk: list[tuple[int, Any]] = []
        while len(chunk) < self._chunks.size and not self._exhausted:
            try:
                chunk.append((self._pulled, next(self._items)))
            except StopIteration:
                self._exhausted = True
            else:
                self._pulled += 1
        return chunk or None

    def _fill(self) -> None:
        """Give every worker that is free something to do."""
        while len(self._running) < self._pool.size and (chunk := self._pull()) is not None:
            try:
                link = self._pool._take(wait=not self._running)
            except BaseException:
                self._left.appendleft(chunk)
                raise
            if link is None:  # other threads have them all
                self._left.appendleft(chunk)
                return
            self._begin(link, chunk)

    def _begin(self, link: _Link, chunk: list[tuple[int, Any]]) -> None:
        try:
            call, message = link.begin_many(self._fn, [(item,) for _index, item in chunk])
        except Exception as exc:
            self._pool._give(link)
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
        running = _Running(link, call, chunk)
        self._running[link.fd] = running
        self._epoll.register(link.fd, select.EPOLLIN)
        try:
            _drive(link.send(call, message))
        except ConnectionError:  # it died while it had nothing to do
            _drive(link.lost(call))
            self._ended(running)
            if self._in_vain > self._pool.size + STARTS:
                raise link.death() from None

    def _answer(self, index: int, outcome: _session.Outcome) -> None:
        self._done[index] = outcome
        if not self._ordered:
            self._order.append(index)

    def _advance(self, limit: float | None) -> None:
        left = None if limit is None else limit - self._pool._io.now()
        if left is not None and left <= 0:
            raise TimeoutError("the results were not there by the deadline")
        self._take_in(left)

    def _take_in(self, seconds: float | None) -> None:
        for fd, _events in self._epoll.poll(seconds):
            running = self._running[fd]
            link, call = running.link, running.call
            link.advance()
            if link.over and not call.done:
                _drive(link.lost(call))
            if call.done:
                self._ended(running)

    def _ended(self, running: _Running) -> None:
        link, call, chunk = running.link, running.call, running.chunk
        del self._running[link.fd]
        self._epoll.unregister(link.fd)
        left = call.unbegun if call.started else len(chunk)
        link.statistics["calls"] += len(chunk) - left
        call.on_answer = call.outcomes.append  # the link keeps the call, not this
        if left:
            self._left.append(chunk[-left:])
        elif not link.over:
            self._chunks.took(time.monotonic() - running.began, len(chunk))
        self._in_vain = 0 if call.started else self._in_vain + 1
        self._pool._give(link)

    def stop(self) -> None:
        """Cancel what still runs, and let go of all."""
        if os.getpid() != self._pool._owner:
            return
        with self._lock:
            self._pool._maps.discard(self)
            for running in list(self._running.values()):
                try:
                    _drive(running.link.leave(running.call))
                finally:
                    self._ended(running)
            self._epoll.close()


def _advance_any(maps: list[_Mapping]) -> None:
    """Wait, for a while, until one of them has been answered something; take that in."""
    poll = select.poll()
    for mapping in maps:
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            poll.register(mapping.wait_fd, select.POLLIN)
    poll.poll(_LOOK_SECONDS * 1000)
    for mapping in maps:
        mapping.look()


@contextlib.contextmanager
def open_pool(
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
    polling: bool | None = None,
    **options: Unpack[Options],
) -> Iterator[Pool]:
    """Workers for the time of this block, at the end of which they have gone.

    Arguments and errors as of :func:`anyfork.anyio.open_pool`, and ``polling`` as of
    :func:`open_worker`.
    """
    low, high = pool_sizes(size, min, max)
    io = _Blocking(polling)
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
    pool = Pool(io, low, high, spec)
    try:
        pool._open()
        yield pool
    finally:
        pool._close()
