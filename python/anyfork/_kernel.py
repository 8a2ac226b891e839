"""What of the kernel anyfork uses, tried here: the feature matrix of ``anyfork doctor``.

Rule: each feature is tried, never concluded from a version number (a seccomp filter or a
container may forbid what the kernel has).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

# The same on all architectures, linux/unistd.h.
_SYS_CLONE3, _SYS_CLOSE_RANGE = 435, 436
_GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO for the 64 bytes of its first version
_INFO_EXIT = 1 << 3


class Feature(NamedTuple):
    """One thing that a kernel may lack or forbid."""

    name: str
    since: str  # of Linux
    used_for: str
    without: str
    trial: Callable[[], None]  # raises OSError where it is missing


def _system_call(number: int, *arguments: int, missing: tuple[int, ...] = (errno.ENOSYS,)) -> None:
    """Raise if the kernel does not know this call; other errors are of the arguments."""
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [ctypes.c_long(n) for n in (number, *arguments, *(0,) * (6 - len(arguments)))]
    if libc.syscall(*padded) < 0 and (number_of := ctypes.get_errno()) in missing:
        raise OSError(number_of, os.strerror(number_of))


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _close_range() -> None:
    _system_call(_SYS_CLOSE_RANGE, 0x7FFFFFFF, 0x7FFFFFFF)


def _clone3() -> None:
    _system_call(_SYS_CLONE3, missing=(errno.ENOSYS, errno.EPERM))


def _exit_info() -> None:
    """The status of a child that somebody else has reaped."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = os.pidfd_open(pid)
    try:
        os.waitpid(pid, 0)
        info = bytearray(64)
        struct.pack_into("=Q", info, 0, _INFO_EXIT)
        fcntl.ioctl(pidfd, _GET_INFO, info)
        if not struct.unpack_from("=Q", info)[0] & _INFO_EXIT:
            raise OSError(errno.ENODATA, "without the exit status")
    finally:
        os.close(pidfd)


def _cgroup_mount() -> str:
    with open("/proc/self/mounts") as file:
        fields = [line.split() for line in file]
    for mount in fields:
        if mount[2] == "cgroup2":
            return mount[1]
    raise OSError(errno.ENOENT, "no cgroup v2 is mounted")


def _cgroup(file: str) -> Callable[[], None]:
    def trial() -> None:
        path = os.path.join(_cgroup_mount(), f"anyfork-doctor-{os.getpid()}")
        os.mkdir(path)
        try:
            os.close(os.open(os.path.join(path, file), os.O_WRONLY))
        finally:
            os.rmdir(path)

    return trial


def _proc() -> None:
    os.readlink("/proc/self/ns/pid_for_children")


FEATURES = (
    Feature(
        "pidfd_open(2)", "5.3", "a worker's pidfd, wait and signal without races",
        "methods that fork refuse; exec works", _pidfd,
    ),
    Feature(
        "close_range(2)", "5.9", 'fd_policy="close" in a few system calls',
        "descriptors are listed from /proc and closed one by one", _close_range,
    ),
    Feature(
        "clone3(2)", "5.7", "exec is born in its cgroup",
        "it moves there itself before it executes", _clone3,
    ),
    Feature(
        "PIDFD_GET_INFO", "6.15", "the status of a worker that the host has reaped",
        "it is told by the worker's own report, else WorkerDied", _exit_info,
    ),
    Feature(
        "cgroup v2", "4.5", "cgroup=", "cgroup= is refused", _cgroup("cgroup.procs"),
    ),
    Feature(
        "cgroup.kill", "5.14", 'scope="cgroup"', 'scope="cgroup" is refused',
        _cgroup("cgroup.kill"),
    ),
    Feature(
        "/proc", "4.12", "descriptors and threads of a worker, CPython's memory checked",
        "numbers are tried one by one; ps does not show name=", _proc,
    ),
)  # fmt: skip


def try_features() -> list[dict[str, object]]:
    """Each feature, and why it is not here: empty if it is."""
    rows: list[dict[str, object]] = []
    for feature in FEATURES:
        try:
            feature.trial()
            why = ""
        except OSError as exc:
            why = exc.strerror or str(exc)
        rows.append(
            {
                "name": feature.name,
                "since": feature.since,
                "available": not why,
                "why_not": why,
                "used_for": feature.used_for,
                "without": feature.without,
            }
        )
    return rows
