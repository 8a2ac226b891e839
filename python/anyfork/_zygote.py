"""A template, from inside: what it loads, and how it settles, before it serves."""

from __future__ import annotations

import gc
import importlib
import os
import sys

from . import _anyfork, _audit, _boot

# As a template had them when it began to serve; so in all of its workers.
path: list[str] = []
argv: list[str] = []


def judge(found: list[_audit.Finding], audit: str) -> None:
    """RuntimeError with what was found, or a warning."""
    texts = [str(finding) for finding in found]
    if texts and audit == "refuse":
        raise RuntimeError(
            "this cannot be a template: " + " | ".join(texts) + " (or leave the module out of "
            "preload; audit='warn' takes it as it is)"
        )
    for text in texts:
        print(f"anyfork template: {text}", file=sys.stderr)


def _preload(name: str, on_error: str) -> None:
    try:
        importlib.import_module(name)
    except BaseException as exc:
        # Some modules end the program where they cannot work.
        if on_error == "raise" or not isinstance(exc, Exception | SystemExit):
            exc.add_note(f"This was in a template, which was to preload {name!r}.")
            raise
        if on_error == "warn":
            print(
                f"anyfork template: {name!r} is not preloaded, workers have to import it "
                f"themselves: {type(exc).__name__}: {exc}",
                file=sys.stderr,
            )


def _load(preload: tuple[str, ...], setup: bytes | None, on_error: str) -> None:
    for name in preload:
        _preload(name, on_error)
    if setup is not None:
        try:
            fn, args = _boot.load(setup)
            fn(*args)
        except BaseException as exc:
            exc.add_note("This was in a template, in its setup function.")
            raise


def serve(
    control: int,
    owner: int,
    capabilities: tuple[int, int, int],
    standby: tuple[int, int],
    idle: float,
    audit: str,
    on_error: str,
    siblings: bool,
    shared: bool,
    loads: tuple[tuple[tuple[str, ...], bytes | None], ...],
) -> None:
    """The main program of a template; it returns once its owner and its workers have gone.

    ``siblings``: its workers are children of its parent. ``shared``: they can start workers with
    it. ``loads``: (modules, a setup function for
    _boot.load()), in their order; none: a snapshot. Nothing is collected while modules are
    loaded, and what they have made is frozen: a collection in a worker would copy all of it.
    """
    from . import _api  # noqa: F401  # for workers that start workers; it imports this module

    _anyfork.begin_template(control, capabilities)
    gc.disable()
    ours = _audit.open_sockets()
    names: list[str] = []
    for preload, setup in loads:
        _load(preload, setup, on_error)
        names += preload
    if loads:
        judge(_audit.findings(ours), audit)
    if siblings and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(
            "a template with threads cannot have workers that are the owner's children: what the "
            "threads have locked in the C library would stay so; leave parent='owner' out"
        )
    _boot.load_needed()
    _boot.rehearse()
    _boot.loaded = frozenset(sys.modules)
    _anyfork.set_title(": ".join(filter(None, ("anyfork template", ", ".join(names)))))
    gc.collect()
    gc.freeze()
    gc.enable()
    low, high = standby
    global path, argv
    path, argv = list(sys.path), list(sys.argv)
    _anyfork.serve(control, owner, low, high, idle, shared, siblings)
