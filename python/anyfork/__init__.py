"""Fork from any interpreter, any thread, on the CPython you already have."""

from __future__ import annotations

import atexit as _atexit
import os as _os
import sys as _sys

from . import _anyfork

__version__ = "0.1.0"
__all__ = [
    "CallCancelled",
    "Cancelled",
    "Child",
    "Descriptor",
    "Method",
    "MethodUnavailable",
    "Options",
    "RemoteError",
    "SpawnError",
    "Template",
    "TemplateLost",
    "WorkerDied",
    "begin_heartbeat",
    "fork",
    "forkpty",
    "install",
    "is_installed",
    "methods",
    "notify_ready",
    "register_child_reset",
    "report_progress",
    "run",
    "snapshot",
    "spawn",
    "spawn_many",
    "uninstall",
    "warm",
]

# A worker in a fresh interpreter imports this package for _boot alone, and waits for it; it
# has said so in sys. All the rest is loaded there, at once, when the first of it is asked
# for. Programs have it from the beginning: neither a child of fork() nor a signal handler
# in the middle of the first start may find it half loaded.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._api import (
        CallCancelled,
        Cancelled,
        Child,
        Descriptor,
        Method,
        MethodUnavailable,
        Options,
        RemoteError,
        SpawnError,
        Template,
        TemplateLost,
        WorkerDied,
        begin_heartbeat,
        fork,
        forkpty,
        install,
        is_installed,
        methods,
        notify_ready,
        register_child_reset,
        report_progress,
        run,
        snapshot,
        spawn,
        spawn_many,
        uninstall,
        warm,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _api

        globals().update((public, getattr(_api, public)) for public in __all__)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    if not hasattr(_sys, "_anyfork_boots"):  # see afk_boot_prepare(), and _exec.py
        __getattr__(__all__[0])


# Other interpreters may have to find this package too.
_anyfork._set_package_parent(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))


def _close_templates() -> None:
    """After the atexit callbacks of whoever imported this package, which may start workers."""
    template = _sys.modules.get("anyfork._template")
    if template is not None:
        template._close_all()


_atexit.register(_close_templates)

if not _anyfork.in_main():
    # The public API does not tell when a sub-interpreter finalizes; its last
    # atexit callback does.
    _atexit.register(_anyfork._begin_finalizing)
    _os.register_at_fork(after_in_child=lambda: _atexit.register(_anyfork._begin_finalizing))
