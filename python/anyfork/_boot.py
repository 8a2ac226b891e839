"""The first Python in a worker. Imported before the fork, run after it.

Everything here runs in a process in which the other threads have just vanished,
with whatever they held. So: no import that is not done at the top, no lock that
another thread may have held.
"""

from __future__ import annotations

import _frozen_importlib
import _thread
import atexit
import io
import linecache
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from . import _errors

# Half-imported modules are not destroyed: their finalizers are not ours to run.
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
    _repair_streams()
    _name_main_thread()
    _reset_multiprocessing()


def _repair(stream: object) -> None:
    """Give a text stream over a file descriptor new locks and empty buffers.

    In place: whoever holds a reference has the repaired stream. A thread that was
    inside write() left a lock that nothing resets, and text that the parent had
    buffered is the parent's to write. Other kinds of streams are left alone.
    """
    if type(stream) is not io.TextIOWrapper:
        return
    buffer: Any = stream.buffer
    if type(buffer) not in (io.BufferedWriter, io.BufferedReader, io.BufferedRandom):
        return
    raw = buffer.raw
    if type(raw) is not io.FileIO or raw.closed:
        return
    mode = getattr(stream, "mode", None)
    settings: dict[str, Any] = {
        "encoding": stream.encoding,
        "errors": stream.errors,
        "line_buffering": stream.line_buffering,
        "write_through": stream.write_through,
    }
    try:
        buffer.__init__(raw)
        stream.__init__(buffer, **settings)  # type: ignore[misc]
    except (OSError, ValueError):
        return  # its descriptor is gone: as unusable as it was
    if mode is not None:
        stream.mode = mode  # type: ignore[misc]


def _repair_streams() -> None:
    streams = [getattr(sys, f"{dunder}{name}{dunder}", None)
               for name in ("stdin", "stdout", "stderr") for dunder in ("__", "")]
    logging = sys.modules.get("logging")
    for ref in list(getattr(logging, "_handlerList", ())):
        handler = ref() if isinstance(ref, weakref.ref) else ref
        # Not through a property: logging's last-resort handler has one.
        streams.append(getattr(handler, "__dict__", {}).get("stream"))
    for stream in {id(s): s for s in streams}.values():
        _repair(stream)


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
