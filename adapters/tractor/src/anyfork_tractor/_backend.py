# SPDX-License-Identifier: AGPL-3.0-or-later
"""The spawn backend: start an actor's process, see it through its life, reap it.

The steps and their order are those of tractor's own backends; two are different on
purpose. The event that says that the child has connected is made *before* the child:
a forked one is faster than its parent. And the wait for it is raced against the
child's death, so that one that cannot boot is an error and not a hang.
"""

from __future__ import annotations

import functools
import typing
from typing import Any

import trio
from tractor import _exceptions
from tractor.devx import debug
from tractor.msg import types as msgtypes
from tractor.runtime import _state
from tractor.runtime._portal import Portal
from tractor.spawn import _spawn

import anyfork

from . import _reset
from ._process import ActorProcess

METHODS = tuple(row.name for row in anyfork.methods())
"""The keys that :func:`register` adds: the spawn methods of anyfork."""

_IN_SUBINTERPRETER = ("subint", "subint_forkserver")
# The only labels by which an actor waits for the specification that its parent sends;
# that of a forked one must not be "trio", which imports the parent's __main__ again.
_LABEL_EXECUTED, _LABEL_FORKED = "trio", "subint_forkserver"

_methods: dict[str, str] = {}  # key of tractor -> method of anyfork


# ---- in the child ---------------------------------------------------------------------


def _actor_main(
    uid: tuple[str, str],
    loglevel: str | None,
    parent_addr: Any,
    infect_asyncio: bool,
    forked: bool,
    key: str,
    keys: dict[str, str],
) -> None:
    from tractor._child import _actor_child_main

    if forked:
        _reset.reset()
    else:  # a fresh process: its own actors are started as it was
        register(keys)
        _spawn.try_set_start_method(key)  # type: ignore[arg-type]
    _actor_child_main(
        uid=uid,
        loglevel=loglevel,
        parent_addr=parent_addr,
        infect_asyncio=infect_asyncio,
        spawn_method=_LABEL_FORKED if forked else _LABEL_EXECUTED,  # type: ignore[arg-type]
    )


# ---- in the parent ----------------------------------------------------------------------


@functools.cache
def _why_not_in_subinterpreter() -> str:
    """Why an actor's runtime cannot be loaded there; empty if it can."""
    import _interpreters

    interpreter = _interpreters.create("isolated")
    try:
        failure = _interpreters.exec(interpreter, "import msgspec, tractor")
    finally:
        _interpreters.destroy(interpreter)
    return "" if failure is None else str(failure.msg)


def _check(method: str) -> None:
    """Raise MethodUnavailable where actors cannot be started by it."""
    if method in _IN_SUBINTERPRETER and (why := _why_not_in_subinterpreter()):
        raise anyfork.MethodUnavailable(
            "interpreter",
            None,
            method,
            f"an actor cannot run in a sub-interpreter here: {why} (msgspec#563); nothing was "
            "started. Use 'subint_fork', whose actors run in the main interpreter",
        )
    row = next(row for row in anyfork.methods() if row.name == method)
    if not row.available:
        raise anyfork.MethodUnavailable("layout", None, method, row.reason or "not available here")


def _start(
    key: str, uid: tuple[str, str], subactor: Any, parent_addr: Any, infect_asyncio: bool,
    options: dict[str, Any],
) -> ActorProcess:
    """No checkpoint in it: a cancelled spawn cannot lose what it has started."""
    method = _methods[key]
    _check(method)
    # An actor handles Ctrl-C itself, as every process of the foreground group does.
    options = {"sigint": "own", **options}
    child = anyfork.spawn(
        _actor_main,
        uid,
        subactor.loglevel,
        parent_addr,
        infect_asyncio,
        method != "exec",
        key,
        dict(_methods),
        method=method,
        **options,
    )
    return ActorProcess(child)


async def _connected_or_dead(
    server: Any, uid: tuple[str, str], event: trio.Event, process: ActorProcess
) -> Any:
    """The channel of the child that has connected back."""

    async def give_up_when_dead() -> None:
        await process.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up_when_dead)
        await event.wait()
        nursery.cancel_scope.cancel()
    if event.is_set():
        return server._peers[uid][-1]
    raise _exceptions.ActorFailure(
        f"{uid[0]}: the process ended before its actor had connected (exit code "
        f"{process.returncode})"
    ) from process.why()


async def _let_the_debugger_finish(uid: tuple[str, str], process: ActorProcess) -> None:
    """Cancelled before the child was up: not in the middle of somebody's session."""
    if _state.is_root_process():
        await debug.maybe_wait_for_debugger()
        return
    async with debug.acquire_debug_lock(subactor_uid=uid):
        with trio.move_on_after(0.5):
            await process.wait()


