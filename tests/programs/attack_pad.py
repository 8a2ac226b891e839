"""Attacks on the launch pad, at the moments at which a thread that one has to wait
for is worst. Usage: attack_pad.py MODE. Prints "ok" where it comes back."""

from __future__ import annotations

import atexit
import logging
import logging.config
import os
import sys
import threading
import time
import weakref

from attack_common import status_of

import anyfork

LIMIT = 60.0


def start() -> object:
    with anyfork.spawn(os.getpid, method="subint_fork") as child:
        assert child.result(LIMIT) == child.pid
        return child.pid


def try_to_start() -> str:
    """A start works, or fails with an error of ours; it never hangs."""
    begin = time.monotonic()
    try:
        start()
        answer = "started"
    except (anyfork.SpawnError, PythonFinalizationError) as exc:
        answer = f"{type(exc).__name__}: {exc}"
    assert time.monotonic() - begin < LIMIT, answer
    return answer


def say(answer: str, write=os.write) -> None:  # type: ignore[no-untyped-def]
    write(1, f"{answer}\n".encode())


class Late:
    """Starts a worker when the interpreter takes its modules down."""

    def __del__(self, attempt=try_to_start, say=say) -> None:  # type: ignore[no-untyped-def]
        try:
            say(f"in __del__: {attempt()}")
        except BaseException as exc:
            say(f"in __del__: refused: {type(exc).__name__}")


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        say(f"under logging's lock: {try_to_start()}")


def dictconfig() -> None:
    config = {"version": 1, "handlers": {"h": {"()": Handler}}, "root": {"handlers": ["h"]}}
    logging.config.dictConfig(config)


def main(mode: str) -> None:
    match mode:
        case "idle":  # a live pad when the program ends
            start()
        case "exit":
            start()
            sys.exit(7)
        case "raise":
            start()
            raise SystemExit(7)
        case "logging":
            dictconfig()
            say(f"after it: {try_to_start()}")
        case "logging-live":
            start()
            dictconfig()
            say(f"after it: {try_to_start()}")
        case "atexit" | "atexit-live":
            if mode == "atexit-live":
                start()
            atexit.register(lambda: say(f"in atexit: {try_to_start()}"))
        case "shutdown":
            start()
            threading._register_atexit(lambda: say(f"at threads' end: {try_to_start()}"))  # type: ignore[attr-defined]
        case "thread":  # a thread that starts workers while main ends
            start()
            threading.Thread(
                target=lambda: [say(f"in a thread: {try_to_start()}") for _ in range(3)]
            ).start()
        case "del" | "del-live":
            if mode == "del-live":
                start()
            sys.modules["late"] = Late()  # type: ignore[assignment]
        case "finalize":
            start()
            keep.append(Late())
            weakref.finalize(keep[0], lambda: say(f"in finalize: {try_to_start()}"))
        case "forked":  # the child of a fork makes its own
            start()
            pid = anyfork.fork()
            if pid == 0:
                start()
                start()
                os._exit(5)
            assert status_of(pid) == 5
            start()
        case "threads":
            threads = [threading.Thread(target=start) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        case "hooks":  # that let the GIL go, beside threads that want it
            stop = threading.Event()
            turns = [0, 0, 0]

            def spin(n: int) -> None:
                while not stop.is_set():
                    turns[n] += 1

            for n in range(len(turns)):
                threading.Thread(target=spin, args=(n,)).start()
            start()
            nap = [0.0]
            os.register_at_fork(before=lambda: time.sleep(nap[0]))
            os.register_at_fork(after_in_parent=lambda: time.sleep(nap[0]))
            for nap[0] in (0.0, 0.001, 0.02, 0.0) * 5:
                before = list(turns)
                start()
                if nap[0] == 0.02:
                    assert any(a > b for a, b in zip(turns, before, strict=True)), turns
            stop.set()
        case "daemon":  # a daemon thread is inside a start when main ends
            start()

            def for_ever() -> None:
                while True:
                    try_to_start()

            threading.Thread(target=for_ever, daemon=True).start()
            time.sleep(0.05)
    say("ok")


keep: list[object] = []

if __name__ == "__main__":
    main(sys.argv[1])
