"""What the package offers: see __init__.py, which loads it, for when."""

from __future__ import annotations

from ._anyfork import fork, forkpty
from ._boot import register_child_reset
from ._child import Child
from ._errors import (
    CallCancelled,
    MethodUnavailable,
    RemoteError,
    SpawnError,
    TemplateLost,
    WorkerDied,
)
from ._install import install, is_installed, uninstall
from ._methods import Method, methods
from ._options import Options
from ._request import run, spawn, spawn_many
from ._session import Descriptor
from ._supervised import begin_heartbeat, notify_ready
from ._template import Template, snapshot, warm
from ._worker import Cancelled, report_progress

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

for _name in __all__:
    if _name not in ("fork", "forkpty"):  # in C, whose __module__ stays
        globals()[_name].__module__ = __package__