async def actor_process(
    name: str,
    actor_nursery: Any,
    subactor: Any,
    errors: dict[tuple[str, str], Exception],
    bind_addrs: list[Any],
    parent_addr: Any,
    _runtime_vars: dict[str, Any],
    *,
    infect_asyncio: bool = False,
    task_status: trio.TaskStatus[Portal] = trio.TASK_STATUS_IGNORED,
    proc_kwargs: dict[str, Any] | None = None,
) -> None:
    """tractor's ``<method>_proc()``: one task per actor, from its start to its end."""
    uid = subactor.aid.uid
    server = actor_nursery._actor.ipc_server
    key = _spawn._spawn_method
    # Made now, and waited for itself: the server takes it out of the table when the
    # child connects, which may be before this task goes on.
    event = server._peer_connected.setdefault(uid, trio.Event())
    process: ActorProcess | None = None
    cancelled_during_spawn = False
    try:
        try:
            process = _start(
                key, uid, subactor, parent_addr, infect_asyncio, dict(proc_kwargs or {})
            )
            channel = await _connected_or_dead(server, uid, event, process)
        except trio.Cancelled:
            cancelled_during_spawn = True
            if _state.debug_mode() and process is not None:
                with trio.CancelScope(shield=True):
                    await _let_the_debugger_finish(uid, process)
            raise

        portal = Portal(channel)
        actor_nursery._children[uid] = (subactor, process, portal)
        await channel.send(
            msgtypes.SpawnSpec(
                _parent_main_data=subactor._parent_main_data,
                enable_modules=subactor.enable_modules,
                reg_addrs=subactor.reg_addrs,
                bind_addrs=bind_addrs,
                _runtime_vars=_runtime_vars,
            )
        )
        _state.current_actor()._actoruid2nursery[uid] = actor_nursery
        task_status.started(portal)

        with trio.CancelScope(shield=True):
            await actor_nursery._join_procs.wait()
        async with trio.open_nursery() as nursery:
            if portal in actor_nursery._cancel_after_result_on_exit:
                nursery.start_soon(_spawn.cancel_on_completion, portal, subactor, errors)
            await _spawn.soft_kill(process, ActorProcess.wait, portal)  # type: ignore[type-var]
            nursery.cancel_scope.cancel()
    finally:
        server._peer_connected.pop(uid, None)
        if process is not None:
            with trio.CancelScope(shield=True):
                await _reap(process, subactor, bind_addrs, _runtime_vars, cancelled_during_spawn)
        if not cancelled_during_spawn:
            actor_nursery._children.pop(uid, None)


async def _reap(
    process: ActorProcess,
    subactor: Any,
    bind_addrs: list[Any],
    runtime_vars: dict[str, Any],
    cancelled_during_spawn: bool,
) -> None:
    """The hard end, which no zombie outlives."""
    if cancelled_during_spawn and _state.debug_mode():
        async with debug.acquire_debug_lock(subactor_uid=subactor.aid.uid):
            with trio.move_on_after(0.5):
                await process.wait()
    await debug.maybe_wait_for_debugger(child_in_debug=runtime_vars.get("_debug_mode", False))
    if process.poll() is None:
        await _spawn.hard_kill(process, bind_addrs=bind_addrs, subactor=subactor)  # type: ignore[arg-type]
    process.close()


# ---- registration -------------------------------------------------------------------------


def register(keys: dict[str, str] | None = None) -> None:
    """Make anyfork's methods known to tractor, in this process and its actors.

    Args:
      keys: {start_method: method of anyfork}; all methods under their own names.

    Before ``open_root_actor()`` or ``open_nursery()``, best when the program is imported;
    again does no harm. tractor's own methods stay as they are, unless ``keys`` names one.

    Raises: ValueError for an unknown method.
    """
    keys = {name: name for name in METHODS} if keys is None else keys
    for method in keys.values():
        if method not in METHODS:
            raise ValueError(f"unknown spawn method {method!r}; known are: {', '.join(METHODS)}")
    new = {key: method for key, method in keys.items() if _methods.get(key) != method}
    if not new:
        return
    first = not _methods
    if first:
        _reset.remember()
        _wrap_try_set_start_method()
    _methods.update(new)
    for key in new:
        _spawn._methods[key] = actor_process  # type: ignore[index]
    _widen()


def _wrap_try_set_start_method() -> None:
    """It knows a fixed set of keys only."""
    original = _spawn.try_set_start_method

    @functools.wraps(original)
    def try_set_start_method(key: Any) -> Any:
        if key not in _methods:
            return original(key)
        _check(_methods[key])
        _spawn._ctx = None
        _spawn._spawn_method = key
        return None

    _spawn.try_set_start_method = try_set_start_method


def _widen() -> None:
    """The types and lists that name what is known."""
    from tractor import _root

    known = typing.get_args(_spawn.SpawnMethodKey)
    known += tuple(key for key in _methods if key not in known)
    _spawn.SpawnMethodKey = typing.Literal[known]  # type: ignore[assignment, misc]
    _root._DEBUG_COMPATIBLE_BACKENDS += tuple(
        key for key in _methods if key not in _root._DEBUG_COMPATIBLE_BACKENDS
    )
