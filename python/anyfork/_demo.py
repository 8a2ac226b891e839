"""``anyfork demo``: hash many files in workers of every method, and check them.

Rule: the event loop of the parent never waits for a worker; it watches file
descriptors. Workers started in the sub-interpreter are watched there, with
poll(2), on that thread: their handles belong to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import stat
import statistics
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import _anyfork, _console, _lab
from ._child import Child
from ._errors import SpawnError
from ._methods import methods
from ._options import Options
from ._request import spawn

_BUSY_THREADS = 4
_FDS_PER_WORKER = 4
_BLOCK = 1 << 20
_DIGEST = hashlib.sha256().digest_size
_MISSING = bytes(_DIGEST)
_SKIPPED_FOLDERS = {b"__pycache__", b"site-packages", b"dist-packages"}


# ---- the files -----------------------------------------------------------------------


class File(NamedTuple):
    path: bytes
    size: int
    changed_ns: int


def find_files(top: bytes, skipped: Counter[str], leave_out: set[bytes]) -> Iterator[File]:
    """The regular files at or under ``top``; what is not taken is counted in ``skipped``."""
    try:
        if not os.path.isdir(top):
            yield from _regular(top, os.stat(top), skipped)
            return
        with os.scandir(top) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        skipped["vanished"] += 1
        return
    except OSError:
        skipped["unreadable folder"] += 1
        return
    for entry in entries:
        try:
            if entry.is_symlink():
                skipped["symbolic link"] += 1
            elif not entry.is_dir():
                yield from _regular(entry.path, entry.stat(), skipped)
            elif entry.name not in leave_out:
                yield from find_files(entry.path, skipped, leave_out)
        except OSError:
            skipped["vanished"] += 1


def _regular(path: bytes, info: os.stat_result, skipped: Counter[str]) -> Iterator[File]:
    if stat.S_ISREG(info.st_mode):
        yield File(path, info.st_size, info.st_mtime_ns)
    else:
        skipped["fifo, socket or device"] += 1


def digest(path: bytes) -> bytes:
    """The SHA-256 of a regular file, as long as it is when it is opened.

    Raises OSError; never waits for a fifo that has taken the file's place.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(f"no regular file any more: {os.fsdecode(path)}")
        state, left = hashlib.sha256(), info.st_size
        while left > 0:
            block = os.read(fd, min(left, _BLOCK))
            if not block:
                break
            state.update(block)
            left -= len(block)
        return state.digest()
    finally:
        os.close(fd)


def read_all(
    files: list[File], skipped: Counter[str], bar: _console.Progress
) -> tuple[list[File], list[bytes]]:
    """The parent's own digests; files that cannot be read are left out, and counted."""
    kept: list[File] = []
    digests: list[bytes] = []
    bar.begin("the parent's own digests", len(files))
    for file in files:
        try:
            digests.append(digest(file.path))
            kept.append(file)
        except FileNotFoundError:
            skipped["vanished"] += 1
        except OSError:
            skipped["unreadable"] += 1
        bar.advance(1)
    return kept, digests


def shares_of(files: list[File], n: int) -> list[list[int]]:
    """Indices of ``files`` in ``n`` shares of about the same number of bytes."""
    shares: list[list[int]] = [[] for _ in range(n)]
    load = [0] * n
    for i in sorted(range(len(files)), key=lambda i: -files[i].size):
        # Opening a file costs about what reading 16 kB does.
        least = load.index(min(load))
        shares[least].append(i)
        load[least] += files[i].size + 16384
    return shares


# ---- in a worker -----------------------------------------------------------------------


class Hashed(NamedTuple):
    """A worker's result: digests end to end, and what could not be read."""

    digests: bytes
    errors: dict[int, str]
    in_main: bool


def hash_share(paths: list[bytes], progress_fd: int) -> Hashed:
    """The target of every worker: trio.run, in a process of its own."""
    import trio

    return trio.run(_hash_share, paths, progress_fd)


async def _hash_share(paths: list[bytes], progress_fd: int) -> Hashed:
    import trio

    digests: list[bytes] = []
    errors: dict[int, str] = {}
    told = 0

    def tell() -> None:
        nonlocal told
        news = len(digests) - told
        if news:
            os.write(progress_fd, news.to_bytes(4, "little"))
            told += news

    async def tell_now_and_then() -> None:
        while True:
            await trio.sleep(0.05)
            tell()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_now_and_then)
        for i, path in enumerate(paths):
            try:
                digests.append(digest(path))
            except OSError as exc:
                digests.append(_MISSING)
                errors[i] = str(exc)
            if i == 0:
                tell()
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    tell()
    return Hashed(b"".join(digests), errors, _anyfork.in_main())


