"""usage: twin_child.py KIND PLACE [CHECK...]   (PLACE: thread main)

One child of anyfork.fork() per check of child_checks.TWIN, forked in a
sub-interpreter, on a thread of its own or on the main thread, inside a generator's
frame. One line of JSON each: {"check", "code" (None: hung), "text"}.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import child_checks
import outcomes
import subint

import anyfork

interpreter_id = -1


def _forks(names: list[str], path: str) -> Iterator[tuple[str, int | None]]:
    """Forks inside this frame; the child goes on in it too."""
    local = ["of the caller"]
    for name in names:
        code = outcomes.in_child(
            anyfork.fork, lambda name=name: child_checks.perform(child_checks.TWIN[name], path)
        )
        yield name, code
        assert local == ["of the caller"]


def run(names: list[str]) -> None:
    global interpreter_id
    interpreter_id = subint.current()
    child_checks.context_variable.set("of the caller")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stderr")
        for name, code in _forks(names or list(child_checks.TWIN), path):
            text = ""
            if os.path.exists(path):
                with open(path, errors="replace") as stderr:
                    text = stderr.read()
                os.unlink(path)
            outcomes.tell({"check": name, "code": code, "text": text})


def main(kind: str, place: str, *names: str) -> None:
    with subint.interpreter("isolated") as other, subint.interpreter(kind) as made:
        other.run("import json")
        made.run(f"import twin_child; twin_child.run({list(names)!r})", place)
    outcomes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
