"""Older kernels and containers: system calls that answer ENOSYS, by a seccomp filter.

What has another way takes it; what has none fails clearly, with nothing left.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys

from attack_common import LIMIT, available, in_child, places, raises, same
from attack_options import open_here

import anyfork

# asm/unistd_64.h; these four have the same number on all architectures that are newer
NUMBERS = {"clone3": 435, "close_range": 436, "pidfd_open": 434}
IOCTL = {"x86_64": 16, "aarch64": 29}.get(platform.machine())
SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine())
PIDFD_GET_INFO = 0xFF0B  # the low 16 bits; the others have the size

LD, JEQ, RET, AND = 0x20, 0x15, 0x06, 0x54  # linux/bpf_common.h, linux/filter.h
ALLOW, ENOSYS = 0x7FFF0000, 0x00050000 | errno.ENOSYS  # linux/seccomp.h
SET_MODE_FILTER, TSYNC = 1, 1
PR_SET_NO_NEW_PRIVS = 38


def _instruction(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("=HBBI", code, jt, jf, k)


def forbid(*names: str) -> None:
    """For all threads of this process and all that come of them, for good."""
    program = [_instruction(LD, 0, 0, 0)]  # the number
    for name in names:
        if name == "ioctl(PIDFD_GET_INFO)":
            assert IOCTL is not None
            program += [
                _instruction(JEQ, 0, 4, IOCTL),
                _instruction(LD, 0, 0, 24),  # the second argument's lower half
                _instruction(AND, 0, 0, 0xFFFF),
                _instruction(JEQ, 0, 1, PIDFD_GET_INFO),
                _instruction(RET, 0, 0, ENOSYS),
                _instruction(LD, 0, 0, 0),
            ]
        else:
            program += [_instruction(JEQ, 0, 1, NUMBERS[name]), _instruction(RET, 0, 0, ENOSYS)]
    program.append(_instruction(RET, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    same(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0)
    done = libc.syscall(SECCOMP, SET_MODE_FILTER, TSYNC, ctypes.c_char_p(fprog))
    assert done == 0, os.strerror(ctypes.get_errno())


def absent(*names: str) -> None:
    forbid(*names)
    libc = ctypes.CDLL(None, use_errno=True)
    for name in set(names) & set(NUMBERS):
        same((libc.syscall(NUMBERS[name], 0, 0, 0), ctypes.get_errno()), (-1, errno.ENOSYS))


def open_descriptors() -> int:
    """But for libffi, which ctypes of 3.14 leaves open, and the folder itself."""
    return sum(not (".so" in path or path.endswith("/fd")) for path in open_here().values())


def start_all() -> None:
    for method in available():
        same(anyfork.run(os.getpid, method=method) == os.getpid(), False)
        assert anyfork.run(open_descriptors, method=method, fd_policy="close") <= 5
    same(anyfork.run(open_descriptors, method="exec"), 4)  # 0 to 2, report
    with anyfork.spawn(argv=["sh", "-c", "exit 3"], stdin=subprocess.DEVNULL) as child:
        same(child.wait(LIMIT), 3)
        same(child._status_from, "wait")


@places("main")
def check_doctor_sees_what_is_absent(place: str) -> None:
    """In a process of its own, for good."""
    from anyfork import _kernel

    def missing(*forbidden: str) -> set[str]:
        def look() -> list[str]:
            if forbidden:
                forbid(*forbidden)
            return [str(row["name"]) for row in _kernel.try_features() if not row["available"]]

        return set(eval(in_child(look)))

    here = missing()
    same(missing("clone3", "close_range") - here, {"clone3(2)", "close_range(2)"} - here)
    same(missing("pidfd_open") - here, {"pidfd_open(2)", "PIDFD_GET_INFO"} - here)
    same(missing("ioctl(PIDFD_GET_INFO)") - here, {"PIDFD_GET_INFO"} - here)


def check_without_clone3_and_close_range(place: str) -> None:
    if SECCOMP is None:
        return
    absent("clone3", "close_range")
    start_all()


def check_without_get_info(place: str) -> None:
    if SECCOMP is None:
        return
    absent("ioctl(PIDFD_GET_INFO)")
    start_all()


@places("main")
def check_a_stolen_status_without_get_info(place: str) -> None:
    """A typed error and never a success; where there is a record, it tells."""
    if SECCOMP is None:
        return
    absent("ioctl(PIDFD_GET_INFO)")
    with anyfork.spawn(argv=["sh", "-c", "exit 3"]) as child:
        assert child.pid is not None
        same(os.waitpid(child.pid, 0), (child.pid, 3 << 8))
        exc = raises(anyfork.WorkerDied, child.wait, LIMIT)
        assert "reaped by somebody else" in str(exc), exc
        same((child.returncode, child._status_from), (None, "lost"))
    with anyfork.spawn(sys.exit, 3, method="exec") as child:
        assert child.pid is not None
        same(os.waitpid(child.pid, 0), (child.pid, 3 << 8))
        same((child.wait(LIMIT), child._status_from), (3, "report"))


def check_without_pidfd_open(place: str) -> None:
    """exec gets its pidfd from clone(2); a fork cannot, and says what is missing."""
    if SECCOMP is None:
        return
    absent("pidfd_open")
    same(anyfork.run(os.getpid, method="exec") == os.getpid(), False)
    with anyfork.spawn(argv=["sh", "-c", "exit 3"]) as child:
        same(child.wait(LIMIT), 3)
    for method in available():
        exc = raises(anyfork.SpawnError, anyfork.spawn, os.getpid, method=method)
        same((method, exc.stage, exc.errno), (method, "pidfd", errno.ENOSYS))
