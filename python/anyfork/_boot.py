"""The first Python in a worker. Imported before the fork, run after it.

Everything here runs in a process in which the other threads have just vanished,
with whatever they held. So: no import that is not done at the top or by
load_needed(), no lock that another thread may have held.

A fresh interpreter has nothing but this module, and what it imports here is most of what
a start there takes: modules in C, and what CPython itself has loaded by then. What may
not be there (threading, weakref, logging) has nothing to be repaired then.
"""

from __future__ import annotations

import _frozen_importlib
import _pickle as pickle
import _thread
import atexit
import io
import os
import sys
import time
from _collections_abc import Coroutine

from . import _anyfork

TYPE_CHECKING = False  # without typing
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any
else:
    import _signal

_faulthandler: Any
try:
    import faulthandler as _faulthandler
except ImportError:  # an isolated interpreter: nor can the target import it there
    _faulthandler = None

_needed: tuple[object, ...]  # until load_needed() there is none

# Half-imported modules are not destroyed: their finalizers are not ours to run.
_kept: list[object] = []

READY, ERROR, RESULT, RAISED, EXIT = 1, 2, 3, 4, 5


# ---- before the fork --------------------------------------------------------------


def descriptors_in_use() -> bytes:
    """Those above 2 that standard streams and logging handlers of this interpreter write
    to, as an array of C ints: the worker writes there too. Sockets are not among them:
    what two processes write to one would be mixed."""
    names = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")
    streams: list[Any] = [getattr(sys, name, None) for name in names]
    streams += [getattr(handler, "stream", None) for handler in _handlers()]
    found: list[int] = []
    for stream in streams:
        try:
            fd = stream.fileno()
        except Exception:  # not over a descriptor, or closed
            continue
        if type(fd) is int and fd > 2 and fd not in found:
            found.append(fd)
    return b"".join(fd.to_bytes(4, sys.byteorder) for fd in found)


_forking_loops: dict[int, Any] = {}


class loop_remembered:
    """A worker that is forked meanwhile knows the trio loop of this thread."""

    def __enter__(self) -> None:
        module: Any = sys.modules.get("trio._core._run")
        runner = getattr(getattr(module, "GLOBAL_RUN_CONTEXT", None), "runner", None)
        if runner is not None:
            _forking_loops[_thread.get_ident()] = runner

    def __exit__(self, *exc: object) -> None:
        _forking_loops.pop(_thread.get_ident(), None)


def _handlers() -> list[object]:
    """The logging handlers that are alive."""
    references = getattr(sys.modules.get("logging"), "_handlerList", ())
    reference: Any = getattr(sys.modules.get("weakref"), "ref", ())
    return [r() if isinstance(r, reference) else r for r in list(references)]


def load_needed() -> None:
    """What the functions below reach only on their way, before a fork from this interpreter:
    an import in the child might wait for a dead thread."""
    global _needed
    import fcntl
    import linecache
    import traceback

    # On free-threaded builds the first call of a C function prepares its argument parser,
    # and a child that was forked meanwhile waits for ever for a dead thread to finish.
    loads(pickle.dumps(None, protocol=5))
    _needed = (fcntl, linecache, traceback)  # looked for by afk_boot_prepare_fork()


# ---- before the hooks -----------------------------------------------------------


class _Deaf:
    """Stands for the socket that wakes a loop which does not run in this process."""

    def wakeup_thread_and_signal_safe(self) -> None:
        pass


def silence_loops() -> None:
    """The garbage collector hands copies of the owner's async generators to the copy of its
    loop, which would write to a descriptor that is not ours (trio/_core/_asyncgens.py).
    Those of asyncio are silent when they cannot write."""
    for runner in _forking_loops.values():
        queue: Any = getattr(runner, "entry_queue", None)
        if hasattr(queue, "wakeup"):
            queue.wakeup = _Deaf()
    _kept.append(list(_forking_loops.values()))
    _forking_loops.clear()


