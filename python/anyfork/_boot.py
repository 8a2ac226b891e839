"""The first Python in a worker. Imported before the fork, run after it.

Everything here runs in a process in which the other threads have just vanished,
with whatever they held. So: no import that is not done at the top, no lock that
another thread may have held.
"""

from __future__ import annotations

import _frozen_importlib
import _thread
import atexit
import contextlib
import io
import linecache
import os
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from . import _errors

# What is replaced must not be destroyed: its destructor would flush what the
# parent had buffered, or wait for a lock of a dead thread.
_kept: list[object] = []

READY, ERROR, RESULT, RAISED, EXIT = 1, 2, 3, 4, 5


# ---- before the hooks -----------------------------------------------------------


def repair_imports() -> None:
    """Drop modules that a dead thread was importing, and forget its import locks.

    Resetting only the lock would let the next import "succeed" with half a
    module. What this very thread is importing stays: it holds those locks itself.
    """
    me = _thread.get_ident()
    importlib: Any = _frozen_importlib
    locks = importlib._module_locks
    for name, ref in list(locks.items()):
        lock = ref()
        owner = getattr(lock, "owner", None)
        if lock is None or owner is None or owner == me:
            continue
        locks.pop(name, None)
        module = sys.modules.get(name)
        if module is not None and _is_initializing(module):
            _kept.append(module)
            del sys.modules[name]
    importlib._blocking_on.clear()


def _is_initializing(module: object) -> bool:
    spec = getattr(module, "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def forget_finalizers() -> None:
    """The parent's weakref.finalize callbacks are the parent's to run."""
    finalize: Any = weakref.finalize
    for info in list(finalize._registry.values()):
        info.atexit = False
    finalize._registered_with_atexit = False


# ---- the prelude ------------------------------------------------------------------


def prelude() -> None:
    """Make streams, logging, threads and multiprocessing a fresh process's own."""
    _rebuild_streams()
    _name_main_thread()
    _reset_multiprocessing()


def _layers(stream: object) -> tuple[Any, Any, Any] | None:
    """(text, buffer, raw) of a text stream over a file descriptor, else None."""
    if type(stream) is not io.TextIOWrapper:
        return None
    buffer = stream.buffer
    if type(buffer) not in (io.BufferedWriter, io.BufferedReader, io.BufferedRandom):
        return None
    raw = buffer.raw
    if type(raw) is not io.FileIO or raw.closed:
        return None
    return stream, buffer, raw


def _rebuilt(stream: Any, fd: int | None = None) -> Any:
    """A new stream over the same descriptor, with none of the old one's locks and
    buffered text; None if it is not that kind of stream."""
    layers = _layers(stream)
    if layers is None:
        return None
    text, buffer, raw = layers
    fd = raw.fileno() if fd is None else fd
    try:
        os.fstat(fd)
    except OSError:
        return None
    mode = raw.mode.replace("x", "w")
    if "+" in mode:
        mode = "rb+"
    new_raw = io.FileIO(fd, mode.replace("a", "w"), closefd=False)
    new_raw.name = raw.name
    new_buffer: Any
    if type(buffer) is io.BufferedReader:
        new_buffer = io.BufferedReader(new_raw)
    elif type(buffer) is io.BufferedRandom:
        new_buffer = io.BufferedRandom(new_raw)
    else:
        new_buffer = io.BufferedWriter(new_raw)
    new = io.TextIOWrapper(
        new_buffer,
        encoding=text.encoding,
        errors=text.errors,
        line_buffering=text.line_buffering,
        write_through=text.write_through,
    )
    with contextlib.suppress(AttributeError):
        new.mode = text.mode  # type: ignore[misc]
    _kept.append(stream)
    return new


def _rebuild_streams() -> None:
    replaced: dict[int, Any] = {}
    for name in ("stdin", "stdout", "stderr"):
        for attribute in (f"__{name}__", name):
            old = getattr(sys, attribute, None)
            if old is None:
                continue
            new = replaced.get(id(old))
            if new is None:
                new = _rebuilt(old)
                if new is None:
                    continue
                replaced[id(old)] = new
            setattr(sys, attribute, new)
    _retarget_logging(replaced)


def _retarget_logging(replaced: dict[int, Any]) -> None:
    logging = sys.modules.get("logging")
    if logging is None:
        return
    for ref in list(getattr(logging, "_handlerList", ())):
        handler = ref() if isinstance(ref, weakref.ref) else ref
        # Not through a property: logging's last-resort handler has one.
        state = getattr(handler, "__dict__", {})
        old = state.get("stream")
        if old is None:
            continue
        new = replaced.get(id(old)) or _rebuilt(old)
        if new is not None:
            state["stream"] = new


def _name_main_thread() -> None:
    thread = threading.current_thread()
    if isinstance(thread, threading.Thread):
        thread.name = "MainThread"


def _reset_multiprocessing() -> None:
    """As multiprocessing.Process._bootstrap() does in its own children."""
    util: Any = sys.modules.get("multiprocessing.util")
    process: Any = sys.modules.get("multiprocessing.process")
    if util is None or process is None:
        return
    process._children = set()
    util._finalizer_registry.clear()
    util._run_after_forkers()
    atexit.register(util._exit_function)


# ---- the target ---------------------------------------------------------------------


def load(data: bytes) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Unpickle (fn, args), with the caller's module path behind this one's."""
    path, payload = pickle.loads(data)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    fn, args = pickle.loads(payload)
    return fn, args


def run(call: tuple[Callable[..., object], tuple[object, ...]]) -> tuple[int, int, bytes]:
    """Call the target: (report kind or 0, exit code, payload)."""
    fn, args = call
    try:
        result = fn(*args)
        return RESULT, 0, pickle.dumps(result, protocol=5)
    except SystemExit as exc:
        return 0, _exit_code(exc), b""
    except BaseException as exc:
        return RAISED, 1, describe(exc)


def _exit_code(exc: SystemExit) -> int:
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    print(exc.code, file=sys.stderr)
    return 1


def describe(exc: BaseException) -> bytes:
    """An exception for the owner: pickled if that works both ways, else its repr."""
    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException as failure:
        text = f"(no traceback: {type(failure).__name__})"
    try:
        shown = str(exc)
    except BaseException as failure:
        shown = f"(no text: {type(failure).__name__})"
    pickled: bytes | None
    try:
        pickled = pickle.dumps(exc, protocol=5)
        pickle.loads(pickled)
    except BaseException:
        pickled = None
    name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
    return pickle.dumps((pickled, name, shown, text), protocol=5)


def restore(payload: bytes) -> BaseException:
    """The owner's side of describe(): the exception, with the remote traceback."""
    pickled, name, shown, text = pickle.loads(payload)
    exc: BaseException
    if pickled is None:
        exc = _errors.RemoteError(name, shown, text)
    else:
        try:
            exc = pickle.loads(pickled)
        except Exception as failure:
            exc = _errors.RemoteError(name, shown, text)
            exc.add_note(f"it could not be unpickled here: {failure!r}")
    exc.add_note(f"Traceback in the worker:\n{text.rstrip()}")
    return exc


def finish() -> None:
    """What Py_FinalizeEx() would do for Python code, without finalizing."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    finally:
        try:
            atexit._run_exitfuncs()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    if stream is not None:
                        stream.flush()
                except (OSError, ValueError):
                    pass


# Modules that the functions above reach only on their way: loaded now, for an
# import in the child might wait for a dead thread.
_needed = (linecache, traceback, pickle)
