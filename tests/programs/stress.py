"""usage: stress.py [--count N] [--interpreters 4] [--threads 3] [--progress]

Everything at once: N forks from several interpreters, legacy and isolated, on several
threads each, twin forks and hops in turn, and from main by the launch pad, while one
thread creates and destroys interpreters, another keeps the main interpreter busy, and
main's hooks now and then let its GIL go in the middle of a fork.

Prints one line of JSON: forks, bad (exit codes other than 0), hung, churned, ms
(median, p99, max of a fork), seconds, leftover interpreters and fds. Exit code 0 if
nothing was bad, hung or left. With --progress a line per second on stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import struct
import sys
import threading
import time

import outcomes
import subint

import anyfork
from anyfork import _anyfork

RECORD = struct.Struct("=id")  # exit code, milliseconds; a write of this size is atomic
HUNG = 1000


def work() -> None:
    rows = {i: str(i) for i in range(300)}
    assert len(json.loads(json.dumps(list(rows.items())))) == 300


def collect_now_and_then() -> None:
    """Looking at every object copies every page: most of what a child costs."""
    if os.getpid() % 8 == 0:
        gc.collect()


def twin_work() -> None:
    """In the child of a twin fork."""
    work()
    collect_now_and_then()
    subint.on_thread(work)
    runtime = _anyfork.runtime()
    assert runtime["interpreters"] == 2 and runtime["own_thread_states"] == 1, runtime
    assert threading.active_count() == 1


def hop_work() -> None:
    """In a worker in main."""
    work()
    subint.on_thread(work)
    collect_now_and_then()
    assert _anyfork.runtime()["interpreters"] == 1
    assert threading.active_count() == 1


def one(way: str) -> tuple[int, float]:
    """One fork: the child's exit code or HUNG, and the milliseconds that the call took."""
    start = time.perf_counter()
    if way == "twin":
        pid = anyfork.fork()
        if pid == 0:
            code = 1
            try:
                twin_work()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        took = time.perf_counter() - start
        ended = outcomes.wait(pid)
    else:
        with anyfork.spawn(hop_work, method="subint_fork") as child:
            took = time.perf_counter() - start
            try:
                ended = child.wait(outcomes.LIMIT)
            except TimeoutError:
                outcomes.tell_hung(child.pid)
                child.kill()
                child.wait()
                ended = None
            failure = child.exception()
            if failure is not None:
                print(failure, getattr(failure, "__notes__", ""), file=sys.stderr, flush=True)
                if ended == 0:
                    ended = 1
    return HUNG if ended is None else ended, took * 1000


def run(n: int, threads: int, ways: tuple[str, ...], fd: int) -> None:
    """In each interpreter: n forks on so many threads, a record each into the pipe."""
    left = iter(range(n))
    lock = threading.Lock()

    def loop() -> None:
        while True:
            with lock:
                k = next(left, None)
            if k is None:
                return
            os.write(fd, RECORD.pack(*one(ways[k % len(ways)])))
            work()

    others = [threading.Thread(target=loop) for _ in range(threads - 1)]
    for t in others:
        t.start()
    loop()
    for t in others:
        t.join()


def nap() -> None:
    # No object that threads share: CPython's free-threaded builds may fork while a dead
    # thread has the lock of one, for which its own hooks then wait in the child; see
    # docs/internals.md.
    if time.perf_counter_ns() % 50 == 0:
        time.sleep(0.0002)


CHURN_REST = 0.02  # seconds, times how many there were


class Crowd:
    """The threads of main that never rest: one busy, one that churns interpreters."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.churned = 0
        self._threads = [threading.Thread(target=self._spin), threading.Thread(target=self._churn)]

    def __enter__(self) -> Crowd:
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for t in self._threads:
            t.join()

    def _spin(self) -> None:
        rows: dict[int, list[int]] = {}
        while not self.stop.is_set():
            for k in range(200):
                rows[k] = [k] * 10
            rows.clear()

    def _churn(self) -> None:
        while not self.stop.is_set():
            with subint.interpreter(subint.KINDS[self.churned % 2]) as made:
                made.run("import json; x = [1]")
            self.churned += 1
            # CPython does not give all of an ended interpreter's memory back (1.4 MB each
            # are left by 3.13, 4.2 MB by 3.13t), which every fork then has to map: in a
            # long run they are made less and less often.
            self.stop.wait(self.churned * CHURN_REST)


def collect(r: int, n: int, progress: bool) -> tuple[list[int], list[float]]:
    """Read the records until all writers are gone."""
    codes: list[int] = []
    times: list[float] = []
    start = told = time.monotonic()
    with os.fdopen(r, "rb") as records:
        while len(record := records.read(RECORD.size)) == RECORD.size:
            code, took = RECORD.unpack(record)
            codes.append(code)
            times.append(took)
            now = time.monotonic()
            if progress and (now - told > 1 or len(codes) == n):
                told = now
                outcomes.tell_progress(len(codes), n, sum(code != 0 for code in codes), start)
    return codes, times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--interpreters", type=int, default=4)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()

    before = sorted(os.listdir("/proc/self/fd"))
    r, w = os.pipe()
    start = time.monotonic()
    made = [subint.Interpreter(subint.KINDS[k % 2]) for k in range(options.interpreters)]
    ways = ("twin", "hop") if twin_works(made) else ("hop",)
    places = len(made) + 1  # main is the last
    share = [options.count // places + (k < options.count % places) for k in range(places)]
    failures: list[str] = []

    def drive(k: int) -> None:
        try:
            if k == len(made):
                run(share[k], options.threads, ("hop",), w)
            else:
                made[k].run(
                    f"import stress; stress.run({share[k]}, {options.threads}, {ways!r}, {w})"
                )
        except BaseException as exc:
            failures.append(str(exc))

    os.register_at_fork(before=nap, after_in_parent=nap)
    with Crowd() as crowd:
        drivers = [threading.Thread(target=drive, args=(k,)) for k in range(places)]
        for t in drivers:
            t.start()

        def close_when_done() -> None:
            for t in drivers:
                t.join()
            os.close(w)

        closer = threading.Thread(target=close_when_done)
        closer.start()
        codes, times = collect(r, options.count, options.progress)
        closer.join()
    for interpreter in made:
        interpreter.destroy()
    times.sort()
    leftover = len(subint.interpreters()) - 1 - _anyfork.runtime()["pad"]
    fds = len(os.listdir("/proc/self/fd")) - len(before)
    bad = sorted(code for code in codes if code not in (0, HUNG))
    hung = codes.count(HUNG)
    outcomes.tell(
        {
            "forks": len(codes),
            "ways": list(ways),
            "bad": bad,
            "hung": hung,
            "churned": crowd.churned,
            "failures": failures,
            "ms": {
                "median": round(times[len(times) // 2], 2),
                "p99": round(times[int(len(times) * 0.99)], 2),
                "max": round(times[-1], 2),
            }
            if times
            else None,
            "seconds": round(time.monotonic() - start, 1),
            "leftover": {"interpreters": leftover, "fds": fds},
        }
    )
    fine = len(codes) == options.count and not (bad or hung or failures or leftover or fds)
    return 0 if fine else 1


def twin_works(made: list[subint.Interpreter]) -> bool:
    """Not on free-threaded builds, whose stress is of hops alone."""
    try:
        made[0].run("import anyfork; anyfork._anyfork.check_fork()")
    except RuntimeError as exc:
        if "MethodUnavailable" in str(exc):
            return False
        raise
    return True


if __name__ == "__main__":
    outcomes.leave(main())
