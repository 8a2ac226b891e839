"""Templates, as their owner holds them: made when needed, and made again."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from . import _anyfork, _audit, _exec, _options, _pickling, _zygote
from ._child import Child
from ._errors import MethodUnavailable, SpawnError, TemplateLost, WorkerDied

if TYPE_CHECKING:
    from typing import Unpack

    from ._options import Options

METHOD = "zygote"
_CONTROL_FD = 3  # of the template; its number there
_TIMES_MADE = 3  # in one start
_DEATH_TIMEOUT = 10.0
_ATTACH_TIMEOUT = 2.0
# Behind what the owner has, for it may have the package by other means.
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LONG = 1e6  # seconds


class _Process(Child):
    """A template's own; it is not the user's to close."""

    def __del__(self) -> None:
        pass


class _NotOurs:
    """In place of a handle: the process has another owner too."""

    pid: int | None = None
    pidfd: int | None = None

    def is_alive(self) -> bool:
        return True

    def detach(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Made(NamedTuple):
    """One process of a template."""

    link: _anyfork.Template
    process: _Process | _NotOurs
    owner: int
    path: list[str]
    found: list[str] | None  # sys.path, if no working directory changes what it means
    argv: list[str]


class Stats(NamedTuple):
    """What a template has done, by all of its processes.

    starts: workers. missed: starts that had to wait for a standby. made: how often its
    process was made. pid: of the process now; None: there is none. standbys, workers: its
    children now (of ``parent="owner"``: workers without a name of their own). call: seconds
    that the last starts, 256 at most, took their callers: (median, 99th percentile); None:
    there was none. pss: kB of memory, of the process with its standbys and workers, what they
    share counted once (proc_pid_smaps(5)); None: not readable, as without CAP_SYS_PTRACE.
    late: modules that workers, whose result was asked for, had to import themselves: candidates
    for ``preload``.
    """

    starts: int
    missed: int
    made: int
    pid: int | None
    standbys: int
    workers: int
    call: tuple[float, float] | None
    pss: int | None
    late: tuple[str, ...]


class _Spec(NamedTuple):
    """What is loaded: one step of a tree of templates."""

    preload: tuple[str, ...]
    setup: Callable[[], object] | None


class Template:
    """A process that has loaded what workers need, and keeps some of them ready.

    Args:
      preload: modules that are imported in it.
      setup: called in it after that, for what is not done by an import. Pickled.
      standby: (low, high): how many workers are kept ready when there was no start for
        ``idle`` seconds, and otherwise.
      idle: seconds.
      timeout: seconds that it may take to load all that.
      audit: what is done about threads, sockets and locked locks that it has then:
        "refuse", or "warn" on standard error. `anyfork doctor --template` shows them.
      on_error: what is done about a preload that cannot be imported: "raise", "warn" on
        standard error and go on, or "ignore" it. Workers import it themselves then, and
        get the error if they do.
      parent: "owner": workers are this process's children, and so is the template, for
        :func:`os.getppid`, ps and psutil; then whoever waits for all children of this process
        meets them, and standbys that have expired are zombies until the next start. Fork
        handlers of C libraries, pthread_atfork(3), are not called in workers then.

    Its process is made by the first start, or by :meth:`warm`; and made again, of the same
    modules, by the first start after it has died, or after this process has changed its
    ids, groups, capabilities, filters, namespaces, root, cgroup or session: no worker may
    do what its owner cannot. Workers live on without it.

    Safe from any thread of its interpreter. In a forked child it makes a process of the
    child's own.
    """

    _shared = False  # with its workers

    def __init__(
        self,
        preload: Iterable[str] = (),
        *,
        setup: Callable[[], object] | None = None,
        standby: tuple[int, int] = (1, 4),
        idle: float = 60.0,
        timeout: float = 120.0,
        audit: Literal["refuse", "warn"] = "refuse",
        on_error: Literal["raise", "warn", "ignore"] = "raise",
        parent: Literal["template", "owner"] = "template",
    ) -> None:
        if isinstance(preload, str) or not isinstance(preload, Iterable):
            raise TypeError(f"preload: names of modules are wanted: [{preload!r}]")
        self._spec = _Spec(tuple(preload), setup)
        for name in self._spec.preload:
            if not isinstance(name, str) or not name:
                raise TypeError(f"preload: names of modules are wanted, not {name!r}")
        if setup is not None and not callable(setup):
            raise TypeError(f"setup: a callable is wanted, not {type(setup).__name__}")
        if not isinstance(standby, tuple | list) or [type(n) for n in standby] != [int, int]:
            raise TypeError(f"standby: (low, high), two ints, is wanted, not {standby!r}")
        low, high = standby
        if not 0 <= low <= high <= 256:
            raise ValueError(f"standby: 0 <= low <= high <= 256 is wanted, not {standby!r}")
        for name, seconds in (("idle", idle), ("timeout", timeout)):
            if not isinstance(seconds, int | float):
                raise TypeError(f"{name}: seconds are wanted, not {seconds!r}")
            if not seconds > 0:
                raise ValueError(f"{name}: seconds, more than 0, are wanted, not {seconds!r}")
        if audit not in ("refuse", "warn"):
            raise ValueError(f"audit: 'refuse' or 'warn' is wanted, not {audit!r}")
        if on_error not in ("raise", "warn", "ignore"):
            raise ValueError(
                f"on_error: 'raise', 'warn' or 'ignore' is wanted, not {on_error!r}"
            )
        self._audit = audit
        self._on_error = on_error
        if parent not in ("template", "owner"):
            raise ValueError(f"parent: 'template' or 'owner' is wanted, not {parent!r}")
        self._siblings = parent == "owner"
        self._standby = (low, high)
        self._idle = min(float(idle), _LONG)
        self._timeout = min(float(timeout), _LONG)
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._times_made = 0
        self._before = (0, 0)
        self._late: set[str] = set()
        self._closed = False
        self._maker: int | None = None
        _templates.add(self)

    def child(
        self,
        preload: Iterable[str] = (),
        *,
        setup: Callable[[], object] | None = None,
        standby: tuple[int, int] = (1, 4),
        idle: float = 60.0,
        timeout: float = 120.0,
        audit: Literal["refuse", "warn"] = "refuse",
        on_error: Literal["raise", "warn", "ignore"] = "raise",
    ) -> Template:
        """A template that begins with what this one has loaded: its process is forked from
        this one's, and shares that memory. Arguments as of :class:`Template`, whose ``parent``
        is this one's."""
        return _Branch(
            self,
            preload,
            setup=setup,
            standby=standby,
            idle=idle,
            timeout=timeout,
            audit=audit,
            on_error=on_error,
            parent="owner" if self._siblings else "template",
        )

    # ---- making it ----------------------------------------------------------------

    def is_made(self) -> bool:
        """Whether there is a process of it, so that a start does not wait for one."""
        made = self._made
        return made is not None and made.owner == os.getpid()

    def warm(self) -> Self:
        """Make its process now, if there is none; return when it serves.

        Raises: what the import or ``setup`` raised there, with its traceback as a note;
        SpawnError.
        """
        self._process()
        return self

    def _process(self) -> _Made:
        made = self._made
        if made is not None and made.owner == os.getpid() and not self._closed:
            return made
        me = threading.get_ident()
        if self._maker == me:
            raise RuntimeError(
                "this template is being made, by this very thread: a signal handler cannot start "
                "its first worker meanwhile"
            )
        with self._lock:
            if self._closed:
                raise ValueError("this template is closed")
            made = self._made
            if made is None or made.owner != os.getpid():
                self._maker = me
                try:
                    made = self._made = self._make()
                finally:
                    self._maker = None
                self._times_made += 1
        if self._closed:  # meanwhile
            self._discard(made)
            raise ValueError("this template is closed")
        return made

    def _specs(self) -> tuple[_Spec, ...]:
        """All that a fresh process has to load."""
        return (self._spec,)

    def _begin(self, args: tuple[object, ...], options: Options) -> Child:
        """Start the process, whose target is :func:`_zygote.serve`."""
        return _exec.start_target(
            _zygote.serve,
            (*args, self._shared, _loads(self._specs())),
            options,
            template=not self._siblings,  # else it is our child, as they are
            cls=_Process,
        )

    def _make(self, fresh: bool = False) -> _Made:
        """``fresh``: an executed process, which is for one start."""
        link = _anyfork.Template(self._siblings)
        found, argv = list(sys.path), list(sys.argv)
        path = _pickling.search_path()
        options: Options = {
            "fds": {_CONTROL_FD: link.server_end()},
            "name": "anyfork template",
        }
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            # A file of the template's would get the number of one that is closed.
            if not _anyfork.stream_is_open(number):
                options[name] = -3  # type: ignore[literal-required]  # subprocess.DEVNULL
        try:
            args = (
                _CONTROL_FD,
                os.getpid(),
                link.capabilities(),
                (0, 0) if fresh else self._standby,
                self._idle,
                self._audit,
                self._on_error,
                self._siblings,
            )
            process = (Template._begin if fresh else type(self)._begin)(self, args, options)
        finally:
            link.drop_server_end()
        assert isinstance(process, _Process)
        try:
            self._await(link, process)
        except BaseException:
            process.close()
            link.close()
            raise
        return _Made(link, process, os.getpid(), path, found if found == path else None, argv)

    def _await(
        self, link: _anyfork.Template, process: _Process | _NotOurs, timeout: float | None = None
    ) -> None:
        poll = select.poll()
        poll.register(link, select.POLLIN)
        if process.pidfd is not None:
            poll.register(process.pidfd, select.POLLIN)
        end = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            try:
                if link.hello():
                    return
            except SpawnError as failure:
                if isinstance(process, _NotOurs) or (process.is_alive() and failure.errno):
                    raise  # of another version, say
                exc = process.exception(_DEATH_TIMEOUT)
                if exc is None or isinstance(exc, WorkerDied):
                    exc = SpawnError("template", failure.errno, METHOD, _ended(process))
                raise exc from None
            left = end - time.monotonic()
            if left <= 0:
                raise SpawnError(
                    "template",
                    None,
                    METHOD,
                    f"it is not ready after {self._timeout:g} s: {self._what()}; give it more "
                    "time: Template(timeout=...)",
                )
            poll.poll(left * 1000)

    def _what(self) -> str:
        names = self._spec.preload
        return f"it loads {', '.join(names)}" if names else "it loads nothing"

    def _discard(self, made: _Made) -> None:
        """That process starts nothing any more. Its workers go on, and it with them."""
        with self._lock:
            if self._made is made:
                self._made = None
                if made.owner == os.getpid():
                    starts, missed = made.link.counts()
                    self._before = (self._before[0] + starts, self._before[1] + missed)
        if made.owner != os.getpid():
            return
        if self._siblings and isinstance(made.process, _Process):
            # It tells nobody's end, so that nothing keeps it; and it is our child.
            made.link.shutdown()
            with contextlib.suppress(TimeoutError, WorkerDied, SpawnError):
                made.process.wait(_DEATH_TIMEOUT)
        else:
            with contextlib.suppress(SpawnError):
                made.process.detach()
        made.process.close()

    # ---- using it -------------------------------------------------------------------

    def _pickled(
        self, fn: Callable[..., object], args: tuple[object, ...]
    ) -> tuple[bytes, tuple[str, str, bool] | None]:
        return _pickled((fn, args))

    def start(
        self,
        fn: Callable[..., object],
        args: tuple[object, ...],
        options: dict[str, Any] | None,
        cls: type[Child] = Child,
    ) -> Child:
        """For :func:`anyfork.spawn`: ``options`` as ``_options.prepare()`` makes them."""
        if options and options.pop("fresh", False):
            return self._start_fresh(fn, args, options)
        call = self._pickled(fn, args)
        why = ""
        for _ in range(_TIMES_MADE):
            made = self._made
            if made is None or made.owner != os.getpid() or self._closed:
                made = self._process()
            child = _anyfork.spawn(cls, METHOD, _whole(made, *call), (), options, -1, made.link)
            if not isinstance(child, str):
                child.__dict__["_late"] = self._late
                return child
            why = child
            self._discard(made)
        raise SpawnError("template", None, METHOD, f"made {_TIMES_MADE} times: {why}")

    def start_many(
        self,
        fn: Callable[..., object],
        args_of_each: list[tuple[object, ...]],
        options: dict[str, Any] | None,
    ) -> list[Child]:
        """For :func:`anyfork.spawn_many`."""
        calls = [self._pickled(fn, args) for args in args_of_each]
        children: list[Child | None] = [None] * len(calls)
        why: str | None = ""
        for _ in range(_TIMES_MADE):
            made = self._process()
            left = [i for i, child in enumerate(children) if child is None]
            pickles = [_whole(made, *calls[i]) for i in left]
            started, why = _anyfork.spawn_many(Child, pickles, options, made.link)
            for i, child in zip(left, started, strict=True):
                children[i] = child
                if child is not None:
                    child.__dict__["_late"] = self._late
            if why is None:
                return [child for child in children if child is not None]
            self._discard(made)
        raise SpawnError("template", None, METHOD, f"made {_TIMES_MADE} times: {why}")

    def _start_fresh(
        self, fn: Callable[..., object], args: tuple[object, ...], options: dict[str, Any]
    ) -> Child:
        """By a process that is made for this worker."""
        if self._closed:
            raise ValueError("this template is closed")
        call = self._pickled(fn, args)
        made = self._make(fresh=True)
        try:
            child = _anyfork.spawn(Child, METHOD, _whole(made, *call), (), options, -1, made.link)
        finally:
            self._discard(made)
        if isinstance(child, str):
            raise SpawnError("template", None, METHOD, child)
        with self._lock:
            self._before = (self._before[0] + 1, self._before[1])
        return child

    def spawn(
        self, fn: Callable[..., object], /, *args: object, **options: Unpack[Options]
    ) -> Child:
        """:func:`anyfork.spawn` with this template."""
        options["template"] = self
        return _request.spawn(fn, *args, method=METHOD, **options)

    def run(self, fn: Callable[..., Any], /, *args: object, **options: Unpack[Options]) -> Any:
        """:func:`anyfork.run` with this template."""
        options["template"] = self
        return _request.run(fn, *args, method=METHOD, **options)

    def spawn_many(
        self,
        fn: Callable[..., object],
        args_of_each: Iterable[tuple[object, ...]],
        /,
        **options: Unpack[Options],
    ) -> list[Child]:
        """:func:`anyfork.spawn_many` with this template."""
        options["template"] = self
        return _request.spawn_many(fn, args_of_each, **options)

    def stats(self) -> Stats:
        """Counts since the template was created, and what it has now.

        Waits for nobody; to count memory takes some milliseconds where there are many workers.
        """
        made = self._made
        starts, missed = self._before
        late = tuple(sorted(self._late))
        if made is None or made.owner != os.getpid():
            return Stats(starts, missed, self._times_made, None, 0, 0, None, None, late)
        more, more_missed = made.link.counts()
        alive = made.process.pid is not None and made.process.is_alive()
        pid = made.process.pid if alive else None
        standbys, workers, pss = 0, 0, None
        if pid is not None:
            standbys, workers, pss = _family(pid, self._siblings)
        return Stats(
            starts + more,
            missed + more_missed,
            self._times_made,
            pid,
            standbys,
            workers,
            _percentiles(made.link.calls()),
            pss,
            late,
        )

    def reload(self) -> Self:
        """Make a new process, of modules as they are now; the next start has it."""
        made = self._made
        if made is not None:
            self._discard(made)
        return self.warm()

    def close(self) -> None:
        """Start nothing any more. Workers that run go on.

        A process that another thread is making is discarded by that thread.
        """
        self._closed = True
        made = self._made
        if made is not None:
            self._discard(made)

    def __del__(self) -> None:
        made = getattr(self, "_made", None)
        if made is not None:  # not killed, for it tells how its workers ended
            with contextlib.suppress(Exception):
                self._discard(made)

    def __enter__(self) -> Self:
        return self.warm()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        made = self._made
        pid = made.process.pid if made is not None else None
        return f"<anyfork.Template {list(self._spec.preload)} pid={pid}>"


