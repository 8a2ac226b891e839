"""The server of warm interpreters, `anyfork serve`, and what asks it for its state.

One thread and one selector. A client (src/run) sends one request and its descriptors; its
worker comes from the one template that the server owns. The connection is the client: its
end ends the worker.

Rules: what a client sends is checked before it is used, and nothing that is read from it
can make the server wait. A worker may do no more than its client could, and is where that
is, or it is not started.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import _anyfork, _boot, _exec, _options, _served
from ._child import Child
from ._errors import SpawnError
from ._template import METHOD, Template, pss_kb

DEFAULT_NAME = "default"
_MAGIC, _VERSION = 0x524B4641, 1
RUN, STATUS, STOP, STARTED, ENDED, REFUSED, REPLY = range(1, 8)
_LIMITS, _FDS_MAX, _TEXT_MAX = 16, 240, 16384
# struct run_request and the head of struct run_answer, of src/run/run.h
_REQUEST = struct.Struct(f"@IHHcBBBIiIIIQQ{2 * _LIMITS}QQ{_FDS_MAX}i0Q")
_HEAD = struct.Struct("@IHH")
_ANSWER = struct.Struct("@IHHi")
_BODY_MAX = 6 << 20  # what execve(2) takes with the largest stack limit
_WORDS_MAX = 200_000  # beside which other clients wait
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_SO_PEERPIDFD = 77  # Linux 6.5; other numbers on parisc and sparc, where it fails
_SILENCE_SECONDS = 5.0
_GRACE_SECONDS = 5.0
_STOP_SECONDS = 30.0
_PAUSE_SECONDS = 0.1
_LOOKED_SECONDS = 0.05
_LOOK_AGAIN_SECONDS = 0.1
_BACKLOG = 256
_HANDOVER = "ANYFORK_SERVE_HANDOVER"
_BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from anyfork._cli import main; main()"
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Trouble(Exception):
    """What is told to the user of the command line, and ends it."""


class Refused(Exception):
    """What is told to a client instead of a start."""


# ---- the folder -----------------------------------------------------------------------


def folder() -> str:
    """Where the sockets are; as find_folder() of src/run/request.c."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    uid = os.geteuid()
    if base.startswith("/"):
        return f"{base}/anyfork"
    run = f"/run/user/{uid}"
    with contextlib.suppress(OSError):
        found = os.lstat(run)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
            return f"{run}/anyfork"
    return f"/tmp/anyfork-{uid}"


def open_folder(*, create: bool) -> int:
    """A descriptor of it, which has been looked at: nobody can put another in its place."""
    path = folder()
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise Trouble(f"{path}: {exc.strerror}; set XDG_RUNTIME_DIR to a folder of yours") from None
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(fd)
        raise Trouble(
            f"{path} must be yours alone, a folder of mode 0700 (it is of user {found.st_uid}, "
            f"mode {stat.S_IMODE(found.st_mode):04o}): remove it, or set XDG_RUNTIME_DIR"
        )
    return fd


def check_name(name: str) -> str:
    """Of a server. Raises ValueError."""
    known = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not 1 <= len(name) <= 64 or not set(name) <= known or name[0] in ".-":
        raise ValueError(
            f"a name has letters, digits, '.', '_' and '-' only, at most 64: not {name!r}"
        )
    return name


# ---- requests ---------------------------------------------------------------------------


class Request(NamedTuple):
    """A start, as its client wants it; ``fds`` are ours to close."""

    kind: str
    words: list[bytes]
    env: dict[bytes, bytes]
    umask: int
    nice: int
    mask: int
    ignored: int
    limits: dict[int, tuple[int, int]]
    cwd: int
    streams: list[int]  # -1: closed
    terminal: int  # the number of a stream; -1: none
    kept: dict[int, int]


def read_request(data: bytes, fds: list[int]) -> Request:
    """Raises Refused for what no client of ours would send."""
    if len(data) != _REQUEST.size:
        raise Refused("the request is malformed: its size")
    fields = _REQUEST.unpack(data)
    kind, streams, terminal, _padding, umask, nice = fields[3:9]
    n_words, n_env, n_fds, mask, ignored = fields[9:14]
    limits, body_bytes = fields[14 : 14 + 2 * _LIMITS], fields[14 + 2 * _LIMITS]
    numbers = fields[15 + 2 * _LIMITS :][:n_fds]
    open_streams = [number for number in range(3) if streams & 1 << number]
    if (
        kind not in (b"c", b"m", b"s", b"-")
        or streams > 7
        or terminal & ~streams
        or umask > 0o777
        or n_words < 1
        or n_fds > _FDS_MAX
        or len(fds) != 2 + len(open_streams) + n_fds
        or len(set(numbers)) != n_fds
        or any(not 3 <= number < 2**30 for number in numbers)
    ):
        raise Refused("the request is malformed")
    if body_bytes > _BODY_MAX or n_words + n_env > _WORDS_MAX:
        raise Refused("the arguments and the environment are too large")
    words = _read_body(fds[0], body_bytes, n_words + n_env)
    given = iter(fds[2:])
    return Request(
        kind.decode(),
        words[:n_words],
        _environment(words[n_words:]),
        umask,
        nice,
        mask,
        ignored,
        {i: (limits[2 * i], limits[2 * i + 1]) for i in range(_LIMITS)},
        fds[1],
        [next(given) if streams & 1 << number else -1 for number in range(3)],
        (terminal & -terminal).bit_length() - 1,
        dict(zip(numbers, given, strict=True)),
    )


