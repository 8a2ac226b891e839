"""Supervision: what is to be supervised, and a runner that never waits.

The table of src/core/supervise.c decides; :class:`Runner` carries out what it says, with
real processes, and tells it what they do. Whoever waits (a command, an event loop) does so on
one descriptor, until one deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from . import _anyfork, _boot, _options, _request, _supervised
from ._child import Child
from ._errors import RemoteError, SpawnError, WorkerDied, describe_status
from ._heartbeat import VERDICTS, Verdict
from ._template import METHOD, Template

Restart = Literal["permanent", "transient", "temporary"]
Strategy = Literal["one_for_one", "one_for_all", "rest_for_one"]
RESTARTS: tuple[Restart, ...] = ("permanent", "transient", "temporary")
STRATEGIES: tuple[Strategy, ...] = ("one_for_one", "one_for_all", "rest_for_one")
_FOREVER = 2**63 - 1
_MOST_SECONDS = 1e9
_MOST_CHILDREN = 10_000
_MOST_READY_BYTES = 512


class SpecError(ValueError):
    """A spec is not valid; the text names the child and the member."""


# ---- what is wanted of a member ----------------------------------------------------------


def _seconds(name: str, value: object, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{name}: a number of seconds is wanted, not {value!r}")
    if not least <= value <= _MOST_SECONDS:
        raise SpecError(f"{name}: from {least:g} to {_MOST_SECONDS:g} seconds, not {value!r}")
    return float(value)


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise SpecError(f"{name}: {value!r} is none of {', '.join(map(repr, known))}")


def _signal_number(name: str, value: object) -> int:
    try:
        if isinstance(value, str):
            return signal.Signals[value].value
        if not isinstance(value, bool) and isinstance(value, int):
            return signal.Signals(value).value
    except (KeyError, ValueError):
        pass
    raise SpecError(f"{name}: a signal is wanted, 'SIGTERM' say, not {value!r}")


def _ns(seconds: float | None) -> int:
    return _FOREVER if seconds is None else int(seconds * 1e9)


# ---- specs -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeartbeatSpec:
    """How a child is watched while it runs.

    interval: seconds between beats.
    stopped, in_c, waiting: how many seconds of that verdict are too many: the child is killed
      then, and started again as its restart type says. None: any number. See docs/supervision.md
      for what the verdicts mean; a service that has nothing to do is "waiting".
    """

    interval: float = 1.0
    stopped: float | None = 30.0
    in_c: float | None = None
    waiting: float | None = None

    def __post_init__(self) -> None:
        _seconds("interval", self.interval, 0.01)
        if self.interval > 3600:
            raise SpecError("interval: at most an hour")
        for name in ("stopped", "in_c", "waiting"):
            limit = getattr(self, name)
            if limit is not None and _seconds(name, limit) < 4 * self.interval:
                raise SpecError(f"{name}: at least four intervals ({4 * self.interval:g} s)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """One child, and what is done about its end.

    name: of letters, digits, ".", "_" and "-".
    target: a callable, or "module:function", which is imported in the worker; with ``args`` and
      ``kwargs``. Or argv: the words of a command.
    method: by which a target is started, a name of :func:`anyfork.methods`.
    options: of its process, see :class:`anyfork.Options`.
    env: added to the environment.
    restart: "permanent": always started again; "transient": unless it ended well (status 0);
      "temporary": never.
    ready: "started": once it runs; "report": once it has called :func:`anyfork.notify_ready`;
      a number: once the program has written a newline there, as s6 wants it.
    ready_timeout: seconds that this may take; None: any number.
    stop_signal: by which it is asked to end.
    grace: seconds it then has before it is killed; "brutal_kill": none; "infinity".
    backoff, backoff_max: seconds before its first restart, and at most; each time it fails
      again the delay is doubled.
    healthy: seconds after which that begins anew, if it was ready for so long.
    heartbeat: a :class:`HeartbeatSpec`, or None. A program has to take part in it:
      :func:`anyfork.begin_heartbeat`, or ``anyfork_heartbeat_begin()`` in C.
    """

    name: str
    target: Callable[..., object] | str | None = None
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = dataclasses.field(default_factory=dict)
    argv: Sequence[str] | None = None
    method: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    restart: Restart = "permanent"
    ready: Literal["started", "report"] | int = "started"
    ready_timeout: float | None = 60.0
    stop_signal: int | str = signal.SIGTERM
    grace: float | Literal["brutal_kill", "infinity"] = 5.0
    backoff: float = 0.1
    backoff_max: float = 30.0
    healthy: float = 10.0
    heartbeat: HeartbeatSpec | None = None

    def __post_init__(self) -> None:
        known = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        if not isinstance(self.name, str) or not 1 <= len(self.name) <= 64:
            raise SpecError(f"name: from 1 to 64 characters are wanted, not {self.name!r}")
        if not set(self.name) <= known:
            raise SpecError(
                f"name: letters, digits, '.', '_' and '-' only are wanted, not {self.name!r}"
            )
        try:
            self._check()
        except (SpecError, TypeError, ValueError) as exc:
            raise SpecError(f"child {self.name!r}: {exc}") from None

    def _check(self) -> None:
        self._check_what()
        _one_of("restart", self.restart, RESTARTS)
        self._check_ready()
        _signal_number("stop_signal", self.stop_signal)
        if self.grace not in ("brutal_kill", "infinity"):
            if isinstance(self.grace, str):
                raise SpecError(
                    "grace: a number of seconds, 'brutal_kill' or 'infinity' is wanted, not "
                    f"{self.grace!r}"
                )
            _seconds("grace", self.grace)
        if _seconds("backoff_max", self.backoff_max) < _seconds("backoff", self.backoff):
            raise SpecError(f"backoff_max: less than backoff, {self.backoff:g}")
        _seconds("healthy", self.healthy)
        if self.heartbeat is not None and not isinstance(self.heartbeat, HeartbeatSpec):
            raise SpecError(f"heartbeat: a HeartbeatSpec is wanted, not {self.heartbeat!r}")
        self._check_options()

    def _check_what(self) -> None:
        if (self.target is None) == (self.argv is None):
            raise SpecError("either a target or a command is wanted")
        if self.argv is not None:
            words = self.argv
            if isinstance(words, str) or not words or not all(isinstance(w, str) for w in words):
                raise SpecError(f"argv: a list of words is wanted, not {words!r}")
            if self.args or self.kwargs or self.method not in (None, "exec"):
                raise SpecError("args, kwargs, method: a command has none")
            return
        if isinstance(self.target, str):
            module, _colon, name = self.target.partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
                raise SpecError(f"target: 'module:function' is wanted, not {self.target!r}")
        elif not callable(self.target):
            raise SpecError(f"target: a callable is wanted, not {self.target!r}")
        rows = {row["name"]: row for row in _anyfork.method_traits()}
        method = rows.get(self.method or METHOD)
        if method is None:
            raise SpecError(f"method: {self.method!r} is none of {', '.join(rows)}")
        if not method["has_process"]:
            raise SpecError(
                f"method: {self.method!r} makes a thread of this process, which cannot be stopped"
            )

    def _check_ready(self) -> None:
        if isinstance(self.ready, int) and not isinstance(self.ready, bool):
            if self.argv is None:
                raise SpecError("ready: a target reports by anyfork.notify_ready(): say 'report'")
            if not 3 <= self.ready < 1024:
                raise SpecError(f"ready: a descriptor from 3 to 1023, not {self.ready}")
        else:
            _one_of("ready", self.ready, ("started", "report"))
        if self.ready_timeout is not None:
            _seconds("ready_timeout", self.ready_timeout)

    def _check_options(self) -> None:
        for name in ("stdin", "stdout", "stderr"):
            given = self.options.get(name)
            if given == _options.PIPE and type(given) is int:
                raise SpecError(f"{name}: nobody would have the other end of the pipe")
        if not all(isinstance(w, str) for pair in self.env.items() for w in pair):
            raise SpecError(f"env: a table of strings is wanted, not {self.env!r}")
        plain = {name: value for name, value in self.options.items() if name != "template"}
        _options.prepare("exec" if self.argv else self.method or METHOD, plain)

    def is_started_as(self, other: ChildSpec) -> bool:
        """Whether a process of that spec would be the same: a reload lets it run."""
        mine, theirs = (
            dataclasses.replace(
                spec, restart="permanent", ready_timeout=None, stop_signal="SIGTERM", grace=0.0,
                backoff=0.0, backoff_max=0.0, healthy=0.0,
                heartbeat=spec.heartbeat and HeartbeatSpec(
                    interval=spec.heartbeat.interval, stopped=None
                ),
            )
            for spec in (self, other)
        )  # fmt: skip
        return mine == theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisorSpec:
    """Children, in the order in which they are started, and what goes for all of them.

    strategy: which others are stopped and started again when one has to be: "one_for_one",
      none; "one_for_all", all; "rest_for_one", those that come after it.
    intensity, period: so many restarts within so many seconds are one too many when there is
      one more: all are stopped, and :class:`SupervisorFailed` is raised. None: as many as it takes.
    preload: modules for the template of children by ``zygote``.
    """

    children: Sequence[ChildSpec]
    strategy: Strategy = "one_for_one"
    intensity: int | None = 3
    period: float = 5.0
    preload: Sequence[str] = ()

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        if self.intensity is not None and (
            isinstance(self.intensity, bool)
            or not isinstance(self.intensity, int)
            or not 0 <= self.intensity <= 1000
        ):
            raise SpecError(f"intensity: from 0 to 1000, not {self.intensity!r}")
        _seconds("period", self.period, 0.001)
        names = self.preload
        if not isinstance(names, list | tuple) or not all(m and isinstance(m, str) for m in names):
            raise SpecError(f"preload: a list of modules is wanted, not {self.preload!r}")
        if not 1 <= len(self.children) <= _MOST_CHILDREN:
            raise SpecError(f"children: from 1 to {_MOST_CHILDREN}, not {len(self.children)}")
        counts = Counter(child.name for child in self.children)
        twice = [name for name, n in counts.items() if n > 1]
        if twice:
            raise SpecError(f"children: there are two of the name {twice[0]!r}")

    def child(self, name: str) -> ChildSpec | None:
        """The spec of the child of that name; None if there is none."""
        return next((child for child in self.children if child.name == name), None)


def _row(spec: ChildSpec, number: int) -> tuple[Any, ...]:
    """As _anyfork.Supervisor wants it."""
    beats = spec.heartbeat
    limits = [None if beats is None else getattr(beats, name, None) for name in VERDICTS]
    grace: float | None
    if isinstance(spec.grace, str):
        grace = 0.0 if spec.grace == "brutal_kill" else None
    else:
        grace = spec.grace
    return (
        number,
        RESTARTS.index(spec.restart),
        _signal_number("stop_signal", spec.stop_signal),
        spec.ready != "started" or spec.argv is None,  # a target is, once it is called
        _ns(spec.ready_timeout),
        _ns(grace),
        _ns(spec.backoff),
        _ns(spec.backoff_max),
        _ns(spec.healthy),
        0 if beats is None else _ns(2 * beats.interval),
        tuple(_ns(limit) for limit in limits),
    )


# ---- what is told ------------------------------------------------------------------------

_TEXTS = {
    "started": "started, process {pid}",
    "ready": "ready",
    "not_started": "cannot be started: {detail}",
    "exited": "{detail}",
    "died": "{detail}",
    "stopped": "stopped: {detail}",
    "stopping": "is being stopped ({signal})",
    "not_ready": "is not ready in time: it is stopped",
    "late": "its heartbeat says {verdict!r} for too long: it is killed",
    "killing": "has not ended in time: it is killed",
    "held": "was killed and does not end: the system holds it",
    "restarting": "is started again in {delay:g} s",
    "done": "is not started again",
    "all_ready": "all are ready",
    "giving_up": "max restart intensity reached: all are stopped",
    "shutdown": "stopping all",
    "reloaded": "reloaded",
    "reload_failed": "not reloaded, nothing has changed: {detail}",
    "finished": "all have ended",
    "error": "{detail}",
    "lost": "{detail}",
}
KINDS = tuple(_TEXTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a child, or (``child`` is None) to the supervisor.

    kind: one of those in docs/supervision.md. time: as of :func:`time.time`. pid, returncode:
    of the child's process. signal: by which it is stopped, or died. delay: seconds until its
    restart. verdict: on its heartbeat. detail: in words. exception: what its target raised.
    """

    kind: str
    time: float
    child: str | None = None
    pid: int | None = None
    returncode: int | None = None
    signal: str | None = None
    delay: float | None = None
    verdict: Verdict | None = None
    detail: str | None = None
    exception: BaseException | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without what is None, and without the exception itself."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["exception"]
        return {
            {"kind": "event"}.get(name, name): value
            for name, value in found.items()
            if value is not None
        }

    def __str__(self) -> str:
        text = _TEXTS[self.kind].format(**vars(self))
        return text if self.child is None else f"{self.child}: {text}"