class _Default(Template):
    """The template of starts that name none. Its workers have it too."""

    _shared = True
    _alone = False  # it cannot be that of the process that has made this one

    def _specs(self) -> tuple[_Spec, ...]:
        return (_Spec(("cloudpickle",), None),)

    def _make(self, fresh: bool = False) -> _Made:
        if self._alone or fresh:
            return super()._make(fresh)
        self._alone = True  # once it has gone, or must not serve this process any more
        link = _anyfork.Template(False)
        try:
            if link.attach():
                link.drop_server_end()
                self._await(link, _NotOurs(), min(self._timeout, _ATTACH_TIMEOUT))
                path, argv = _zygote.path, _zygote.argv
                return _Made(link, _NotOurs(), os.getpid(), path, None, argv)
        except SpawnError:  # it does not take this process
            pass
        link.drop_server_end()
        link.close()
        return super()._make()


class _Branch(Template):
    """A template whose process is a worker of another template."""

    def __init__(self, root: Template, preload: Iterable[str], **arguments: Any) -> None:
        super().__init__(preload, **arguments)
        self._root = root

    def _specs(self) -> tuple[_Spec, ...]:
        return (*self._root._specs(), self._spec)

    def _pickled(
        self, fn: Callable[..., object], args: tuple[object, ...]
    ) -> tuple[bytes, tuple[str, str, bool] | None]:
        return self._root._pickled(fn, args)  # a snapshot's has its own way

    def _begin(self, args: tuple[object, ...], options: Options) -> Child:
        prepared = _options.prepare(METHOD, options)
        return self._root.start(
            _zygote.serve, (*args, False, _loads((self._spec,))), prepared, cls=_Process
        )

    def _start_fresh(
        self, fn: Callable[..., object], args: tuple[object, ...], options: dict[str, Any]
    ) -> Child:
        root = self._root
        while isinstance(root, _Branch):
            root = root._root
        if isinstance(root, _Snapshot):
            return root._start_fresh(fn, args, options)
        return super()._start_fresh(fn, args, options)


