"""usage: held_gil.py KIND N

N twin forks from an interpreter whose other threads never stop changing its objects:
its GIL has to be held at the fork, or some children find a half-made change. One line
of JSON: {"forks", "broken": [exit codes]}.
"""

from __future__ import annotations

import gc
import sys
import threading

import outcomes
import subint

import anyfork


def run(n: int) -> None:
    stop = threading.Event()
    shared: dict[int, object] = {}

    def churn() -> None:
        while not stop.is_set():
            own: dict[int, list[int]] = {}
            for x in range(3000):
                own[x] = [x]
                shared[x & 1023] = own
            sorted(own, reverse=True)
            shared.clear()

    def work() -> None:
        gc.collect()
        for x in range(3000):
            shared[x] = str(x)
        assert len(dict(shared)) >= 3000
        gc.collect()
        subint.on_thread(gc.collect)

    sys.setswitchinterval(0.0005)
    threads = [threading.Thread(target=churn) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        codes = [outcomes.in_child(anyfork.fork, work) for _ in range(n)]
    finally:
        stop.set()
        for t in threads:
            t.join()
    outcomes.tell({"forks": len(codes), "broken": [code for code in codes if code != 0]})


def main(kind: str, n: str) -> None:
    with subint.interpreter(kind) as made:
        made.run(f"import held_gil; held_gil.run({int(n)})", "thread")
    outcomes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
