"""The options of one start: what spawn()'s keywords mean, checked and made plain.

What comes out is a dict of ints, bytes, lists and tuples for _anyfork.spawn(), under
the names of ``struct anyfork_options``; ranges are checked there.
"""

from __future__ import annotations

import operator
import os
import resource
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from ._template import Template

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Descriptor = int | IO[Any]

# enum anyfork_stdio_kind of include/anyfork/anyfork.h
_NULL, _PIPE, _FD, _FILE, _STDOUT = range(1, 6)
# subprocess.PIPE, STDOUT and DEVNULL; without its import, which would be half the time
# that it takes to import this package.
PIPE = -1
_SPECIAL = {PIPE: _PIPE, -2: _STDOUT, -3: _NULL}
_SESSION_NEW, _SESSION_GROUP = 1, 2
_POLICIES = ("default", "close", "tombstone", "inherit")
_SIGINT = ("owner", "own", "group")
_SCOPES = ("worker", "group", "cgroup")
_NO_LIMIT = 2**64 - 1


class Options(TypedDict, total=False):
    """Keywords of :func:`anyfork.spawn`; what is not given, or None, is as the owner has it.

    executable: the program to run, else ``argv[0]`` looked up in PATH; for a Python
      target the interpreter. Only with ``exec``.
    env: the whole environment.
    cwd, umask: as of :func:`os.chdir` and :func:`os.umask`.
    user, group, extra_groups: names or numbers; real, effective and saved ids.
    rlimits: {resource.RLIMIT_...: soft or (soft, hard)}.
    nice: added to the owner's.
    cpus: the CPUs it may run on.
    cgroup: the folder of a cgroup v2.
    oom_score_adj: -1000 to 1000.
    name: what ``ps`` and ``top`` show; in /proc/PID/comm with dashes for spaces, by which CPython
      would miscount threads.
    start_new_session, process_group: as of :class:`subprocess.Popen`.
    stdin, stdout, stderr: :data:`subprocess.PIPE`, :data:`subprocess.DEVNULL`, a
      descriptor or file, or a path; stderr also :data:`subprocess.STDOUT`. A path is
      opened for appending, that of stdin for reading.
    fds: {number in the worker: descriptor or file}; 3 and above.
    pass_fds: descriptors that keep their numbers.
    fd_policy: what becomes of all others: "close" (the default of ``exec``),
      "tombstone" (of methods that fork: a placeholder takes their number) or "inherit".
    signal_mask: the signals that the worker blocks; none.
    ignored_signals, default_signals: beside those that the owner ignores; and those
      that the worker takes by default though the owner ignores them (with ``exec``
      SIGPIPE and SIGXFSZ, which Python ignores).
    sigint: who acts on Ctrl-C: "owner" (the worker ignores it), "own" (the worker:
      KeyboardInterrupt in Python), or "group" (the same, in a process group of its own,
      which the terminal leaves alone).
    lifeline: whether the worker ends with its owner; or the signal that ends it.
    scope: who ends then: "worker"; "group": its process group or session too; "cgroup":
      all that is in its cgroup.
    guard: also hold the worker by a small process that ends it where the kernel does not:
      a worker that changes its user itself, an owner whose descriptors foreign processes
      have. Where the scope is a cgroup it is on.
    template: the :class:`anyfork.Template` that makes the worker; with ``zygote`` only.
    fresh: by a process of the template that is made for this worker alone: with a layout of the
      address space, a stack canary and a hash seed of its own. It takes as long as the preloads.
    """

    executable: Path
    env: Mapping[str, str] | Mapping[bytes, bytes]
    cwd: Path
    umask: int
    user: int | str
    group: int | str
    extra_groups: Iterable[int | str]
    rlimits: Mapping[int, int | tuple[int, int]]
    nice: int
    cpus: Iterable[int]
    cgroup: Path
    oom_score_adj: int
    name: str
    start_new_session: bool
    process_group: int | None
    stdin: Descriptor | Path | None
    stdout: Descriptor | Path | None
    stderr: Descriptor | Path | None
    fds: Mapping[int, Descriptor]
    pass_fds: Iterable[Descriptor]
    fd_policy: Literal["close", "tombstone", "inherit"]
    signal_mask: Iterable[int]
    ignored_signals: Iterable[int]
    default_signals: Iterable[int]
    sigint: Literal["owner", "own", "group"]
    lifeline: bool | int
    scope: Literal["worker", "group", "cgroup"]
    guard: bool
    template: Template
    fresh: bool