class _Snapshot(Template):
    """A template whose process is forked from this one's, once."""

    def _begin(self, args: tuple[object, ...], options: Options) -> Child:
        if self._times_made:
            raise TemplateLost(
                "template",
                None,
                METHOD,
                "the snapshot has ended, or this process may not do any more what it did then; "
                "the state that it had cannot be made again: take another",
            )
        # Those that are in our tables are closed in a forked child before anything is moved.
        control = os.dup(int(options["fds"][_CONTROL_FD]))  # type: ignore[arg-type]
        try:
            prepared = _options.prepare("fork", {**options, "fds": {_CONTROL_FD: control}})
            process = _anyfork.spawn(
                _Process, "fork", _zygote.serve, (*args, False, ()), prepared, -1, None
            )
        finally:
            os.close(control)
        assert not isinstance(process, str)
        return process

    def _pickled(
        self, fn: Callable[..., object], args: tuple[object, ...]
    ) -> tuple[bytes, tuple[str, str, bool] | None]:
        """By reference also what ``__main__`` defines: it is there, with its state."""
        try:
            return _pickling.by_reference((fn, args), METHOD)[0], None
        except TypeError:
            return _pickling.by_value((fn, args), METHOD), None

    def _start_fresh(
        self, fn: Callable[..., object], args: tuple[object, ...], options: dict[str, Any]
    ) -> Child:
        raise ValueError("fresh: a snapshot is what it is; take another, or use Template(...)")

    def reload(self) -> Self:
        raise ValueError("a snapshot cannot be loaded again: take another")