def repair_imports(caller: int) -> None:
    """Drop modules that dead threads were importing, and forget all import locks.

    Resetting only the lock would let the next import "succeed" with half a
    module. What the thread that asked for this worker was importing stays as it
    is, for the target comes from there: importing it again would start workers
    again, and nobody would ever finish it here, so that a thread that waits for
    its lock would wait for ever.
    """
    me = _thread.get_ident()
    importlib: Any = _frozen_importlib
    locks = importlib._module_locks
    half: list[str] = []
    for name, ref in list(locks.items()):
        # One without an owner too: a dead thread may have been about to take it.
        locks.pop(name, None)
        module = sys.modules.get(name)
        if not _is_initializing(module):
            continue
        if getattr(ref(), "owner", None) in (me, caller):
            module.__spec__._initializing = False  # type: ignore[union-attr]
        else:
            half.append(name)
    importlib._blocking_on.clear()
    for name in _with_half(half):
        _kept.append(sys.modules.pop(name))


def _is_initializing(module: object) -> bool:
    spec = getattr(module, "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _with_half(half: list[str]) -> set[str]:
    """Those modules, and the complete ones that are part of the same import: the
    submodules of a package (a new package would lack them as attributes), and
    what has a half module among its globals (a circular import). Not extension
    modules: some refuse to be loaded twice."""
    names = more = set(half)
    while more:
        prefixes = tuple(f"{name}." for name in names)
        gone = {id(sys.modules[name]) for name in names}
        more = {
            name
            for name, module in list(sys.modules.items())
            if name not in names
            and type(module) is type(sys)
            and not _is_initializing(module)
            and str(getattr(module, "__file__", None)).endswith((".py", ".pyc"))
            and (
                name.startswith(prefixes)
                or any(id(value) in gone for value in list(vars(module).values()))
            )
        }
        names = names | more
    return names


def forget_finalizers() -> None:
    """What the parent's weakref.finalize objects would do at exit is the parent's to
    do: not at this process's exit, and not when it drops its copy of the object.

    Those with ``atexit = False`` free something of this process alone: kept.
    """
    finalize: Any = getattr(sys.modules.get("weakref"), "finalize", None)
    if finalize is not None:
        for reference, info in list(finalize._registry.items()):
            if info.atexit:
                del finalize._registry[reference]
                _kept.append(info)
        finalize._registered_with_atexit = False
    _forget_threading_exits()


def _forget_threading_exits() -> None:
    """threading has an atexit list of its own. On it stay those who stop what this
    process may start itself: the threads of executors, and the launch pad."""
    module: Any = sys.modules.get("threading")
    if module is None:
        return
    module._threading_atexits.clear()
    module._SHUTTING_DOWN = False
    for name in ("thread", "process"):
        futures = sys.modules.get(f"concurrent.futures.{name}")
        stop = getattr(futures, "_python_exit", None)
        if stop is not None:
            module._register_atexit(stop)
    if _anyfork.in_main():
        module._register_atexit(_anyfork._pad_stop)


# ---- the prelude ------------------------------------------------------------------


def prelude(redirected: int, interruptible: bool) -> None:
    """Make streams, logging, threads and multiprocessing a fresh process's own.

    ``redirected``: bits of the standard streams that are not the owner's.
    ``interruptible``: SIGINT is the worker's own.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if redirected & (1 << number):
            _open_stream(number, name)
        else:
            for stream in (getattr(sys, f"__{name}__", None), getattr(sys, name, None)):
                _renew(stream)
    _renew_logging()
    if interruptible and _anyfork.in_main():
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    _reset_faulthandler()
    _name_main_thread()
    _forget_executors()
    _reset_multiprocessing()


def begin(streams: int, interruptible: bool) -> None:
    """In a template's worker, which has had its prelude: what only its start could tell.

    ``streams``: bits 0 to 2, the standard streams that are another file than the template's;
    bits 3 to 5, those that are closed. ``interruptible``: SIGINT is the worker's own.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if streams & (8 << number):
            _kept.append((getattr(sys, f"__{name}__", None), getattr(sys, name, None)))
            setattr(sys, f"__{name}__", None)
            setattr(sys, name, None)
        elif streams & (1 << number):
            _open_stream(number, name)
    if interruptible:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def _open_stream(number: int, name: str) -> None:
    """A standard stream that is another file than the owner's: what the owner has put
    in its place, a test's capture say, is not the worker's."""
    _kept.append((getattr(sys, f"__{name}__", None), getattr(sys, name, None)))
    stream = new_stream(number, name)
    setattr(sys, f"__{name}__", stream)
    setattr(sys, name, stream)


def new_stream(number: int, name: str, unbuffered: bool = False) -> Any:
    """A standard stream as create_stdio() of CPython's pylifecycle.c makes it."""
    old = getattr(sys, f"__{name}__", None)
    writes = number > 0
    direct = unbuffered and writes
    buffer: Any = open(  # noqa: SIM115
        number, "wb" if writes else "rb", buffering=0 if direct else -1, closefd=False
    )
    raw = buffer if direct else buffer.raw
    raw.name = f"<{name}>"
    stream: Any = io.TextIOWrapper(
        buffer,
        encoding=getattr(old, "encoding", None),
        errors=getattr(old, "errors", None) or ("backslashreplace" if number == 2 else None),
        newline="\n",
        line_buffering=not direct and (number == 2 or raw.isatty()),
        write_through=direct,
    )
    stream.mode = "w" if writes else "r"
    return stream


_renewed: set[int] = set()


def _renew(stream: object) -> None:
    """Give a text stream over a descriptor a new buffer: without the lock that a
    dead thread may hold, and without what the parent had not flushed.

    In place: wrappers and handlers that refer to the stream go on with it.
    """
    if not isinstance(stream, io.TextIOWrapper) or id(stream) in _renewed:
        return
    try:
        buffer, encoding, errors = stream.buffer, stream.encoding, stream.errors
        line_buffering, write_through = stream.line_buffering, stream.write_through
        raw = buffer.raw
    except (AttributeError, ValueError):  # not a buffer, or detached
        return
    kind = type(buffer)
    if kind not in (io.BufferedWriter, io.BufferedReader, io.BufferedRandom):
        return
    if type(raw) is not io.FileIO or raw.closed:
        return
    mode = "rb+" if "+" in raw.mode else "rb" if "r" in raw.mode else "wb"
    try:
        new_raw = io.FileIO(raw.fileno(), mode, closefd=raw.closefd)
    except OSError:  # somebody closed the descriptor
        return
    new_raw.name = raw.name
    _kept.append(buffer)
    _renewed.add(id(stream))
    io.TextIOWrapper.__init__(
        stream,
        kind(new_raw),
        encoding=encoding,
        errors=errors,
        line_buffering=line_buffering,
        write_through=write_through,
    )


def _renew_logging() -> None:
    logging = sys.modules.get("logging")
    if logging is None:
        return
    for handler in _handlers():
        # Not through a property: logging's last-resort handler has one.
        state = getattr(handler, "__dict__", {})
        _renew(state.get("stream"))
        for name in ("sock", "socket"):  # of those that connect when they need to
            if _is_tombstone(state.get(name)):
                _kept.append(state[name])
                state[name] = None
        if isinstance(state.get("buffer"), list):  # a BufferingHandler: not flushed twice
            state["buffer"] = []
    atexit.register(logging.shutdown)


def _is_tombstone(file: object) -> bool:
    """Whether a placeholder has the descriptor's number."""
    import fcntl  # is there: load_needed()

    try:
        return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_PATH)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _reset_faulthandler() -> None:
    """Its handlers are gone; were it still enabled, enable() would do nothing."""
    if _faulthandler is not None and _faulthandler.is_enabled():
        _faulthandler.disable()


