"""A template, from inside: what it loads, and how it settles, before it serves."""

from __future__ import annotations

import gc
import importlib
import os

from . import _anyfork, _boot


def serve(
    control: int,
    owner: int,
    preload: tuple[str, ...],
    setup: bytes | None,
    standby: tuple[int, int],
    idle: float,
) -> None:
    """The main program of a template; it returns once its owner and its workers have gone.

    ``setup``: for _boot.load(). Nothing is collected while modules are loaded, and what
    they have made is frozen: a collection in a worker would copy all of it.
    """
    gc.disable()
    for name in preload:
        try:
            importlib.import_module(name)
        except BaseException as exc:
            exc.add_note(f"This was in a template, which was to preload {name!r}.")
            raise
    if setup is not None:
        try:
            fn, args = _boot.load(setup)
            fn(*args)
        except BaseException as exc:
            exc.add_note("This was in a template, in its setup function.")
            raise
    _refuse_threads()
    _boot.rehearse()
    _anyfork.set_title(": ".join(filter(None, ("anyfork template", ", ".join(preload)))))
    gc.collect()
    gc.freeze()
    gc.enable()
    low, high = standby
    _anyfork.serve(control, owner, low, high, idle)


def _refuse_threads() -> None:
    """A worker would not have them, but what they held."""
    threads = [name for name in os.listdir("/proc/self/task") if int(name) != os.getpid()]
    if not threads:
        return
    names = []
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/comm") as f:
                names.append(f.read().strip())
        except OSError:  # it has ended
            continue
    if names:
        raise RuntimeError(
            f"a template must have no other threads, and has {len(names)}: {', '.join(names)}; "
            "workers would not have them, but find locked what they had locked: start them in "
            "the workers, or leave their module out of preload"
        )
