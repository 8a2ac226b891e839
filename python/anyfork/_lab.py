"""Where the command line tries things out: sub-interpreters, fresh Pythons, /proc.

Rule: what may crash is tried in a process of its own, with a timeout.
"""

from __future__ import annotations

import _interpreters
import contextlib
import json
import os
import pickle
import platform
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from ._errors import describe_status

Kind = Literal["legacy", "isolated"]
KINDS: tuple[Kind, ...] = ("legacy", "isolated")


class SubInterpreterError(Exception):
    """What a function raised in a sub-interpreter, as text."""


class SubInterpreter:
    """A sub-interpreter in which functions of this package can be called.

    Args:
      kind: "legacy" (the main interpreter's GIL, as mod_wsgi's) or "isolated"
        (a GIL of its own, PEP 684).
    """

    def __init__(self, kind: Kind) -> None:
        self.id = _interpreters.create(kind)

    def call(self, fn: Callable[..., Any], /, *args: object) -> Any:
        """Call ``fn(*args)`` there, on the calling thread; arguments and result are
        pickled. Raises SubInterpreterError with the traceback's text.

        Returns twice if ``fn`` forks and returns twice.
        """
        fd = os.open(os.devnull, os.O_RDONLY)  # keeps the number until _answer() replaces it
        try:
            failure = _interpreters.exec(
                self.id,
                f"import sys\n"
                f"sys.path.extend(p for p in {sys.path!r} if p not in sys.path)\n"
                f"from anyfork import _lab\n"
                f"_lab._answer({fd}, {pickle.dumps((fn, args))!r})\n",
            )
            if failure is not None:
                raise SubInterpreterError(getattr(failure, "formatted", str(failure)))
            with open(fd, "rb", closefd=False) as file:
                value, error = pickle.load(file)
        finally:
            os.close(fd)
        if error is not None:
            raise SubInterpreterError(error)
        return value

    def destroy(self) -> None:
        _interpreters.destroy(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.destroy()


def _answer(fd: int, call: bytes) -> None:
    """The sub-interpreter's side of :meth:`SubInterpreter.call`."""
    try:
        fn, args = pickle.loads(call)
        answer = pickle.dumps((fn(*args), None))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    # A new file, made after the call: if that forked, each process gets its own.
    own = os.memfd_create("anyfork-answer")
    with open(own, "wb", closefd=False) as file:
        file.write(answer)
    os.lseek(own, 0, os.SEEK_SET)
    os.dup2(own, fd, inheritable=False)
    os.close(own)


# ---- fresh processes ----------------------------------------------------------------


class Trial(NamedTuple):
    """What became of a function that was tried in a fresh Python.

    ``value`` is what it returned, None if it did not get there; ``left_over``
    the processes that it left behind (they have been killed).
    """

    status: int | None
    value: Any
    stdout: str
    stderr: str
    seconds: float
    left_over: list[int]

    def failure(self) -> str | None:
        """Why there is no value to believe, or None."""
        if self.status is None:
            return f"no end within {self.seconds:.0f} s, killed"
        if self.status != 0:
            return f"{describe_status(self.status)}; {last_line(self.stderr)}"
        if self.left_over:
            return f"left processes behind: {self.left_over}"
        return None


_TRIAL = """\
import sys
sys.path[:] = {path!r}
from anyfork import _lab
_lab._tried({fd}, {module!r}, {name!r}, {args!r})
"""


def try_in_fresh_python(
    fn: Callable[..., Any], /, *args: str | int, timeout: float = 60.0, wait: float = 5.0
) -> Trial:
    """Call ``fn(*args)`` in a new Python; its result comes back as JSON.

    Args:
      timeout: seconds after which the process and all its children are killed.
      wait: seconds that its children may take to go after it has ended.
    """
    answer, out, err = (os.memfd_create(f"anyfork-{n}") for n in ("answer", "out", "err"))
    code = _TRIAL.format(
        path=sys.path, fd=answer, module=fn.__module__, name=fn.__name__, args=args
    )
    begin = time.monotonic()
    try:
        with subprocess.Popen(
            # CPython's and our warning about a fork beside threads is not news here.
            [sys.executable, "-P", "-W", "ignore::DeprecationWarning", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=(answer,),
            start_new_session=True,
        ) as process:
            status: int | None
            try:
                code_or_signal = process.wait(timeout)
                status = -code_or_signal if code_or_signal < 0 else code_or_signal << 8
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        seconds = time.monotonic() - begin
        left_over = _group_ends(process.pid, wait if status is not None else 0)
        text = _contents(answer)
        value = json.loads(text) if text and status == 0 else None
        return Trial(status, value, _contents(out), _contents(err), seconds, left_over)
    finally:
        for fd in (answer, out, err):
            os.close(fd)


def _contents(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


def _tried(fd: int, module: str, name: str, args: tuple[str | int, ...]) -> None:
    """The fresh process's side of :func:`try_in_fresh_python`."""
    import importlib
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some trials crash on purpose
    os.set_inheritable(fd, False)
    me = os.getpid()
    value = getattr(importlib.import_module(module), name)(*args)
    if os.getpid() == me:  # a forked child may come back here too
        os.write(fd, json.dumps(value).encode())


def _group_ends(group: int, wait: float) -> list[int]:
    """Wait for the end of a process group; kill and return what is still there."""
    deadline = time.monotonic() + wait
    while True:
        alive = [p.pid for p in processes() if p.group == group and p.state not in "ZX"]
        if not alive or time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


def last_line(text: str) -> str:
    """The line of a crash's or exception's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error") or "Assertion" in line]
    return (fatal or lines[-1:] or ["no message"])[0]


# ---- what is there --------------------------------------------------------------------


class ProcessInfo(NamedTuple):
    pid: int
    parent: int
    group: int
    state: str


def processes() -> Iterator[ProcessInfo]:
    """All processes of the machine that can be seen; see proc_pid_stat(5)."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                yield ProcessInfo(int(name), int(fields[1]), int(fields[2]), fields[0].decode())


def children() -> set[int]:
    """The child processes of this one, zombies too."""
    me = os.getpid()
    return {p.pid for p in processes() if p.parent == me}


def python_info() -> dict[str, Any]:
    """Which CPython this is."""
    return {
        "implementation": platform.python_implementation(),
        "version": sys.version.split()[0],
        "build": " ".join(platform.python_build()),
        "compiler": platform.python_compiler(),
        "debug": hasattr(sys, "gettotalrefcount"),
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "executable": sys.executable,
    }


def python_line() -> str:
    """:func:`python_info` in one line."""
    info = python_info()
    kind = "debug" if info["debug"] else "release"
    gil = "free-threaded" if info["free_threaded"] else "GIL"
    return (
        f"{info['implementation']} {info['version']} ({info['build']}, {info['compiler']}), "
        f"{kind}, {gil}; {info['executable']}"
    )
