"""A target on its way to another interpreter: pickled, with what it is found by there."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

Target = tuple[Callable[..., object], tuple[object, ...]]


class _Pickler(pickle.Pickler):
    """Notices whether something is to be found in the program itself."""

    names_main = False

    def reducer_override(self, obj: Any) -> Any:
        # In a fresh worker the program is __mp_main__.
        if getattr(obj, "__module__", None) in ("__main__", "__mp_main__"):
            self.names_main = True
        return NotImplemented


def _refused(method: str, exc: Exception) -> TypeError:
    return TypeError(
        f"{method}: the target runs in another interpreter, so it and its arguments must be "
        f"picklable: {type(exc).__name__}: {exc}. Or use method='fork'"
    )


def by_reference(call: Target, method: str) -> tuple[bytes, bool]:
    """The pickle, and whether something in it is defined in ``__main__``. TypeError."""
    try:
        data = pickle.dumps(call, protocol=5)
        if b"_main__" not in data:
            return data, False
        pickler = _Pickler(io.BytesIO(), protocol=5)  # a text may contain it too
        pickler.dump(call)
    except Exception as exc:
        raise _refused(method, exc) from exc
    return data, pickler.names_main


def looked_through(
    call: tuple[Any, ...], out_of_band: Callable[[Any], object]
) -> tuple[bytes, bool]:
    """:func:`by_reference` of what is large: its bytes are not searched."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=5, buffer_callback=out_of_band)
    pickler.dump(call)
    return file.getvalue(), pickler.names_main


def by_value(
    call: tuple[Any, ...], method: str, out_of_band: Callable[[Any], object] | None = None
) -> bytes:
    """What is defined in ``__main__``, and functions without a name of their own, as they
    are; what is in modules by reference."""
    import cloudpickle  # not when this package is imported: it takes long

    try:
        data: bytes = cloudpickle.dumps(call, protocol=5, buffer_callback=out_of_band)
    except Exception as exc:
        raise _refused(method, exc) from exc
    return data


def search_path() -> list[str]:
    """sys.path, which must not follow the worker's own working directory."""
    entries = [p for p in sys.path if isinstance(p, str)]
    if all(p.startswith("/") for p in entries):
        return entries
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return entries
    return [os.path.join(here, p) if p else here for p in entries]


# CPython takes it away once the program's own code has run, but threads may go on.
_MAIN_FILE = getattr(sys.modules.get("__main__"), "__file__", None)


def main_program(method: str) -> tuple[str, str]:
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
            "interpreter cannot import: put it in a module, or use method='zygote' or 'fork'"
        )
    return "path", os.path.abspath(path)


def pickled(call: Target, method: str, fresh: bool) -> bytes:
    """For ``_boot.load()`` in an interpreter that knows nothing of this one; or, not
    ``fresh``, in the main interpreter of this program."""
    data, names_main = by_reference(call, method)
    main = (*main_program(method), True) if fresh and names_main else None
    return pickle.dumps((search_path(), sys.argv, main, data), protocol=5)