def snapshot(
    *,
    standby: tuple[int, int] = (1, 4),
    idle: float = 60.0,
    timeout: float = 120.0,
    audit: Literal["refuse", "warn"] = "refuse",
    parent: Literal["template", "owner"] = "template",
) -> Template:
    """A template of this program as it is now: its workers find all modules, objects and state
    of this moment, and nothing of that is pickled or imported.

    For a quiet point: early, before there are threads and connections. Targets are found by
    their names, those of ``__main__`` too, if they were defined by then.

    Args: as of :class:`Template`. ``audit`` looks at this process, before it is forked.

    Raises: RuntimeError with what it has found; MethodUnavailable where method ``fork`` cannot
    work, or in a sub-interpreter. Once the snapshot's process has died, or this one has
    changed its ids, namespaces and so on, starts raise :class:`TemplateLost`.
    """
    if not _anyfork.in_main():
        raise MethodUnavailable(
            "template",
            None,
            METHOD,
            "a snapshot can be taken in the main interpreter only; Template() in any",
        )
    _zygote.judge(_audit.findings(frozenset()), audit)
    return _Snapshot(
        standby=standby, idle=idle, timeout=timeout, audit=audit, parent=parent
    ).warm()


def _loads(specs: tuple[_Spec, ...]) -> tuple[tuple[tuple[str, ...], bytes | None], ...]:
    """Modules, and what _boot.load() makes of each setup function."""
    loads = []
    for spec in specs:
        setup = None
        if spec.setup is not None:
            data, main = _pickled((spec.setup, ()))
            setup = pickle.dumps((None, None, main, data), protocol=5)
        loads.append((spec.preload, setup))
    return tuple(loads)


