"""What a process must not have when it is forked as a template, looked for from inside."""

from __future__ import annotations

import _thread
import collections
import functools
import gc
import os
import re
import struct
import sys
import threading
import time
import warnings
from typing import Any, NamedTuple

from . import _anyfork

_LOCKS = (_thread.LockType, _thread.RLock)
_TRIAL_TIMEOUT = 10.0
_SETTLE = 0.2  # seconds for threads that are ending
_STACK_BYTES = 65536  # of a thread's that are looked through
_WORD = struct.calcsize("P")

# Libraries with pools of threads, as their files are called; and what makes them have none.
_POOLS = {
    "libgomp": "OMP_NUM_THREADS=1",
    "libomp": "OMP_NUM_THREADS=1",
    "libiomp5": "OMP_NUM_THREADS=1",
    "libscipy_openblas": "OPENBLAS_NUM_THREADS=1",
    "libopenblas": "OPENBLAS_NUM_THREADS=1",
    "libblis": "BLIS_NUM_THREADS=1",
    "libmkl": "MKL_NUM_THREADS=1",
}


class Finding(NamedTuple):
    """``kind``: thread, socket, lock or cuda. ``what``: which. ``remedy``: what to do."""

    kind: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}; {self.remedy}"


class Module(NamedTuple):
    """One preload: seconds and kB that its import took, threads that it has started."""

    name: str
    seconds: float
    kb: int
    threads: int
    error: str | None


def _other_threads() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/task"):
        if int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/self/task/{name}/comm") as f:
                found[int(name)] = f.read().strip()
        except OSError:  # it has ended
            continue
    return found


def _fork_once() -> None:
    """As a template will: pools that stop in their fork handlers have stopped then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    end = time.monotonic() + _TRIAL_TIMEOUT
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, 9)
        time.sleep(0.001)


class _Mapping(NamedTuple):
    begin: int
    end: int
    path: str


def _mappings() -> list[_Mapping]:
    """Of this process, in the order of their addresses; without a file: an empty path."""
    found = []
    with open("/proc/self/maps") as f:
        for line in f:
            words = line.rstrip("\n").split(maxsplit=5)
            begin, _minus, end = words[0].partition("-")
            path = words[5].removesuffix(" (deleted)") if len(words) > 5 else ""
            found.append(_Mapping(int(begin, 16), int(end, 16), path))
    return found


def _pool_of(path: str) -> str | None:
    name = os.path.basename(path)
    return next((pool for pool in _POOLS if re.match(rf"{pool}[-_.\d]", f"{name}.")), None)


def _pool_of_thread(tid: int, mappings: list[_Mapping]) -> str | None:
    """The library that a waiting thread waits in: its stack holds addresses of it."""
    pools = [m for m in mappings if _pool_of(m.path) is not None]
    if not pools:
        return None
    try:
        with open(f"/proc/self/task/{tid}/syscall") as f:
            top = int(f.read().split()[-2], 16)
        stack = next(m for m in mappings if m.begin <= top < m.end)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            size = min(_STACK_BYTES, stack.end - top) // _WORD * _WORD
            data = os.pread(memory.fileno(), size, top)
    except (OSError, ValueError, IndexError, StopIteration):  # it runs, or /proc does not tell
        return None
    for (word,) in struct.iter_unpack("P", data[: len(data) // _WORD * _WORD]):
        for mapping in pools:
            if mapping.begin <= word < mapping.end:
                return _pool_of(mapping.path)
    return None


def _thread_finding(tid: int, name: str | None, comm: str, mappings: list[_Mapping]) -> Finding:
    pool = _pool_of_thread(tid, mappings) if name is None else None
    if pool is None:
        return Finding(
            "thread",
            name or comm,
            "workers would not have it, but find locked what it had locked: start it in workers",
        )
    return Finding(
        "thread",
        f"{comm}, of the pool of {pool}",
        "workers would not have it, and may wait for it for ever in their first parallel loop: "
        f"compute nothing parallel in preloads and setup, or have {_POOLS[pool]} in the "
        "environment of this program (or threadpoolctl.threadpool_limits(1) before it does)",
    )


def _threads() -> list[Finding]:
    if _other_threads():
        _fork_once()
    end = time.monotonic() + _SETTLE
    while (left := _other_threads()) and time.monotonic() < end:
        time.sleep(0.01)
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    mappings = _mappings() if left else []
    return [
        _thread_finding(tid, known.get(tid), comm, mappings) for tid, comm in sorted(left.items())
    ]


def open_sockets() -> frozenset[str]:
    """Those of this process, but for standard streams and what this package uses itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
        if target.startswith("socket:") and int(name) > 2 and not _anyfork.holds(int(name)):
            found.add(f"descriptor {name}")
    return frozenset(found)


