# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a forked actor must forget: the runtime of the actor that it was forked from.

tractor keeps the state of *the* actor of a process in module globals, class attributes
and shared defaults. A copy of them would send the child's peers, locks and cached
resources to its parent's. Two of them are defects that forking makes visible:
``Server._peers`` has one default for all instances, and the copy of
``_RUNTIME_VARS_DEFAULTS`` is shallow.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from typing import Any

_PLAIN = (type(None), bool, int, float, str, bytes, tuple, frozenset)

# Classes that are namespaces of the process; module -> names.
_NAMESPACES = {
    "tractor.devx.debug._tty_lock": ("Lock", "DebugStatus"),
    "tractor.trionics._mngrs": ("_Cache",),
}
# Containers that only ever describe the running actor: emptied.
_CONTAINERS = {
    "tractor.ipc._shm": ("_known_tokens",),
    "tractor.ipc._fd_share": ("_rings",),
    "tractor.experimental._pubsub": ("_pub_state",),
}
# Names that are set to a value of a fresh process.
_VALUES: dict[str, dict[str, Any]] = {
    "tractor.runtime._state": {"_current_actor": None, "_last_actor_terminated": None},
    "tractor.devx._stackscope": {"_trio_token": None, "_tree_dumped": False},
}
_LOCKS = {"tractor.devx._stackscope": ("_handler_lock",)}

_pristine: dict[type, dict[str, Any]] = {}
_runtime_vars: dict[str, Any] = {}


def _module(name: str) -> Any:
    return sys.modules.get(name)


def remember() -> None:
    """What the namespaces look like when nothing runs. At the latest while this actor
    boots, when tractor imports its parent's ``__main__``: nothing is debugged then."""
    from tractor.runtime import _state

    # The lists of the defaults are those of the live variables, so may be filled already.
    _runtime_vars.update(
        {k: [] if isinstance(v, list) else v for k, v in _state._RUNTIME_VARS_DEFAULTS.items()}
    )
    _runtime_vars["_enable_tpts"] = [_state._def_tpt_proto]
    for module, names in _NAMESPACES.items():
        for name in names:
            cls = getattr(sys.modules[module], name, None)
            if cls is not None:
                _pristine[cls] = {
                    key: value
                    for key, value in vars(cls).items()
                    if not key.startswith("__") and isinstance(value, _PLAIN)
                }


def _reset_namespace(cls: type) -> None:
    plain = _pristine[cls]
    for key, value in list(vars(cls).items()):
        if key.startswith("__"):
            continue
        if key in plain:
            setattr(cls, key, plain[key])
        elif isinstance(value, dict | list | set):
            value.clear()
        elif isinstance(value, contextlib.ExitStack):
            setattr(cls, key, contextlib.ExitStack())  # the parent's callbacks do not run here


def reset() -> None:
    """In a forked child, before its own runtime."""
    from tractor.ipc._server import Server
    from tractor.runtime import _state
    from tractor.runtime._runtime import Actor

    _state.set_runtime_vars(copy.deepcopy(_runtime_vars))
    for default in getattr(Server, "__struct_defaults__", ()):
        if isinstance(default, dict | list | set):
            default.clear()
    Actor.lifetime_stack = contextlib.ExitStack()
    for cls in _pristine:
        _reset_namespace(cls)
    for name, names in _CONTAINERS.items():
        for container in (getattr(_module(name), one, None) for one in names):
            if container is not None:
                container.clear()
    for name, values in _VALUES.items():
        for one, value in values.items():
            if hasattr(_module(name), one):
                setattr(_module(name), one, value)
    for name, names in _LOCKS.items():
        for one in names:
            if hasattr(_module(name), one):
                setattr(_module(name), one, threading.RLock())