def _int(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name}: an int is wanted, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: an int is wanted, not {type(value).__name__}") from None
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name}: {number} is out of range")
    return number


def _natural(name: str, value: object) -> int:
    number = _int(name, value)
    if number < 0:
        raise ValueError(f"{name}: {number} is negative")
    return number


def as_bytes(name: str, value: object) -> bytes:
    """A str or path as the system wants it."""
    try:
        data = os.fsencode(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: a str or path is wanted, not {type(value).__name__}") from None
    if b"\0" in data:
        raise ValueError(f"{name}: it contains a NUL character")
    return data


def _name(name: str, value: object) -> bytes:
    data = as_bytes(name, value)
    if not data:
        raise ValueError(f"{name}: empty")
    return data


def _list(name: str, value: object, item: Callable[[str, Any], Any]) -> list[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: an iterable is wanted, not {type(value).__name__}")
    return [item(name, one) for one in value]


def _mapping(name: str, value: object) -> list[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: a mapping is wanted, not {type(value).__name__}")
    return list(value.items())


def _choice(name: str, value: object, known: tuple[str, ...]) -> int:
    if value not in known or value == "default":
        names = ", ".join(repr(one) for one in known if one != "default")
        raise ValueError(f"{name}: {value!r} is none of {names}")
    return known.index(value)


def _id(name: str, value: object, find: Callable[[str], int]) -> int:
    if not isinstance(value, str):
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32 - 1:
            return value
        raise (ValueError if isinstance(value, int) else TypeError)(
            f"{name}: a name or a number is wanted, not {value!r}"
        )
    try:
        return find(value)
    except KeyError:
        raise ValueError(f"{name}: {value!r} is not known to this system") from None


def _user(name: str, value: object) -> int:
    def find(text: str) -> int:
        import pwd

        return pwd.getpwnam(text).pw_uid

    return _id(name, value, find)


def _group(name: str, value: object) -> int:
    def find(text: str) -> int:
        import grp

        return grp.getgrnam(text).gr_gid

    return _id(name, value, find)


def _signal(name: str, value: object) -> int:
    number = _int(name, value)
    if not 1 <= number < signal.NSIG:
        raise ValueError(f"{name}: {number} is not a signal number")
    return number


def _fd(name: str, value: object) -> int:
    """The number of a descriptor, or of an object that has one."""
    fileno = getattr(value, "fileno", None)
    try:
        number = _int(name, fileno() if callable(fileno) else value)
    except OSError:  # io.UnsupportedOperation of a StringIO, say
        raise ValueError(f"{name}: {type(value).__name__} has no file descriptor") from None
    if number < 0:
        raise ValueError(f"{name}: {number} is not a file descriptor")
    return number


def _env(name: str, value: object) -> list[bytes]:
    entries = []
    for key, text in _mapping(name, value):
        left, right = as_bytes(name, key), as_bytes(name, text)
        if b"=" in left or not left:
            raise ValueError(f"{name}: {key!r} is not the name of a variable")
        entries.append(left + b"=" + right)
    return entries


def _limit(name: str, value: object) -> int:
    if value in (resource.RLIM_INFINITY, float("inf")):
        return _NO_LIMIT
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: an int is wanted, not {type(value).__name__}") from None
    if not 0 <= number <= _NO_LIMIT:
        raise ValueError(f"{name}: {number} is out of range")
    return number


def _rlimits(name: str, value: object) -> list[tuple[int, int, int]]:
    limits = []
    for key, pair in _mapping(name, value):
        which = _natural(name, key)
        if isinstance(pair, tuple | list):
            if len(pair) != 2:
                raise ValueError(f"{name}: (soft, hard) is wanted, not {pair!r}")
            soft, hard = (_limit(name, one) for one in pair)
        else:
            soft = _limit(name, pair)
            try:
                hard = _limit(name, resource.getrlimit(which)[1])
            except ValueError:
                raise ValueError(f"{name}: {which} is no resource of this system") from None
            hard = max(soft, hard)
        limits.append((which, soft, hard))
    return limits


def _cpus(name: str, value: object) -> list[int]:
    cpus = _list(name, value, _natural)
    if not cpus:
        raise ValueError(f"{name}: none is given")
    return cpus


def _stdio(name: str, value: object) -> tuple[int, int, bytes | None, int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value in _SPECIAL:
            return (_SPECIAL[value], -1, None, 0, 0)
        return (_FD, _fd(name, value), None, 0, 0)
    if callable(getattr(value, "fileno", None)):
        return (_FD, _fd(name, value), None, 0, 0)
    flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return (_FILE, -1, as_bytes(name, value), flags, 0o666)


_PLAIN: dict[str, tuple[str, Callable[[str, Any], object]]] = {
    "executable": ("program", as_bytes),
    "env": ("env", _env),
    "cwd": ("cwd", as_bytes),
    "umask": ("umask", _natural),
    "user": ("user", _user),
    "group": ("group", _group),
    "extra_groups": ("groups", lambda name, value: _list(name, value, _group)),
    "rlimits": ("rlimits", _rlimits),
    "nice": ("nice", _int),
    "cpus": ("cpus", _cpus),
    "cgroup": ("cgroup", as_bytes),
    "oom_score_adj": ("oom_score_adj", _int),
    "name": ("name", _name),
    "stdin": ("stdin", _stdio),
    "stdout": ("stdout", _stdio),
    "stderr": ("stderr", _stdio),
    "fd_policy": ("fd_policy", lambda name, value: _choice(name, value, _POLICIES)),
    "signal_mask": ("signal_mask", lambda name, value: _list(name, value, _signal)),
    "ignored_signals": ("ignored_signals", lambda name, value: _list(name, value, _signal)),
    "default_signals": ("default_signals", lambda name, value: _list(name, value, _signal)),
    "sigint": ("sigint", lambda name, value: _choice(name, value, _SIGINT)),
    "scope": ("lifeline_scope", lambda name, value: _choice(name, value, _SCOPES)),
}
_MANY = ("guard", "start_new_session", "process_group", "fds", "pass_fds", "lifeline", "fresh")
NAMES = frozenset(_PLAIN) | frozenset(_MANY)


def _session(options: Mapping[str, Any], plain: dict[str, Any]) -> None:
    new = options.get("start_new_session", False)
    if not isinstance(new, bool):
        raise TypeError(f"start_new_session: True or False is wanted, not {new!r}")
    group = options.get("process_group")
    if new and group is not None:
        raise ValueError("process_group: a new session has a process group of its own")
    if new:
        plain["session"] = _SESSION_NEW
    elif group is not None:
        plain["session"] = _SESSION_GROUP
        plain["process_group"] = _natural("process_group", group)


def _descriptors(options: Mapping[str, Any], plain: dict[str, Any]) -> None:
    pairs = [
        (_fd("fds", here), _natural("fds", there))
        for there, here in _mapping("fds", options.get("fds", {}))
    ]
    pairs += [(fd, fd) for fd in _list("pass_fds", options.get("pass_fds", ()), _fd) if fd > 2]
    if pairs:
        plain["fds"] = pairs


def _lifeline(options: Mapping[str, Any], plain: dict[str, Any]) -> None:
    guard = options.get("guard", False)
    if not isinstance(guard, bool):
        raise TypeError(f"guard: True or False is wanted, not {guard!r}")
    plain["guard"] = int(guard)
    lifeline = options.get("lifeline", True)
    if isinstance(lifeline, bool):
        plain["lifeline_signal"] = signal.SIGKILL if lifeline else 0
    else:
        plain["lifeline_signal"] = _signal("lifeline", lifeline)


def _fresh(method: str, options: Mapping[str, Any], plain: dict[str, Any]) -> None:
    fresh = options.get("fresh", False)
    if not isinstance(fresh, bool):
        raise TypeError(f"fresh: True or False is wanted, not {fresh!r}")
    if fresh and method != "zygote":
        raise ValueError(f"{method}: fresh: only method 'zygote' has templates")
    if fresh:
        plain["fresh"] = True


def prepare(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The dict for _anyfork.spawn(). Raises TypeError or ValueError that names the
    option; opens nothing."""
    unknown = sorted(options.keys() - NAMES)
    if unknown:
        raise TypeError(
            f"{method}: unknown option {unknown[0]!r} (arguments of the target are positional: "
            f"spawn(fn, 1, 2), or functools.partial); known are: {', '.join(sorted(NAMES))}"
        )
    plain: dict[str, Any] = {}
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name in _PLAIN:
            key, convert = _PLAIN[name]
            plain[key] = convert(name, value)
    _session(options, plain)
    _descriptors(options, plain)
    _lifeline(options, plain)
    _fresh(method, options, plain)
    return plain
