"""The extension module: glue between Python objects and libanyfork.

Public names are re-exported by the package; the others are for it and its tests.
Every function works in any interpreter, from any thread, unless it says otherwise.
"""

from collections.abc import Buffer, Callable, Iterable
from typing import Any, Literal, NoReturn, TypedDict, final

FAULTS: bool
"""Whether this build can inject faults (-Dfaults=true)."""

class _MethodTraits(TypedDict):
    name: str
    summary: str
    runs_in: str
    memory: str
    may_wait_for: str
    lacks: str | None
    target: Literal["caller", "main", "fresh"]
    has_process: bool
    pickles: bool

@final
class _MethodRow(_MethodTraits):
    available: bool
    reason: str | None

@final
class _Runtime(TypedDict):
    interpreters: int
    main_thread_states: int
    own_thread_states: int
    main_tstate_alive: bool
    gilstate_check: int
    in_main: bool
    own_gil: bool
    pad: bool
    interpreter: int

_State = tuple[Literal["unknown", "ready", "refused"], str]

def fork() -> int:
    """Fork; return 0 in the child and its pid in the parent, in any interpreter.

    In main: as os.fork(), but live sub-interpreters do not crash the child. In a
    sub-interpreter it returns twice there. Raises MethodUnavailable, SpawnError,
    PythonFinalizationError, with nothing changed.
    """

def forkpty() -> tuple[int, int]:
    """As fork(), with a new pseudo-terminal: (pid, master fd); (0, -1) in the child."""

def spawn[ChildT: Child](
    type: type[ChildT],
    method: str,
    target: Callable[..., object] | bytes | None,
    args: tuple[object, ...],
    options: dict[str, Any] | None,
    report_to: int,
    template: Template | Literal[True] | None,
    /,
) -> ChildT | str:
    """Start a worker; ``target`` is a callable, bytes that _boot.load() understands, or
    None for a program, whose end of the report socket gets the number ``report_to``.
    ``template``: of a method that needs one; True: the program is one, and nobody's child.
    A str is the reason why the template has to be made again; nothing was started."""

def spawn_many[ChildT: Child](
    type: type[ChildT],
    pickles: list[bytes],
    options: dict[str, Any] | None,
    template: Template,
    /,
) -> tuple[list[ChildT | None], str | None]:
    """:func:`spawn` by a template, of each: one message to each standby. A str is the reason
    why the template has to be made again, for those that are None."""

def begin_template(control: int, capabilities: tuple[int, int, int], /) -> None:
    """Be a template-to-be: with no more capabilities than these, and nobody else has its socket."""

def serve(
    control: int, owner: int, low: int, high: int, idle: float, shared: bool, siblings: bool, /
) -> None:
    """Be a template: until its owner has gone and all workers have ended."""

def holds(fd: int, /) -> bool:
    """Whether that descriptor is one that this package uses itself."""

def stream_is_open(number: int, /) -> bool:
    """Whether that standard stream is open, and not the number of a descriptor of ours."""

def stamp(paths: tuple[bytes, ...], /) -> int:
    """A number that is another one once one of the files is."""

def set_comm(name: str, /) -> None:
    """/proc/self/comm, cut to 15 bytes, with dashes for spaces."""

def set_title(title: str, /) -> None:
    """What ps shows of this process."""

@final
class Template:
    """The owner's end of a template; it closes with the object."""

    def __init__(self, siblings: bool, /) -> None:
        """``siblings``: its standbys are children of this process."""

    def fileno(self) -> int:
        """Readable when the template has said something; -1 in a forked child."""

    def server_end(self) -> int:
        """The descriptor for the template-to-be; -1 once dropped."""

    def drop_server_end(self) -> None: ...
    def attach(self) -> bool:
        """Ask the template that has made this process to serve it too, at the server's end.
        False: it is not shared."""

    def hello(self) -> bool:
        """Whether it serves by now. Raises SpawnError."""

    def capabilities(self) -> tuple[int, int, int]:
        """Permitted, effective, inheritable: all that the template may have."""

    def close(self) -> None:
        """Only while no other thread uses it."""

    def shutdown(self) -> None:
        """Have no more standbys made. Safe while other threads start with it."""

    def counts(self) -> tuple[int, int]:
        """Starts, and how many of them found no standby ready."""

    def calls(self) -> list[int]:
        """Nanoseconds that the last starts took, 256 at most, in no order."""

_Reading = tuple[int, int, int, int]