# ---- starting workers ----------------------------------------------------------------------


class Raw(NamedTuple):
    """What came of the workers of one batch, in the order of their shares."""

    begin: float
    end: float
    start_seconds: list[float]
    results: list[Hashed | None]
    errors: list[str | None]
    pids: list[int | None]


class Workers:
    """Workers being started and watched; closing them kills what still runs."""

    def __init__(self, method: str, shares: list[list[bytes]], progress_fd: int) -> None:
        self.method = method
        self.has_process = any(
            row["has_process"] for row in _anyfork.method_traits() if row["name"] == method
        )
        self.shares = shares
        self.progress_fd = progress_fd
        self.children: list[Child] = []
        self.start_seconds: list[float] = []
        self.results: list[Hashed | None] = [None] * len(shares)
        self.errors: list[str | None] = [None] * len(shares)
        self.begin = self.end = time.perf_counter()

    def start_one(self) -> Child:
        share = self.shares[len(self.children)]
        begin = time.perf_counter()
        options: Options = {"pass_fds": [self.progress_fd]} if self.has_process else {}
        child = spawn(hash_share, share, self.progress_fd, method=self.method, **options)
        self.start_seconds.append(time.perf_counter() - begin)
        self.children.append(child)
        return child

    def collect(self, child: Child) -> None:
        """What a worker that has ended has sent."""
        nth = self.children.index(child)
        self.end = time.perf_counter()
        try:
            self.results[nth] = child.result(0)
        except Exception as exc:
            self.errors[nth] = f"{type(exc).__name__}: {exc}"
        child.close()

    def raw(self) -> Raw:
        """Once all have been collected."""
        pids = [child.pid for child in self.children]
        return Raw(self.begin, self.end, self.start_seconds, self.results, self.errors, pids)

    def close(self) -> None:
        for child in self.children:
            child.close()


def _watched(child: Child) -> list[int]:
    """The descriptors that tell of a worker's reports and of its end."""
    return [fd for fd in (child.pidfd, child.report_fd) if fd is not None and fd >= 0]


async def run_in_main(method: str, shares: list[list[bytes]], progress_fd: int) -> Raw:
    """Start the workers inside trio.run, and watch them there."""
    import trio

    workers = Workers(method, shares, progress_fd)
    try:
        async with trio.open_nursery() as nursery:
            for _ in shares:
                if method == "fork":  # forks this very thread, from inside trio.run
                    child = workers.start_one()
                else:  # would only wait here, for the launch pad
                    child = await trio.to_thread.run_sync(workers.start_one)
                nursery.start_soon(_wait_for, workers, child)
                await trio.lowlevel.checkpoint()
        return workers.raw()
    finally:
        workers.close()


async def _wait_for(workers: Workers, child: Child) -> None:
    """Wait for a worker's end; reads its result meanwhile, or it could not write on."""
    import trio

    async def readable(fd: int, scope: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(fd)
        scope.cancel()

    while child.is_alive():
        async with trio.open_nursery() as nursery:
            for fd in _watched(child):
                nursery.start_soon(readable, fd, nursery.cancel_scope)
    workers.collect(child)


def run_here(method: str, shares: list[list[bytes]], progress_fd: int, stop_fd: int) -> Raw:
    """Start the workers in the calling interpreter, and watch them with poll(2).

    Returns early, with the workers killed, once ``stop_fd`` is readable.
    """
    workers = Workers(method, shares, progress_fd)
    try:
        for _ in shares:
            workers.start_one()
        alive = list(workers.children)
        while True:
            for child in [child for child in alive if not child.is_alive()]:
                workers.collect(child)
                alive.remove(child)
            if not alive:
                return workers.raw()
            poll = select.poll()
            poll.register(stop_fd, select.POLLIN)
            for child in alive:
                for fd in _watched(child):
                    poll.register(fd, select.POLLIN)
            if any(fd == stop_fd for fd, _ in poll.poll()):
                workers.close()
    finally:
        workers.close()


async def run_in_subinterpreter(
    interp: _lab.SubInterpreter, method: str, shares: list[list[bytes]], progress_fd: int
) -> Raw:
    """Start the workers in that interpreter, on a thread of trio's."""
    import trio

    stop_r, stop_w = os.pipe()

    async def tell_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            os.write(stop_w, b"x")  # closing it would not do: workers have it open

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_when_cancelled)
            raw: Raw = await trio.to_thread.run_sync(
                interp.call, run_here, method, shares, progress_fd, stop_r
            )
            nursery.cancel_scope.cancel()
        return raw
    finally:
        os.close(stop_r)
        os.close(stop_w)


