#!/usr/bin/env python3
"""Check that child*.c call nothing but async-signal-safe functions.

usage: tools/check_child.py [OBJECT_OR_FOLDER...]

Between fork(2) and the repaired child every lock of the process may be held by a
thread that does not exist any more. What the compiled objects of src/core/child.c
and child_options.c leave undefined is all that they can call; each name must be in
the list below. And no object of src/core may allocate thread storage at its first
look, which a forked child may be: none refers to __tls_get_addr().
Folders are searched for the objects (default: build). Objects with sanitizers
compiled in are passed over. Exit status: 0, 1 if something else is called, 2 if
no object was found.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# signal-safety(7), unless a comment says why it may be here.
ALLOWED = frozenset(
    {
        "_exit",
        "close",
        "dup2",
        "dup3",
        "sendmsg",
        "chdir",
        "execve",
        "open",
        "open64",
        "setpgid",
        "umask",
        "fcntl",
        "fcntl64",
        "getpid",
        "poll",
        "read",
        "readlink",
        "setsid",
        "sigaction",
        "sigaddset",
        "sigismember",
        "sigprocmask",
        "write",
        # Bare system calls, too, which POSIX lacks or does not list.
        "getpriority",
        "getrlimit",
        "getrlimit64",
        "prctl",
        "setpriority",
        "syscall",
        # Of forked workers only, once CPython and all hooks have settled.
        "setgroups",
        "setresgid",
        "setresuid",
        # Of the other one of the two.
        "afk_child_give_up",
        "afk_child_join_session",
        "afk_child_place_fds",
        "afk_child_set_signals",
        "afk_child_tell_guard",
        "ioctl",  # a bare system call; not in POSIX's list because POSIX lacks it
        "memcpy",  # the compiler's, for structures
        "memset",
        "__errno_location",  # errno, of this thread
        "__stack_chk_fail",  # only once all is lost
        "_GLOBAL_OFFSET_TABLE_",
    }
)
# glibc's checked variants of the same, with _FORTIFY_SOURCE.
FORTIFIED = frozenset({"__read_chk", "__poll_chk", "__memcpy_chk", "__memset_chk"})
SANITIZERS = ("__asan_", "__tsan_", "__ubsan_", "__msan_", "__sanitizer_")


def undefined(path: Path) -> set[str]:
    """The undefined symbols of an object, without versions."""
    out = subprocess.run(
        ["nm", "--undefined-only", "--format=posix", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {line.split()[0].split("@")[0] for line in out.splitlines() if line.strip()}


def find(arguments: list[str]) -> list[Path]:
    """The objects named, and those in the folders named."""
    found: list[Path] = []
    for name in arguments or [str(ROOT / "build")]:
        path = Path(name)
        if path.is_dir():
            found.extend(sorted(path.rglob("*src_core_*.c.o")))
        elif path.is_file():
            found.append(path)
        else:
            print(f"check_child: {path}: no such object", file=sys.stderr)
            return []
    return found


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    checked = 0
    failed = False
    for path in find(arguments):
        names = undefined(path)
        if any(name.startswith(SANITIZERS) for name in names):
            continue
        if "__tls_get_addr" in names:
            failed = True
            print(f"check_child: {path} allocates thread storage when it is first looked at")
        if "src_core_child" not in path.name:
            continue
        checked += 1
        bad = sorted(names - ALLOWED - FORTIFIED)
        if bad:
            failed = True
            print(f"check_child: {path} calls what may hang in a forked child: {', '.join(bad)}")
    if checked == 0:
        print("check_child: no object of src/core/child*.c: build first", file=sys.stderr)
        return 2
    if not failed:
        print(f"check_child: {checked} object(s), only async-signal-safe calls")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