@final
class Heartbeat:
    """A worker's heartbeat, as its owner has it; it goes with the object."""

    def __init__(self, interval: float = 1.0) -> None: ...
    def fileno(self) -> int:
        """For the worker."""

    def read(self) -> _Reading:
        """(alive, progressing, cpu_ns, interval_ns): see _heartbeat.Reading."""

def heartbeat_begin(fd: int, interval: float = 0, /) -> None:
    """In the worker's main thread: beat, every ``interval`` seconds; 0: as the owner asks."""

def heartbeat_end() -> None:
    """Beat no more. Once it returns, there is no such thread."""

def heartbeat_verdict(
    before: _Reading, after: _Reading, /
) -> Literal["running", "in_c", "waiting", "stopped"]: ...

_Row = tuple[int, int, int, bool, int, int, int, int, int, int, tuple[int, int, int, int]]
_Outs = list[tuple[str, int, int, int]]

@final
class Supervisor:
    """The table of src/core/supervise.c, which has the members' meaning. Times are
    nanoseconds; what is returned is to be done and told: (kind, id, value, ns)."""

    def __init__(
        self, strategy: int, intensity: int, period: int, children: list[_Row], /
    ) -> None: ...
    def start(self, now: int, /) -> _Outs: ...
    def event(
        self, id: int, event: Literal["started", "failed", "ready", "exited", "died"], now: int, /
    ) -> _Outs: ...
    def beat(self, id: int, reading: _Reading, now: int, /) -> _Outs: ...
    def tick(self, now: int, /) -> _Outs: ...
    def restart(self, id: int, now: int, /) -> _Outs: ...
    def stop(self, most: int, now: int, /) -> _Outs:
        """``most``: no grace is longer; -1: as each has it."""

    def kill(self, now: int, /) -> _Outs: ...
    def reload(
        self, now: int, spec: tuple[int, int, int, list[_Row], list[bool]], /
    ) -> _Outs:
        """The last list: which of the children are started again. OSError (EBUSY): there is
        one that has not taken place."""

    def deadline(self) -> int | None: ...
    def children(self) -> list[tuple[int, str, str | None, int]]:
        """(id, state, verdict, failures in a row), in their order."""

    @property
    def finished(self) -> bool: ...
    @property
    def reloading(self) -> bool: ...
    @property
    def culprit(self) -> int | None:
        """Whose restart was one too many."""

def exec_worker(report_fd: int, target: bytes, /) -> NoReturn:
    """Be the worker of method exec in a fresh interpreter."""

def method_traits() -> list[_MethodTraits]:
    """The rows of the table, in its order, without looking at the interpreter's layout."""

def methods() -> list[_MethodRow]:
    """The rows of the table; ``available`` is for the calling interpreter."""

def workers_held() -> int:
    """How many handles of workers this process has not closed."""

def cuda_state(library: str, /) -> tuple[Literal["off", "on", "unknown"], list[int]]:
    """Of a libcuda that is loaded: whether it was initialized, and the devices with a
    context; -1: a context of this thread's own. Loads and initializes nothing."""

def fork_hooks() -> list[Any] | None:
    """What os.register_at_fork() was given in this interpreter; None: not known here."""

def fork_handlers() -> list[str] | None:
    """The libraries that registered fork handlers, "" where that is not known; None:
    nobody has counted them, see src/shim/atfork.c."""

def check_fork() -> None:
    """Raise MethodUnavailable where fork() cannot work."""

def layout() -> dict[str, _State]:
    """By feature (hop, twin, hooks, stack, attach): its state, and why it is refused."""

def runtime() -> _Runtime | None:
    """Counts for tests and doctor, racy by nature; None where hop is refused."""

def default_signals() -> None:
    """Give this process a worker's signal dispositions and an empty mask."""

def set_disposition(sig: int, ignore: bool, /) -> None:
    """SIG_IGN or SIG_DFL by sigaction(2), from any interpreter."""

def in_main() -> bool:
    """Whether the caller is in the main interpreter."""

def _layout_doctored(table: bytes, version_hex: int, debug: bool, /) -> dict[str, _State]:
    """What layout() would be with this table, version and debug flag."""

def _layout_table() -> tuple[bytes, int, bool]:
    """The true arguments of _layout_doctored()."""

def _begin_finalizing() -> None:
    """From now on this interpreter refuses to fork: it shuts down."""

def _pad_stop() -> None:
    """Stop the launch pad, if it runs; the next start that needs it makes a new one."""

def _set_package_parent(directory: str, /) -> None:
    """The folder of this package, for interpreters without it on their path."""

# Only in builds with FAULTS.
def _fault_arm(nth: int, errno: int, for_good: bool, /) -> None:
    """Let the nth fault point from now fail, and all after it if ``for_good``."""