def _name_main_thread() -> None:
    threading: Any = sys.modules.get("threading")
    thread = threading.current_thread() if threading is not None else None
    if thread is not None:
        # Not by its setter, which renames the process, from 3.14 on.
        thread._name = "MainThread"


def _forget_executors() -> None:
    """The executors of dead threads: threading._shutdown() would wake them, through a
    lock that their thread may have held at the fork (concurrent/futures/process.py,
    _python_exit), and wait for ever."""
    for name, attribute in (
        ("concurrent.futures.thread", "_threads_queues"),
        ("concurrent.futures.process", "_threads_wakeups"),
    ):
        table: Any = getattr(sys.modules.get(name), attribute, None)
        if table is not None:
            _kept.append(list(table.items()))
            table.clear()


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
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker: Any = getattr(module, "_resource_tracker", None)
    if tracker is not None:
        # The owner's process, behind a pipe that is not ours: one of our own is started
        # when it is needed. Its lock may have been a dead thread's.
        tracker._fd = tracker._pid = None
        if hasattr(tracker, "_lock"):
            tracker._lock = _thread.RLock()


def set_environment(entries: list[bytes]) -> None:
    """The whole environment of this start, ``NAME=value`` each. Most of it is there."""
    wanted = {}
    for entry in entries:
        name, _equals, value = entry.partition(b"=")
        if name:  # some programs are given "=x"
            wanted[name] = value
    there: Any = getattr(os.environb, "_data", None)  # as bytes: items() makes them all anew
    if there is None:
        there = dict(os.environb)
    if there == wanted:
        return
    zone = there.get(b"TZ")
    for name in there.keys() - wanted.keys():
        del os.environb[name]
    for name, value in wanted.items():
        if there.get(name) != value:
            os.environb[name] = value
    if wanted.get(b"TZ") != zone:
        time.tzset()


