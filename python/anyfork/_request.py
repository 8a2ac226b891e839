"""(fn, args, method) checked and, where it changes interpreter, pickled."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from . import _anyfork
from ._child import Child

# The table is fixed when the library is built, and an interpreter stays what it is.
_TRAITS = {row["name"]: row for row in _anyfork.method_traits()}
_NAMES = tuple(_TRAITS)


def _check(fn: object, method: object) -> str:
    if not callable(fn):
        raise TypeError(f"the target must be callable, not {type(fn).__name__}: {fn!r}")
    if method is None:
        raise TypeError(f"method is required: one of {', '.join(_NAMES)}")
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, not {type(method).__name__}")
    if method not in _NAMES:
        raise ValueError(f"unknown spawn method {method!r}; known are: {', '.join(_NAMES)}")
    return method


def _pickled(fn: Callable[..., object], args: tuple[object, ...], method: str) -> bytes:
    try:
        payload = pickle.dumps((fn, args), protocol=5)
    except Exception as exc:
        raise TypeError(
            f"{method}: the target runs in another interpreter, so it and its arguments must be "
            f"picklable: {type(exc).__name__}: {exc}. Or use method='fork'"
        ) from exc
    main = None
    if _TRAITS[method]["target"] == "fresh" and b"__main__" in payload:
        main = _main_program(method)
    path = [p for p in sys.path if isinstance(p, str)]
    return pickle.dumps((path, main, payload), protocol=5)


def _main_program(method: str) -> tuple[str, str]:
    """How a fresh interpreter finds what is defined in ``__main__``: ("name", module) or
    ("path", file), as multiprocessing's spawn method does."""
    module: Any = sys.modules["__main__"]
    name = getattr(getattr(module, "__spec__", None), "name", None)
    if name is not None:
        return "name", name
    path = getattr(module, "__file__", None)
    if path is None or not os.path.exists(path):
        raise TypeError(
            f"{method}: the target is defined in an interactive __main__, which a fresh "
            "interpreter cannot import: put it in a module, or use method='fork'"
        )
    return "path", os.path.abspath(path)


def spawn(fn: Callable[..., object], /, *args: object, method: str | None = None) -> Child:
    """Start a worker that calls ``fn(*args)``; return its handle at once.

    Args:
      fn: any callable for methods that run in the caller's memory; picklable
        where the target changes interpreter, as :func:`anyfork.methods` says.
      args: its arguments.
      method: a name of :func:`anyfork.methods`; required.

    Returns: a :class:`Child`, before the worker is ready.

    Raises, with nothing started: TypeError or ValueError for bad input,
    MethodUnavailable where the method cannot work here, SpawnError if the system
    refuses, PythonFinalizationError while the interpreter shuts down.

    The worker has default signal dispositions, an empty signal mask, standard
    streams and logging handlers of its own, and ends by ``os._exit()``. It ends
    with its owner, whatever it is doing then. Safe from any thread and any
    interpreter, also inside ``trio.run`` or an asyncio loop.
    """
    name = _check(fn, method)
    if _TRAITS[name]["pickles"]:
        return _anyfork.spawn(Child, name, _pickled(fn, args, name), ())
    return _anyfork.spawn(Child, name, fn, args)


def run(fn: Callable[..., Any], /, *args: object, method: str | None = None) -> Any:
    """Call ``fn(*args)`` in a worker and return its result.

    Blocks until the worker has ended. Arguments and errors as :func:`spawn`;
    raises also what the target raised, and :class:`WorkerDied`.
    """
    with spawn(fn, *args, method=method) as child:
        return child.result()