def _fault_report() -> tuple[int, int, str | None]:
    """(faults injected, fault points passed, the last one's name)."""

@final
class View:
    """A part of a message, read-only, where the sender has put it.

    The memory is the sender's again once all views of the message have gone, and what was
    made of them without a copy.
    """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class _ChannelStatistics(TypedDict):
    sent: int
    received: int
    bytes_sent: int
    bytes_received: int
    shared_sent: int
    shared_received: int
    segments: int
    segment_bytes: int

@final
class Channel:
    """One end of a socket over which two processes send each other messages.

    For any thread. A message is a kind, an id, parts (bytes) and descriptors. Parts that have
    more than 32 KiB together go through memory that both processes share, and arrive as
    :class:`View`. In a forked child the channel is closed; views stay, and the child must not
    rely on them once its parent has let go of its own.
    """

    def __init__(self, fd: int, message_max: int = ...) -> None:
        """Take ``fd`` over: a Unix socket of type SOCK_SEQPACKET, of a pair. ``message_max``
        is for both directions: bytes of all parts (4 GiB)."""

    def send(
        self, kind: int, id: int, parts: Iterable[Buffer], /, fds: Iterable[int] = ()
    ) -> bool:
        """One message; never waits. False: there is no room now, and nothing was sent.

        Raises BrokenPipeError or ConnectionResetError if the peer has gone, ValueError for a
        message that is too large, or a closed channel, OSError."""

    def receive(self) -> tuple[int, int, tuple[bytes | View, ...], tuple[int, ...]] | None:
        """(kind, id, parts, fds), or None if nothing is there now; never waits. The descriptors
        are the caller's.

        Raises EOFError if the peer has closed it; ConnectionAbortedError if it has sent what
        is no message, OSError or MemoryError where there is no room for one: the channel is
        closed then. ValueError: it is closed."""

    def wait(self, timeout: float | None = None, spin: float = 0.0, also: int = -1) -> int:
        """Until there is something to receive (1), or the descriptor ``also`` is readable (2),
        or both (3); 0: the time has passed. For ``spin`` seconds by polling with the GIL held."""

    def wait_writable(self, timeout: float | None = None) -> bool:
        """Until there is room for a message, or the peer has gone. False: the time has passed."""

    def fileno(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Close it; whoever waits wakes. Views stay valid."""

    def shutdown(self) -> None:
        """End both directions; whoever waits wakes. What has come can still be received."""

    def trim(self) -> None:
        """Give idle shared memory of this end back to the system."""

    def statistics(self) -> _ChannelStatistics:
        """Messages, bytes of their parts, those of them through shared memory; the segments of
        both directions that this end has mapped now."""

class Child:
    """A worker process, by its handle. Made by spawn() only."""

    @property
    def pid(self) -> int | None:
        """Process id; None for a thread of this process."""

    @property
    def pidfd(self) -> int | None:
        """Readable once the worker has ended; -1 after close(); None as for pid."""

    @property
    def report_fd(self) -> int:
        """Readable when the worker has reported; -1 when it has no more."""

    @property
    def method(self) -> str:
        """Name of the spawn method."""

    def signal(self, sig: int, /) -> None:
        """Send a signal; by pidfd, so never to another process."""

    def close(self) -> None:
        """Kill the worker if it runs, unless it is detached; reap it, close its fds."""

    def detach(self) -> None:
        """Let the worker outlive its owner and its handle, which then neither kills nor
        waits. Raises MethodUnavailable for a thread of this process, SpawnError."""

    def _take_stdio(self, which: int, /) -> int:
        """The owner's end of a standard stream, the caller's from now on; or -1."""

    def _wait(self, until_ended: bool, timeout: float | None, /) -> bool:
        """Wait until it has ended, or else is ready; False if the time has passed."""

    def _poll(self) -> bool:
        """Read what it has reported; whether it has ended. Never waits."""

    def _outcome(self) -> tuple[int, Any]:
        """(kind, payload): kind 0 and None, or a kind of _boot and bytes."""

    def _error(self) -> tuple[str, int, str] | None:
        """(stage, errno, detail) of its ERROR record."""

    @property
    def _ready(self) -> bool: ...
    @property
    def _ended(self) -> bool: ...
    @property
    def _foreign(self) -> bool: ...
    @property
    def _closed(self) -> bool: ...
    @property
    def _read_errno(self) -> int: ...
    @property
    def _status(self) -> int | None: ...
    @property
    def _status_from(self) -> Literal["running", "report", "wait", "pidfd", "lost"]: ...