def _sockets(ours: frozenset[str]) -> list[Finding]:
    return [
        Finding(
            "socket",
            name,
            "two processes that talk on one connection mix what they say, so that workers get a "
            "placeholder: connect in workers",
        )
        for name in sorted(open_sockets() - ours)
    ]


def _is_locked(lock: Any) -> bool:
    # An RLock tells it by its repr alone, before 3.14.
    locked = getattr(lock, "locked", None)
    return bool(locked()) if locked is not None else repr(lock).startswith("<locked")


def _locks() -> list[Finding]:
    """Reachable from modules and from what the garbage collector knows: locks themselves
    are not among that, before they are held by something that is."""
    places: dict[int, tuple[object, str]] = {}
    for name, module in list(sys.modules.items()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if isinstance(value, _LOCKS):
                places.setdefault(id(value), (value, f"{name}.{key}"))
    for owner in gc.get_objects():
        if type(owner) is dict or not hasattr(owner, "__dict__") or isinstance(owner, type):
            continue
        try:
            items = list(vars(owner).items())
        except Exception:  # a property of that name, say
            continue
        for key, value in items:
            if isinstance(value, _LOCKS):
                kind = type(owner)
                places.setdefault(id(value), (value, f"{kind.__module__}.{kind.__name__}.{key}"))
    return [
        Finding(
            "lock",
            name,
            "nobody is there to release it in a worker: release it before the template serves",
        )
        for lock, name in places.values()
        if _is_locked(lock)
    ]


def _cuda_of_driver() -> str | None:
    """Asked of libcuda itself, whoever has loaded it."""
    paths = {m.path for m in _mappings() if os.path.basename(m.path).startswith("libcuda.so")}
    for path in sorted(paths):
        state, devices = _anyfork.cuda_state(path)
        if state == "unknown":
            return f"{path} is loaded, and does not tell whether it is in use"
        if devices == [-1]:
            return "a context of this thread"
        if devices:
            return f"a context on device {', '.join(map(str, devices))}"
        if state == "on":
            return "the driver is initialized"
    return None


def _cuda() -> list[Finding]:
    what = _cuda_of_driver()
    in_use = getattr(sys.modules.get("torch.cuda"), "is_initialized", None)
    if what is None and callable(in_use) and in_use():
        what = "torch.cuda is initialized"
    if what is None:
        return []
    return [
        Finding(
            "cuda",
            what,
            "no process that is forked from here could use a GPU (CUDA_ERROR_NOT_INITIALIZED): "
            "preload the libraries, but make the first call of CUDA in workers",
        )
    ]


def findings(ours: frozenset[str]) -> list[Finding]:
    """All of them; ``ours``: sockets that belong to the template itself."""
    return [*_threads(), *_sockets(ours), *_locks(), *_cuda()]


class Handlers(NamedTuple):
    """Who is called at each fork: libraries, and how often each has registered; what
    os.register_at_fork() was given. None: not known."""

    c: dict[str, int] | None
    python: list[str] | None


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    module = getattr(fn, "__module__", None) or type(fn).__module__
    return f"{module}.{getattr(fn, '__qualname__', None) or type(fn).__qualname__}"


def fork_handlers() -> Handlers:
    paths, hooks = _anyfork.fork_handlers(), _anyfork.fork_hooks()
    names = [os.path.basename(path) or "of a library that is not known" for path in paths or ()]
    return Handlers(
        None if paths is None else dict(collections.Counter(names)),
        # Not the marks by which the library finds these lists, which do nothing.
        None
        if hooks is None
        else [name for hook in hooks if not (name := _name_of(hook)).endswith("anyfork_mark")],
    )


def _resident_kb() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def inspect(names: list[str]) -> tuple[list[Module], list[Finding], Handlers]:
    """Import modules here, one after the other, and look. For a process of its own."""
    modules = []
    ours = open_sockets()
    for name in names:
        kb, threads, begun = _resident_kb(), len(_other_threads()), time.monotonic()
        error = None
        try:
            __import__(name)
        except BaseException as exc:
            error = f"{type(exc).__name__}: {exc}"
        modules.append(
            Module(
                name,
                time.monotonic() - begun,
                _resident_kb() - kb,
                len(_other_threads()) - threads,
                error,
            )
        )
    return modules, findings(ours), fork_handlers()
