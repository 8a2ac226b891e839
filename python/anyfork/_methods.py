"""The table of spawn methods, as Python sees it."""

from __future__ import annotations

from typing import NamedTuple

from . import _anyfork


class Method(NamedTuple):
    """One row of the table.

    ``available`` is for the calling interpreter; ``reason`` says why not.
    """

    name: str
    summary: str
    runs_in: str
    memory: str
    may_wait_for: str
    available: bool
    reason: str | None


def methods() -> list[Method]:
    """The spawn methods, in the table's order. Starts nothing."""
    return [Method(**row) for row in _anyfork.methods()]
