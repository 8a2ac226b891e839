"""The table of spawn methods, as Python sees it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from . import _anyfork


class Method(NamedTuple):
    """One row of the table.

    ``target``: whose interpreter and memory the target runs in, the caller's, main's or
    fresh ones. ``has_process``: it is a process, with a pid and signals. ``pickles``: its target
    and result are pickled on the way there, from the calling interpreter.
    ``lacks``: what it cannot do on this CPython, or None.
    ``available`` is for the calling interpreter too; ``reason`` says why not.
    """

    name: str
    summary: str
    runs_in: str
    memory: str
    may_wait_for: str
    lacks: str | None
    target: Literal["caller", "main", "fresh"]
    has_process: bool
    pickles: bool
    available: bool
    reason: str | None


def methods() -> list[Method]:
    """The spawn methods, in the table's order. Starts nothing."""
    return [Method(**row) for row in _anyfork.methods()]
