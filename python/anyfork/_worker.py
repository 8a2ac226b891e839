"""A worker that is called again and again: its side of the conversation."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
import signal
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from . import _anyfork, _boot, _session

if TYPE_CHECKING:
    import logging

# Ignored where nobody handles it: a request that comes too late harms nobody.
CANCEL_SIGNAL = signal.SIGURG


class Cancelled(BaseException):
    """The owner asks for the end of this call. Raised where the target is at that moment, in
    its main thread; catch it to clean up, and raise it again."""


def main(fd: int, spec: dict[str, Any]) -> None:
    """Answer calls that come by that socket, until the owner closes it.

    ``spec``, all of it optional: "loop": "trio" or "asyncio", for coroutines; "initializer":
    what _session.load() takes, of (fn, args), called first; "log_level": records of that level
    and above go to the owner; "heartbeat": a descriptor.
    """
    global _current
    with contextlib.suppress(ImportError, OSError, ValueError):
        import faulthandler

        faulthandler.enable(2)  # so that a crash has a traceback
    serving = _Serving(_anyfork.Channel(fd), spec.get("loop"))
    _current = serving
    try:
        heartbeat = spec.get("heartbeat")
        if heartbeat is not None:
            _anyfork.heartbeat_begin(heartbeat)
        if spec.get("log_level") is not None:
            _forward_log(serving, spec["log_level"])
        serving.listen_for_cancel()
        initializer = spec.get("initializer")
        if initializer is not None:
            fn, args = _session.load(*initializer)
            fn(*args)
        serving.serve()
    finally:
        _current = None


_current: _Serving | None = None
# What copies its context (asyncio.to_thread(), say) goes on to be of its call.
_call: contextvars.ContextVar[int] = contextvars.ContextVar("anyfork call")


def report_progress(value: object) -> None:
    """Call ``on_progress(value)`` of whoever awaits this call in the owner.

    In a worker, from any thread of it; elsewhere nothing happens, so that the same function
    serves there. Raises: what pickling raises.
    """
    serving = _current
    number = None if serving is None else serving.call
    if serving is None or number is None or _call.get(number) != number:
        return  # no call, or another one than that which this was begun for
    serving.say(_session.PROGRESS, number, *_session.dump(value))


class _Serving:
    """The worker's end of the channel."""

    def __init__(self, channel: Any, loop: str | None) -> None:
        self.channel = channel
        self.loop = loop
        self.inbox: deque[_session.Message] = deque()
        self.call: int | None = None  # under way
        self.stream: _session.Stream | None = None  # of that call
        self.news: Any = None  # an event of the loop that runs it
        self._interruptible = False  # a target runs, which a signal may end
        self._reading = False  # the main thread looks at the channel itself
        self._signalled = False  # meanwhile
        self._ended = False

    # ---- messages ------------------------------------------------------------------

    def say(self, kind: int, number: int, parts: Any = (), fds: Any = ()) -> None:
        """Send it; waits while the owner does not read."""
        while not self.channel.send(kind, number, parts, fds):
            self.channel.wait_writable(None)

    def take(self, wait: bool) -> _session.Message | None:
        """The next message; None: there is none now, or, if it waits, no more at all."""
        if self.inbox:
            return self.inbox.popleft()
        self._reading = True
        try:
            if self.inbox:  # the signal handler was there first
                return self.inbox.popleft()
            channel = self.channel
            while not self._ended:
                if wait:
                    channel.wait(None)
                message: _session.Message | None = channel.receive()
                if message is not None or not wait:
                    return message
            return None
        except (EOFError, ConnectionError):
            self._ended = True
            return None
        finally:
            self._reading = False

    # ---- cancellation --------------------------------------------------------------

    def listen_for_cancel(self) -> None:
        """Only the main thread of a main interpreter can; elsewhere a call that is cancelled
        ends by itself, or with its worker. System calls are interrupted, not restarted: that is
        what ends a target that waits in one (PEP 475)."""
        with contextlib.suppress(ValueError):
            signal.signal(CANCEL_SIGNAL, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        if self.news is not None:
            return  # the loop listens
        if self._reading:
            self._signalled = True  # whoever reads may be past it
            return
        self._look()
        if self._interruptible and self.is_cancelled():
            self._interruptible = False
            raise Cancelled

    def _look(self) -> None:
        """Put what has come into the inbox."""
        self._signalled = False
        try:
            while (message := self.channel.receive()) is not None:
                self.inbox.append(message)
        except (EOFError, ConnectionError):
            self._ended = True  # the owner has gone, and this worker goes with it

    def is_cancelled(self) -> bool:
        """Whether the messages that wait cancel the call under way."""
        return any(
            kind == _session.CANCEL and number == self.call
            for kind, number, _parts, _fds in self.inbox
        )

    # ---- calls ---------------------------------------------------------------------

    def serve(self) -> None:
        self.say(_session.READY, 0)
        while (message := self.take(True)) is not None:
            self._perform(message)
            del message  # or what it holds, perhaps shared memory, is held until the next one

    def _perform(self, message: _session.Message) -> None:
        kind, number, parts, fds = message
        if kind not in (_session.CALL, _session.CALL_MANY, _session.CALL_WITH):
            for fd in fds:  # of a call that has ended meanwhile
                os.close(fd)
            return
        self.call = number
        _call.set(number)
        try:
            content = _session.load(parts, fds)
        except BaseException as exc:
            exc.add_note("The call could not be unpickled in the worker.")
            self.say(_session.RAISED, number, (_boot.describe(exc),))
        else:
            if kind == _session.CALL:
                self.answer(number, *content)
            elif kind == _session.CALL_MANY:
                self._call_many(number, *content)
            else:
                self._call_with(number, *content)
        finally:
            self.call = None

    def _call_many(
        self, number: int, fn: Callable[..., object], calls: list[tuple[object, ...]]
    ) -> None:
        """One answer for each, as soon as it is there: a death loses no other. Those behind
        one that was cancelled are not begun."""
        for args in calls:
            if not self.answer(number, fn, args):
                return
            number += 1

    def _call_with(
        self,
        number: int,
        fn: Callable[..., object],
        args: tuple[object, ...],
        extras: dict[str, Any],
    ) -> None:
        """A call with more to it than a function and its arguments."""
        try:
            context = _context(extras.get("context", ()))
        except Exception as exc:
            exc.add_note("This was in the worker, which was to set a context variable.")
            self.say(_session.RAISED, number, (_boot.describe(exc),))
            return
        if "stream" in extras:
            self.stream = _session.Stream(extras["stream"])
            kind = AsyncWorkerStream if _is_async(fn) else WorkerStream
            args = (kind(self, self.stream), *args)
        try:
            context.run(self.answer, number, fn, args)
        finally:
            if self.stream is not None:
                self.stream.drop()
                self.stream = None

    def answer(self, number: int, fn: Callable[..., object], args: tuple[object, ...]) -> bool:
        """Call it, and say what came of it. False: it was cancelled."""
        try:
            try:
                self._interruptible = True
                if self._signalled or self.inbox:
                    self._look()
                    if self.is_cancelled():
                        raise Cancelled
                result = fn(*args)
                self._interruptible = False
                if type(result) is CoroutineType:
                    result = self._in_loop(result)
            except BaseException as exc:
                self._interruptible = False
                return self._failed(number, exc)
            self._returned(number, result)
        except Cancelled:  # it came while an exception was on its way here
            self._interruptible = False
            self.say(_session.CANCELLED, number)
            return False
        return True

    def _returned(self, number: int, result: object) -> None:
        try:
            parts, fds = _session.dump(result)
            self.say(_session.RESULT, number, parts, fds)
        except ConnectionError:
            pass  # the owner has gone
        except BaseException as exc:  # whatever its pickling raises is the call's
            kind = type(result)
            exc.add_note(
                "The target returned, but its result cannot be sent: it is of type "
                f"{kind.__module__}.{kind.__qualname__}."
            )
            self.say(_session.RAISED, number, (_boot.describe(exc),))

    def _failed(self, number: int, exc: BaseException) -> bool:
        if isinstance(exc, SystemExit):
            raise exc  # the worker's end, as it asks for
        if isinstance(exc, Cancelled | KeyboardInterrupt | _CancelledInLoop):
            self.say(_session.CANCELLED, number)
            return False
        self.say(_session.RAISED, number, (_boot.describe(exc),))
        return True

    # ---- coroutines ----------------------------------------------------------------

    def _in_loop(self, coroutine: Coroutine[Any, Any, object]) -> object:
        """Run it in a loop of the kind that was asked for, and listen meanwhile."""
        if self.loop is None:
            coroutine.close()
            raise TypeError(
                "the target is a coroutine function, and this worker was made without a loop: "
                "open it with loop='trio' or loop='asyncio'"
            )
        try:
            import anyio
        except BaseException:
            coroutine.close()
            raise
        result: list[object] = []
        failure: list[BaseException] = []
        self.news = anyio.Event()

        async def run() -> None:
            async with anyio.create_task_group() as group:
                with anyio.CancelScope() as scope:
                    group.start_soon(self._listen, scope)
                    try:
                        result.append(await coroutine)
                    except anyio.get_cancelled_exc_class():
                        raise
                    except BaseException as exc:
                        failure.append(exc)
                group.cancel_scope.cancel()

        try:
            anyio.run(run, backend=self.loop)
        finally:
            self.news = None
        if failure:
            raise failure[0]
        if not result:
            raise _CancelledInLoop
        return result[0]

    async def _listen(self, scope: Any) -> None:
        """Take in what the owner says, while its call runs in a loop."""
        import anyio

        while True:
            self.sort_in()
            if self.is_cancelled() or self._ended:
                scope.cancel()
                return
            self.news.set()
            self.news = anyio.Event()
            await anyio.wait_readable(self.channel)

    def sort_in(self) -> None:
        """Take in all that has come: what is of the stream to the stream."""
        waiting: list[_session.Message] = []
        while (message := self.take(False)) is not None:
            kind, number, parts, fds = message
            if self.stream is not None and number == self.call and kind in _session.STREAMS:
                self.stream.received(kind, parts, fds)
            else:
                waiting.append(message)
        self.inbox.extend(waiting)


class _CancelledInLoop(BaseException):
    """The loop's way to say it, at the end of the loop."""


def _is_async(fn: Callable[..., object]) -> bool:
    from ._request import is_async

    return is_async(fn)


# ---- streams ----------------------------------------------------------------------


class WorkerStream:
    """What a target that was opened as a stream gets as its first argument: its side."""

    def __init__(self, serving: _Serving, stream: _session.Stream) -> None:
        self._serving = serving
        self._stream = stream
        self._closed = False

    def _wait(self) -> None:
        """Until something has come."""
        serving = self._serving
        message = serving.take(True)
        if message is None:  # the owner has gone
            raise Cancelled
        kind, number, parts, fds = message
        if number != serving.call:
            return
        if kind == _session.CANCEL:
            raise Cancelled
        if kind in _session.STREAMS:
            self._stream.received(kind, parts, fds)

    def _check(self) -> int:
        number = self._serving.call
        if number is None or self._serving.stream is not self._stream:
            raise ValueError("this stream's call has ended")
        return number

    def send(self, value: object) -> None:
        """Send an item; waits while the owner has a window full of them. ValueError after
        :meth:`send_eof`."""
        number = self._check()
        if self._closed:
            raise ValueError("send() after send_eof()")
        while not self._stream.credit:
            self._wait()
        parts, fds = _session.dump(value)
        self._stream.credit -= 1
        self._serving.say(_session.ITEM, number, parts, fds)

    def send_eof(self) -> None:
        """There will be no more items from this side; so too when the target returns."""
        if not self._closed:
            self._closed = True
            self._serving.say(_session.END, self._check())

    def receive(self) -> Any:
        """The owner's next item; waits for it. EOFError: there will be none."""
        number = self._check()
        while not self._stream.items:
            if self._stream.ended:
                raise EOFError("the owner sends no more")
            self._wait()
        item, credit = self._stream.take()
        if credit:
            self._serving.say(_session.CREDIT, number, _session.number(credit))
        return item

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                item = self.receive()
            except EOFError:
                return
            yield item


class AsyncWorkerStream(WorkerStream):
    """The same for a target that is a coroutine function: its methods are awaited, and
    :meth:`receive` raises anyio.EndOfStream at the end."""

    async def _news(self) -> None:
        await self._serving.news.wait()

    async def send(self, value: object) -> None:  # type: ignore[override]
        """As :meth:`WorkerStream.send`."""
        import anyio
        from anyio.lowlevel import checkpoint

        await checkpoint()
        number = self._check()
        if self._closed:
            raise ValueError("send() after send_eof()")
        while not self._stream.credit:
            await self._news()
        parts, fds = _session.dump(value)
        self._stream.credit -= 1
        while not self._serving.channel.send(_session.ITEM, number, parts, fds):
            await anyio.wait_writable(self._serving.channel)

    async def send_eof(self) -> None:  # type: ignore[override]
        """As :meth:`WorkerStream.send_eof`."""
        super().send_eof()

    async def receive(self) -> Any:
        """The owner's next item. anyio.EndOfStream: there will be none."""
        import anyio
        from anyio.lowlevel import checkpoint

        await checkpoint()
        while not self._stream.items:
            if self._stream.ended:
                raise anyio.EndOfStream
            self._check()
            await self._news()
        return super().receive()

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("this side is asynchronous: `async for`")

    def __aiter__(self) -> AsyncWorkerStream:
        return self

    async def __anext__(self) -> Any:
        import anyio

        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None


# ---- what is carried over ------------------------------------------------------------


def _context(carried: Any) -> contextvars.Context:
    """A context with these variables: (module, its name there, value)."""
    context = contextvars.copy_context()
    for module, name, value in carried:
        context.run(getattr(importlib.import_module(module), name).set, value)
    return context


def _forward_log(serving: _Serving, level: int) -> None:
    """Have the root logger send its records to the owner, in place of its handlers here."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                serving.say(_session.LOG, 0, *_session.dump(_plain(self, record)))
            except (ValueError, ConnectionError):
                pass  # the owner has gone
            except Exception:
                self.handleError(record)

    root = logging.getLogger()
    root.handlers[:] = [Handler()]
    root.setLevel(level)


def _plain(handler: logging.Handler, record: logging.LogRecord) -> dict[str, Any]:
    """A record without what cannot be pickled, as logging.handlers.QueueHandler makes it."""
    plain = dict(record.__dict__)
    plain["msg"] = record.getMessage()
    plain["args"] = None
    if record.exc_info:
        import logging

        plain["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
    plain["exc_info"] = None
    return plain
