"""(fn, args, method, options) checked and, where it changes interpreter, pickled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Unpack

from . import _anyfork, _boot, _exec, _options, _pickling, _template
from ._child import Child
from ._options import Options, Path

# The table is fixed when the library is built, and an interpreter stays what it is.
TRAITS = {row["name"]: row for row in _anyfork.method_traits()}
_NAMES = tuple(TRAITS)
DEFAULT = _template.METHOD
# inspect.CO_COROUTINE, CO_ASYNC_GENERATOR
_CO_COROUTINE, _CO_ASYNC_GENERATOR = 0x80, 0x200


_NOT_HERE = (
    "a worker that imports the program, where its target is defined, would start workers itself: "
    "what starts them belongs under `if __name__ == '__main__':`"
)


def is_async(fn: object) -> bool:
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
    if is_async(fn):
        raise TypeError(
            f"the target is a coroutine function, which needs a loop to run in: {fn!r}; give "
            "spawn(trio.run, fn, ...) or a function that calls asyncio.run(fn(...))"
        )
    if method is None:
        return DEFAULT
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, not {type(method).__name__}")
    if method not in _NAMES:
        raise ValueError(f"unknown spawn method {method!r}; known are: {', '.join(_NAMES)}")
    return method


def _check_template(method: str, options: Options) -> _template.Template | None:
    template: object = options.pop("template", None)
    if method != _template.METHOD:
        if template is not None:
            raise ValueError(f"{method}: template: only method {_template.METHOD!r} has one")
        return None
    if template is not None and not isinstance(template, _template.Template):
        raise TypeError(f"template: a Template is wanted, not {type(template).__name__}")
    return template


def _check_options(method: str, options: Options) -> dict[str, Any] | None:
    if not options:
        return None
    prepared = _options.prepare(method, options)
    if not TRAITS[method]["has_process"]:
        raise ValueError(
            f"{method}: {min(options)}: the worker is a thread of this process, and has no "
            "such state of its own"
        )
    if "program" in prepared and method != "exec":
        raise ValueError(f"{method}: executable: this method starts no program; use method='exec'")
    return prepared


def check_options(method: str, options: Options) -> None:
    """Raise what spawn() would raise for them; nothing is changed."""
    options = options.copy()
    _check_template(method, options)
    _check_options(method, options)


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
      method: a name of :func:`anyfork.methods`; for a callable ``zygote`` unless it is given.
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
    if _boot.importing_main:
        raise RuntimeError(_NOT_HERE)
    if argv is not None:
        if fn is not None:
            raise TypeError("argv: a worker has a target or a program, not both")
        _check_template("exec", options)
        if method not in (None, "exec"):
            raise ValueError(f"{method}: argv: only method 'exec' starts programs")
        return _exec.start_program(argv, options)
    name = _check(fn, method)
    assert fn is not None
    template = _check_template(name, options) if options else None
    if name == "exec":
        return _exec.start_target(fn, args, options)
    prepared = _check_options(name, options) if options else None
    if name == _template.METHOD:
        return (template or _template.default()).start(fn, args, prepared)
    target: Callable[..., object] | bytes = fn
    if TRAITS[name]["pickles"]:
        fresh = TRAITS[name]["target"] == "fresh"
        target, args = _pickling.pickled((fn, args), name, fresh), ()
    with _boot.loop_remembered():
        child = _anyfork.spawn(Child, name, target, args, prepared, -1, None)
    assert not isinstance(child, str)
    return child


def spawn_many(
    fn: Callable[..., object],
    args_of_each: Iterable[tuple[object, ...]],
    /,
    **options: Unpack[Options],
) -> list[Child]:
    """Start a worker for each of these arguments, ``fn(*args)``, by method ``zygote``.

    What takes long is done once: this process is looked at, and standbys that are not ready
    are asked for in one message, and forked while the first ones run.

    Args:
      fn, options: as of :func:`spawn`, for all of them.
      args_of_each: a tuple for each worker.

    Returns: their handles, in the same order.

    Raises: as :func:`spawn`; those that were started by then have been ended.
    """
    if _boot.importing_main:
        raise RuntimeError(_NOT_HERE)
    name = _check(fn, None)
    calls = list(args_of_each)
    for args in calls:
        if not isinstance(args, tuple):
            raise TypeError(f"args_of_each: a tuple for each worker is wanted, not {args!r}")
    template = _check_template(name, options) if options else None
    prepared = _check_options(name, options) if options else None
    if prepared and prepared.get("fresh"):
        raise ValueError("fresh: these workers share a process of the template: use spawn()")
    return (template or _template.default()).start_many(fn, calls, prepared)


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
