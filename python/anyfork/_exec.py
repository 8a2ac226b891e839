"""Method ``exec``: programs, and targets in a fresh interpreter, from both sides."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

from . import _anyfork, _options, _pickling
from ._child import Child
from ._errors import MethodUnavailable
from ._options import Options, Path

# -P: a module of the working directory is not taken for one of the standard library;
# the owner's sys.path, which may begin with it, comes with the target.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); sys._anyfork_boots = True; "
    "from anyfork._boot import main; main()"
)


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


def _command(executable: str, report_fd: int, target_fd: int, name: bytes) -> list[bytes]:
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


def _exec_options(options: Options) -> dict[str, Any]:
    prepared = _options.prepare("exec", options)
    # As subprocess does: a program should not find ignored what Python ignores.
    asked = prepared.get("ignored_signals", ())
    ours = [sig for sig in (signal.SIGPIPE, signal.SIGXFSZ) if sig not in asked]
    prepared.setdefault("default_signals", ours)
    return prepared


def start_target(
    fn: Callable[..., object],
    args: tuple[object, ...],
    options: Options,
    *,
    template: bool = False,
    cls: type[Child] = Child,
) -> Child:
    """A worker in a fresh interpreter; ``template``: that is nobody's child."""
    prepared = _exec_options(options)
    executable = os.fsdecode(prepared.get("program") or interpreter())
    name = prepared.pop("name", b"")  # an interpreter finds its files by argv[0]
    fd = target_file(_pickling.pickled((fn, args), "exec", True))
    try:
        taken = [there for _here, there in prepared.get("fds", ())]
        report_to = max([2, *taken]) + 1
        prepared["fds"] = [*prepared.get("fds", ()), (fd, report_to + 1)]
        prepared["argv"] = _command(executable, report_to, report_to + 1, name)
        prepared["program"] = os.fsencode(executable)
        _audit(prepared, options)
        child = _anyfork.spawn(
            cls, "exec", None, (), prepared, report_to, True if template else None
        )
    finally:
        os.close(fd)
    assert not isinstance(child, str)
    return child


def start_program(argv: Iterable[Path], options: Options) -> Child:
    """A worker that is a program."""
    prepared = _exec_options(options)
    if isinstance(argv, str | bytes) or not isinstance(argv, Iterable):
        raise TypeError(f"argv: a sequence of words is wanted, not {type(argv).__name__}")
    prepared["argv"] = [_options.as_bytes("argv", word) for word in argv]
    _audit(prepared, options)
    child = _anyfork.spawn(Child, "exec", None, (), prepared, -1, None)
    assert not isinstance(child, str)
    child.__dict__["_program"] = True
    return child


def _audit(prepared: dict[str, Any], options: Options) -> None:
    argv = prepared["argv"]
    program = prepared.get("program") or (argv[0] if argv else b"")
    sys.audit("subprocess.Popen", program, argv, options.get("cwd"), options.get("env"))
