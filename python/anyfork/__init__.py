"""Fork from any interpreter, any thread, on the CPython you already have."""

from __future__ import annotations

import os as _os

from . import _anyfork
from ._anyfork import fork, forkpty
from ._boot import register_child_reset
from ._child import Child
from ._errors import MethodUnavailable, RemoteError, SpawnError, TemplateLost, WorkerDied
from ._install import install, is_installed, uninstall
from ._methods import Method, methods
from ._options import Options
from ._request import run, spawn, spawn_many
from ._template import Template, snapshot, warm

__version__ = "0.1.0"
__all__ = [
    "Child",
    "Method",
    "MethodUnavailable",
    "Options",
    "RemoteError",
    "SpawnError",
    "Template",
    "TemplateLost",
    "WorkerDied",
    "fork",
    "forkpty",
    "install",
    "is_installed",
    "methods",
    "register_child_reset",
    "run",
    "snapshot",
    "spawn",
    "spawn_many",
    "uninstall",
    "warm",
]

for _name in __all__:
    if _name not in ("fork", "forkpty"):  # in C, whose __module__ stays
        globals()[_name].__module__ = __name__
del _name

# Other interpreters may have to find this package too.
_anyfork._set_package_parent(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))

if not _anyfork.in_main():
    # The public API does not tell when a sub-interpreter finalizes; its last
    # atexit callback does.
    import atexit as _atexit

    _atexit.register(_anyfork._begin_finalizing)
    _os.register_at_fork(after_in_child=lambda: _atexit.register(_anyfork._begin_finalizing))
