"""usage: sanitized.py [N]

Every kind of fork N times, for tools/sanitize: it runs this where each call costs
ten times as much. All answers are checked; nothing may be left. The last part
starts workers from several threads at once: the hand-offs to the launch pad and to
the threads that hold a GIL.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading

import subint

import anyfork

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def reap(pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"a child ended with {code}"


def fork_once() -> None:
    pid = anyfork.fork()
    if pid == 0:
        os._exit(0 if sum(range(100)) == 4950 else 1)
    reap(pid)
    pid, master = anyfork.forkpty()
    if pid == 0:
        os._exit(0 if os.isatty(0) else 1)
    reap(pid)
    os.close(master)


def spawn_once(method: str) -> None:
    assert anyfork.run(str.upper, "a" * 100_000, method=method) == "A" * 100_000
    with anyfork.spawn(divmod, 1, 0, method=method) as child:
        assert isinstance(child.exception(), ZeroDivisionError)


def everything(n: int, in_main: bool) -> None:
    for _ in range(n):
        if in_main or not FREE_THREADED:
            fork_once()
            spawn_once("fork")
        spawn_once("subint_fork")


def on_threads(n: int, in_main: bool) -> None:
    """The same from three threads at once."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            for _ in range(n):
                if in_main or not FREE_THREADED:
                    anyfork.run(int, "1", method="fork")
                anyfork.run(int, "1", method="subint_fork")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=body) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    everything(n, True)
    on_threads(n, True)
    for kind in subint.KINDS:
        with subint.interpreter(kind) as made:
            made.run(f"import sanitized; sanitized.everything({n}, False)")
            made.run(f"import sanitized; sanitized.everything({n}, False)", where="thread")
            made.run(f"import sanitized; sanitized.on_threads({n}, False)")
    print("all right", flush=True)


if __name__ == "__main__":
    main()