def _read_body(fd: int, size: int, n_words: int) -> list[bytes]:
    """Of a sealed memfd alone: reading another file might take for ever."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise Refused("the request is malformed: its body is not sealed")
        data = os.pread(fd, size, 0)
    except OSError:
        raise Refused("the request is malformed: its body is no memfd") from None
    if len(data) != size or data.count(b"\0") != n_words:
        raise Refused("the request is malformed: its body")
    words = data.split(b"\0")
    if words.pop() != b"":
        raise Refused("the request is malformed: its body")
    return words


def _environment(entries: list[bytes]) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for entry in entries:
        name, equals, value = entry.partition(b"=")
        if name and equals:
            found.setdefault(name, value)  # as getenv(3)
    return found


# ---- who asks ----------------------------------------------------------------------------

# Of /proc/PID/status: what a worker would have as the server has it.
_FIELDS = re.compile(
    "^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Seccomp_filters|Cap(?:Inh|Prm|Eff|Bnd|Amb)):[ \t]*(.*?)"
    "[ \t]*$",
    re.MULTILINE,
)
_NAMESPACES = tuple(os.listdir("/proc/self/ns"))
_WORDS = {
    "Uid": "user ids", "Gid": "group ids", "Groups": "groups", "NoNewPrivs": "no_new_privs",
    "Seccomp": "seccomp state", "Seccomp_filters": "seccomp filters",
    **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "capabilities"),
}  # fmt: skip


def _read(path: str, folder: int | None = None) -> str:
    """A small file of /proc; open() would take twice as long."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        data = b""
        while piece := os.read(fd, 1 << 13):
            data += piece
        return os.fsdecode(data)
    finally:
        os.close(fd)


try:
    _HAS_LABELS = bool(_read("/proc/self/attr/current"))
except OSError:
    _HAS_LABELS = False


def _powers(folder: int) -> dict[str, str]:
    """What a process may do and where it is, but for its cgroup, by its folder of /proc.
    Raises OSError."""
    found = dict(_FIELDS.findall(_read("status", folder)))
    for name in _NAMESPACES:
        found[f"{name} namespace"] = os.readlink(f"ns/{name}", dir_fd=folder)
    root = os.stat("root", dir_fd=folder)
    found["root directory"] = f"{root.st_dev}:{root.st_ino}"
    if _HAS_LABELS:
        with contextlib.suppress(OSError):
            found["security label"] = _read("attr/current", folder)
    return found