# ---- batches -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One line of the table."""

    method: str
    started_from: str
    runs_in: str
    workers: int
    start_ms: float
    first_result_ms: float
    seconds: float
    files: int
    bytes: int
    mb_per_s: float
    verified: int
    changed: int
    longest_pause_ms: float
    problems: list[str]


class Gap(NamedTuple):
    """A line of the table without workers: not available here, or failed to start."""

    method: str
    started_from: str
    reason: str
    failed: bool


class Job:
    """The files, the parent's digests of them, and who is to get which."""

    def __init__(self, files: list[File], digests: list[bytes], n: int) -> None:
        self.files = files
        self.digests = digests
        self.shares = shares_of(files, n)
        self.paths = [[files[i].path for i in share] for share in self.shares]
        self.bytes = sum(file.size for file in files)

    def check(self, raw: Raw) -> tuple[int, int, list[str]]:
        """Compare digests: (how many agree, how many files changed, problems)."""
        verified = changed = 0
        problems = [
            f"worker {pid}: {error}"
            for pid, error in zip(raw.pids, raw.errors, strict=True)
            if error is not None
        ]
        for share, result in zip(self.shares, raw.results, strict=True):
            if result is None:
                continue
            if len(result.digests) != len(share) * _DIGEST:
                problems.append(f"{len(result.digests) // _DIGEST} digests for {len(share)} files")
                continue
            for nth, i in enumerate(share):
                got = result.digests[nth * _DIGEST : (nth + 1) * _DIGEST]
                if got == self.digests[i]:
                    verified += 1
                elif _has_changed(self.files[i]):
                    changed += 1
                else:
                    why = result.errors.get(nth, "its digest differs from the parent's")
                    problems.append(f"{os.fsdecode(self.files[i].path)}: {why}")
        return verified, changed, problems


def _has_changed(file: File) -> bool:
    """Whether somebody changed or removed the file while we worked."""
    try:
        info = os.stat(file.path)
    except OSError:
        return True
    return (info.st_size, info.st_mtime_ns) != (file.size, file.changed_ns)


class Parent:
    """What keeps the parent busy: threads, a trio task that looks for pauses."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.rounds = [0] * _BUSY_THREADS
        self.ticks = 0
        self.longest_pause = 0.0
        self.idle_pause = 0.0  # the longest before any worker was started
        self.threads = [
            threading.Thread(target=self._spin, args=(i,), name=f"busy-{i}", daemon=True)
            for i in range(_BUSY_THREADS)
        ]

    def _spin(self, i: int) -> None:
        while not self.stop.is_set():
            self.rounds[i] += 1

    async def tick(self) -> None:
        import trio

        before = time.perf_counter()
        while True:
            await trio.sleep(0.01)
            now = time.perf_counter()
            self.ticks += 1
            self.longest_pause = max(self.longest_pause, now - before)
            before = now


class FirstResult:
    """Reads how far the workers are, moves the bar, notes when the first file was done."""

    def __init__(self, bar: _console.Progress) -> None:
        self.bar = bar
        self.at: float | None = None
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)

    async def watch(self) -> None:
        import trio

        while True:
            await trio.lowlevel.wait_readable(self.read_fd)
            self.take()

    def take(self) -> None:
        """What there is, without waiting."""
        while True:
            try:
                data = os.read(self.read_fd, 4 * 1024)  # a multiple of what tell() writes
            except BlockingIOError:
                return
            if self.at is None:
                self.at = time.perf_counter()
            news = (data[i : i + 4] for i in range(0, len(data), 4))
            self.bar.advance(sum(int.from_bytes(n, "little") for n in news))

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


def _is_child(pid: int) -> bool:
    """Whether a child of ours, running or not reaped, has that number. Asks about one:
    to look through /proc means to wait for the busy threads at every file there."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


