"""A worker and the channel to it: how a call goes, whoever waits.

Written once for every way of waiting. an :class:`Io` is one of them; that of :mod:`anyfork.sync`
blocks in its ``wait()``, so that its coroutines run through without ever being suspended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol, Self

from . import _anyfork, _heartbeat, _memory, _request, _session, _worker
from ._child import Child
from ._errors import CallCancelled, SpawnError, WorkerDied, worker_name
from ._options import Options
from ._session import CALL, CALL_MANY, CALL_WITH, Call, ProtocolError, Session

_TAIL = 4096  # bytes of a worker's standard error that are kept
_WINDOW = 16  # items of a stream on their way, in each direction
_ORDERLY = 5.0  # seconds that a worker which has closed its channel has to end
_PAGE = os.sysconf("SC_PAGE_SIZE")

FORKED = (
    "these workers are of the process that this one was forked from, which alone may call them: "
    "open others here"
)

STARTS = 3  # of a worker for a call, where somebody kills it before it is ready


class Io(Protocol):
    """A way of waiting."""

    @property
    def loop(self) -> str | None:
        """For targets that are coroutine functions, where nothing else is asked for."""

    @property
    def now(self) -> Callable[[], float]:
        """Seconds, of the clock that this loop goes by."""

    async def wait(self, link: Link, timeout: float | None) -> bool:
        """Until the link is readable; False: it was not, after so many seconds."""

    def forget(self, link: Link) -> None:
        """It is waited for no more, and closed."""

    def shield(self) -> contextlib.AbstractContextManager[object]:
        """What runs in it is not cancelled: it takes a bounded time."""


class Link:
    """One worker, and what its owner knows of it. Not thread-safe: one caller at a time.

    Args of :meth:`start`: see :func:`anyfork.anyio.open_worker`.
    """

    def __init__(
        self,
        child: Child,
        channel: _anyfork.Channel,
        session: Session,
        io: Io,
        grace: float,
        beats: _anyfork.Heartbeat | None = None,
    ) -> None:
        self.beats = beats
        self.child = child
        self.channel = channel
        self.session = session
        self.grace = grace
        self.statistics = {"calls": 0, "failed": 0, "cancelled": 0}
        self.over = False  # it sends nothing more
        self.killed = False  # by us
        self._io = io
        self._tail = b""
        self._stderr = -1
        self._epoll = select.epoll()
        self.fd = self._epoll.fileno()
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._watched = child.wake_fd
        self._epoll.register(self._watched, select.EPOLLIN)
        if child.stderr is not None:
            self._stderr = child.stderr.fileno()
            os.set_blocking(self._stderr, False)
            self._epoll.register(self._stderr, select.EPOLLIN)

    # ---- start and end -----------------------------------------------------------------

    @classmethod
    def start(
        cls,
        io: Io,
        *,
        method: str | None,
        grace: float,
        loop: str | None,
        initializer: tuple[Callable[..., object], tuple[object, ...]] | None,
        log_level: int | None,
        stderr_tail: bool,
        heartbeat: float | None,
        options: Options,
    ) -> Self:
        """Start the worker; :meth:`ready` waits for it."""
        checked_timeout(grace, "grace")
        name = _request.DEFAULT if method is None else method
        traits = _request.TRAITS.get(name)
        if traits is None:  # says so
            _request.spawn(_worker.main, method=method)
        assert traits is not None
        same_main = traits["target"] == "caller"
        spec: dict[str, Any] = {"loop": loop or io.loop, "log_level": log_level}
        if initializer is not None:
            spec["initializer"] = _session.dump_call(initializer, name, same_main)
            if spec["initializer"][1]:
                raise TypeError("initializer: a Descriptor can be an argument of calls only")
        if heartbeat is not None and not traits["has_process"]:
            raise ValueError(f"{name}: heartbeat: the worker is a thread of this process")
        beats = None if heartbeat is None else _anyfork.Heartbeat(heartbeat)
        _memory.look()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.closing(ours), contextlib.closing(theirs):
            if not traits["has_process"]:
                child = _request.spawn(_worker.main, theirs.fileno(), spec, method=name, **options)
                theirs.detach()  # that thread's from now on
            else:
                options = options.copy()
                options["pass_fds"] = [*options.get("pass_fds", ()), theirs.fileno()]
                if beats is not None:
                    options["pass_fds"] = [*options["pass_fds"], beats.fileno()]
                    spec["heartbeat"] = beats.fileno()
                if stderr_tail and options.get("stderr") is None:
                    options["stderr"] = subprocess.PIPE
                child = _request.spawn(_worker.main, theirs.fileno(), spec, method=name, **options)
            try:
                channel = _anyfork.Channel(ours.detach())
                return cls(child, channel, Session(name, same_main), io, grace, beats)
            except BaseException:
                child.close()
                raise

    async def ready(self, timeout: float | None) -> None:
        """Wait until it takes calls. Raises what its initializer raised; SpawnError,
        WorkerDied, TimeoutError; and it has ended then."""
        deadline = None if timeout is None else self._io.now() + timeout
        try:
            while not self.session.ready:
                await self._wait(deadline)
                self.advance()
                if self.over and not self.session.ready:
                    died = await self._death()
                    exc = self.child.exception(0)
                    if exc is not None and not isinstance(exc, WorkerDied):
                        raise exc
                    died.add_note("It had not come to take calls: its initializer ran, or before.")
                    raise died
        except BaseException:
            with self._io.shield():
                await self.end(0)
            raise

    async def _wait(self, deadline: float | None) -> None:
        if deadline is None:
            await self._io.wait(self, None)
        elif not await self._io.wait(self, max(0.0, deadline - self._io.now())):
            raise TimeoutError(
                f"{worker_name(self.child.pid)} did not answer within the timeout that was given"
            )

    async def close(self) -> None:
        """:meth:`end`, whatever comes in between."""
        try:
            with self._io.shield():
                await self.end()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Kill it and close all that is of it, without waiting for a loop."""
        self.over = True
        self.channel.close()
        self._stderr = -1
        self._io.forget(self)
        self._epoll.close()
        self.beats = None  # its descriptor goes with it
        self.child.close()

    async def end(self, grace: float | None = None) -> None:
        """Let it end: asked first, then killed, and reaped. Nothing of it is left."""
        self.channel.close()
        self.over = True
        if self.child._closed or self.child._foreign:
            return
        await self._await_end(self.grace if grace is None else grace)
        self._pump()
        self.drop()

    async def _await_end(self, grace: float) -> None:
        """Until the process has ended; killed after so many seconds."""
        deadline = self._io.now() + grace
        while self.child.is_alive():
            self._watch()
            left = deadline - self._io.now()
            if left <= 0 and not self.killed:
                self.kill()
            if left <= 0 and self.child.pid is None:
                return  # a thread of this process: it goes on, unheard
            await self._io.wait(self, None if self.killed else left)
            self._pump()

    def kill(self) -> None:
        """At once. Of a thread of this process, only its channel ends."""
        self.killed = True
        if self.child._foreign:
            return
        if self.child.pid is not None:
            self.child.kill()
        elif not self.channel.closed:
            self.channel.shutdown()

    async def raise_death(self) -> NoReturn:
        """For a call of a worker that is of no use any more."""
        raise await self._death()

    async def lost(self, call: Call) -> None:
        """It says nothing more, and this call was not answered."""
        self._over()
        call.lost(await self._death())

    async def _death(self) -> WorkerDied:
        """What a worker that says nothing more has died of; waits until it has."""
        await self._await_end(_ORDERLY)
        self._pump()
        return self.death()

    def death(self) -> WorkerDied:
        """As an exception; the worker has ended."""
        child = self.child
        died = child.exception(0) if not child.is_alive() else None
        status = child._status
        oom = not self.killed and child.returncode == -signal.SIGKILL and _memory.has_killed()
        detail = "" if isinstance(died, WorkerDied) or died is None else repr(died)
        exc = WorkerDied(child.pid, status, detail, oom, self.tail())
        if died is not None and not isinstance(died, WorkerDied):
            exc.__cause__ = died
        return exc

    # ---- what comes ----------------------------------------------------------------------

    fd: int
    """For event loops: readable when :meth:`advance` has something to do."""

    def advance(self) -> None:
        """Take in what has come, without waiting."""
        receive, session = self.channel.receive, self.session
        try:
            message = receive()
            if message is None:
                self._look()
                return
            while message is not None:
                session.received(message)
                call = session.call
                if call is not None and call.done:
                    return  # and nothing follows
                message = receive()
        except (EOFError, ConnectionError):
            self._over()
        except Exception as exc:
            self._over()
            self.kill()
            if not isinstance(exc, ProtocolError):
                raise

    def _over(self) -> None:
        if not self.over:
            self.over = True
            self._epoll.unregister(self.channel.fileno())

    def _look(self) -> None:
        """There was no message: news of the process, then, or of its standard error."""
        self._pump()
        if not self.child.is_alive():
            # A child of its own may hold the channel. What it has sent came before that.
            if not self.over:
                self.channel.shutdown()
                self._drain()
                self._over()
        else:
            self._watch()

    def _drain(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError, ProtocolError):
            while (message := self.channel.receive()) is not None:
                self.session.received(message)

    def _watch(self) -> None:
        fd = self.child.wake_fd
        if fd != self._watched:
            with contextlib.suppress(OSError):
                self._epoll.unregister(self._watched)
            self._epoll.register(fd, select.EPOLLIN)
            self._watched = fd

    def _pump(self) -> None:
        """Pass on what it wrote to its standard error, and keep the end of it."""
        while self._stderr >= 0:
            try:
                data = os.read(self._stderr, 65536)
            except BlockingIOError:
                return
            if not data:
                self._epoll.unregister(self._stderr)
                self._stderr = -1
                return
            self._tail = (self._tail + data)[-_TAIL:]
            _write_all(2, data)

    @property
    def was_killed(self) -> bool:
        """By somebody else, or by what it has done."""
        return not self.killed and (self.child.returncode or 0) < 0

    def tail(self) -> str:
        """The end of its standard error."""
        return self._tail.decode(errors="replace")

    def rss(self) -> int:
        """Bytes of memory that it holds; 0 if it has gone or is no process."""
        try:
            with open(f"/proc/{self.child.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def check_ours(self) -> None:
        """ValueError in a forked child of the worker's owner."""
        if self.child._foreign:
            raise ValueError(FORKED)

    @property
    def began(self) -> bool:
        """Whether it may have begun its last call."""
        return self.session.call is not None and self.session.call.started

    async def heartbeat(self, sleep: Callable[[float], Awaitable[object]]) -> _heartbeat.Verdict:
        """What it does, as seen for some beats."""
        if self.beats is None:
            raise ValueError("heartbeat: open the worker with heartbeat=seconds to have one")
        before = self.beats.read()
        await sleep(2.5 * before[3] / 1e9)
        return _heartbeat.verdict(before, self.beats.read())

    def figures(self) -> dict[str, Any]:
        """For statistics()."""
        return {**self.statistics, **self.channel.statistics()}

    # ---- calls ---------------------------------------------------------------------------

    def begin(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        extras: dict[str, Any] | None,
        on_progress: Callable[[Any], object] | None,
    ) -> tuple[Call, _session.Message]:
        """One call, and the message that asks for it."""
        if extras is None:
            call, message = self.session.begin(CALL, (fn, args))
        else:
            call, message = self.session.begin(CALL_WITH, (fn, args, extras))
        call.on_progress = on_progress
        return call, message

    async def run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float | None = None,
        extras: dict[str, Any] | None = None,
        on_progress: Callable[[Any], object] | None = None,
    ) -> Any:
        """One call, to its end."""
        deadline = None if timeout is None else self._io.now() + checked_timeout(timeout)
        call, message = self.begin(fn, args, extras, on_progress)
        await self.perform(call, message, deadline)
        return self.outcome(call)

    def outcome(self, call: Call) -> Any:
        """What the call came to, the first that was not taken yet."""
        self.statistics["calls"] += call.started  # else a pool has another worker do it
        returned, value = call.outcomes.popleft()
        if returned:
            return value
        self.statistics["failed"] += call.started
        try:
            raise value
        finally:
            del value  # or the traceback holds itself

    def begin_many(
        self, fn: Callable[..., Any], calls: list[tuple[Any, ...]]
    ) -> tuple[Call, _session.Message]:
        """Several calls in one message."""
        return self.session.begin(CALL_MANY, (fn, calls), len(calls))

    async def perform(
        self, call: Call, message: _session.Message, deadline: float | None = None
    ) -> None:
        """Send it and wait until all is answered; whatever goes wrong, it is over then."""
        try:
            if not call.started:
                call.started = True  # before it is: an interrupt may come right behind that
                if not self.channel.send(*message):
                    await self.send(call, message, deadline)
            while not call.done and call.failure is None:
                await self._wait(deadline)
                self.advance()
                if self.over and not call.done:
                    await self.lost(call)
            if call.failure is not None:
                raise call.failure
        except ConnectionError:
            call.started = False
            await self.lost(call)
        except BaseException:
            await self.leave(call)
            raise

    async def leave(self, call: Call) -> None:
        """:meth:`abandon` in the middle of something else. If that is disturbed too, the worker
        is killed at once. A forked child leaves the worker to its parent."""
        if self.child._foreign:
            call.lost(CallCancelled())
            return
        try:
            with self._io.shield():
                await self.abandon(call)
        except BaseException:
            self._over()
            self.kill()
            call.lost(CallCancelled())
            raise

    async def send(
        self, call: Call, message: _session.Message, deadline: float | None = None
    ) -> None:
        """Send it when there is room; the worker may have to be heard first."""
        try:
            call.started = True  # before it is: an interrupt may come right behind that
            while not self.channel.send(*message):
                call.started = False
                with self.writable():
                    await self._wait(deadline)
                self.advance()
                if self.over:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                call.started = True
        except ConnectionError:
            call.started = False
            raise

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Meanwhile it counts as readable also when there is room to send."""
        self._epoll.modify(self.channel.fileno(), select.EPOLLIN | select.EPOLLOUT)
        try:
            yield
        finally:
            if not self.over:
                self._epoll.modify(self.channel.fileno(), select.EPOLLIN)

    async def abandon(self, call: Call) -> None:
        """Nobody waits for it any more: the worker is asked to leave it, and killed if it does
        not. Takes ``grace`` and a kill's time at most."""
        if call.done:
            return
        self.statistics["cancelled"] += 1
        if not call.started:
            call.lost(CallCancelled())
            return
        if not self.over and self.grace > 0:
            self._ask()
            deadline = self._io.now() + self.grace
            while not (call.done or self.over) and (left := deadline - self._io.now()) > 0:
                await self._io.wait(self, left)
                self.advance()
                if call.stream is not None:
                    call.stream.drop()
        if not call.done:
            self._over()
            self.kill()
            await self._await_end(0)
            call.lost(self.death())

    def _ask(self) -> None:
        message = self.session.cancel()
        if message is not None:
            with contextlib.suppress(ConnectionError):
                self.channel.send(*message)
            self._prod()

    def _prod(self) -> None:
        """The channel is not looked at by a target that runs: interrupt it."""
        if self.child.pid is not None:
            with contextlib.suppress(SpawnError):
                self.child.signal(_worker.CANCEL_SIGNAL)

    # ---- streams -------------------------------------------------------------------------

    async def open_stream(
        self, fn: Callable[..., Any], args: tuple[Any, ...], extras: dict[str, Any]
    ) -> Call:
        extras["stream"] = _WINDOW
        call, message = self.session.begin(CALL_WITH, (fn, args, extras))
        call.stream = _session.Stream(_WINDOW)
        try:
            await self.send(call, message)
        except ConnectionError:
            await self.lost(call)
        except BaseException:
            await self.leave(call)
            raise
        return call