def _zombie_status(child: Child, mine: dict[str, str]) -> int | None:
    """How a worker ended that its parent has not reaped; None: it has, or that is not shown."""
    assert child.pidfd is not None
    try:
        folder = os.open(f"/proc/{child.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        signal.pidfd_send_signal(child.pidfd, 0)  # not reaped: the number is still its own
        state, *_rest, status = _read("stat", folder).rpartition(")")[2].split()
        theirs = dict(_FIELDS.findall(_read("status", folder)))
    except OSError:
        return None
    finally:
        os.close(folder)
    # Of those whom we may not trace 0 is shown.
    shown = all(theirs.get(what) == mine[what] for what in ("Uid", "Gid", "CapPrm"))
    return int(status) if state == "Z" and shown else None


def _cgroups(folder: int) -> tuple[str, str]:
    """The path in the cgroup v2, and all of v1."""
    v2, v1 = "", []
    for line in _read("cgroup", folder).splitlines():
        if line.startswith("0::"):
            v2 = line[3:]
        else:
            v1.append(line)
    return v2, "\n".join(v1)


def _cgroup_mount() -> str:
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _dash, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            words = left.split()
            if words[3] == "/":
                return words[4].encode().decode("unicode_escape")
    raise Refused("no cgroup v2 is mounted here, in which its worker would have to be")


def _here(name: str) -> str:
    return (
        "start a server where this program runs, under a name of its own: "
        f"anyfork serve --detach --name NAME; anyfork-run --name NAME ... (this is {name!r})"
    )


class _Place(NamedTuple):
    """Where a client is, if that is not where its worker would be; None: it is."""

    cgroup: str | None
    cpus: set[int] | None
    oom_score_adj: int | None


class _Peer:
    """The process at the other end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        size = struct.calcsize("3i")
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        self.pid, self.uid, _gid = struct.unpack("3i", data)

    @contextlib.contextmanager
    def looked_at(self, connection: socket.socket) -> Iterator[int]:
        """Its folder of /proc, which cannot become another process's unnoticed. OSError."""
        try:
            pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as exc:
            if exc.errno != errno.ENOPROTOOPT:  # it has gone, and its number may be another's
                raise Refused("the client has gone") from None
            pidfd = os.pidfd_open(self.pid)
        try:
            folder = os.open(f"/proc/{self.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield folder
            finally:
                os.close(folder)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(0):
                raise Refused("the client has gone")
        finally:
            os.close(pidfd)


# ---- what may change beneath a server ---------------------------------------------------

class _Files:
    """Some files, as they were when this was made."""

    def __init__(self, paths: list[str]) -> None:
        self._each = {path: _stamp(path) for path in paths}
        self._paths = tuple(map(os.fsencode, paths))
        self._all = _anyfork.stamp(self._paths)

    def changed(self) -> str | None:
        """One that is another now."""
        if _anyfork.stamp(self._paths) == self._all:
            return None
        changed = (path for path, stamp in self._each.items() if _stamp(path) != stamp)
        return next(changed, os.fsdecode(self._paths[0]))


def _stamp(path: str) -> int:
    return _anyfork.stamp((os.fsencode(path),))


# Read by the interpreter when it starts, or by the loader: a worker has them as the server.
_AT_START = (
    "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONCOERCECLOCALE", "PYTHONDEBUG", "PYTHONDEVMODE",
    "PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONINSPECT",
    "PYTHONINTMAXSTRDIGITS", "PYTHONIOENCODING", "PYTHONMALLOC", "PYTHONMALLOCSTATS",
    "PYTHONNODEBUGRANGES", "PYTHONNOUSERSITE", "PYTHONOPTIMIZE", "PYTHONPERFSUPPORT",
    "PYTHONPLATLIBDIR", "PYTHONPROFILEIMPORTTIME", "PYTHONPYCACHEPREFIX", "PYTHONTRACEMALLOC",
    "PYTHONUSERBASE", "PYTHONUTF8", "PYTHONVERBOSE", "PYTHONWARNINGS", "PYTHON_CPU_COUNT",
    "PYTHON_FROZEN_MODULES", "PYTHON_GIL", "PYTHON_JIT", "PYTHON_PERF_JIT_SUPPORT",
    "PYTHON_CONTEXT_AWARE_WARNINGS", "PYTHON_THREAD_INHERIT_CONTEXT",
)  # fmt: skip


def _search_path() -> list[str]:
    """sys.path of this interpreter, but for PYTHONPATH and the program's own entry."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [_exec.interpreter(), *flags, "-P", "-c", "import sys; print(ascii(sys.path))"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    import ast

    if run.returncode != 0:
        raise Trouble(
            f"{command[0]} cannot tell its sys.path (status {run.returncode}): "
            f"{run.stderr.strip() or 'it says nothing'}; mend what it loads when it starts"
        )
    said = run.stdout.splitlines()  # sitecustomize may print, too
    return [path for path in ast.literal_eval(said[-1]) if path]


def _python_path(value: str, cwd: str) -> list[str]:
    """The entries of PYTHONPATH, as site makes them."""
    if not value:
        return []
    entries = [os.path.abspath(os.path.join(cwd, entry)) for entry in value.split(os.pathsep)]
    return list(dict.fromkeys(entries))


# ---- the server ------------------------------------------------------------------------------


class Config(NamedTuple):
    """What `anyfork serve` was asked for."""

    name: str
    preload: tuple[str, ...]
    idle: float
    audit: str


class _Client:
    """A connection; its worker, once there is one."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.peer = _Peer(connection)
        self.deadline: float | None = time.monotonic() + _SILENCE_SECONDS
        self.child: Child | None = None
        self.watched: set[int] = set()
        self.told = self.told_end = False
        self.look_again: float | None = None  # its worker has ended, and nobody tells how
        self.gone = False
        self.looked = 0.0  # when nothing of what is loaded had changed
        self.moved = False  # to another cgroup than ours


class Server:
    """All that `anyfork serve` is, once it has its socket."""

    def __init__(self, config: Config, directory: int, listener: socket.socket, lock: int) -> None:
        self._config = config
        self._directory = directory
        self._listener = listener
        self._lock = lock
        self._socket_id = os.stat(_socket_name(config.name), dir_fd=directory).st_ino
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._stoppers: list[_Client] = []
        self._begun = self._active = time.monotonic()
        self._paused_until: float | None = None
        self._stopping: float | None = None
        self._killed = False
        self._runs = 0
        self._self = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._powers = _powers(self._self)
        self._limits = {i: resource.getrlimit(i) for i in range(_LIMITS)}
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._at_start = {name: os.environ.get(name) for name in _AT_START}
        self._ignored = self._ignored_signals()
        self._base_path: list[str] = []
        self._own = _Files(
            [
                os.path.realpath(_exec.interpreter()),
                *filter(None, (getattr(m, "__file__", None) for m in (_anyfork, _served))),
                os.path.abspath(__file__),
            ]
        )
        self._template = Template(
            (_served.__name__, *config.preload),
            standby=(2, 8),
            audit=config.audit,  # type: ignore[arg-type]
        )
        self._preloaded: _Files | None = None

    @staticmethod
    def _ignored_signals() -> set[int]:
        """Ours, and so those of workers, but for two that Python itself ignores."""
        row = next(line for line in _read("/proc/self/status").splitlines() if "SigIgn" in line)
        bits = int(row.split()[1], 16)
        found = {sig for sig in range(1, 65) if bits & 1 << sig - 1}
        return found - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT}

    # ---- its life ---------------------------------------------------------------------

    def find_modules(self) -> None:
        """Set sys.path for those that are preloaded. Raises Trouble, and what subprocess does."""
        self._base_path = _search_path()
        here = os.getcwd()
        sys.path[:] = [*_python_path(os.environ.get("PYTHONPATH", ""), here), *self._base_path]
        if _PACKAGE_PARENT not in sys.path:
            sys.path.append(_PACKAGE_PARENT)

    def warm(self) -> None:
        """Make the template. Raises what an import in it raised; SpawnError."""
        self._preloaded = None
        self._template.warm()
        files = self._template.run(_served.loaded).files
        self._preloaded = _Files(files)

    def refuse_waiting(self, why: str) -> None:
        """Those who came while the server that was here became this one."""
        self._listener.setblocking(False)
        with contextlib.suppress(OSError):  # EINVAL: it does not listen yet
            while True:
                client = _Client(self._listener.accept()[0])
                self._send(client, REFUSED, text=why)
                client.connection.close()

    def run(self) -> None:
        """Serve until it is told to stop, or nobody has wanted anything for long."""
        ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(sig) != signal.SIG_IGN:  # nohup(1)
                signal.signal(sig, lambda *_: None)
        self._selector.register(ours, selectors.EVENT_READ, self._signalled)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        try:
            while not self._is_done():
                for key, _events in self._selector.select(self._timeout()):
                    # Not one that was dropped in this very round.
                    if self._selector.get_map().get(key.fd) is key:
                        key.data(key.fileobj)
                self._on_time()
        finally:
            signal.set_wakeup_fd(-1)
            ours.close()
            theirs.close()
            self._close()

    def _is_done(self) -> bool:
        if self._stopping is None:
            return False
        late = self._killed and self._stopping <= time.monotonic()  # the kernel holds them
        return late or not any(client.child for client in self._clients)

    def _timeout(self) -> float | None:
        times = [c.deadline for c in self._clients if c.deadline is not None]
        times += [c.look_again for c in self._clients if c.look_again is not None]
        if self._paused_until is not None:
            times.append(self._paused_until)
        if self._stopping is not None:
            times.append(self._stopping)
        elif not self._clients and self._config.idle:
            times.append(self._active + self._config.idle)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _on_time(self) -> None:
        now = time.monotonic()
        for client in list(self._clients):
            if client.deadline is not None and client.deadline <= now:
                self._refuse(client, "nothing was asked for in time")
            if client.look_again is not None and client.look_again <= now:
                self._look_again(client)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            if self._stopping is None:
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if self._stopping is not None and self._stopping <= now and not self._killed:
            self._killed = True
            self._stopping = now + _GRACE_SECONDS
            self._signal_all(signal.SIGKILL)
        if self._clients:
            self._active = now
        elif self._stopping is None and 0 < self._config.idle <= now - self._active:
            self._say(f"nobody has wanted anything for {self._config.idle:g} s: it ends")
            self._stop()

    def _signalled(self, ours: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while ours.recv(64):
                self._stop()

    def _stop(self) -> None:
        if self._stopping is not None:
            return
        self._stopping = time.monotonic() + _GRACE_SECONDS
        self._unlink()
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._listener)
        self._listener.close()
        for client in list(self._clients):
            if client.child is None and client not in self._stoppers:
                self._refuse(client, "the server is being stopped")
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, sig: int) -> None:
        for client in self._clients:
            if client.child is not None:
                with contextlib.suppress(SpawnError):
                    client.child.signal(sig)
                    client.child.signal(signal.SIGCONT)

    def _unlink(self) -> None:
        name = _socket_name(self._config.name)
        with contextlib.suppress(OSError):
            if os.stat(name, dir_fd=self._directory).st_ino == self._socket_id:
                os.unlink(name, dir_fd=self._directory)

    def _close(self) -> None:
        self._unlink()
        self._listener.close()
        self._template.close()
        for client in list(self._clients):
            if client.child is not None:
                client.child.close()
            if client in self._stoppers:
                self._send(client, REPLY)
            client.connection.close()
        self._selector.close()
        for fd in (self._lock, self._directory, self._self):
            os.close(fd)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that has gone
            print(f"anyfork serve: {text}", file=sys.stderr, flush=True)

    # ---- connections --------------------------------------------------------------------

    def _accept(self, _listener: object) -> None:
        same = self._own.changed() is None
        if not same and not any(client.child for client in self._clients):
            self._become_anew()
        try:
            connection, _address = self._listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._selector.unregister(self._listener)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.add(client)
        # While it prepares its request, which takes it about as long.
        if same and self._preloaded is not None and self._preloaded.changed() is None:
            client.looked = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._hear(client))
        self._hear(client)  # most have said it all by then

    def _hear(self, client: _Client) -> None:
        try:
            data, fds, flags = _receive(client.connection)
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        try:
            if not data or client.deadline is None:
                self._hung_up(client)  # nothing is to be said after the request
            else:
                client.deadline = None
                if client.peer.uid != os.geteuid():
                    raise Refused("this server is of another user")
                self._answer(client, data, fds, flags)
        except Refused as exc:
            self._refuse(client, str(exc))
        except Exception as exc:  # of one client; the others' programs go on
            self._say(f"a bug: {''.join(traceback.format_exception(exc))}")
            self._refuse(client, f"the server failed, which is a bug: {exc!r}")
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, client: _Client, data: bytes, fds: list[int], flags: int) -> None:
        if len(data) < _HEAD.size or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise Refused("the request is malformed, or there are too many descriptors")
        magic, version, op = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise Refused("the request is malformed: it is not of anyfork")
        if version != _VERSION:
            raise Refused(
                f"the client speaks version {version}, this server {_VERSION}: stop it with "
                "`anyfork serve --stop`, and start that which belongs to the client"
            )
        if op == RUN:
            self._start(client, read_request(data, fds))
        elif op == STATUS:
            self._send(client, REPLY, text=json.dumps(self._status()))
            self._drop(client)
        elif op == STOP:
            self._stoppers.append(client)
            self._stop()
        else:
            raise Refused(f"the request is malformed: operation {op}")

    def _send(
        self, client: _Client, op: int, value: int = 0, text: str = "", fds: tuple[int, ...] = ()
    ) -> None:
        data = _ANSWER.pack(_MAGIC, _VERSION, op, value) + text.encode()[: _TEXT_MAX - 1]
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):  # it has gone, which its connection tells
            client.connection.sendmsg(
                [data], control, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
            )

    def _refuse(self, client: _Client, why: str) -> None:
        self._send(client, REFUSED, text=why)
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        """The connection is over, and so is its worker."""
        if not client.gone:
            client.gone = True
            self._selector.unregister(client.connection)
            client.connection.close()
            client.deadline = None
        if client.child is None:
            self._clients.discard(client)

    def _hung_up(self, client: _Client) -> None:
        if client.child is not None:
            with contextlib.suppress(SpawnError):
                client.child.kill()
        if client in self._stoppers:
            self._stoppers.remove(client)
        self._drop(client)

    # ---- starts ---------------------------------------------------------------------------

    def _start(self, client: _Client, request: Request) -> None:
        if self._stopping is not None:
            raise Refused("the server is being stopped")
        place = self._check_peer(client)
        self._check_environment(request)
        self._check_limits(request)
        self._check_files(client)
        work, options = self._work(request)
        options.update(place._asdict())
        client.moved = place.cgroup is not None
        try:
            prepared = _options.prepare(METHOD, options)
            prepared["env"] = [name + b"=" + value for name, value in request.env.items()]
            prepared["rlimits"] = [(i, *pair) for i, pair in request.limits.items()]
            child = self._template.start(_served.work, (work,), prepared)
        except Exception as exc:
            raise Refused(self._why(client, exc)) from None
        self._runs += 1
        client.child = child
        self._watch(client)

    def _why(self, client: _Client, exc: BaseException | None) -> str:
        where = f"; {_here(self._config.name)}" if client.moved else ""
        return f"the worker could not be started: {exc}{where}"

    def _check_peer(self, client: _Client) -> _Place:
        """Raises Refused where a worker could do more than it, or would be elsewhere."""
        peer = client.peer
        try:
            with peer.looked_at(client.connection) as folder:
                theirs = _powers(folder)
                v2, v1 = _cgroups(folder)
                cpus = os.sched_getaffinity(peer.pid)
                oom = int(_read("oom_score_adj", folder))
        except OSError as exc:
            raise Refused(
                f"what process {peer.pid} may do cannot be seen from the server "
                f"({exc.strerror}): {_here(self._config.name)}"
            ) from None
        for what, mine in self._powers.items():
            if theirs.get(what) != mine:
                raise Refused(
                    f"its {_WORDS.get(what, what)} would be the server's, not yours "
                    f"({mine or 'none'}, not {theirs.get(what) or 'none'}): "
                    f"{_here(self._config.name)}"
                )
        my_v2, my_v1 = _cgroups(self._self)
        if v1 != my_v1:
            raise Refused(f"it would be in other cgroups (v1) than you: {_here(self._config.name)}")
        return _Place(
            None if v2 == my_v2 else _cgroup_mount() + v2,
            cpus if cpus != os.sched_getaffinity(0) else None,
            oom if oom != int(_read("oom_score_adj", self._self)) else None,
        )

    def _check_environment(self, request: Request) -> None:
        for name, mine in self._at_start.items():
            theirs = request.env.get(name.encode())
            if (None if theirs is None else os.fsdecode(theirs)) != mine:
                raise Refused(
                    f"{name} is {'not set' if theirs is None else repr(os.fsdecode(theirs))} here "
                    f"and {'not set' if mine is None else repr(mine)} at the server, and an "
                    "interpreter reads it when it starts: make them equal, or "
                    + _here(self._config.name)
                )

    def _check_limits(self, request: Request) -> None:
        may_raise = int(self._powers["CapEff"] or "0", 16) >> 24 & 1  # CAP_SYS_RESOURCE
        infinite = 2**64 - 1
        for which, (_soft, hard) in request.limits.items():
            mine = self._limits[which][1]
            if not may_raise and hard > (infinite if mine < 0 else mine):
                limit = "unlimited" if hard == infinite else hard
                raise Refused(
                    f"your hard limit {_limit_name(which)} is {limit}, and the server's only "
                    f"{mine}: {_here(self._config.name)}"
                )

    def _check_files(self, client: _Client) -> None:
        """Of the interpreter, and of what is preloaded, as they are now."""
        if client.looked > time.monotonic() - _LOOKED_SECONDS:
            return
        if (path := self._own.changed()) is not None:
            running = sum(client.child is not None for client in self._clients)
            raise Refused(
                f"{path} has changed, and {running} programs of the interpreter that was there "
                "still run: try again once they have ended, or `anyfork serve --stop`"
            )
        path = "it" if self._preloaded is None else self._preloaded.changed()
        if path is None:
            return
        self._say(f"{path} has changed: the template is made anew")
        try:
            self._template.reload()
            self.warm()
        except BaseException as exc:
            self._preloaded = None
            raise Refused(
                f"{path} has changed, and the template cannot be made anew: "
                f"{type(exc).__name__}: {exc}"
            ) from None

    def _work(self, request: Request) -> tuple[_served.Work, dict[str, Any]]:
        env = request.env
        cwd_number = max(request.kept, default=2) + 1
        options: dict[str, Any] = {
            "umask": request.umask,
            "signal_mask": _signals(request.mask),
            "ignored_signals": _signals(request.ignored) - {signal.SIGKILL, signal.SIGSTOP},
            "default_signals": self._ignored - _signals(request.ignored),
            "sigint": "owner" if request.ignored & 1 << signal.SIGINT - 1 else "own",
            "start_new_session": True,
            "fds": {**request.kept, cwd_number: request.cwd},
            "name": _title(request),
        }
        nice = request.nice - os.getpriority(os.PRIO_PROCESS, 0)
        if nice:
            options["nice"] = nice
        for name, fd in zip(("stdin", "stdout", "stderr"), request.streams, strict=True):
            options[name] = fd if fd >= 0 else subprocess.DEVNULL
        path = _python_path(
            os.fsdecode(env.get(b"PYTHONPATH", b"")), os.readlink(f"/proc/self/fd/{request.cwd}")
        )
        work = _served.Work(
            request.kind,
            [os.fsdecode(word) for word in request.words],
            [*path, *self._base_path],
            cwd_number,
            [number for number, fd in enumerate(request.streams) if fd < 0],
            request.terminal,
            list(request.kept),
            bool(env.get(b"PYTHONUNBUFFERED")),
            bool(env.get(b"PYTHONSAFEPATH")),
            not env.get(b"PYTHONDONTWRITEBYTECODE"),
        )
        return work, options

    # ---- workers ----------------------------------------------------------------------------

    def _watch(self, client: _Client) -> None:
        """Its worker's reports, while there may be any; and its end, which its template may be
        late to tell, or never tell: when that has stopped."""
        child = client.child
        assert child is not None and child.pidfd is not None
        wanted = {child.report_fd, child.pidfd} - {-1}
        if client.look_again is not None:
            wanted.discard(child.pidfd)  # it stays readable
        for fd in client.watched - wanted:
            self._selector.unregister(fd)
        for fd in wanted - client.watched:
            self._selector.register(fd, selectors.EVENT_READ, lambda fd: self._news(client, fd))
        client.watched = wanted

    def _news(self, client: _Client, fd: int) -> None:
        child = client.child
        assert child is not None
        if child.is_alive():
            if child._ready and not client.told and not client.gone:
                client.told = True
                assert child.pid is not None and child.pidfd is not None
                self._send(client, STARTED, child.pid, fds=(child.pidfd,))
            if fd == child.pidfd:
                client.look_again = time.monotonic() + _LOOK_AGAIN_SECONDS
            self._watch(client)
            return
        for watched in client.watched:
            self._selector.unregister(watched)
        client.look_again = None
        if not client.gone and not client.told_end:
            self._tell_end(client, child)
        child.close()
        client.child = None
        self._drop(client)

    def _look_again(self, client: _Client) -> None:
        """Its template, which has it as a zombie, has not told of its end yet."""
        child = client.child
        assert child is not None
        client.look_again = time.monotonic() + _LOOK_AGAIN_SECONDS
        if client.told and not client.told_end and child.is_alive():
            status = _zombie_status(child, self._powers)
            if status is not None:
                client.told_end = True
                self._send(client, ENDED, status)
        self._news(client, -1)

    def _tell_end(self, client: _Client, child: Child) -> None:
        if not child._ready:
            self._send(client, REFUSED, text=self._why(client, child.exception(0)))
        elif child._outcome()[0] == _boot.RAISED:  # outside of all that work() looks after
            exc = child.exception(0)
            if isinstance(exc, KeyboardInterrupt):
                self._send(client, ENDED, signal.SIGINT)
            else:
                self._send(client, REFUSED, text=f"the worker failed, which is a bug: {exc!r}")
        elif child._status is None:
            self._send(client, REFUSED, text="the program has ended; how is not known")
        else:
            self._send(client, ENDED, child._status)

    # ---- the rest -----------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        stats = self._template.stats()
        return {
            "name": self._config.name,
            "pid": os.getpid(),
            "socket": f"{folder()}/{_socket_name(self._config.name)}",
            "python": _exec.interpreter(),
            "version": sys.version.split()[0],
            "preload": list(self._config.preload),
            "starts": self._runs,
            "waited": stats.missed,
            "running": sum(client.child is not None for client in self._clients),
            "uptime_seconds": round(time.monotonic() - self._begun, 1),
            "template_pid": stats.pid,
            "templates_made": stats.made,
            "standbys": stats.standbys,
            "server_kb": _memory(),
            "template_kb": stats.pss,  # with its standbys and workers
        }

    def _become_anew(self) -> None:
        """The same server by the interpreter that is there now. The socket, and who waits in
        it, stays."""
        self._say("the interpreter has changed: it is executed anew")
        for fd in (self._lock, self._listener.fileno()):
            os.set_inheritable(fd, True)
        os.environ[_HANDOVER] = f"{self._lock},{self._listener.fileno()}"
        for which in range(_LIMITS):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(which, self._limits[which])
        self._template.close()
        try:
            python = _exec.interpreter()
            os.execv(python, command_line(self._config, python))
        except Exception as exc:
            self._say(f"it cannot be executed: {exc}")
            self._stop()


