"""Sub-interpreters for tests and programs: made, run and destroyed in one place.

Errors in a sub-interpreter are raised in the caller; nothing is swallowed.
"""

from __future__ import annotations

import _interpreters  # type: ignore[import-not-found]
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KINDS = ("legacy", "isolated")
PLACES = ("thread", "main")
PROGRAMS = os.path.dirname(os.path.abspath(__file__))


def on_thread(fn: Callable[[], Any]) -> Any:
    """Call fn on a thread of its own; return what it returns, raise what it raises."""
    outcome: list[tuple[bool, Any]] = []

    def body() -> None:
        try:
            outcome.append((True, fn()))
        except BaseException as exc:
            outcome.append((False, exc))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    ok, value = outcome[0]
    if not ok:
        raise value
    return value


class Interpreter:
    """A sub-interpreter with this one's sys.path."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.id = _interpreters.create(kind)
        path = [PROGRAMS, *(entry for entry in sys.path if entry != PROGRAMS)]
        self.run(f"import sys; sys.path[:] = {path!r}")

    def run(self, code: str, where: str = "main") -> None:
        """Run code in its __main__ module, on this thread or a new one."""

        def execute() -> None:
            failure = _interpreters.exec(self.id, code)
            if failure is not None:
                details = getattr(failure, "errdisplay", None) or failure.formatted
                raise RuntimeError(f"in the {self.kind} interpreter: {details}")

        if where == "thread":
            on_thread(execute)
        else:
            execute()

    def destroy(self) -> None:
        _interpreters.destroy(self.id)


@contextmanager
def interpreter(kind: str) -> Iterator[Interpreter]:
    """An interpreter for the length of a block."""
    made = Interpreter(kind)
    try:
        yield made
    finally:
        made.destroy()


def interpreters() -> list[int]:
    """The ids of all interpreters that the runtime lists."""
    return [entry[0] if isinstance(entry, tuple) else entry for entry in _interpreters.list_all()]


def current() -> int:
    """The id of the calling interpreter."""
    entry = _interpreters.get_current()
    return entry[0] if isinstance(entry, tuple) else entry
