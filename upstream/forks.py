"""Fork in interpreters other than the main one, of a CPython that has the patches.

usage: PYTHON upstream/forks.py [--count N] [--json]

N times os.fork() (default 1000) in each of: an interpreter that shares the GIL of the main one
("legacy") and one that has its own ("isolated", with allow_fork), idle, beside two busy threads of
the main interpreter, beside two of its own, and beside both. The child looks at itself: garbage
collection, a thread, a lock of each interpreter, another fork. Exit status 1 if a child of any was
wrong or did not end within 60 s.
"""

import _interpreters
import argparse
import json
import os
import sys
import threading
import warnings
from typing import Any

INSIDE = """
import gc, json, os, select, sys, sysconfig, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
objects, stop = {{}}, []

def work(k):
    n = 0
    while not stop:
        n += 1
        objects[k, n % 500] = [n]

def in_child():
    gc.collect()
    json.loads(json.dumps([1, {{"2": 3}}]))
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        # There it may be locked by a thread that is gone, as after any fork().
        objects[0] = 1
    assert threading.active_count() == 1
    assert threading.current_thread() is threading.main_thread()
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    if (pid := os.fork()) == 0:
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5

def fork():
    # True if the child was right.
    if (pid := os.fork()) == 0:
        status = 1
        try:
            in_child()
            status = 0
        finally:
            os._exit(status)
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ended = bool(poll.poll(60_000))
    os.close(fd)
    if not ended:
        os.kill(pid, 9)
    return os.waitpid(pid, 0)[1] == 0 and ended

references = getattr(sys, "gettotalrefcount", lambda: 0)
threads = [threading.Thread(target=work, args=(k,)) for k in range({threads})]
for thread in threads:
    thread.start()
bad = sum(not fork() for _ in range(10))
start, before = time.monotonic(), references()
bad += sum(not fork() for _ in range({count}))
result = {{"bad": bad, "seconds": round(time.monotonic() - start, 3)}}
if not threads and not {main_threads}:
    result["references"] = references() - before
stop.append(1)
for thread in threads:
    thread.join()
os.write({fd}, json.dumps(result).encode())
"""


def work(stop: list[int]) -> None:
    while not stop:
        sum(range(500))


def cell(config: Any, main_threads: int, threads: int, count: int) -> dict[str, Any]:
    stop: list[int] = []
    busy = [threading.Thread(target=work, args=(stop,)) for _ in range(main_threads)]
    for thread in busy:
        thread.start()
    read_fd, write_fd = os.pipe()
    interp = _interpreters.create(_interpreters.new_config(config, allow_fork=True))
    code = INSIDE.format(threads=threads, main_threads=main_threads, count=count, fd=write_fd)
    problem = _interpreters.exec(interp, code)
    stop.append(1)
    for thread in busy:
        thread.join()
    if problem is not None:
        raise RuntimeError(problem.formatted)
    result = json.loads(os.read(read_fd, 4096))
    os.close(read_fd)
    os.close(write_fd)
    _interpreters.destroy(interp)
    return {
        "config": config,
        "busy threads of main": main_threads,
        "busy threads": threads,
        "forks": count,
        **result,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bad = 0
    for config in ("legacy", "isolated"):
        for main_threads, threads in ((0, 0), (2, 0), (0, 2), (2, 2)):
            result = cell(config, main_threads, threads, options.count)
            bad += result["bad"]
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                print(*(f"{key} {value}" for key, value in result.items()), sep=", ", flush=True)
    return bad != 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    sys.exit(main())
