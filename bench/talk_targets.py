"""What the workers of bench_talk.py do."""

from __future__ import annotations

from typing import Any


def echo(value: Any) -> Any:
    return value


def size(value: Any) -> int:
    return int(value.nbytes)


def spin() -> None:
    while True:
        pass
