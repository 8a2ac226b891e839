"""os.fork and os.forkpty of this interpreter, replaced."""

from __future__ import annotations

import os
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


def install(*, strict: bool = False) -> None:
    """Make ``os.fork()`` and ``os.forkpty()`` of this interpreter work.

    They become :func:`anyfork.fork` and :func:`anyfork.forkpty`: with them
    ``pty``, pexpect, ``sh`` and multiprocessing's fork context work in a
    sub-interpreter. In the main interpreter the child survives live
    sub-interpreters (gh-139759).

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
