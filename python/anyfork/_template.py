"""Templates, as their owner holds them: made when needed, and made again."""

from __future__ import annotations

import atexit
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

from . import _anyfork, _exec, _pickling, _zygote
from ._child import Child
from ._errors import SpawnError, WorkerDied

if TYPE_CHECKING:
    from typing import Unpack

    from ._options import Options

METHOD = "zygote"
_CONTROL_FD = 3  # of the template; its number there
_TIMES_MADE = 3  # in one start
_DEATH_TIMEOUT = 10.0
# Behind what the owner has, for it may have the package by other means.
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LONG = 1e6  # seconds


class _Process(Child):
    """A template's own; it is not the user's to close."""

    def __del__(self) -> None:
        pass


class _Made(NamedTuple):
    """One process of a template."""

    link: _anyfork.Template
    process: _Process
    owner: int
    path: list[str]
    argv: list[str]


class Stats(NamedTuple):
    """What a template has done, by all of its processes.

    starts: workers. missed: starts that had to wait for a standby. made: how often its
    process was made. pid: of the process now; None: there is none.
    """

    starts: int
    missed: int
    made: int
    pid: int | None


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

    Its process is made by the first start, or by :meth:`warm`; and made again, of the same
    modules, by the first start after it has died, or after this process has changed its
    ids, groups, capabilities, filters, namespaces, root, cgroup or session: no worker may
    do what its owner cannot. Workers live on without it.

    Safe from any thread of its interpreter. In a forked child it makes a process of the
    child's own.
    """

    def __init__(
        self,
        preload: Iterable[str] = (),
        *,
        setup: Callable[[], object] | None = None,
        standby: tuple[int, int] = (1, 4),
        idle: float = 60.0,
        timeout: float = 120.0,
        audit: Literal["refuse", "warn"] = "refuse",
    ) -> None:
        if isinstance(preload, str):
            raise TypeError(f"preload: names of modules are wanted: [{preload!r}]")
        self._preload = tuple(preload)
        for name in self._preload:
            if not isinstance(name, str) or not name:
                raise TypeError(f"preload: names of modules are wanted, not {name!r}")
        if setup is not None and not callable(setup):
            raise TypeError(f"setup: a callable is wanted, not {type(setup).__name__}")
        low, high = standby
        if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high <= 256):
            raise ValueError(f"standby: 0 <= low <= high <= 256 is wanted, not {standby!r}")
        if not idle > 0 or not timeout > 0:
            raise ValueError("idle, timeout: seconds are wanted")
        if audit not in ("refuse", "warn"):
            raise ValueError(f"audit: 'refuse' or 'warn' is wanted, not {audit!r}")
        self._audit = audit
        self._setup = setup
        self._standby = (low, high)
        self._idle = min(float(idle), _LONG)
        self._timeout = min(float(timeout), _LONG)
        self._lock = threading.Lock()
        self._made: _Made | None = None
        self._times_made = 0
        self._before = (0, 0)
        self._closed = False
        self._maker: int | None = None
        _templates.add(self)

    # ---- making it ----------------------------------------------------------------

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
            return made

    def _make(self) -> _Made:
        link = _anyfork.Template()
        path, argv = _pickling.search_path(), list(sys.argv)
        preload = self._preload if self is not _default else ("cloudpickle", *self._preload)
        options: Options = {
            "fds": {_CONTROL_FD: link.server_end()},
            "name": "anyfork template",
        }
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            # A file of the template's would get the number of one that is closed.
            if not _anyfork.stream_is_open(number):
                options[name] = -3  # type: ignore[literal-required]  # subprocess.DEVNULL
        try:
            setup = None
            if self._setup is not None:
                data, main = _pickled((self._setup, ()))
                setup = pickle.dumps((None, None, main, data), protocol=5)
            args = (
                _CONTROL_FD,
                os.getpid(),
                link.capabilities(),
                preload,
                setup,
                self._standby,
                self._idle,
                self._audit,
            )
            process = _exec.start_target(
                _zygote.serve,
                args,
                options,
                template=True,
                cls=_Process,
            )
        finally:
            link.drop_server_end()
        assert isinstance(process, _Process)
        try:
            self._await(link, process)
        except BaseException:
            process.close()
            link.close()
            raise
        return _Made(link, process, os.getpid(), path, argv)

    def _await(self, link: _anyfork.Template, process: _Process) -> None:
        assert process.pidfd is not None
        poll = select.poll()
        poll.register(link, select.POLLIN)
        poll.register(process.pidfd, select.POLLIN)
        end = time.monotonic() + self._timeout
        while True:
            try:
                if link.hello():
                    return
            except SpawnError as failure:
                if process.is_alive() and failure.errno:  # of another version, say
                    raise
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
        return f"it loads {', '.join(self._preload)}" if self._preload else "it loads nothing"

    def _discard(self, made: _Made) -> None:
        """That process starts nothing any more. Its workers go on, and it with them."""
        with self._lock:
            if self._made is made:
                self._made = None
                if made.owner == os.getpid():
                    starts, missed = made.link.counts()
                    self._before = (self._before[0] + starts, self._before[1] + missed)
        if made.owner == os.getpid():
            with contextlib.suppress(SpawnError):
                made.process.detach()
            made.process.close()

    # ---- using it -------------------------------------------------------------------

    def start(
        self, fn: Callable[..., object], args: tuple[object, ...], options: dict[str, Any] | None
    ) -> Child:
        """For :func:`anyfork.spawn`: ``options`` as ``_options.prepare()`` makes them."""
        data, main = _pickled((fn, args))
        why = ""
        for _ in range(_TIMES_MADE):
            made = self._process()
            path = _pickling.search_path()
            argv = sys.argv
            whole = pickle.dumps(
                (
                    None if path == made.path else (*path, _PACKAGE_PARENT),
                    None if argv == made.argv else argv,
                    main,
                    data,
                ),
                protocol=5,
            )
            child = _anyfork.spawn(Child, METHOD, whole, (), options, -1, made.link)
            if not isinstance(child, str):
                return child
            why = child
            self._discard(made)
        raise SpawnError("template", None, METHOD, f"made {_TIMES_MADE} times: {why}")

    def spawn(
        self, fn: Callable[..., object], /, *args: object, **options: Unpack[Options]
    ) -> Child:
        """:func:`anyfork.spawn` with this template."""
        from . import spawn

        options["template"] = self
        return spawn(fn, *args, method=METHOD, **options)

    def run(self, fn: Callable[..., Any], /, *args: object, **options: Unpack[Options]) -> Any:
        """:func:`anyfork.run` with this template."""
        from . import run

        options["template"] = self
        return run(fn, *args, method=METHOD, **options)

    def stats(self) -> Stats:
        """Counts since the template was created; waits for nobody."""
        made = self._made
        starts, missed = self._before
        pid = None
        if made is not None and made.owner == os.getpid():
            more, more_missed = made.link.counts()
            starts, missed = starts + more, missed + more_missed
            pid = made.process.pid if made.process.is_alive() else None
        return Stats(starts, missed, self._times_made, pid)

    def reload(self) -> Self:
        """Make a new process, of modules as they are now; the next start has it."""
        made = self._made
        if made is not None:
            self._discard(made)
        return self.warm()

    def close(self) -> None:
        """Start nothing any more. Workers that run go on."""
        with self._lock:
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
        return f"<anyfork.Template {list(self._preload)} pid={pid}>"


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
_default: Template | None = None
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


atexit.register(_close_all)


def default() -> Template:
    """The template of starts that name none."""
    global _default
    if _default is None:
        with _making_default:
            if _default is None:
                _default = Template()
    return _default


def warm() -> Template:
    """Make the default template ready, which otherwise the first start does."""
    return default().warm()
