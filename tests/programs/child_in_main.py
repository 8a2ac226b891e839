"""usage: child_in_main.py START [CHECK...]   (START: legacy isolated pad main)

One worker in main per check of child_checks.MAIN, started from there, beside other
live interpreters. One line of JSON each: {"check", "code" (None: hung), "text"}.
"""

from __future__ import annotations

import os
import sys
import tempfile

import child_checks
import outcomes
import subint

import anyfork

METHOD = {"legacy": "subint_fork", "isolated": "subint_fork", "pad": "subint_fork", "main": "fork"}


def run(start: str, names: list[str]) -> None:
    for name in names or child_checks.MAIN:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "stderr")
            child = anyfork.spawn(child_checks.perform_main, name, path, method=METHOD[start])
            try:
                code: int | None = child.wait(outcomes.LIMIT)
            except TimeoutError:
                code = None
                child.kill()
                child.wait()
            failure = child.exception()
            child.close()
            text = f"{failure!r} {getattr(failure, '__notes__', '')}\n" if failure else ""
            if os.path.exists(path):
                with open(path, errors="replace") as stderr:
                    text += stderr.read()
        outcomes.tell({"check": name, "code": code, "text": text})


def main(start: str, *names: str) -> None:
    with subint.interpreter("isolated") as isolated, subint.interpreter("legacy") as legacy:
        isolated.run("import json, re, datetime, decimal")
        legacy.run("import json, re, threading")
        if start in subint.KINDS:
            with subint.interpreter(start) as made:
                made.run(
                    f"import child_in_main; child_in_main.run({start!r}, {list(names)!r})", "thread"
                )
        else:
            subint.on_thread(lambda: run(start, list(names)))
    outcomes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
