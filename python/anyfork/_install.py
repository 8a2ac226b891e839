"""os.fork and os.forkpty of this interpreter, replaced."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from . import _anyfork

_NAMES = ("fork", "forkpty")
_originals: dict[tuple[str, str], Any] = {}
_replacements: list[Any] = []


def _refuse(name: str) -> Callable[[], Any]:
    def refused() -> Any:
        raise RuntimeError(
            f"os.{name}() would kill its child in a sub-interpreter; call anyfork.{name}()"
        )

    refused.__name__ = refused.__qualname__ = name
    refused.__module__ = "anyfork"
    return refused


class _Marker:
    """multiprocessing keeps its after-fork functions by weak reference to such."""


_marker = _Marker()
_watching = False


def _in_twin_child() -> None:
    """What multiprocessing's children need where the host has handlers of its own
    (Apache's turns SIGTERM into exit code 255) or blocks signals (uWSGI), and where
    only main may call signal.signal()."""
    if not is_installed():
        return
    # Half a module where a thread that does not exist here was importing it.
    util: Any = sys.modules.get("multiprocessing.util")
    register = getattr(util, "register_after_fork", None)
    if register is not None:
        register(_marker, lambda _: _anyfork.default_signals())
    original = signal.signal

    def set_signal(signalnum: int, handler: Any) -> Any:
        if handler not in (signal.SIG_IGN, signal.SIG_DFL):
            return original(signalnum, handler)
        before = signal.getsignal(signalnum)
        _anyfork.set_disposition(int(signalnum), handler == signal.SIG_IGN)
        return before

    signal.signal = set_signal


def _watch_forks() -> None:
    global _watching
    if not _watching:
        os.register_at_fork(after_in_child=_in_twin_child)
        _watching = True


def install(*, strict: bool = False) -> None:
    """Make ``os.fork()`` and ``os.forkpty()`` of this interpreter work.

    They become :func:`anyfork.fork` and :func:`anyfork.forkpty`: with them
    ``pty``, pexpect, ``sh`` and multiprocessing's fork context work in a
    sub-interpreter; children of multiprocessing get a worker's signal dispositions
    there, and may call ``signal.signal()`` for SIG_IGN and SIG_DFL. In the main
    interpreter the child survives live sub-interpreters (gh-139759).

    Args:
      strict: in a sub-interpreter, only replace the calls that would kill their
        child by functions that raise RuntimeError; in main do nothing.

    Raises: MethodUnavailable, before anything is changed, where ``fork()`` cannot
    work here. Idempotent; the last call counts. This interpreter only.
    """
    in_main: bool = _anyfork.in_main()
    if strict and in_main:
        uninstall()
        return
    if not strict:
        _anyfork.check_fork()
        if not in_main:
            _watch_forks()
    for module_name in ("os", "posix"):
        module = sys.modules.get(module_name)
        if module is None:
            continue
        for name in _NAMES:
            now = getattr(module, name)
            new = _refuse(name) if strict else getattr(_anyfork, name)
            if now not in _replacements:
                _originals[module_name, name] = now
            _replacements.append(new)
            setattr(module, name, new)


def uninstall() -> None:
    """Put the functions back that :func:`install` replaced, unless somebody else
    has replaced them since."""
    for (module_name, name), original in list(_originals.items()):
        module = sys.modules[module_name]
        if getattr(module, name) in _replacements:
            setattr(module, name, original)
    _originals.clear()
    _replacements.clear()


def is_installed() -> bool:
    """Whether os.fork is anyfork's in this interpreter."""
    return os.fork is _anyfork.fork