_resets: list[Callable[[], object]] = []


def register_child_reset(fn: Callable[[], object]) -> Callable[[], object]:
    """Call ``fn()`` in every worker that is forked from this interpreter's memory, once
    its streams, logging and imports are its own and before its target.

    For state that a copy must not share: caches of connections, random generators. An
    exception ends the worker, and is the cause of the SpawnError that its owner gets.
    Not called in children of :func:`anyfork.fork`: those have :func:`os.register_at_fork`.

    Returns: ``fn``, so that it serves as a decorator. Raises: TypeError.
    """
    if not callable(fn):
        raise TypeError(f"a callable is wanted, not {type(fn).__name__}: {fn!r}")
    _resets.append(fn)
    return fn


def reset_registered() -> None:
    """Random generators and caches of libraries that are loaded, and what was registered."""
    for name, attribute in (("numpy.random", "seed"), ("torch.random", "seed")):
        seed = getattr(sys.modules.get(name), attribute, None)
        if callable(seed):
            seed()
    # Its idle threads are gone. trio drops them itself since 0.29.
    threads = getattr(sys.modules.get("trio._core._thread_cache"), "THREAD_CACHE", None)
    idle = getattr(threads, "_idle_workers", None)
    if isinstance(idle, dict):
        idle.clear()
    for fn in list(_resets):
        fn()


# ---- the target ---------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """What a fresh interpreter calls ``__mp_main__`` is the program itself here."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__mp_main__" and module not in sys.modules:
            module = "__main__"
        try:
            return super().find_class(module, name)
        except AttributeError:
            if module != "__main__" or not _absent_main:
                raise
            _import_main(*_absent_main.pop())
            return super().find_class("__mp_main__", name)


def loads(data: Any, buffers: Any = ()) -> Any:
    """pickle.loads(), of what comes from a worker or goes to one."""
    if type(data) is not bytes:  # large, in shared memory: not searched
        return _loads_large(data, buffers)
    if b"_main__" not in data:
        return pickle.loads(data, buffers=buffers)
    return _Unpickler(io.BytesIO(data), buffers=buffers).load()


def _loads_large(data: Any, buffers: Any) -> Any:
    try:
        return pickle.loads(data, buffers=buffers)
    except (AttributeError, ImportError):
        if b"_main__" not in (data := bytes(data)):
            raise
        return _Unpickler(io.BytesIO(data), buffers=buffers).load()


# How to import what is __main__ in the owner, where a target came by value: what cannot be
# pickled so, a function that functools.cache has wrapped, say, is found there after all.
_absent_main: list[tuple[str, str]] = []
importing_main = False  # a fresh interpreter is at it, for the sake of its target


