"""Kill a template, or a standby of it, at its n-th system call.

The template installs a filter, as soon as its interpreter can, that tells of every system
call of its own and of all that it forks, and its owner decides: seccomp_unotify(2). So each
step between two system calls is met, in the build that is shipped, and nobody is traced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator

from attack_common import HERE, LIMIT, is_gone, until

import anyfork

SYS_PIDFD_GETFD = 438
CONTINUE = 1
RECV, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_*
QUIET = 0.03  # seconds
NOTIFICATION = 80  # bytes; its id, a pid, flags, the number of the call

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Watch(threading.Thread):
    """Lets a template and its standbys go on, and kills one of them when it is due."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._path = os.path.join(folder, "listener")
        with open(os.path.join(folder, "sitecustomize.py"), "w") as f:
            f.write(f"import syscalls_begin\nsyscalls_begin.begin({self._path!r})\n")
        self._python_path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, HERE, self._python_path)))
        self._nth = 0
        self._of_template = False
        self._stop = False
        self.template = 0
        self.calls: Counter[int] = Counter()  # of each process, since armed
        self.pids: set[int] = set()
        self.killed = ""
        self.failure: BaseException | None = None
        self._last = time.monotonic()

    def arm(self, nth: int, of_template: bool) -> None:
        """The nth call from now, of the template or of any standby of it."""
        self.calls.clear()
        self.killed = ""
        self._of_template = of_template
        self._nth = nth

    def disarm(self) -> None:
        """``killed`` stays as it is."""
        self._nth = 0

    def is_quiet(self) -> bool:
        """All of them wait for something."""
        return time.monotonic() - self._last > QUIET

    def stop(self) -> None:
        self._stop = True
        self.join(LIMIT)
        assert not self.is_alive(), "the watch does not end"
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        try:
            fd = self._take_listener()
            self._unset()  # the next template has none
            if fd >= 0:
                self._listen(fd)
                os.close(fd)
        except BaseException as exc:
            self.failure = exc

    def _unset(self) -> None:
        if self._python_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = self._python_path

    def _take_listener(self) -> int:
        while not self._stop:
            time.sleep(0.002)
            with contextlib.suppress(OSError):
                with open(self._path) as f:
                    self.template, number = map(int, f.read().split())
                pidfd = os.pidfd_open(self.template)
                fd: int = _syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
                os.close(pidfd)
                if fd >= 0 and "seccomp" in os.readlink(f"/proc/self/fd/{fd}"):
                    return fd
                if fd >= 0:
                    os.close(fd)
                elif ctypes.get_errno() == errno.EPERM:  # it would wait for ever
                    os.kill(self.template, signal.SIGKILL)
                    return -1
        return -1

    def _listen(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            events = poll.poll(50)
            if events and not events[0][1] & select.POLLIN:
                return  # all that had the filter have ended
            # Who ends slowly still has to be answered, for it has a copy of the listener.
            if not events and self._stop and all(map(is_gone, self.pids)):
                return
            if events:
                with contextlib.suppress(FileNotFoundError, InterruptedError):  # it has died
                    self._answer(fd)

    def _answer(self, fd: int) -> None:
        notification = bytearray(NOTIFICATION)
        fcntl.ioctl(fd, RECV, notification, True)
        ident, pid, _flags, call = struct.unpack_from("=QIIi", notification)
        self.pids.add(pid)
        self._last = time.monotonic()
        self.calls[pid] += 1
        counted = self._of_template == (pid == self.template)
        if counted and self._nth and self.calls[pid] >= self._nth:
            self.killed = f"{pid} at call {self.calls[pid]}, number {call}"
            self._nth = 0
            os.kill(pid, signal.SIGKILL)
            return
        fcntl.ioctl(fd, SEND, struct.pack("=QqiI", ident, 0, 0, CONTINUE))


@contextlib.contextmanager
def watched(standby: tuple[int, int]) -> Iterator[tuple[anyfork.Template, Watch]]:
    """A template that is not made yet, and its watch. Afterwards nothing of them is left."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(folder)
        watch.start()
        template = anyfork.Template(standby=standby)
        try:
            yield template, watch
        finally:
            template.close()
            watch.stop()
        for pid in watch.pids:
            until(lambda pid=pid: is_gone(pid), f"the end of {pid}")


def why_not() -> str:
    """Why a process here may not watch another so; empty if it may."""
    try:
        with watched((0, 0)) as (template, watch):
            template.run(int, "1")
        return "" if watch.calls else "no call was told"
    except (OSError, anyfork.SpawnError) as exc:
        return repr(exc)
