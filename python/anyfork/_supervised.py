"""The worker's side of supervision: heartbeat, readiness, and its target. Small, for it is
imported in each worker before its target."""

from __future__ import annotations

import os
import sys
from typing import Any

from . import _anyfork

READY, HEARTBEAT = "ANYFORK_READY_FD", "ANYFORK_HEARTBEAT_FD"

_ready_fd = -1  # of a target; a program finds it in its environment


def _announced(name: str) -> int:
    """The descriptor of that variable, which programs that this one starts shall not have."""
    text = os.environ.pop(name, "")
    if not text:
        return -1
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} is {text!r}, which is no descriptor: unset it")
    return int(text)


def notify_ready() -> bool:
    """Tell the supervisor that this child is ready: what comes after it may start.

    For targets, and for programs in Python, of :mod:`anyfork.supervision` and `anyfork
    supervise` whose spec says ``ready = "report"``. The second time, and without a
    supervisor that waits for it, it does nothing and returns False.
    """
    global _ready_fd
    fd, _ready_fd = _ready_fd, -1
    if fd < 0:
        fd = _announced(READY)
    if fd < 0:
        return False
    try:
        os.write(fd, b"\n")  # as s6 wants it
    except BrokenPipeError:
        return False
    finally:
        os.close(fd)
    return True


def begin_heartbeat() -> bool:
    """In a program in Python whose spec has a heartbeat: begin it, in the main thread. Targets
    have it already. Without a supervisor that asks for it, it does nothing and returns False."""
    fd = _announced(HEARTBEAT)
    if fd < 0:
        return False
    _begin(fd)
    return True


def _begin(fd: int) -> None:
    import atexit

    _anyfork.heartbeat_begin(fd)
    os.close(fd)
    atexit.register(_anyfork.heartbeat_end)  # its thread asks an interpreter that is there


def find(path: str) -> Any:
    """The target that "module:function" names. Raises ImportError, AttributeError."""
    import importlib

    module, _colon, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def call(
    target: Any, args: tuple[object, ...], kwargs: dict[str, object], ready: int, heartbeat: int
) -> None:
    """Be a child whose target is Python's: nobody takes its result."""
    global _ready_fd
    if heartbeat >= 0:
        _begin(heartbeat)
    _ready_fd = ready
    if isinstance(target, str):
        here = os.getcwd()
        if here not in sys.path:
            sys.path.insert(0, here)
        target = find(target)
    target(*args, **kwargs)
