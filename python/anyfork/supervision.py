"""Supervision of children: their specs, and what is told of them. docs/supervision.md.

The supervisor itself is :func:`anyfork.trio.open_supervisor`, or that of ``anyfork.asyncio`` or
``anyfork.anyio``, or the command ``anyfork supervise``.
"""

from __future__ import annotations

from ._supervise import (
    ChildInfo,
    ChildSpec,
    Event,
    HeartbeatSpec,
    SpecError,
    SupervisorFailed,
    SupervisorSpec,
)
from ._supervised import begin_heartbeat, notify_ready

__all__ = [
    "ChildInfo",
    "ChildSpec",
    "Event",
    "HeartbeatSpec",
    "SpecError",
    "SupervisorFailed",
    "SupervisorSpec",
    "begin_heartbeat",
    "notify_ready",
]

for _name in __all__:
    if _name[0].isupper():
        globals()[_name].__module__ = __name__
