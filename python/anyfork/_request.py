"""(fn, args, method, options) checked and, where it changes interpreter, pickled."""

from __future__ import annotations

import functools
import io
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, Unpack

from . import _anyfork, _boot, _exec, _options
from ._child import Child
from ._options import Options, Path

# The table is fixed when the library is built, and an interpreter stays what it is.
_TRAITS = {row["name"]: row for row in _anyfork.method_traits()}
_NAMES = tuple(_TRAITS)
# inspect.CO_COROUTINE, CO_ASYNC_GENERATOR
_CO_COROUTINE, _CO_ASYNC_GENERATOR = 0x80, 0x200


def _check_place() -> None:
    if _boot.importing_main:
        raise RuntimeError(
            "a worker that imports the program, where its target is defined, would start workers "
            "itself: what starts them belongs under `if __name__ == '__main__':`"
        )


def _is_async(fn: object) -> bool:
    """As inspect.iscoroutinefunction(); its import takes longer than a start."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not hasattr(fn, "__code__") and not isinstance(fn, type):
        fn = getattr(type(fn), "__call__", None)  # noqa: B004
    flags = getattr(getattr(fn, "__code__", None), "co_flags", 0)
    return bool(flags & (_CO_COROUTINE | _CO_ASYNC_GENERATOR))


def _check(fn: object, method: object) -> str:
    if not callable(fn):
        hint = "; a program is started by spawn(argv=[...])" if isinstance(fn, list | tuple) else ""
        what = "nothing" if fn is None else f"{type(fn).__name__}: {fn!r}"
        raise TypeError(f"the target must be callable, not {what}{hint}")
    if _is_async(fn):
        raise TypeError(
            f"the target is a coroutine function, which needs a loop to run in: {fn!r}; give "
            "spawn(trio.run, fn, ...) or a function that calls asyncio.run(fn(...))"
        )
    if method is None:
        raise TypeError(f"method is required: one of {', '.join(_NAMES)}")
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, not {type(method).__name__}")
    if method not in _NAMES:
        raise ValueError(f"unknown spawn method {method!r}; known are: {', '.join(_NAMES)}")
    return method


class _Pickler(pickle.Pickler):
    """Notices whether something is to be found in the program itself."""

    names_main = False

    def reducer_override(self, obj: Any) -> Any:
        # In a fresh worker the program is __mp_main__.
        if getattr(obj, "__module__", None) in ("__main__", "__mp_main__"):
            self.names_main = True
        return NotImplemented


def _pickled(fn: Callable[..., object], args: tuple[object, ...], method: str) -> bytes:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
    try:
        pickler.dump((fn, args))
    except Exception as exc:
        raise TypeError(
            f"{method}: the target runs in another interpreter, so it and its arguments must be "
            f"picklable: {type(exc).__name__}: {exc}. Or use method='fork'"
        ) from exc
    main = None
    if _TRAITS[method]["target"] == "fresh" and pickler.names_main:
        main = _main_program(method)
    return pickle.dumps((_search_path(), sys.argv, main, buffer.getvalue()), protocol=5)


def _search_path() -> list[str]:
    """sys.path, which must not follow the worker's own working directory."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return [p for p in sys.path if isinstance(p, str)]
    return [os.path.join(here, p) if p else here for p in sys.path if isinstance(p, str)]


# CPython takes it away once the program's own code has run, but threads may go on.
_MAIN_FILE = getattr(sys.modules.get("__main__"), "__file__", None)


def _main_program(method: str) -> tuple[str, str]:
    """How a fresh interpreter finds what is defined in ``__main__``: ("name", module) or
    ("path", file), as multiprocessing's spawn method does."""
    module: Any = sys.modules["__main__"]
    name = getattr(getattr(module, "__spec__", None), "name", None)
    if name is not None:
        if name == "__main__" or name.endswith(".__main__"):
            raise TypeError(
                f"{method}: the target is defined in {name}, which cannot be imported a second "
                "time: put it in a module of its own, or use method='fork'"
            )
        return "name", name
    path = getattr(module, "__file__", None) or _MAIN_FILE
    if path is None or not os.path.exists(path):
        raise TypeError(
            f"{method}: the target is defined in an interactive __main__, which a fresh "
            "interpreter cannot import: put it in a module, or use method='fork'"
        )
    return "path", os.path.abspath(path)


def _check_options(method: str, options: Options) -> dict[str, Any] | None:
    if not options:
        return None
    prepared = _options.prepare(method, options)
    if not _TRAITS[method]["has_process"]:
        raise ValueError(
            f"{method}: {min(options)}: the worker is a thread of this process, and has no "
            "such state of its own"
        )
    if "program" in prepared and method != "exec":
        raise ValueError(f"{method}: executable: this method starts no program; use method='exec'")
    return prepared


