"""usage: twin_return.py KIND PLACE WAY   (WAY: return raise sys_exit destroy)

The child of a twin fork leaves its sub-interpreter: exec() returns into main in both
processes, and the child then ends as any program does. One line of JSON per step.
"""

from __future__ import annotations

import os
import sys
import threading

import outcomes
import subint

import anyfork

LEAVE = {
    "return": "",
    "raise": "raise ValueError('in the child')",
    "sys_exit": "raise SystemExit(3)",
    "destroy": "",
}


def fork_and(way: str) -> None:
    """In the sub-interpreter."""
    if anyfork.fork() == 0:
        exec(LEAVE[way])


def main(kind: str, place: str, way: str) -> None:
    parent = os.getpid()
    made = subint.Interpreter(kind)

    def body() -> None:
        failure = ""
        try:
            made.run(f"import twin_return; twin_return.fork_and({way!r})")
        except RuntimeError as exc:
            failure = str(exc)
        in_child = os.getpid() != parent
        outcomes.tell(
            {
                "child": in_child,
                "failure": failure,
                "threads": threading.active_count(),
                "is_main_thread": threading.current_thread() is threading.main_thread(),
            }
        )
        if in_child and way == "destroy":
            made.destroy()
            with subint.interpreter("isolated") as new:
                new.run("import json")
            outcomes.tell({"interpreters": subint.interpreters()})

    if place == "thread":
        subint.on_thread(body)  # the child ends with its only thread
    else:
        body()
    if os.getpid() == parent:
        pid = int(open(f"/proc/self/task/{parent}/children").read().split()[0])  # noqa: SIM115
        outcomes.tell({"code": outcomes.wait(pid)})
        made.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
