"""Errors: what failed, where, what it left behind, what to do."""

from __future__ import annotations

import errno as _errno
import os
import resource
import signal

# enum anyfork_code of include/anyfork/anyfork.h
_EINVAL, _ELAYOUT, _EUNAVAILABLE, _ESYSTEM, _EFINALIZING = range(-5000, -5005, -1)
_ETIMEDOUT, _EDIED, _EFOREIGN, _EREAPED = range(-5006, -5010, -1)


class SpawnError(OSError):
    """A start failed; nothing of it is left behind.

    Attributes:
      stage: where it failed, a name such as ``"fork"`` or ``"pipe"``.
      errno: the system's error number, or None if no system call was involved.
      method: the spawn method, or ``"fork()"``.
      detail: what was found.
    """

    def __init__(self, stage: str, errno: int | None, method: str, detail: str) -> None:
        self.stage = stage
        self.method = method
        self.detail = detail
        what = f"{detail} (stage: {stage})" if detail else f"stage {stage} failed"
        text = f"{method}: {what}"
        if errno:
            super().__init__(errno, f"{text}: {os.strerror(errno)}")
        else:
            super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.stage, self.errno, self.method, self.detail))


class MethodUnavailable(SpawnError, NotImplementedError):
    """This method, or ``fork()``, cannot work here; nothing was started."""


class TemplateLost(SpawnError):
    """A snapshot starts nothing any more, and cannot be made again; nothing was started."""


class WorkerDied(Exception):
    """A worker ended without a result.

    Attributes:
      pid: its process id; None for a thread of this process.
      status: its wait status, as of :func:`os.waitpid`; None if the host reaped
        it and no record tells.
      returncode: the exit code, or the negated signal number, or None.
      oom: whether the kernel killed it because memory had run out, as far as the counters
        of its cgroup tell.
      stderr: the end of what it wrote to its standard error, where that was kept.
    """

    def __init__(
        self,
        pid: int | None,
        status: int | None,
        detail: str = "",
        oom: bool = False,
        stderr: str = "",
    ) -> None:
        self.pid = pid
        self.status = status
        self.detail = detail
        self.oom = oom
        self.stderr = stderr
        self.returncode = None if status is None else os.waitstatus_to_exitcode(status)
        if pid is None and status is None:
            text = f"{worker_name(pid)} ended; how is not known"
        else:
            text = f"{worker_name(pid)} {describe_status(status)}"
        if oom:
            text += ", for memory had run out (oom)"
        super().__init__(f"{text}: {detail}" if detail else text)
        if stderr:
            self.add_note(f"The end of its standard error:\n{stderr.rstrip()}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.pid, self.status, self.detail, self.oom, self.stderr))


class CallCancelled(Exception):
    """A call ended by a cancellation, or a KeyboardInterrupt, of the worker's own: its owner
    did not ask for it."""

    def __init__(self) -> None:
        super().__init__("the call was cancelled in the worker")


class RemoteError(Exception):
    """An exception of a worker that could not be pickled: its repr and traceback.

    Attributes:
      type_name: the qualified name of its type.
      traceback_text: the traceback as the worker saw it.
    """

    def __init__(self, type_name: str, text: str, traceback_text: str) -> None:
        self.type_name = type_name
        self.text = text
        self.traceback_text = traceback_text
        super().__init__(f"{type_name}: {text}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.type_name, self.text, self.traceback_text))


def worker_name(pid: int | None) -> str:
    """What to call a worker; without a pid it is a thread of this process."""
    return "the sub-interpreter" if pid is None else f"worker {pid}"


def describe_status(status: int | None) -> str:
    """Say what a wait status means."""
    if status is None:
        return "was reaped by somebody else in this process; its status is lost"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"


def _descriptor_limit() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    from . import _anyfork

    return (
        f"the limit of open files is {soft} (RLIMIT_NOFILE, hard limit {hard}), and this process "
        f"holds {_anyfork.workers_held()} workers, with up to four each"
    )


# Members of struct anyfork_options, and what they are called here.
_OPTION_OF = {
    "lifeline_scope": "scope",
    "lifeline_signal": "lifeline",
    "n_groups": "extra_groups",
    "groups": "extra_groups",
    "session": "start_new_session",
    "program": "executable",
}


def in_python(stage: str, detail: str) -> str:
    """What C says of an option, under the option's name here."""
    if stage not in ("argument", "option"):
        return detail
    member, colon, rest = detail.partition(":")
    return _OPTION_OF.get(member, member) + colon + rest


def from_c(
    code: int, stage: str, errno: int, method: str, detail: str, line: int
) -> BaseException:
    """Make the exception for a ``struct anyfork_error``."""
    detail = in_python(stage, detail)
    if code == _EINVAL:
        return ValueError(f"{method}: {detail}")
    if code == _EFINALIZING:
        return PythonFinalizationError(f"{method}: {detail}")
    if code in (_ELAYOUT, _EUNAVAILABLE):
        what = detail
        if code == _ELAYOUT:
            import sys

            version = sys.version.split()[0]
            what = f"unknown interpreter layout ({detail}; CPython {version})"
        started = "" if stage == "signal" else "nothing was started. "
        return MethodUnavailable(
            stage,
            None,
            method,
            f"{what}; {started}`anyfork methods` shows what works here, and what each method is",
        )
    if errno in (_errno.EMFILE, _errno.ENFILE):
        detail = "; ".join(filter(None, (detail, _descriptor_limit())))
    if code == _EFOREIGN:
        return SpawnError(stage, None, method, detail)
    exc = SpawnError(stage, errno or None, method, detail)
    if code == _ETIMEDOUT:
        exc.add_note("nothing was started")
    return exc
