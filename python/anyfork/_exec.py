"""Method ``exec``: the command line of a fresh interpreter, and its first Python."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable

from . import _anyfork
from ._errors import MethodUnavailable

# -P: a module of the working directory is not taken for one of the standard library;
# the owner's sys.path, which may begin with it, comes with the target.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from anyfork._exec import main; main()"


def interpreter() -> str:
    """The Python of this process. Inside a host, sys.executable may be the host."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}{sys.abiflags}"
    found = [sys.executable] if "python" in os.path.basename(sys.executable or "") else []
    for prefix in dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_exec_prefix)):
        found += [os.path.join(prefix, "bin", one) for one in (name, "python3")]
    for path in found:
        if os.access(path, os.X_OK):
            return path
    raise MethodUnavailable(
        "argument",
        None,
        "exec",
        "this program's own Python interpreter cannot be found; nothing was started. "
        "Say which it is: executable=...",
    )


def argv(executable: str, report_fd: int, target_fd: int, name: bytes) -> list[bytes]:
    """The command line for a target in ``target_fd``; ``name`` may be empty."""
    import subprocess  # not when this package is imported: it is large

    flags: Callable[[], list[str]] = subprocess._args_from_interpreter_flags  # type: ignore[attr-defined]
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = [executable, *flags(), "-P", "-c", _BOOT, parent, str(report_fd), str(target_fd)]
    return [*(os.fsencode(word) for word in words), name]


def target_file(data: bytes) -> int:
    """A descriptor from which the worker reads its target; the caller closes it."""
    fd = os.memfd_create("anyfork-target")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def main() -> None:
    """In the fresh interpreter: read the target, call it, end. Never returns."""
    _parent, report_fd, target_fd, name = sys.argv[1:5]
    if name:
        with open("/proc/self/comm", "wb") as comm:
            comm.write(os.fsencode(name)[:15])
    with open(int(target_fd), "rb") as file:
        data = file.read()
    sys.path[:], sys.argv[:], *_rest = pickle.loads(data)
    _anyfork.exec_worker(int(report_fd), data)