def _exec_options(options: Options) -> dict[str, Any]:
    prepared = _options.prepare("exec", options)
    # As subprocess does: a program should not find ignored what Python ignores.
    asked = prepared.get("ignored_signals", ())
    ours = [sig for sig in (signal.SIGPIPE, signal.SIGXFSZ) if sig not in asked]
    prepared.setdefault("default_signals", ours)
    return prepared


def _exec_target(fn: Callable[..., object], args: tuple[object, ...], options: Options) -> Child:
    prepared = _exec_options(options)
    executable = os.fsdecode(prepared.get("program") or _exec.interpreter())
    name = prepared.pop("name", b"")  # an interpreter finds its files by argv[0]
    fd = _exec.target_file(_pickled(fn, args, "exec"))
    try:
        taken = [there for _here, there in prepared.get("fds", ())]
        report_to = max([2, *taken]) + 1
        prepared["fds"] = [*prepared.get("fds", ()), (fd, report_to + 1)]
        prepared["argv"] = _exec.argv(executable, report_to, report_to + 1, name)
        prepared["program"] = os.fsencode(executable)
        _audit(prepared, options)
        child = _anyfork.spawn(Child, "exec", None, (), prepared, report_to)
    finally:
        os.close(fd)
    return child


def _exec_program(argv: Iterable[Path], options: Options) -> Child:
    prepared = _exec_options(options)
    if isinstance(argv, str | bytes) or not isinstance(argv, Iterable):
        raise TypeError(f"argv: a sequence of words is wanted, not {type(argv).__name__}")
    prepared["argv"] = [_options.as_bytes("argv", word) for word in argv]
    _audit(prepared, options)
    child = _anyfork.spawn(Child, "exec", None, (), prepared, -1)
    child.__dict__["_program"] = True
    return child


def _audit(prepared: dict[str, Any], options: Options) -> None:
    argv = prepared["argv"]
    program = prepared.get("program") or (argv[0] if argv else b"")
    sys.audit("subprocess.Popen", program, argv, options.get("cwd"), options.get("env"))


def spawn(
    fn: Callable[..., object] | None = None,
    /,
    *args: object,
    method: str | None = None,
    argv: Iterable[Path] | None = None,
    **options: Unpack[Options],
) -> Child:
    """Start a worker that calls ``fn(*args)``, or runs a program; return its handle.

    Args:
      fn: any callable for methods that run in the caller's memory; picklable
        where the target changes interpreter, as :func:`anyfork.methods` says.
      args: its arguments.
      method: a name of :func:`anyfork.methods`; required for a callable.
      argv: instead of ``fn``, the words of a command. Method ``exec``.
      options: the state of the worker: see :class:`anyfork.Options`.

    Returns: a :class:`Child`, before the worker is ready; by ``exec`` as soon as the
    program runs.

    Raises, with nothing started: TypeError or ValueError for bad input,
    MethodUnavailable where the method cannot work here, SpawnError if the system
    refuses, PythonFinalizationError while the interpreter shuts down.

    A worker has default signal dispositions, ignores SIGINT, has an empty signal mask,
    standard streams and logging handlers of its own, and of the owner's descriptors
    only those that it was given. A forked one ends by ``os._exit()``. It ends with its
    owner, whatever it is doing then. Safe from any thread and any interpreter, also
    inside ``trio.run`` or an asyncio loop.
    """
    _check_place()
    if argv is not None:
        if fn is not None:
            raise TypeError("argv: a worker has a target or a program, not both")
        if method not in (None, "exec"):
            raise ValueError(f"{method}: argv: only method 'exec' starts programs")
        return _exec_program(argv, options)
    name = _check(fn, method)
    assert fn is not None
    if name == "exec":
        return _exec_target(fn, args, options)
    prepared = _check_options(name, options)
    target: Callable[..., object] | bytes = fn
    if _TRAITS[name]["pickles"]:
        target, args = _pickled(fn, args, name), ()
    with _boot.loop_remembered():
        return _anyfork.spawn(Child, name, target, args, prepared, -1)


def run(
    fn: Callable[..., Any],
    /,
    *args: object,
    method: str | None = None,
    **options: Unpack[Options],
) -> Any:
    """Call ``fn(*args)`` in a worker and return its result.

    Blocks until the worker has ended. Arguments and errors as :func:`spawn`;
    raises also what the target raised, and :class:`WorkerDied`. A standard stream cannot
    be a pipe, of which nobody would have the other end.
    """
    if "argv" in options:
        raise TypeError("argv: run() calls a target; a program is started by spawn(argv=...)")
    for name in ("stdin", "stdout", "stderr"):
        if options.get(name) == _options.PIPE and type(options.get(name)) is int:
            raise ValueError(f"{name}: nobody would have the other end of the pipe: use spawn()")
    with spawn(fn, *args, method=method, **options) as child:
        return child.result()