def _whole(made: _Made, data: bytes, main: tuple[str, str, bool] | None) -> bytes:
    """For _boot.load(): the call, and what has changed since the template was made."""
    path = None
    if sys.path != made.found:
        now = _pickling.search_path()
        path = None if now == made.path else (*now, _PACKAGE_PARENT)
    argv = None if sys.argv == made.argv else sys.argv
    return pickle.dumps((path, argv, main, data), protocol=5)


def _children(pid: str) -> list[str]:
    """Of all threads of a process, as the kernel lists them."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as f:
                found += f.read().split()
    return found


def _comm(pid: str) -> str | None:
    """What ps shows of a process; None: it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            left, _, right = f.read().rpartition(")")
    except OSError:
        return None
    return left.partition("(")[2] if right.split()[0] not in "ZX" else None


def _family(pid: int, siblings: bool) -> tuple[int, int, int | None]:
    """Standbys and workers of a template, and the memory of them all. Siblings are known by
    their names: workers that were given one are not."""
    names = {one: _comm(one) for one in _children("self" if siblings else str(pid))}
    standbys = [one for one, name in names.items() if name == "anyfork-standby"]
    workers = [
        one
        for one, name in names.items()
        if name not in (None, "anyfork-standby") and (name == "anyfork-worker" or not siblings)
    ]
    pss = 0
    for one in (str(pid), *standbys, *workers):
        try:
            pss += pss_kb(one)
        except PermissionError:  # those that are not dumpable: a part would mislead
            return len(standbys), len(workers), None
        except OSError:  # it has ended
            continue
    return len(standbys), len(workers), pss or None


