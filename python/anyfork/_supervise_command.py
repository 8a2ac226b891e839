"""The command `anyfork supervise`: a spec in TOML, and the loop that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from . import _console
from ._supervise import ChildSpec, Event, HeartbeatSpec, Runner, SpecError, SupervisorSpec

_MOST_BYTES = 1 << 20
_NEVER = "infinity"
# Keys of a [[child]] that are options of its process, and what TOML has for them.
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "cwd": str, "umask": (int, str), "user": (str, int), "group": (str, int),
    "extra_groups": list, "nice": int, "cpus": list, "cgroup": str, "oom_score_adj": int,
    "stdin": str, "stdout": str, "stderr": str, "scope": str, "guard": bool,
    "start_new_session": bool,
}  # fmt: skip
_CHILD = (
    "name", "target", "args", "kwargs", "command", "method", "env", "clear_env", "restart",
    "ready", "ready_timeout", "stop_signal", "grace", "backoff", "backoff_max", "healthy",
    "heartbeat", "rlimits", *_OPTIONS,
)  # fmt: skip
_TOP = ("supervisor", "child")
_SUPERVISOR = ("strategy", "intensity", "period", "preload")
_HEARTBEAT = ("interval", "stopped", "in_c", "waiting")


# ---- the file ---------------------------------------------------------------------------------


def read_spec(path: str) -> SupervisorSpec:
    """Raises SpecError, which names the file and what is wrong there."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise SpecError(f"larger than {_MOST_BYTES >> 20} MiB")
        return spec_of(tomllib.loads(data.decode()))
    except OSError as exc:
        raise SpecError(f"{path}: {exc.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise SpecError(f"{path}: not TOML: {exc}") from None
    except SpecError as exc:
        raise SpecError(f"{path}: {exc}") from None


def spec_of(data: Mapping[str, Any]) -> SupervisorSpec:
    """Of what a file says. Raises SpecError."""
    _check_keys("", data, _TOP)
    own = _table("supervisor", data.get("supervisor", {}))
    _check_keys("supervisor", own, _SUPERVISOR)
    rows = data.get("child", [])
    if not isinstance(rows, list) or not rows:
        raise SpecError("child: at least one table [[child]] is wanted")
    children = [_child(_table("child", row)) for row in rows]
    more: dict[str, Any] = {key: value for key, value in own.items() if key != "intensity"}
    if "intensity" in own:
        more["intensity"] = None if own["intensity"] == _NEVER else own["intensity"]
    try:
        return SupervisorSpec(children=tuple(children), **more)
    except SpecError as exc:
        raise SpecError(f"supervisor: {exc}") from None


def _table(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"{name}: a table is wanted, not {value!r}")
    return value


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            place = f"{where}: " if where else ""
            raise SpecError(f"{place}unknown key {key!r}; known are: {', '.join(sorted(known))}")


def _child(row: dict[str, Any]) -> ChildSpec:
    name = row.get("name")
    if not isinstance(name, str):
        raise SpecError(f"child: name: a name is wanted, not {name!r}")
    try:
        _check_keys("", row, _CHILD)
        return ChildSpec(**_members(row))
    except SpecError as exc:
        text = str(exc)
        raise SpecError(text if text.startswith("child ") else f"child {name!r}: {text}") from None


def _members(row: dict[str, Any]) -> dict[str, Any]:
    plain = ("name", "target", "method", "restart", "ready", "stop_signal", "grace", "backoff",
             "backoff_max", "healthy")  # fmt: skip
    found: dict[str, Any] = {key: row[key] for key in plain if key in row}
    found["options"] = _options_of(row)
    found["env"] = _table("env", row.get("env", {}))
    if "ready_timeout" in row:
        value = row["ready_timeout"]
        found["ready_timeout"] = None if value == _NEVER else value
    if "command" in row:
        words = row["command"]
        if not isinstance(words, list):
            raise SpecError(
                f"command: a list of words is wanted, not {words!r}; a shell's line is "
                "['sh', '-c', 'exec ...']"
            )
        found["argv"] = words
    if "args" in row:
        if not isinstance(row["args"], list):
            raise SpecError(f"args: a list is wanted, not {row['args']!r}")
        found["args"] = tuple(row["args"])
    if "kwargs" in row:
        found["kwargs"] = _table("kwargs", row["kwargs"])
    if "heartbeat" in row:
        found["heartbeat"] = _heartbeat(_table("heartbeat", row["heartbeat"]))
    return found


def _heartbeat(table: dict[str, Any]) -> HeartbeatSpec:
    _check_keys("heartbeat", table, _HEARTBEAT)
    values: dict[str, Any] = {
        key: None if value == _NEVER else value for key, value in table.items()
    }
    try:
        return HeartbeatSpec(**values)
    except SpecError as exc:
        raise SpecError(f"heartbeat: {exc}") from None


def _options_of(row: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, kinds in _OPTIONS.items():
        if key not in row:
            continue
        value = row[key]
        wrong = isinstance(value, bool) and kinds is not bool
        if wrong or not isinstance(value, kinds):
            names = kinds if isinstance(kinds, tuple) else (kinds,)
            wanted = " or ".join(kind.__name__ for kind in names)
            raise SpecError(f"{key}: {wanted} is wanted, not {value!r}")
        options[key] = value
    if isinstance(options.get("umask"), str):
        try:
            options["umask"] = int(options["umask"], 8)
        except ValueError:
            raise SpecError(f"umask: octal digits are wanted, not {row['umask']!r}") from None
    if options.get("stderr") == "stdout":
        options["stderr"] = subprocess.STDOUT
    if "rlimits" in row:
        options["rlimits"] = _rlimits(_table("rlimits", row["rlimits"]))
    clear = row.get("clear_env", False)
    if not isinstance(clear, bool):
        raise SpecError(f"clear_env: true or false is wanted, not {clear!r}")
    if clear:
        options["env"] = {}
    return options


def _rlimits(table: dict[str, Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for key, value in table.items():
        number = getattr(resource, f"RLIMIT_{key.upper()}", None)
        if number is None or key != key.lower():
            raise SpecError(f"rlimits: {key!r} is no limit; 'nofile' is one")
        given = value if isinstance(value, list) else [value]
        values = [resource.RLIM_INFINITY if v == _NEVER else v for v in given]
        if len(values) not in (1, 2) or not all(type(v) is int for v in values):
            raise SpecError(
                f"rlimits: {key}: a number, 'infinity' or [soft, hard] is wanted, not {value!r}"
            )
        found[number] = values[0] if len(values) == 1 else tuple(values)
    return found


# ---- the loop ---------------------------------------------------------------------------------


class _Told:
    """Says what happens: as lines on standard error, or as JSON on standard output."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def event(self, event: Event) -> None:
        if self._as_json:
            self._line(event.as_dict())
        else:
            self.say(str(event))

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal or a pipe that has gone
            print(f"anyfork supervise: {text}", file=sys.stderr, flush=True)

    def _line(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps(data), flush=True)

    def status(self, runner: Runner) -> None:
        if self._as_json:
            rows = [
                {"name": c.name, "state": c.state, "pid": c.pid, "verdict": c.verdict,
                 "failures": c.failures, "starts": c.starts, "returncode": c.returncode,
                 "seconds": None if c.seconds is None else round(c.seconds, 3)}
                for c in runner.children()
            ]  # fmt: skip
            self._line(
                {"event": "status", "time": time.time(), "children": rows,
                 "counters": runner.counters()}
            )  # fmt: skip
            return
        cells = [
            [c.name, c.state, str(c.pid or "-"), "-" if c.seconds is None else f"{c.seconds:.0f} s",
             str(c.starts), "-" if c.returncode is None else str(c.returncode), c.verdict or "-"]
            for c in runner.children()
        ]  # fmt: skip
        headers = ["child", "state", "pid", "since", "starts", "last status", "heartbeat"]
        with contextlib.suppress(OSError), contextlib.redirect_stdout(sys.stderr):
            _console.table(headers, cells, right=(2, 3, 4, 5))
            sys.stdout.flush()


class _Supervisor:
    """What the command is once its spec has been read."""

    def __init__(self, path: str, spec: SupervisorSpec, as_json: bool) -> None:
        self._path = path
        self._as_json = as_json
        self._told = _Told(as_json)
        self._runner = Runner(self._as_here(spec), self._told.event, load_exceptions=False)
        self._stops = 0
        self._children_ended = True
        # Its end is a SIGHUP too. Under nohup(1) it is nothing.
        self._terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
        self._ours, self._theirs = socket.socketpair(type=socket.SOCK_DGRAM)
        for end in (self._ours, self._theirs):
            end.setblocking(False)

    def _as_here(self, spec: SupervisorSpec) -> SupervisorSpec:
        """What children have where they do not say it: nothing to read; and with --json
        nothing but events is written to standard output."""
        common: dict[str, Any] = {"stdin": subprocess.DEVNULL}
        if self._as_json:
            common["stdout"] = 2
        children = [
            dataclasses.replace(child, options={**common, **child.options})
            for child in spec.children
        ]
        return dataclasses.replace(spec, children=tuple(children))

    def run(self) -> int:
        runner = self._runner
        self._take_signals()
        runner.watch(self._ours.fileno(), self._signalled)
        try:
            runner.begin()
            while not runner.finished:
                timeout = runner.timeout()
                _wait(runner.fileno(), timeout)
                runner.handle()
                self._reap_strangers()
        finally:
            signal.set_wakeup_fd(-1)
            runner.unwatch(self._ours.fileno())
            runner.close()
            self._ours.close()
            self._theirs.close()
        failure = runner.failure()
        if failure is not None:
            self._told.say(str(failure))
            return 1
        return 0

    # ---- signals -------------------------------------------------------------------------

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            if sig == signal.SIGINT and signal.getsignal(sig) == signal.SIG_IGN:
                continue  # a shell's background
            signal.signal(sig, lambda *_: None)

    def _signalled(self) -> None:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += self._ours.recv(4096)
        for sig in data:
            closed = sig == signal.SIGHUP and self._terminal and not _has_terminal()
            if closed or sig in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif sig == signal.SIGHUP:
                self._reload()
            elif sig == signal.SIGUSR1:
                self._told.status(self._runner)
            elif sig == signal.SIGCHLD:
                self._children_ended = True

    def _stop(self) -> None:
        self._stops += 1
        if self._stops == 1:
            self._runner.stop()
        elif self._stops == 2:
            self._runner.kill()
        else:
            os._exit(1)  # what still runs ends with us

    def _reload(self) -> None:
        if self._stops:
            return
        try:
            spec = read_spec(self._path)
        except SpecError as exc:
            self._told.event(Event(kind="reload_failed", time=time.time(), detail=str(exc)))
        else:
            self._runner.reload(self._as_here(spec))

    # ---- orphans ----------------------------------------------------------------------------

    def _reap_strangers(self) -> None:
        """As the first process of a container: those whose parents have gone are ours. What
        is a child's is left to its handle."""
        if not self._children_ended:
            return
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                found = None
            if found is None:
                self._children_ended = False
                return
            if found.si_pid in self._runner.pids():
                return  # once more when that has been reaped
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, found.si_pid, os.WEXITED | os.WNOHANG)


def _has_terminal() -> bool:
    """Whether this session has a controlling one."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _wait(fd: int, timeout: float | None) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    # Rounded up: a deadline that has not quite come would be waited for without waiting.
    poll.poll(None if timeout is None else min(timeout * 1000 + 1, 3.6e6))


# ---- the command --------------------------------------------------------------------------------


def check(path: str, as_json: bool) -> int:
    """Say whether a file is valid, and what it says."""
    spec = read_spec(path)
    if as_json:
        print(json.dumps({"valid": True, "children": [child.name for child in spec.children]}))
        return 0
    rows = []
    for child in spec.children:
        what = child.target if child.argv is None else " ".join(child.argv)
        rows.append([child.name, child.restart, str(child.ready), str(what)])
    _console.table(["child", "restart", "ready", "runs"], rows)
    intensity = "any number of" if spec.intensity is None else spec.intensity
    print(f"\n{path}: valid; {spec.strategy}, {intensity} restarts in {spec.period:g} s")
    return 0


def supervise(path: str, as_json: bool) -> int:
    """Run it until it has been stopped, has ended, or has given up."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # for what a template preloads; behind all that we import
    return _Supervisor(path, read_spec(path), as_json).run()


def command(run: Callable[[], int]) -> int:
    """That, with its troubles as the command line tells them."""
    try:
        return run()
    except SpecError as exc:
        print(f"anyfork supervise: {exc}", file=sys.stderr)
        return 1