def load(data: bytes) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Unpickle (fn, args), with the caller's module path behind this one's, and what was
    its ``__main__`` as ours: imported under the name ``__mp_main__``, so that what is
    guarded by ``if __name__ == "__main__"`` does not run."""
    path, argv, main, payload = pickle.loads(data)
    if isinstance(path, tuple):  # the whole of it
        sys.path[:] = path
    elif path is not None:
        sys.path.extend(entry for entry in path if entry not in sys.path)
    if argv is not None:
        sys.argv = argv
    if main is not None:
        kind, where, needed = main
        if needed:
            _import_main(kind, where)
        else:
            _absent_main[:] = [(kind, where)]
    fn, args = loads(payload)
    return fn, args


def _import_main(kind: str, where: str) -> None:
    from multiprocessing import spawn

    global importing_main
    fix: Any = getattr(spawn, f"_fixup_main_from_{kind}")
    importing_main = True
    try:
        fix(where)
    finally:
        importing_main = False


def dumps(value: object, parts: list[Any] | None = None) -> bytes:
    """What goes back to the owner. What came by value goes back so.

    ``parts``: where its buffers go (PEP 574), behind what is there, if not into the pickle.
    """
    keep = None if parts is None else parts.append
    before = 0 if parts is None else len(parts)
    try:
        return pickle.dumps(value, protocol=5, buffer_callback=keep)
    except Exception:
        cloudpickle: Any = sys.modules.get("cloudpickle")
        if cloudpickle is None:
            raise
        if parts is not None:
            del parts[before:]
        try:
            data: bytes = cloudpickle.dumps(value, protocol=5, buffer_callback=keep)
        except Exception:
            pass  # the first failure says more
        else:
            return data
        raise


def rehearse() -> None:
    """The way of a start, before there is one: what it touches is this process's own then."""
    run(load(pickle.dumps((None, None, None, pickle.dumps((_nothing, ()), protocol=5)))))


def _nothing() -> None:
    pass


# What a template has loaded, in its workers; else nothing.
loaded: frozenset[str] = frozenset()
_LATE = b"\0late"  # no pickle ends so: they end with a dot
_LATE_MOST = 1 << 20  # bytes of a payload that may be copied for that


def _with_late(payload: bytes) -> bytes:
    """The payload, and behind it which modules this worker had to import itself."""
    if not loaded or len(sys.modules) == len(loaded) or len(payload) > _LATE_MOST:
        return payload
    names = ",".join(sorted(sys.modules.keys() - loaded)).encode(errors="replace")
    return b"".join((payload, names, len(names).to_bytes(4, "little"), _LATE))


def late_imports(payload: bytes) -> list[str]:
    """The owner's side of it."""
    if not payload.endswith(_LATE):
        return []
    end = len(payload) - len(_LATE) - 4
    size = int.from_bytes(payload[end : end + 4], "little")
    return payload[max(0, end - size) : end].decode(errors="replace").split(",")


def run(call: tuple[Callable[..., object], tuple[object, ...]]) -> tuple[int, int, bytes]:
    """Call the target: (report kind or 0, exit code, payload)."""
    fn, args = call
    try:
        result = fn(*args)
        try:
            return RESULT, 0, _with_late(dumps(result))
        except Exception as exc:
            kind = type(result)
            if isinstance(result, Coroutine):
                result.close()  # or it complains that nobody awaited it
                exc.add_note("It is a coroutine: run it there, by trio.run() or asyncio.run().")
            exc.add_note(
                "The target returned, but its result cannot be pickled: it is of type "
                f"{kind.__module__}.{kind.__qualname__}."
            )
            raise
    except SystemExit as exc:
        return 0, _exit_code(exc), b""
    except BaseException as exc:
        return RAISED, 1, _with_late(describe(exc))


def _exit_code(exc: SystemExit) -> int:
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF
    try:
        if sys.stderr is not None:
            print(exc.code, file=sys.stderr)
    except Exception:
        pass  # as CPython does: the exit code counts
    return 1


def describe(exc: BaseException) -> bytes:
    """An exception for the owner: pickled if that works both ways, else its repr."""
    import traceback  # is there in a forked child: load_needed()

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
        pickled = dumps(exc)
        pickle.loads(pickled)
    except BaseException:
        pickled = None
    name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
    return pickle.dumps((pickled, name, shown, text), protocol=5)


def finish() -> None:
    """What Py_FinalizeEx() would do for Python code, without finalizing."""
    threading: Any = sys.modules.get("threading")
    try:
        if threading is not None:
            # What stands for a thread that Python did not start is dropped while that still
            # works.
            vars(threading._thread_local_info).pop("_track_dummy_thread_ref", None)
            threading._shutdown()
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


def main() -> None:
    """In a fresh interpreter of method exec: read the target, call it, end. Never returns."""
    _parent, report_fd, target_fd, name = sys.argv[1:5]
    if name:
        _anyfork.set_comm(name)
    with open(int(target_fd), "rb") as file:
        data = file.read()
    sys.path[:], sys.argv[:], *_rest = pickle.loads(data)
    _anyfork.exec_worker(int(report_fd), data)


_whole = True  # the last line: this module is complete