async def run_batch(
    job: Job,
    method: str,
    interp: _lab.SubInterpreter | None,
    parent: Parent,
    bar: _console.Progress,
) -> Batch:
    """Start one worker per share, watch them, check what they say."""
    import trio

    origin = "main" if interp is None else "isolated"
    bar.begin(f"{method} from {origin}", len(job.files))
    parent.longest_pause = 0.0
    progress = FirstResult(bar)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress.watch)
            if interp is None:
                raw = await run_in_main(method, job.paths, progress.write_fd)
            else:
                raw = await run_in_subinterpreter(interp, method, job.paths, progress.write_fd)
            nursery.cancel_scope.cancel()
        progress.take()
    finally:
        progress.close()
    verified, changed, problems = job.check(raw)
    left = [pid for pid in raw.pids if pid is not None and _is_child(pid)]
    if left:
        problems.append(f"processes left over: {left}")
    places = {result.in_main for result in raw.results if result is not None}
    runs_in = "/".join("main" if place else "isolated" for place in sorted(places)) or "-"
    seconds = raw.end - raw.begin
    return Batch(
        method=method,
        started_from=origin,
        runs_in=runs_in,
        workers=len(job.shares),
        start_ms=statistics.median(raw.start_seconds) * 1000,
        first_result_ms=((progress.at or raw.end) - raw.begin) * 1000,
        seconds=seconds,
        files=len(job.files),
        bytes=job.bytes,
        mb_per_s=job.bytes / 1e6 / seconds,
        verified=verified,
        changed=changed,
        longest_pause_ms=parent.longest_pause * 1000,
        problems=problems,
    )


def reasons() -> dict[str, str | None]:
    """By method, why it is not available in the calling interpreter."""
    return {method.name: method.reason for method in methods()}


def import_trio() -> None:
    """In the sub-interpreter: workers that are forked there inherit it."""
    import trio  # noqa: F401


def gaps_of(interp: _lab.SubInterpreter) -> dict[tuple[str, str], str]:
    """By method and origin, why there will be no workers."""
    gaps = {(name, "main"): reason for name, reason in reasons().items() if reason}
    there: dict[str, str | None] = interp.call(reasons)
    gaps |= {(name, "isolated"): reason for name, reason in there.items() if reason}
    try:
        interp.call(import_trio)
    except _lab.SubInterpreterError as exc:
        why = _lab.last_line(str(exc))
        gaps.setdefault(("fork", "isolated"), f"trio cannot be imported there: {why}")
    return gaps


async def run_batches(
    job: Job,
    interp: _lab.SubInterpreter,
    parent: Parent,
    bar: _console.Progress,
    only: list[str] | None,
) -> list[Batch | Gap]:
    """Every method, or only those, from main and from the sub-interpreter."""
    import trio

    gaps = gaps_of(interp)
    lines: list[Batch | Gap] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parent.tick)
        for thread in parent.threads:
            thread.start()
        try:
            await trio.sleep(0.3)
            parent.idle_pause = parent.longest_pause
            for method in methods():
                if only is not None and method.name not in only:
                    continue
                for origin, host in (("main", None), ("isolated", interp)):
                    gap = gaps.get((method.name, origin))
                    if gap is not None:
                        lines.append(Gap(method.name, origin, gap, False))
                        continue
                    try:
                        lines.append(await run_batch(job, method.name, host, parent, bar))
                    except* (SpawnError, _lab.SubInterpreterError) as group:
                        why = "; ".join(_lab.last_line(str(e)) for e in _leaves(group))
                        lines.append(Gap(method.name, origin, why, True))
        finally:
            parent.stop.set()
        nursery.cancel_scope.cancel()
    return lines


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


# ---- the command ---------------------------------------------------------------------------------


def _say(text: str) -> int:
    print(f"anyfork demo: {text}", file=sys.stderr)
    return 2