def extras_of(context: Iterable[ContextVar[Any]]) -> dict[str, Any] | None:
    """What a call has beside its function and arguments: (module, name, value) of each context
    variable that has one. None: nothing."""
    if not context:
        return None
    carried = [(_place(variable), variable) for variable in context]
    return {
        "context": [(*place, variable.get()) for place, variable in carried if _has_value(variable)]
    }


def _has_value(variable: ContextVar[Any]) -> bool:
    try:
        variable.get()
    except LookupError:
        return False
    return True


_places: dict[ContextVar[Any], tuple[str, str]] = {}


def _place(variable: ContextVar[Any]) -> tuple[str, str]:
    """Where the worker finds it too: a module and its name there."""
    if not isinstance(variable, ContextVar):
        raise TypeError(f"context: a ContextVar is wanted, not {type(variable).__name__}")
    if variable not in _places:
        for name, module in list(sys.modules.items()):
            if name != "__main__" and getattr(module, variable.name, None) is variable:
                _places[variable] = name, variable.name
                break
        else:
            raise ValueError(
                f"context: the variable {variable.name!r} is not to be found under its name in any "
                "module that a worker can import"
            )
    return _places[variable]


def _write_all(fd: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody hears this program's errors either
        while data:
            data = data[os.write(fd, data) :]


def cpus() -> float:
    """How many CPUs this process may use, by affinity and by the quota of its cgroup."""
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        with open(f"{_memory.own_cgroup()}/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else min(allowed, int(quota) / int(period))


def checked_timeout(timeout: Any, name: str = "timeout") -> float:
    """TypeError or ValueError, if it is not a number of seconds."""
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise TypeError(f"{name}: seconds are wanted, not {timeout!r}")
    if not timeout >= 0:
        raise ValueError(f"{name}: {timeout} is negative")
    return timeout


class OpenStream:
    """A running call that sends and receives, but for its waiting."""

    def __init__(self, io: Any, link: Link, call: Call) -> None:
        self._io = io
        self._link = link
        self._call = call
        assert call.stream is not None
        self._stream = call.stream
        self._sent_eof = False
        self._told = False  # what came of it
        self._value: Any = None

    def _outcome(self) -> Any:
        """What the target returned, or raised: that is raised once."""
        if not self._told:
            self._told = True
            self._value = self._link.outcome(self._call)
        return self._value


class PoolState[L: Link]:
    """What a pool knows of its workers, but for its waiting."""

    def __init__(self, io: Any, low: int, high: int, spec: dict[str, Any]) -> None:
        self._io = io
        self._low = low
        self.size = high
        self._max_calls: int | None = spec.pop("max_calls")
        self._max_rss: int | None = spec.pop("max_rss")
        self._idle_time: float = spec.pop("idle")
        self._start_timeout: float | None = spec.pop("start_timeout")
        self._spec = spec
        self._owner = os.getpid()
        self._idle: list[tuple[L, float]] = []  # and since when
        self._links: set[L] = set()
        self._closed = False
        self._ended = {"calls": 0, "failed": 0, "cancelled": 0}
        self._counts = {"started": 0, "died": 0, "recycled": 0}

    def _is_worn(self, link: L) -> bool:
        if self._max_calls is not None and link.statistics["calls"] >= self._max_calls:
            return True
        return self._max_rss is not None and link.rss() > self._max_rss

    def _forget(self, link: L) -> None:
        """It ends; what it has done still counts."""
        self._links.discard(link)
        for name in self._ended:
            self._ended[name] += link.statistics[name]

    def _figures(self) -> dict[str, Any]:
        totals = {
            name: count + sum(link.statistics[name] for link in self._links)
            for name, count in self._ended.items()
        }
        return {"workers": len(self._links), "idle": len(self._idle), **self._counts, **totals}


class Chunks:
    """How many small calls to send together: as many as take a millisecond, or so many."""

    _SECONDS = 0.001
    _MOST = 512

    def __init__(self, fixed: int | None) -> None:
        if fixed is not None and (isinstance(fixed, bool) or fixed < 1):
            raise ValueError(f"chunks: at least one call at a time, not {fixed!r}")
        self.size = fixed or 1
        self._fixed = fixed is not None

    def took(self, seconds: float, calls: int) -> None:
        """What a chunk has taken, sending included."""
        if not self._fixed:
            wanted = int(self._SECONDS * calls / max(seconds, 1e-7))
            self.size = max(1, min(wanted, 4 * self.size, self._MOST))


def pool_sizes(size: int | None, low: int | None, high: int | None) -> tuple[int, int]:
    """Of size, min and max of a pool. TypeError, ValueError."""
    if size is not None and (low is not None or high is not None):
        raise TypeError("size: a pool has a size, or min and max")
    if size is None and high is None:
        size = os.process_cpu_count() or 1
    most = size if size is not None else high
    least = most if low is None and high is None else low or 0
    for name, number in (("size" if size is not None else "max", most), ("min", least)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: an int is wanted, not {type(number).__name__}")
    assert most is not None and least is not None
    if most < 1 or least < 0 or least > most:
        raise ValueError(f"size: {least} to {most} workers are no pool")
    return least, most