def pss_kb(pid: str) -> int:
    """Of a process, what it shares divided among those who have it. Raises OSError."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Pss:"))


def _percentiles(calls: list[int]) -> tuple[float, float] | None:
    if not calls:
        return None
    calls.sort()
    return calls[len(calls) // 2] / 1e9, calls[len(calls) * 99 // 100] / 1e9


def _ended(process: Child) -> str:
    code = process.returncode
    status = (
        "" if code is None else f", with status {code}" if code >= 0 else f", by signal {-code}"
    )
    return f"it ended before it was ready{status}"


def _pickled(call: _pickling.Target) -> tuple[bytes, tuple[str, str, bool] | None]:
    """The target by reference where that can be found there, else by value; and then how to
    import the program, for what cannot be pickled so."""
    try:
        data, names_main = _pickling.by_reference(call, METHOD)
    except TypeError:
        names_main = True
    if not names_main:
        return data, None
    data = _pickling.by_value(call, METHOD)
    try:
        return data, (*_pickling.main_program(METHOD), False)
    except TypeError:  # a REPL, or a notebook
        return data, None


_templates: weakref.WeakSet[Template] = weakref.WeakSet()
_default: _Default | None = None
_making_default = threading.Lock()


def _new_locks() -> None:
    global _making_default
    _making_default = threading.Lock()
    for template in list(_templates):
        template._lock = threading.Lock()
        template._maker = None


os.register_at_fork(after_in_child=_new_locks)


def _close_all() -> None:
    """So that a template reaps its standbys, and ends alone."""
    for template in list(_templates):
        template.close()


def default() -> Template:
    """The template of starts that name none."""
    global _default
    if _default is None:
        with _making_default:
            if _default is None:
                _default = _Default()
    return _default


def warm() -> Template:
    """Make the default template ready, which otherwise the first start does."""
    return default().warm()


# Not at the top, for it imports this module; nor in the methods, where it would take longer than
# all the rest of their Python.
from . import _request  # noqa: E402