def _fd_limit(workers: int) -> str | None:
    """Why so many workers cannot be watched, or None."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + 32 + workers * _FDS_PER_WORKER
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return None
    return (
        f"{workers} workers need about {needed} open files, the limit is {soft} (RLIMIT_NOFILE): "
        f"raise it with `ulimit -n`, or use fewer workers"
    )


def command(path: str | None, workers: int, as_json: bool, only: list[str] | None = None) -> int:
    """The subcommand; returns its exit status."""
    try:
        import trio
    except ImportError:
        return _say("trio is not installed: pip install 'anyfork[demo]'")
    limit = _fd_limit(workers)
    if limit is not None:
        return _say(limit)
    leave_out = _SKIPPED_FOLDERS if path is None else set()
    top = sysconfig.get_path("stdlib") if path is None else path
    if not os.path.lexists(top):
        return _say(f"no such file or folder: {top}")
    skipped: Counter[str] = Counter()
    files = list(find_files(os.fsencode(os.path.abspath(top)), skipped, leave_out))
    with _console.Progress(1) as bar:
        files, digests = read_all(files, skipped, bar)
        if not files:
            return _say(f"no file to read in {top}{_skipped_text(skipped)}")
        job = Job(files, digests, min(workers, len(files)))
        parent = Parent()
        with _lab.SubInterpreter("isolated") as interp:
            lines: list[Batch | Gap] | None = None
            with contextlib.suppress(KeyboardInterrupt):
                # Not between a start and the moment its handle is kept.
                lines = trio.run(
                    run_batches,
                    job,
                    interp,
                    parent,
                    bar,
                    only,
                    restrict_keyboard_interrupt_to_checkpoints=True,
                )
            alive = interp.call(os.getpid) == os.getpid()
        for thread in parent.threads:
            thread.join()
    if lines is None:
        raise KeyboardInterrupt
    left = sorted(_lab.children())
    problems = _problems(lines, left, alive)
    if as_json:
        report = {
            "python": _lab.python_info(),
            "path": os.path.abspath(top),
            "files": len(files),
            "bytes": job.bytes,
            "skipped": dict(skipped),
            "batches": [line._asdict() for line in lines if isinstance(line, Batch)],
            "unavailable": [line._asdict() for line in lines if isinstance(line, Gap)],
            "parent": {
                "busy_threads": _BUSY_THREADS,
                "busy_rounds": sum(parent.rounds),
                "loop_ticks": parent.ticks,
                "longest_pause_before_ms": parent.idle_pause * 1000,
                "isolated_interpreter_alive": alive,
            },
            "left_over": left,
            "ok": not problems,
        }
        print(json.dumps(report, indent=2))
    else:
        _show(os.path.abspath(top), job, skipped, lines, parent)
        for problem in problems[:20]:
            print(f"FAILED: {problem}")
        if len(problems) > 20:
            print(f"FAILED: and {len(problems) - 20} more")
    return 1 if problems else 0


def _problems(lines: list[Batch | Gap], left: list[int], alive: bool) -> list[str]:
    problems: list[str] = []
    for line in lines:
        where = f"{line.method} from {line.started_from}"
        if isinstance(line, Batch):
            problems += [f"{where}: {problem}" for problem in line.problems]
        elif line.failed:
            problems.append(f"{where}: {line.reason}")
    if left:
        problems.append(f"processes left over: {left}")
    if not alive:
        problems.append("the isolated interpreter does not answer any more")
    return problems


def _skipped_text(skipped: Counter[str]) -> str:
    if not skipped:
        return ""
    return "; left out: " + ", ".join(f"{n} {what}" for what, n in sorted(skipped.items()))


def _show(
    top: str, job: Job, skipped: Counter[str], lines: list[Batch | Gap], parent: Parent
) -> None:
    print(f"anyfork demo on {_lab.python_line()}")
    print(
        f"{len(job.files)} files, {job.bytes / 1e6:.1f} MB, under {top}{_skipped_text(skipped)}\n"
    )
    rows = []
    for line in lines:
        if isinstance(line, Gap):
            verdict = "FAILED" if line.failed else "skipped"
            rows.append([line.method, line.started_from, *["-"] * 6, f"{verdict} (see below)"])
            continue
        ok = not line.problems and line.verified + line.changed == line.files
        verdict = f"ok {line.verified}" if ok else f"FAILED {line.verified}/{line.files}"
        rows.append(
            [
                line.method,
                line.started_from,
                line.runs_in,
                str(line.workers),
                f"{line.start_ms:.{1 if line.start_ms < 100 else 0}f} ms",
                f"{line.first_result_ms:.0f} ms",
                str(line.files),
                f"{line.mb_per_s:.0f}",
                verdict + (f", {line.changed} changed" if line.changed else ""),
            ]
        )
    _console.table(
        ["method", "started\nfrom", "trio\nran in", "workers", "median\nstart",
         "first\nresult", "files", "MB/s", "verified"],
        rows,
        right=[3, 4, 5, 6, 7],
    )
    print()
    for line in lines:
        if isinstance(line, Gap) and not line.failed:
            print(f"skipped: {line.method} from {line.started_from}: {line.reason}")
    there = [
        line.workers for line in lines if isinstance(line, Batch) and line.started_from != "main"
    ]
    pause = max((line.longest_pause_ms for line in lines if isinstance(line, Batch)), default=0)
    print(
        f"{sum(there)} workers were started from an isolated sub-interpreter. Meanwhile, in main: "
        f"{_BUSY_THREADS} busy threads\ndid {sum(parent.rounds):,} rounds, and trio's loop woke "
        f"{parent.ticks} times,\nwith no pause longer than {pause:.0f} ms "
        f"({parent.idle_pause * 1000:.0f} ms beside the busy threads alone).\n"
        f"start: one call of spawn(). first result: from the first call until the first file was "
        f"hashed."
    )
