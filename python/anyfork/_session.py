"""What an owner and its worker say to each other. No input or output here.

A message is (kind, id, parts, fds): part 0 is a pickle, and the others are the buffers that
it left out of band (PEP 574). One call at a time; the id names it.

    owner                               worker
    CALL, CALL_WITH, CALL_MANY   ->
    CANCEL                       ->
                                 <-     RESULT, RAISED or CANCELLED, one for each call
    ITEM, END, CREDIT           <->     of a stream
                                 <-     READY, PROGRESS, LOG
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from . import _boot, _pickling
from ._child import restore
from ._errors import CallCancelled

# fmt: off
(CALL, CALL_WITH, CALL_MANY, CANCEL, RESULT, RAISED, CANCELLED,
 ITEM, END, CREDIT, READY, PROGRESS, LOG) = range(1, 14)
# fmt: on

Message = tuple[int, int, Sequence[Any], Sequence[int]]

_LARGE = 1 << 20  # bytes, from which on a pickle is not searched for names


# ---- values ---------------------------------------------------------------------


class _Descriptors(threading.local):
    """Those of the value that this thread pickles or unpickles."""

    sent: list[int] | None = None
    received: list[int] | None = None


_descriptors = _Descriptors()


class Descriptor:
    """A file descriptor as an argument, result or item: the other side gets a duplicate.

    Args:
      file: a descriptor, or an object that has one. It stays the caller's.

    What arrives owns its duplicate: :meth:`fileno` lends it, :meth:`detach` gives it away,
    and it is closed with the object.
    """

    def __init__(self, file: Any) -> None:
        self._fd: int = file if isinstance(file, int) else file.fileno()
        self._file = file
        self._owned = False

    def fileno(self) -> int:
        """The descriptor's number. ValueError after :meth:`detach` or :meth:`close`."""
        if self._fd < 0:
            raise ValueError("this descriptor was closed or given away")
        return self._fd

    def detach(self) -> int:
        """The number, which is the caller's to close from now on."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close it, if it arrived here and was not detached."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._owned:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_owned", False):
            self.close()

    def __reduce__(self) -> tuple[object, ...]:
        if _descriptors.sent is None:
            raise TypeError("a Descriptor is sent to a worker, not pickled otherwise")
        _descriptors.sent.append(self.fileno())
        return (_arrived, (len(_descriptors.sent) - 1,))

    def __repr__(self) -> str:
        return f"<anyfork.Descriptor {self._fd}>"


def _arrived(index: int) -> Descriptor:
    received = _descriptors.received
    if received is None or not 0 <= index < len(received) or received[index] < 0:
        raise pickle.UnpicklingError("a descriptor that did not come with the message")
    descriptor = Descriptor(received[index])
    descriptor._owned = True
    received[index] = -1
    return descriptor


def dump_call(
    call: tuple[Any, ...], method: str, same_main: bool
) -> tuple[list[Any], Sequence[int]]:
    """(parts, fds) of a function and its arguments, by reference where the worker can find
    them, else by value. ``same_main``: its ``__main__`` is this one. TypeError."""
    parts: list[Any] = [b""]
    if not (any_large(call[1]) and not same_main):
        try:
            data = pickle.dumps(call, 5, buffer_callback=parts.append)
        except Exception:  # a lambda, say, or a descriptor
            pass
        else:
            if same_main or b"_main__" not in data:
                parts[0] = data
                return parts, ()
    fds: list[int] = []
    _descriptors.sent = fds
    try:
        del parts[1:]
        parts[0] = _dump_slowly(call, method, same_main, fds, parts)
        return parts, fds
    finally:
        _descriptors.sent = None


def any_large(args: Sequence[object]) -> bool:
    """Whether there is a text that takes long to search."""
    for arg in args:
        kind = type(arg)
        if (kind is bytes or kind is str or kind is bytearray) and len(arg) > _LARGE:  # type: ignore[arg-type]
            return True
    return False


def _dump_slowly(
    call: tuple[Any, ...], method: str, same_main: bool, fds: list[int], parts: list[Any]
) -> bytes:
    """Also what has descriptors, is large, or has to go by value."""
    try:
        data, names_main = _pickling.looked_through(call, parts.append)
    except Exception:
        names_main = True
    else:
        if same_main or not names_main:
            return data
    del parts[1:], fds[:]
    return _pickling.by_value(call, method, parts.append)


def dump(value: object) -> tuple[list[Any], Sequence[int]]:
    """(parts, fds) of a result or an item. What came by value goes back so."""
    parts: list[Any] = [b""]
    try:
        parts[0] = pickle.dumps(value, 5, buffer_callback=parts.append)
    except Exception:
        pass
    else:
        return parts, ()
    fds: list[int] = []
    _descriptors.sent = fds
    try:
        del parts[1:]
        parts[0] = _boot.dumps(value, parts)
        return parts, fds
    finally:
        _descriptors.sent = None


def load(parts: Sequence[Any], fds: Sequence[int]) -> Any:
    """What :func:`dump` and :func:`dump_call` have made of a value. Its buffers are read-only
    views, of shared memory where they are large: it is used again when the last has gone."""
    data = parts[0]
    if len(parts) == 1 and not fds and type(data) is bytes and b"_main__" not in data:
        return pickle.loads(data)  # most are so
    buffers = [memoryview(part) for part in parts[1:]]
    if not fds:
        return _boot.loads(data, buffers)
    _descriptors.received = received = list(fds)
    try:
        return _boot.loads(data, buffers)
    finally:
        _descriptors.received = None
        for fd in received:  # that nothing in the value names
            if fd >= 0:
                os.close(fd)


# ---- the owner's side -----------------------------------------------------------


class Stream:
    """Both directions of a stream, as one side knows them: whose turn it is to send, what
    has arrived, what the other side may still send."""

    __slots__ = ("_consumed", "credit", "ended", "items", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.credit = window  # items that may be sent
        self.items: deque[tuple[Sequence[Any], Sequence[int]]] = deque()
        self.ended = False  # the other side sends no more
        self._consumed = 0

    def received(self, kind: int, parts: Sequence[Any], fds: Sequence[int]) -> None:
        if kind == ITEM:
            if len(self.items) >= self.window or self.ended:
                _drop(fds)
                raise ProtocolError("more items than its window has, or after their end")
            self.items.append((parts, fds))
            return
        _drop(fds)  # for nothing
        if kind == END:
            self.ended = True
        else:
            self.credit += _number(parts)

    def take(self) -> tuple[Any, int]:
        """The next item, and how many the other side may send more by now (or 0)."""
        item = load(*self.items.popleft())
        self._consumed += 1
        credit = self._consumed if 2 * self._consumed >= self.window else 0
        self._consumed -= credit
        return item, credit

    def drop(self) -> None:
        """Nobody wants the rest of what has arrived."""
        while self.items:
            _drop(self.items.popleft()[1])


def number(value: int) -> tuple[bytes]:
    """The parts of a message that is a number."""
    return (value.to_bytes(4, "little"),)


def _number(parts: Sequence[Any]) -> int:
    if len(parts) != 1 or len(parts[0]) != 4:
        raise ProtocolError("a number was expected")
    return int.from_bytes(parts[0], "little")


class ProtocolError(Exception):
    """The other side said what it could not say then."""


Outcome = tuple[bool, Any]
"""(True, what the target returned) or (False, the exception)."""


class Call:
    """One call, or several that were sent together."""

    __slots__ = (
        "count",
        "done",
        "failure",
        "first",
        "on_answer",
        "on_progress",
        "outcomes",
        "received",
        "started",
        "stream",
        "unbegun",
    )

    def __init__(self, first: int, count: int = 1) -> None:
        self.first = first
        self.count = count
        self.received = 0
        self.done = False  # the worker has answered all of it
        self.outcomes: deque[Outcome] = deque()
        self.started = False  # the worker may have it
        self.failure: Exception | None = None  # of what is called here for it
        self.unbegun = 0
        self.stream: Stream | None = None
        self.on_progress: Callable[[Any], object] | None = None
        self.on_answer: Callable[[Outcome], object] = self.outcomes.append

    def answer(self, outcome: Outcome) -> None:
        self.received += 1
        self.done = self.received == self.count
        self.on_answer(outcome)

    def lost(self, exc: BaseException) -> None:
        """The worker has gone: what it was at has failed; the rest it never began."""
        left = self.count - self.received
        if left:
            self.answer((False, exc))
            self.unbegun = left - 1
        self.finish()

    def finish(self) -> None:
        """Nothing more is answered."""
        self.received = self.count
        self.done = True


class Session:
    """What the owner knows of a worker. Messages to send are returned; those that arrived
    go to :meth:`received`.

    Args:
      method: of the worker, for errors.
      same_main: whether its ``__main__`` is this one.
    """

    def __init__(self, method: str, same_main: bool) -> None:
        self._method = method
        self._same_main = same_main
        self._next = 1
        self.call: Call | None = None
        self.ready = False

    def begin(
        self,
        kind: int,
        what: tuple[Any, ...],
        count: int = 1,
    ) -> tuple[Call, Message]:
        """Begin a call; nothing has changed after an error. TypeError: cannot be pickled."""
        assert self.call is None or self.call.done
        parts, fds = dump_call(what, self._method, self._same_main)
        call = Call(self._next, count)
        self._next += count
        self.call = call
        return call, (kind, call.first, parts, fds)

    def cancel(self) -> Message | None:
        """Ask for the end of the call that is under way."""
        call = self.call
        if call is None or call.done:
            return None
        return CANCEL, call.first, (), ()

    def item(self, value: object) -> Message:
        """An item of the stream, which has credit for it."""
        call = self.call
        assert call is not None and call.stream is not None and call.stream.credit > 0
        parts, fds = dump(value)
        call.stream.credit -= 1
        return ITEM, call.first, parts, fds

    def received(self, message: Message) -> None:
        """Take in a message. Raises ProtocolError, with which the worker is of no use any more."""
        kind, number_, parts, fds = message
        call = self.call
        if not parts and kind in _WITH_PARTS:
            _drop(fds)
            raise ProtocolError(f"message {kind} without its content")
        if (
            kind == RESULT
            and call is not None
            and number_ == call.first + call.received
            and not call.done
        ):
            call.answer(_loaded(parts, fds))  # first: most are so
        elif kind == READY:
            _drop(fds)
            self.ready = True
        elif kind == LOG:
            _log(parts, fds)
        elif call is None or not call.first <= number_ < call.first + call.count:
            _drop(fds)
            if number_ >= self._next or kind not in _OF_CALLS:
                raise ProtocolError(f"message {kind} of call {number_}, which is not under way")
        elif kind in _ANSWERS:
            _drop(fds)  # only a result has some
            if number_ != call.first + call.received or call.done:
                raise ProtocolError(f"an answer to call {number_} out of turn")
            if kind == RAISED:
                call.answer((False, restore(bytes(parts[0]))))
            else:
                call.answer((False, CallCancelled()))
                call.unbegun = call.count - call.received  # the worker begins none behind it
                call.finish()
        elif kind == PROGRESS:
            try:
                value = load(parts, fds)
                if call.on_progress is not None:
                    call.on_progress(value)
            except Exception as exc:  # whoever waits for the call is told
                call.failure = call.failure or exc
        elif kind in STREAMS and call.stream is not None:
            call.stream.received(kind, parts, fds)
        else:
            _drop(fds)
            raise ProtocolError(f"message {kind}")


_ANSWERS = (RESULT, RAISED, CANCELLED)
STREAMS = (ITEM, END, CREDIT)
_OF_CALLS = (*_ANSWERS, *STREAMS, PROGRESS)
_WITH_PARTS = (RESULT, RAISED, ITEM, CREDIT, PROGRESS, LOG)


def _drop(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _loaded(parts: Sequence[Any], fds: Sequence[int]) -> Outcome:
    try:
        return True, load(parts, fds)
    except Exception as exc:
        failure = exc
    except (SystemExit, GeneratorExit) as exc:  # not this program's end
        failure = pickle.UnpicklingError(repr(exc))
        failure.__cause__ = exc
    failure.add_note("The target returned, but its result cannot be unpickled here.")
    return False, failure


def _log(parts: Sequence[Any], fds: Sequence[int]) -> None:
    import logging

    try:
        made = logging.makeLogRecord(load(parts, fds))
        logger = logging.getLogger(made.name)
        if logger.isEnabledFor(made.levelno):
            logger.handle(made)
    except Exception:  # as logging does with what goes wrong in it
        if logging.raiseExceptions:
            sys.excepthook(*sys.exc_info())
