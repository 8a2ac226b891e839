"""usage: fresh_main.py METHOD MODE. A target that is defined in the program itself."""

from __future__ import annotations

import functools
import sys
import time

import anyfork

IMPORTED_AS = __name__


def target(seconds: float) -> str:
    time.sleep(seconds)
    print("the target ends", flush=True)
    return IMPORTED_AS


class Answer:
    """What only the program has."""


class Refusal(Exception):
    pass


@functools.cache
def answer(refuse: bool) -> Answer:
    if refuse:
        raise Refusal("no")
    return Answer()


def nest(method: str) -> str:
    """The program's own target in a worker of a worker."""
    return str(anyfork.run(target, 0.0, method=method))


if __name__ == "__main__":
    method, mode = sys.argv[1:]
    match mode:
        case "result":
            print(anyfork.run(target, 0.0, method=method))
            assert type(anyfork.run(answer, False, method=method)) is Answer
            try:
                anyfork.run(answer, True, method=method)
            except Refusal as exc:
                assert str(exc) == "no"
            else:
                raise AssertionError("it was not refused")
        case "nested":
            print(anyfork.run(nest, method, method=method))
        case "end":  # the program ends before its worker
            child = anyfork.spawn(target, 0.3, method=method)
            child.wait_ready(30)
            print("the program ends", flush=True)
        case "raise":
            child = anyfork.spawn(target, 0.3, method=method)
            child.wait_ready(30)
            raise SystemExit(3)
