"""Run one check of an attack module in one place, idle and then beside busy threads.

usage: attack_run.py MODULE CHECK PLACE
PLACE: main, legacy or isolated (a sub-interpreter of that kind).
Prints "ok" last. Descriptors, children and interpreters must be as before.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys

os.environ["ATTACK_PID"] = str(os.getpid())  # the children of this process inherit it

import _interpreters

import attack_common

from anyfork import _anyfork

IN_A_SUBINTERPRETER = """
import sys
sys.path[:] = {path!r}
import {module}
{module}.{check}({place!r})
"""


def descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{fd} {os.readlink('/proc/self/fd/' + fd)}")
        except OSError:
            continue
    return sorted(f for f in found if not f.endswith("/fd"))


def run_once(module: str, check: str, place: str) -> None:
    function = getattr(importlib.import_module(module), check)
    prepare = getattr(function, "in_main", None)
    cleanup = prepare() if prepare is not None else None
    try:
        if place == "main":
            function(place)
            return
        interpreter = _interpreters.create(place)
        try:
            text = IN_A_SUBINTERPRETER.format(
                path=sys.path, module=module, check=check, place=place
            )
            failure = _interpreters.exec(interpreter, text)
            if failure is not None:
                print(getattr(failure, "errdisplay", None) or failure.formatted, file=sys.stderr)
                raise SystemExit(1)
        finally:
            _interpreters.destroy(interpreter)
    finally:
        if cleanup is not None:
            cleanup()


def main() -> None:
    module, check, place = sys.argv[1:4]
    faulthandler.dump_traceback_later(3 * attack_common.LIMIT, exit=True)
    # On 3.13t a sub-interpreter beside computing threads of main comes to a
    # halt without anyfork too: twenty collections in it do not end in 25 seconds.
    before = None
    halts = place != "main" and not sys._is_gil_enabled()
    # Ten times as many changes of thread as by default: more of them in the middle of
    # something, and less of the time spent waiting for busy ones.
    sys.setswitchinterval(0.0005)
    function = getattr(importlib.import_module(module), check)
    for n_busy in (0, 0 if halts or hasattr(function, "beside_nothing") else 1):
        with attack_common.busy(n_busy):
            run_once(module, check, place)
        if before is None:  # caches, pads and helpers are up now
            before = descriptors()
    after = descriptors()
    if not hasattr(function, "keeps_descriptors"):
        assert after == before, f"descriptors: {before} became {after}"
    try:
        left = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
    else:
        raise AssertionError(f"a child is left: {left}")
    state = _anyfork.runtime()
    assert state is None or state["interpreters"] <= 2, state  # main, and a pad's
    faulthandler.cancel_dump_traceback_later()
    print("ok")


if __name__ == "__main__":
    main()