def _limit_name(which: int) -> str:
    names = (name for name in dir(resource) if name.startswith("RLIMIT_"))
    return next((name for name in names if getattr(resource, name) == which), str(which))


def _signals(bits: int) -> set[int]:
    # Two are the C library's own.
    return {sig for sig in range(1, 65) if bits & 1 << sig - 1 and sig not in (32, 33)}


def _title(request: Request) -> str:
    flag = [f"-{request.kind}".encode()] if request.kind in "cm" else []
    words = b" ".join([b"anyfork-run", *flag, *request.words])
    return os.fsdecode(words[:200])


def _memory() -> int | None:
    """Of this process, proportional, in kB."""
    with contextlib.suppress(OSError):
        return pss_kb("self")
    return None


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int]:
    """A message, its descriptors, its flags."""
    room = socket.CMSG_SPACE((_FDS_MAX + 5) * array.array("i").itemsize)
    data, control, flags, _address = connection.recvmsg(
        _REQUEST.size + 1, room, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags


# ---- the command -------------------------------------------------------------------------------


def _socket_name(name: str) -> str:
    return f"{name}.sock"


def command_line(config: Config, python: str) -> list[str]:
    """Of a server in a fresh interpreter."""
    words = [python, "-P", "-c", _BOOT, _PACKAGE_PARENT, "serve", "--name", config.name]
    words += ["--idle", f"{config.idle:g}", "--audit", config.audit]
    if config.preload:
        words += ["--preload", ",".join(config.preload)]
    return words


def _take_place(name: str, directory: int) -> tuple[socket.socket, int]:
    """Its socket and its lock. Raises Trouble if another server has them."""
    handover = os.environ.pop(_HANDOVER, None)
    if handover is not None:
        lock, listener = map(int, handover.split(","))
        for fd in (lock, listener):
            os.set_inheritable(fd, False)
        return socket.socket(fileno=listener), lock
    lock = os.open(
        f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
        dir_fd=directory,
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Trouble(
            f"a server named {name!r} runs: `anyfork serve --name {name} --status` shows it, "
            "`--stop` ends it; or choose another --name"
        ) from None
    # What is there now is of a server that has died.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_socket_name(name), dir_fd=directory)
    listener_socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old = os.umask(0o177)
    try:
        listener_socket.bind(f"/proc/self/fd/{directory}/{_socket_name(name)}")
    except OSError as exc:
        raise Trouble(f"{folder()}/{_socket_name(name)}: {exc.strerror}") from None
    finally:
        os.umask(old)
    return listener_socket, lock


def serve(config: Config, ready_fd: int) -> int:
    """Be the server. ``ready_fd``: written to once it listens; -1: none."""
    directory = open_folder(create=True)
    listener, lock = _take_place(config.name, directory)
    server = Server(config, directory, listener, lock)
    try:
        server.find_modules()
        server.warm()
    except BaseException as exc:
        what = exc if isinstance(exc, Trouble) else f"{type(exc).__name__}: {exc}"
        why = f"the template cannot be made: {what}"
        server.refuse_waiting(why)
        server._close()
        if isinstance(exc, KeyboardInterrupt):
            raise
        raise Trouble(why) from exc
    listener.setblocking(False)
    listener.listen(_BACKLOG)
    preload = ", ".join(config.preload) or "nothing"
    if ready_fd < 0:
        server._say(f"{config.name!r} listens, process {os.getpid()}, {preload} preloaded")
    else:
        os.write(ready_fd, b"1")
        os.close(ready_fd)
        os.dup2(1, 2)  # /dev/null, as all that a service has
    server.run()
    return 0


def detach(config: Config) -> int:
    """Start the server in a session of its own; return once it listens."""
    ready, theirs = os.pipe()
    said = os.memfd_create("anyfork-serve")  # not a pipe, which a preload could fill
    python = _exec.interpreter()
    try:
        process = subprocess.Popen(
            [*command_line(config, python), "--ready-fd", str(theirs)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
            pass_fds=[theirs], start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        theirs = -1
        listens = os.read(ready, 1) == b"1"
        status = 0 if listens else process.wait()
        sys.stderr.write(os.pread(said, 1 << 16, 0).decode(errors="replace"))
        if listens:
            print(f"anyfork serve: {config.name!r} listens, process {process.pid}")
            process.returncode = 0  # it is nobody's to wait for
            return 0
        return status if status > 0 else 1
    finally:
        for fd in (ready, theirs, said):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def _asked(name: str, op: int) -> Iterator[socket.socket]:
    """A connection on which that was asked. Raises Trouble."""
    path = folder()
    if not os.path.lexists(path):
        raise Trouble(f"no server named {name!r} runs")
    directory = open_folder(create=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.settimeout(_STOP_SECONDS)
            connection.connect(f"/proc/self/fd/{directory}/{_socket_name(name)}")
        except (FileNotFoundError, ConnectionRefusedError):
            raise Trouble(f"no server named {name!r} runs") from None
        except OSError as exc:
            raise Trouble(f"{path}/{_socket_name(name)}: {exc.strerror}") from None
        finally:
            os.close(directory)
        if _Peer(connection).uid != os.geteuid():
            raise Trouble("that server is of another user")
        connection.send(_HEAD.pack(_MAGIC, _VERSION, op))
        yield connection


def _reply(connection: socket.socket) -> str | None:
    """None: it has gone without one."""
    data = connection.recv(_ANSWER.size + _TEXT_MAX)
    if len(data) < _ANSWER.size:
        return None
    _magic, _version, op, _value = _ANSWER.unpack_from(data)
    text = data[_ANSWER.size :].decode()
    if op == REFUSED:
        raise Trouble(text)
    return text


def status(name: str, as_json: bool) -> int:
    """Print what a server says of itself."""
    with _asked(name, STATUS) as connection:
        text = _reply(connection)
    if text is None:
        raise Trouble(f"the server {name!r} has gone")
    found = json.loads(text)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        if isinstance(value, list):
            value = ", ".join(value)
        print(f"{key.replace('_', ' ') + ':':<16} {'none' if value in (None, '') else value}")
    return 0


def stop(name: str) -> int:
    """Return once a server has gone."""
    with _asked(name, STOP) as connection:
        pidfd = -1
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(_Peer(connection).pid)
        try:
            _reply(connection)
            if pidfd >= 0:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(_STOP_SECONDS * 1000):
                    raise Trouble(f"the server {name!r} does not end; see --status")
        except TimeoutError:
            raise Trouble(f"the server {name!r} does not answer") from None
        finally:
            if pidfd >= 0:
                os.close(pidfd)
    return 0


def command(run: Callable[[], int]) -> int:
    """That, with its troubles as the command line tells them."""
    try:
        return run()
    except Trouble as exc:
        print(f"anyfork serve: {exc}", file=sys.stderr)
        return 1
