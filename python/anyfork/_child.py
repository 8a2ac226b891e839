"""The handle of a worker."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import warnings
from types import TracebackType
from typing import IO, Any, Self

from . import _anyfork, _boot
from ._errors import RemoteError, SpawnError, WorkerDied, in_python, worker_name

_taking_streams = threading.Lock()


def _new_lock() -> None:
    global _taking_streams
    _taking_streams = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def restore(payload: bytes) -> BaseException:
    """The owner's side of _boot.describe(): the exception, with the remote traceback."""
    pickled, name, shown, text = pickle.loads(payload)
    exc: BaseException = RemoteError(name, shown, text)
    if pickled is not None:
        try:
            loaded = _boot.loads(pickled)
        except Exception as failure:
            exc.add_note(f"it could not be unpickled here: {failure!r}")
        else:
            if isinstance(loaded, BaseException):
                exc = loaded
    note = f"Traceback in the worker:\n{text.rstrip()}"
    try:
        exc.add_note(note)
    except Exception:  # a class of its own mind
        exc = RemoteError(name, shown, text)
        exc.add_note(note)
    return exc


class Child(_anyfork.Child):
    """A worker, as its owner holds it.

    Made by :func:`anyfork.spawn`. Attributes: ``pid``, ``pidfd`` (readable once
    the worker has ended), ``report_fd`` (readable when it reported), ``method``; and
    :attr:`wake_fd` for event loops.

    The handle owns its worker: :meth:`close`, the end of a ``with`` block, and
    the garbage collector kill what still runs, and reap it. A worker by ``subint``
    is a thread of this process: it has no ``pid`` and no ``pidfd``, cannot be
    signalled, and goes on when its handle is closed. In a forked child of
    the owner the handle is foreign: it raises, and touches nothing.

    ``stdin``, ``stdout`` and ``stderr`` are the owner's ends of those standard streams
    that were asked to be :data:`subprocess.PIPE`: buffered binary files; else None.

    Safe from any thread of the interpreter that made it.
    """

    @property
    def stdin(self) -> IO[bytes] | None:
        """Writes to the worker's standard input."""
        return self._stream(0)

    @property
    def stdout(self) -> IO[bytes] | None:
        """Reads the worker's standard output."""
        return self._stream(1)

    @property
    def stderr(self) -> IO[bytes] | None:
        """Reads the worker's standard error."""
        return self._stream(2)

    @property
    def wake_fd(self) -> int:
        """The descriptor for an event loop: readable when there is news of the worker.

        Ask for it before each wait, and then :meth:`is_alive`, which takes in what came::

            while child.is_alive():
                await trio.lowlevel.wait_readable(child.wake_fd)

        It is ``report_fd`` while there may be reports, of which a large one keeps the
        worker from its end until it is read; then ``pidfd``. Both stay open until
        :meth:`close`: leave the loop's registration before that. -1 after it.
        """
        fd = self.report_fd
        return fd if fd >= 0 or self.pidfd is None else self.pidfd

    def _stream(self, number: int) -> IO[bytes] | None:
        with _taking_streams:
            streams: dict[int, IO[bytes]] = self.__dict__.setdefault("_streams", {})
            if number not in streams:
                fd = self._take_stdio(number)
                if fd < 0:
                    return None
                streams[number] = open(fd, "wb" if number == 0 else "rb")  # noqa: SIM115
            return streams[number]

    def close(self) -> None:
        """Kill the worker if it still runs and is not detached, reap it, and close all
        that belongs to the handle."""
        super().close()
        for stream in list(self.__dict__.get("_streams", {}).values()):
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                stream.close()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the worker has ended; return its :attr:`returncode`.

        Args:
          timeout: seconds; None waits for ever.

        Raises: TimeoutError; WorkerDied if somebody else in this process reaped
        the worker and nothing tells its status.
        """
        self._await_end(timeout)
        code = self.returncode
        if code is None:
            raise WorkerDied(self.pid, None)
        return code

    def _await_end(self, timeout: float | None) -> None:
        if not self._wait(True, timeout):
            raise TimeoutError(f"{worker_name(self.pid)} still runs after {timeout} s")

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the worker is about to call its target.

        Raises: SpawnError if it could not get there, with what it reported and
        how it ended; TimeoutError.
        """
        if not self._wait(False, timeout):
            raise TimeoutError(f"{worker_name(self.pid)} is not ready after {timeout} s")
        if not self._ready:
            self._raise_start_failure()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the worker's end; return what the target returned.

        A program (``argv``) returns None. What has arrived stays after :meth:`close`.

        Raises: what the target raised, with the worker's traceback as a note;
        WorkerDied if it ended without either, or as a program with another status than
        0; SpawnError if it never got to its target; TimeoutError.
        """
        self._await_end(timeout)
        if self._is_program():
            if self.returncode != 0:
                raise WorkerDied(self.pid, self._status)
            return None
        kind, payload = self._outcome()
        late = self.__dict__.pop("_late", None)
        if late is not None and payload is not None:
            late.update(_boot.late_imports(payload))
        exc = self._failure(kind, payload)
        if exc is not None:
            raise exc
        try:
            return _boot.loads(payload)
        except Exception as failure:
            failure.add_note("The target returned, but its result cannot be unpickled here.")
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the worker's end; return what :meth:`result` would raise, or None."""
        self._await_end(timeout)
        if self._is_program():
            return None if self.returncode == 0 else WorkerDied(self.pid, self._status)
        return self._failure(*self._outcome())

    def _is_program(self) -> bool:
        return "_program" in self.__dict__

    def _failure(self, kind: int, payload: bytes) -> BaseException | None:
        """What an ended worker's outcome stands for; None for a result."""
        if self._closed and kind == 0 and not self._ready and self._error() is None:
            return WorkerDied(self.pid, self._status, "its handle was closed")
        if not self._ready:
            return self._start_failure()
        if kind == _boot.RESULT:
            return None
        if kind in (_boot.RAISED, _boot.ERROR):
            return restore(payload)
        if self._read_errno:
            return SpawnError("read", self._read_errno, self.method, "its result is lost")
        if self._closed:
            return WorkerDied(self.pid, self._status, "its handle was closed")
        return WorkerDied(self.pid, self._status, "it sent no result")

    @property
    def returncode(self) -> int | None:
        """Exit code, or the negated signal number; None while the worker runs, or
        before a :meth:`wait` has seen it end. Never waits, never reaps."""
        return None if self._status is None else os.waitstatus_to_exitcode(self._status)

    def is_alive(self) -> bool:
        """Look whether the worker still runs; never waits. Of a detached worker after
        :meth:`close`: whether it ran then."""
        return not self._poll()

    def terminate(self) -> None:
        """Send SIGTERM; nothing happens if the worker has ended.

        Raises: MethodUnavailable if it is no process; SpawnError.
        """
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL; as :meth:`terminate`."""
        self.signal(signal.SIGKILL)

    def _start_failure(self) -> BaseException:
        """Why there is no READY record; the worker has ended, or reported ERROR."""
        if not self._wait(True, 10) and self.pid is not None:
            self.kill()
            self._wait(True, 10)
        if self._read_errno:
            return SpawnError("read", self._read_errno, self.method, "what it reported is lost")
        error = self._error()
        if error is None:
            stage, errno, detail = "child", 0, "the worker ended before it was ready"
        else:
            stage, errno, detail = error
            detail = in_python(stage, detail)
        died = WorkerDied(self.pid, self._status)
        kind, payload = self._outcome()
        cause = restore(payload) if kind == _boot.ERROR and payload else None
        why = repr(cause) if cause is not None else ""
        detail = "; ".join(filter(None, (detail, why, str(died))))
        exc = SpawnError(stage, errno or None, self.method, detail)
        exc.__cause__ = cause
        return exc

    def _raise_start_failure(self) -> None:
        raise self._start_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def detach(self) -> None:
        """Let the worker outlive its owner and this handle, which then neither kills it
        nor waits for it. Once it has ended it is reaped with the next start or the next
        handle that is closed.

        Raises: MethodUnavailable for a thread of this process; SpawnError.
        """
        super().detach()
        self.__dict__["_detached"] = True

    def __del__(self) -> None:
        if self.__dict__.get("_detached"):
            return
        if not (self._closed or self._foreign or self._ended or self._poll()):
            end = "it goes on, unheard" if self.pid is None else "killed"
            warnings.warn(
                f"{worker_name(self.pid)} was still running when its handle was dropped: {end}",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        if self._foreign:
            state = "foreign"
        elif self._status is not None:
            state = f"returncode={self.returncode}"
        else:
            state = "ended" if self._ended else "running"
        return f"<anyfork.Child pid={self.pid} method={self.method} {state}>"
