"""usage: misbehave.py HOW   (HOW: hang orphan fail)

What the harness has to notice in a program.
"""

from __future__ import annotations

import os
import signal
import sys


def main(how: str) -> None:
    if how == "hang":
        signal.pause()
    elif how == "orphan":
        if os.fork() == 0:
            signal.pause()
        os._exit(0)
    sys.exit(5)


if __name__ == "__main__":
    main(*sys.argv[1:])
