"""Ask what is found with doctored tables; a line of JSON for each.

usage: layout_doctored.py FILE, a JSON list of [table in hex, version, debug].
Two sub-interpreters and a second thread live meanwhile, so that a list differs from
its neighbours: with one thread, interpreter.threads.head equals threads.main.
"""

from __future__ import annotations

import json
import sys
import threading

import subint

from anyfork import _anyfork


def main() -> None:
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    with subint.interpreter("legacy"), subint.interpreter("isolated"):
        for table, version, debug in cases:
            found = _anyfork._layout_doctored(bytes.fromhex(table), version, debug)
            print(json.dumps(found), flush=True)
    done.set()
    other.join()


if __name__ == "__main__":
    main()