class SupervisorFailed(Exception):
    """A restart was one too many; all children have been stopped.

    Attributes:
      child: the name of the one that was to be started again.
      event: how it ended the last time.
    """

    def __init__(self, child: str, event: Event | None, spec: SupervisorSpec) -> None:
        self.child = child
        self.event = event
        self.spec = spec
        how = "" if event is None or not event.detail else f"; the last time, it {event.detail}"
        super().__init__(
            f"max restart intensity reached: to restart {child!r} would be more than "
            f"{spec.intensity} in {spec.period:g} s{how}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_failed_anew, (self.child, str(self)))


def _failed_anew(child: str, text: str) -> SupervisorFailed:
    """In another process, where its spec may not be."""
    exc = SupervisorFailed.__new__(SupervisorFailed)
    exc.child, exc.event = child, None
    Exception.__init__(exc, text)
    return exc


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChildInfo:
    """A child as it is now. state: one of those in docs/supervision.md."""

    name: str
    state: str
    pid: int | None
    verdict: Verdict | None
    failures: int
    starts: int
    returncode: int | None
    seconds: float | None  # since its start


# ---- the runner --------------------------------------------------------------------------


class _Member:
    """A child of the runner, over all its processes."""

    def __init__(self, number: int, spec: ChildSpec) -> None:
        self.number = number
        self.spec = spec
        self.handle: Child | None = None
        self.wake_fd = -1
        self.ready_fd = -1
        self.heartbeat: _anyfork.Heartbeat | None = None
        self.told_ready = False
        self.counts: Counter[str] = Counter()
        self.begun = 0
        self.pid: int | None = None
        self.returncode: int | None = None
        self.last: Event | None = None


class Start:
    """One start, prepared: :meth:`run` may be called by any thread, once."""

    def __init__(self, member: _Member, template: Template | None) -> None:
        self.number = member.number
        self.spec = member.spec
        self.heartbeat = None
        self.ready_fd = self._their_ready_fd = -1
        self._template = template
        if self.spec.heartbeat is not None:
            self.heartbeat = _anyfork.Heartbeat(self.spec.heartbeat.interval)
        if self.spec.ready != "started":
            self.ready_fd, self._their_ready_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(self._their_ready_fd, True)

    @property
    def may_take_long(self) -> bool:
        """A template may have to be made first, and to load what it preloads."""
        return self.spec.argv is None and (self.spec.method or METHOD) == METHOD

    def run(self) -> Child:
        """Raises what spawn() raises."""
        spec = self.spec
        # In a group of its own, so that Ctrl-C on a terminal reaches the supervisor alone.
        has_group = spec.options.keys() & {"start_new_session", "process_group"}
        sigint = "own" if has_group else "group"
        options: dict[str, Any] = {"sigint": sigint, **spec.options}
        beats = -1 if self.heartbeat is None else self.heartbeat.fileno()
        if spec.argv is not None:
            return self._run_program(options, beats)
        options.setdefault("name", spec.name)  # of a program it would be argv[0]
        passed = [fd for fd in (self._their_ready_fd, beats) if fd >= 0]
        options["pass_fds"] = [*options.get("pass_fds", ()), *passed]
        if spec.env:
            options["env"] = {**os.environ, **options.get("env", {}), **spec.env}
        if self._template is not None and (spec.method or METHOD) == METHOD:
            options.setdefault("template", self._template)
        return _request.spawn(
            _supervised.call, spec.target, tuple(spec.args), dict(spec.kwargs),
            self._their_ready_fd, beats, method=spec.method, **options,
        )  # fmt: skip

    def _run_program(self, options: dict[str, Any], beats: int) -> Child:
        spec, passed, env = self.spec, list(options.get("pass_fds", ())), dict(self.spec.env)
        if isinstance(spec.ready, int):
            options["fds"] = {**options.get("fds", {}), spec.ready: self._their_ready_fd}
        elif self._their_ready_fd >= 0:
            passed.append(self._their_ready_fd)
            env[_supervised.READY] = str(self._their_ready_fd)
        if beats >= 0:
            passed.append(beats)
            env[_supervised.HEARTBEAT] = str(beats)
        options["pass_fds"] = passed
        if env:
            options["env"] = {**os.environ, **options.get("env", {}), **env}
        assert spec.argv is not None
        return _request.spawn(argv=spec.argv, **options)

    def close_theirs(self) -> None:
        if self._their_ready_fd >= 0:
            os.close(self._their_ready_fd)
            self._their_ready_fd = -1

    def close(self) -> None:
        self.close_theirs()
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1
        self.heartbeat = None


class Runner:
    """A supervisor that never waits: wait until :meth:`fileno` is readable, for
    :meth:`timeout` seconds at most, then call :meth:`handle`; until it is :attr:`finished`.
    For one thread. :meth:`close` leaves nothing behind, whenever it is called.

    on_event: is called with each :class:`Event`.
    load_exceptions: what a target raised comes as itself, for which its module is imported
      here; else as a RemoteError.
    """

    def __init__(
        self,
        spec: SupervisorSpec,
        on_event: Callable[[Event], None],
        clock: Callable[[], int] = time.monotonic_ns,
        load_exceptions: bool = True,
    ) -> None:
        self.spec = spec
        self._load_exceptions = load_exceptions
        self._on_event = on_event
        self._threads: dict[threading.Thread, Start] = {}
        self._started: deque[tuple[threading.Thread, Child | BaseException]] = deque()
        self._clock = clock
        self._numbers = iter(range(2**32))
        self._members = {m.number: m for m in self._new_members(spec.children)}
        self._table = _anyfork.Supervisor(*self._table_spec(spec, list(self._members.values())))
        self._outs: deque[tuple[str, int, int, int]] = deque()
        self._draining = False
        self._closed = False
        self._next: SupervisorSpec | None = None  # reloads that came while there was one
        self._after_reload: tuple[SupervisorSpec, dict[int, ChildSpec]] | None = None
        self._template = self._new_template(spec)
        self._old_templates: list[Template] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self.watch(self._wake, self._woken)

    def _new_members(self, specs: Iterable[ChildSpec]) -> list[_Member]:
        return [_Member(next(self._numbers), spec) for spec in specs]

    @staticmethod
    def _table_spec(spec: SupervisorSpec, members: list[_Member]) -> tuple[Any, ...]:
        by_name = {member.spec.name: member.number for member in members}
        rows = [_row(child, by_name[child.name]) for child in spec.children]
        intensity = -1 if spec.intensity is None else spec.intensity
        return STRATEGIES.index(spec.strategy), intensity, _ns(spec.period), rows

    @staticmethod
    def _new_template(spec: SupervisorSpec) -> Template | None:
        return Template(tuple(spec.preload)) if spec.preload else None

    # ---- waiting -------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when :meth:`handle` has something to do."""
        return self._epoll.fileno()

    def timeout(self) -> float | None:
        """Seconds until :meth:`handle` has to be called; None: no time."""
        deadline = self._table.deadline()
        return None if deadline is None else max(0.0, (deadline - self._clock()) / 1e9)

    def wake(self) -> None:
        """From any thread: have :meth:`handle` called."""
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._started:
            thread, result = self._started.popleft()
            self._have_started(self._threads.pop(thread), result)

    def watch(self, fd: int, when_readable: Callable[[], None]) -> None:
        self._watched[fd] = when_readable
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def handle(self) -> None:
        """Take in what came, and do what is due."""
        for fd, _events in self._epoll.poll(0):
            found = self._watched.get(fd)  # not one that was closed in this very round
            if found is not None:
                found()
        self._take(self._table.tick(self._clock()))

    # ---- commands ------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the children."""
        self._take(self._table.start(self._clock()))

    def stop(self, most: float | None = None) -> None:
        """Stop all, the last one first. ``most``: seconds of grace that are not exceeded."""
        self._next = None
        self._take(self._table.stop(-1 if most is None else _ns(most), self._clock()))

    def kill(self) -> None:
        self._take(self._table.kill(self._clock()))

    def restart(self, name: str) -> None:
        """Stop that child and those that go with it by the strategy, and start them again.
        Raises KeyError."""
        member = next((m for m in self._members.values() if m.spec.name == name), None)
        if member is None or self._table_index(member) is None:
            raise KeyError(f"no child is named {name!r}")
        self._take(self._table.restart(member.number, self._clock()))

    def _table_index(self, member: _Member) -> int | None:
        numbers = [row[0] for row in self._table.children()]
        return numbers.index(member.number) if member.number in numbers else None

    def reload(self, spec: SupervisorSpec) -> None:
        """Take another spec: children that are not in it any more are stopped, new ones
        started, and those started again whose process would be another."""
        if self._table.reloading:
            self._next = spec
            return
        by_name = {member.spec.name: member for member in self._members.values()}
        new_preload = tuple(spec.preload) != tuple(self.spec.preload)
        members, again = [], []
        for child in spec.children:
            member = by_name.get(child.name)
            if member is None:
                member = self._new_members([child])[0]
                self._members[member.number] = member
                again.append(False)
            else:
                by_zygote = child.argv is None and (child.method or METHOD) == METHOD
                same = member.spec.is_started_as(child) and not (new_preload and by_zygote)
                again.append(not same)
            members.append(member)
        if new_preload:
            if self._template is not None:
                self._old_templates.append(self._template)
            self._template = self._new_template(spec)
        specs = {m.number: child for m, child in zip(members, spec.children, strict=True)}
        self._after_reload = (spec, specs)
        row = (*self._table_spec(spec, members), again)
        self._take(self._table.reload(self._clock(), row))

    def _reloaded(self) -> None:
        if self._after_reload is not None:
            self.spec, specs = self._after_reload
            self._after_reload = None
            for number, child in specs.items():
                self._members[number].spec = child
        for template in self._old_templates:
            template.close()
        self._old_templates.clear()
        if self._next is not None:
            spec, self._next = self._next, None
            self.reload(spec)

    # ---- what the table says -------------------------------------------------------------

    def _take(self, outs: list[tuple[str, int, int, int]]) -> None:
        """Carry out; what that brings about comes behind it."""
        self._outs.extend(outs)
        if self._draining:
            return
        self._draining = True
        try:
            while self._outs:
                self._carry_out(*self._outs.popleft())
        finally:
            self._draining = False

    def _carry_out(self, kind: str, number: int, value: int, ns: int) -> None:
        if kind == "start":
            self._start(self._members[number])
        elif kind == "signal":
            self._signal(self._members[number], value)
        elif kind == "look":
            heartbeat = self._members[number].heartbeat
            if heartbeat is not None:
                self._take(self._table.beat(number, heartbeat.read(), self._clock()))
        elif kind == "forget":
            del self._members[number]
        elif kind in ("all_ready", "shutdown", "finished"):
            self._tell(None, kind)
        elif kind == "reloaded":
            self._tell(None, kind)
            self._reloaded()
        else:
            self._tell_of(self._members[number], kind, value, ns)

    def _tell(self, child: str | None, kind: str, **more: Any) -> Event:
        event = Event(kind=kind, time=time.time(), child=child, **more)
        self._on_event(event)
        return event

    def _tell_of(self, member: _Member, kind: str, value: int, ns: int) -> None:
        member.counts[kind] += 1
        more: dict[str, Any] = {"pid": member.pid}
        if kind in ("exited", "died", "stopped", "not_started") and member.last is not None:
            last = dataclasses.replace(member.last, kind=kind, time=time.time())
            member.last = last
            self._on_event(last)
            return
        if kind == "stopping":
            more["signal"] = signal.Signals(value).name
        elif kind == "late":
            more["verdict"] = VERDICTS[value] if 0 <= value < len(VERDICTS) else None
        elif kind == "restarting":
            more = {"delay": ns / 1e9}
        elif kind in ("done", "giving_up"):
            more = {}
        self._tell(member.spec.name, kind, **more)

    # ---- processes -----------------------------------------------------------------------

    def _start(self, member: _Member) -> None:
        try:
            start = Start(member, self._template)
        except OSError as exc:
            self._not_started(member, exc)
            return
        if start.may_take_long:
            self._start_in_thread(start)
            return
        try:
            result: Child | BaseException = start.run()
        except Exception as exc:
            result = exc
        self._have_started(start, result)

    def _start_in_thread(self, start: Start) -> None:
        """Others are looked after meanwhile. Of the loop's own thread pools none is used: it
        may be full."""

        def run() -> None:
            result: Child | BaseException
            try:
                result = start.run()
            except BaseException as exc:
                result = exc
            self._started.append((threading.current_thread(), result))
            self.wake()

        thread = threading.Thread(target=run, name=f"start of {start.spec.name}")
        self._threads[thread] = start
        thread.start()

    def _have_started(self, start: Start, result: Child | BaseException) -> None:
        start.close_theirs()
        if self._closed or isinstance(result, BaseException):
            start.close()
        if self._closed:
            if isinstance(result, Child):
                result.close()
            return
        member = self._members[start.number]
        if isinstance(result, BaseException):
            self._not_started(member, result)
            return
        member.handle, member.heartbeat, member.ready_fd = result, start.heartbeat, start.ready_fd
        member.pid, member.returncode, member.last = result.pid, None, None
        member.told_ready = False
        member.begun = self._clock()
        if member.ready_fd >= 0:
            self.watch(member.ready_fd, lambda: self._ready_news(member))
        self._watch(member)
        self._take(self._table.event(member.number, "started", self._clock()))

    def _not_started(self, member: _Member, exc: BaseException) -> None:
        member.pid = None
        member.last = Event(
            kind="not_started", time=time.time(), child=member.spec.name, detail=str(exc),
            exception=exc,
        )  # fmt: skip
        self._take(self._table.event(member.number, "failed", self._clock()))

    def _signal(self, member: _Member, number: int) -> None:
        if member.handle is None:
            return
        try:
            member.handle.signal(number)
            if number != signal.SIGKILL:
                member.handle.signal(signal.SIGCONT)  # one that was stopped hears it too
        except SpawnError as exc:
            self._tell(member.spec.name, "error", pid=member.pid, detail=str(exc))

    def _watch(self, member: _Member) -> None:
        """The descriptor that tells of it changes once in its life."""
        assert member.handle is not None
        fd = member.handle.wake_fd
        if fd == member.wake_fd:
            return
        if member.wake_fd >= 0:
            self.unwatch(member.wake_fd)
        member.wake_fd = fd
        self.watch(fd, lambda: self._news(member))

    def _news(self, member: _Member) -> None:
        handle = member.handle
        assert handle is not None
        if not handle.is_alive():
            self._ended(member, handle)
            return
        self._watch(member)
        self._look_whether_called(member, handle)

    def _look_whether_called(self, member: _Member, handle: Child) -> None:
        by_call = member.spec.argv is None and member.spec.ready == "started"
        if by_call and handle._ready and not member.told_ready:
            self._be_ready(member)

    def _ready_news(self, member: _Member) -> None:
        try:
            data = os.read(member.ready_fd, _MOST_READY_BYTES)
        except BlockingIOError:
            return
        if b"\n" in data:
            self._be_ready(member)
        # None: nobody has the other end any more. So much: it says something else.
        if b"\n" in data or not data or len(data) == _MOST_READY_BYTES:
            self._close_ready(member)

    def _be_ready(self, member: _Member) -> None:
        member.told_ready = True
        self._take(self._table.event(member.number, "ready", self._clock()))

    def _close_ready(self, member: _Member) -> None:
        if member.ready_fd >= 0:
            self.unwatch(member.ready_fd)
            os.close(member.ready_fd)
            member.ready_fd = -1

    def _ended(self, member: _Member, handle: Child) -> None:
        if member.ready_fd >= 0:
            self._ready_news(member)  # it may have said so just before
        self._look_whether_called(member, handle)
        exc = self._exception(handle)
        code = member.returncode = handle.returncode
        detail = describe_status(handle._status)
        if isinstance(exc, SpawnError):
            detail = str(exc)
        elif exc is not None and not isinstance(exc, WorkerDied):
            lines = str(exc).strip().splitlines() or [""]
            name = exc.type_name if isinstance(exc, RemoteError) else type(exc).__name__
            text = lines[0].removeprefix(f"{name}: ")
            detail = f"{detail}: {name}: {text}" if text else f"{detail}: {name}"
        event: Literal["exited", "died"] = "exited" if code == 0 else "died"
        member.last = Event(
            kind=event, time=time.time(), child=member.spec.name, pid=member.pid, returncode=code,
            signal=None if code is None or code >= 0 else _signal_name(-code), detail=detail,
            exception=exc,
        )  # fmt: skip
        self._let_go(member)
        self._take(self._table.event(member.number, event, self._clock()))

    def _exception(self, handle: Child) -> BaseException | None:
        """Of an ended one. Its class is looked for here only if that is wanted: its module
        would be imported."""
        kind, payload = handle._outcome()
        if self._load_exceptions or kind not in (_boot.RAISED, _boot.ERROR) or not payload:
            return handle.exception(0)
        _pickled, name, shown, text = pickle.loads(payload)
        remote = RemoteError(name, shown, text)
        remote.add_note(f"Traceback in the worker:\n{text.rstrip()}")
        return remote

    def _let_go(self, member: _Member) -> None:
        self._close_ready(member)
        if member.wake_fd >= 0:
            self.unwatch(member.wake_fd)
            member.wake_fd = -1
        if member.handle is not None:
            member.handle.close()
            member.handle = None
        member.heartbeat = None

    # ---- looks ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Nothing runs, and nothing will be started."""
        return self._table.finished and not self._outs

    def failure(self) -> SupervisorFailed | None:
        """Why it gave up, if it did."""
        number = self._table.culprit
        if number is None:
            return None
        member = self._members[number]
        failed = SupervisorFailed(member.spec.name, member.last, self.spec)
        if member.last is not None:
            failed.__cause__ = member.last.exception
        return failed

    def pids(self) -> set[int]:
        """Of the processes that are ours to wait for."""
        return {m.handle.pid for m in self._members.values() if m.handle and m.handle.pid}

    def children(self) -> list[ChildInfo]:
        """Each, in their order."""
        found = []
        for number, state, verdict, failures in self._table.children():
            member = self._members[number]
            alive = member.handle is not None
            found.append(
                ChildInfo(
                    name=member.spec.name, state=state, pid=member.pid if alive else None,
                    verdict=verdict,  # type: ignore[arg-type]
                    failures=failures, starts=member.counts["started"],
                    returncode=member.returncode,
                    seconds=(self._clock() - member.begun) / 1e9 if alive else None,
                )
            )  # fmt: skip
        return found

    def counters(self) -> dict[str, dict[str, int]]:
        """How many events of each kind there were, by child."""
        return {member.spec.name: dict(member.counts) for member in self._members.values()}

    def close(self) -> None:
        """Kill what still runs. A start that is on its way is waited for."""
        if self._closed:
            return
        for thread in list(self._threads):
            thread.join()
        self._closed = True
        self._woken()
        for member in reversed(list(self._members.values())):
            self._let_go(member)
        for template in (self._template, *self._old_templates):
            if template is not None:
                template.close()
        self._epoll.close()
        os.close(self._wake)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
