"""Attacks on the first moments of a worker: what other threads held at the fork."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import importlib
import logging
import logging.handlers
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable

from attack_common import (
    LIMIT,
    available,
    fill_level,
    in_child,
    places,
    raises,
    same,
    signal_sets,
    twin_works,
    until,
    with_main,
)

import anyfork

# ---- locks that a thread of the parent holds -------------------------------------


class Slow:
    """Its finalizer lets the GIL go, in the middle of a collection."""

    def __init__(self, entered: threading.Event, leave: threading.Event) -> None:
        self.cycle, self.entered, self.leave = self, entered, leave

    def __del__(self) -> None:
        self.entered.set()
        self.leave.wait(LIMIT)


def collects() -> int:
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    return gc.collect()


def check_collection_of_a_dead_thread(place: str) -> None:
    """A worker can collect though a thread of the owner was in the middle of it."""
    for method in available():
        anyfork.run(int, method=method)
    entered, leave = threading.Event(), threading.Event()

    def collect() -> None:
        Slow(entered, leave)
        gc.collect()

    thread = threading.Thread(target=collect)
    thread.start()
    entered.wait()
    try:
        for method in available():
            assert anyfork.run(collects, method=method) > 0, method
    finally:
        leave.set()
        thread.join()


def check_beside_collecting_threads(place: str) -> None:
    """On free-threaded builds a collection stops all threads, under a mutex of its own."""
    stop = threading.Event()

    def collect() -> None:
        while not stop.wait(0.001):  # a start, too, has to get its turn
            gc.collect(0)

    threads = [threading.Thread(target=collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for method in available():
            with anyfork.spawn(gc.collect, method=method) as child:
                assert isinstance(child.result(LIMIT), int), method
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Blocked:
    """sys.stdout, sys.stderr and a log file, each with a thread inside its write()."""

    def __init__(self) -> None:
        self.saved = sys.stdout, sys.stderr
        self.pipes = [os.pipe() for _ in range(3)]
        streams = [os.fdopen(w, "w", 1) for _, w in self.pipes]
        sys.stdout, sys.stderr, log = streams
        self.streams = streams
        self.handler = logging.StreamHandler(log)
        self.logger = logging.getLogger("attack.blocked")
        self.logger.propagate = False
        self.logger.addHandler(self.handler)
        text = "x" * 200_000 + "\n"
        calls: list[Callable[[], object]] = [
            lambda: print(text),
            lambda: sys.stderr.write(text),
            lambda: self.logger.warning(text),
        ]
        logging.raiseExceptions = False
        self.threads = [threading.Thread(target=self._write, args=(call,)) for call in calls]
        for thread in self.threads:
            thread.start()
        for r, _ in self.pipes:
            until(lambda r=r: fill_level(r) >= 65536, "a full pipe")

    @staticmethod
    def _write(call: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            call()

    def release(self) -> None:
        for r, _ in self.pipes:
            os.close(r)
        for thread in self.threads:
            thread.join()
        sys.stdout, sys.stderr = self.saved
        self.logger.removeHandler(self.handler)
        logging.raiseExceptions = True
        for stream in self.streams:
            with contextlib.suppress(OSError):
                stream.close()


def block_main() -> Callable[[], None]:
    return Blocked().release


def use_all_streams() -> list[str]:
    """In the worker: write where a dead thread was writing. The pipes are full."""
    done = []
    logger = logging.getLogger("attack.blocked")
    streams = [sys.stdout, sys.stderr, logger.handlers[0].stream]
    for stream in streams:
        os.set_blocking(stream.fileno(), False)
    for use in (lambda: print("w"), lambda: sys.stderr.write("w\n"), lambda: logger.warning("w")):
        with contextlib.suppress(BlockingIOError):
            use()
        done.append("used")
    # What is buffered cannot be written: the flush at the worker's end must not hang.
    for stream in streams:
        os.set_blocking(stream.fileno(), False)
    return done


@with_main(block_main)
def check_streams_held_by_dead_threads(place: str) -> None:
    blocked = Blocked() if place != "main" else None
    try:
        for method in available():
            with anyfork.spawn(use_all_streams, method=method) as child:
                same(child.result(LIMIT), ["used"] * 3)
    finally:
        if blocked is not None:
            blocked.release()


def hold_handler_lock() -> Callable[[], None]:
    handler = logging.Handler()
    handler.emit = lambda record: None  # type: ignore[method-assign]
    logging.getLogger("attack.held").handlers[:] = [handler]
    logging.getLogger("attack.held").propagate = False
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with handler.lock:  # type: ignore[union-attr]
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def stop() -> None:
        release.set()
        thread.join()

    return stop


def log_through_held_handler() -> str:
    logging.getLogger("attack.held").warning("x")
    logging.shutdown()
    return "logged"


@with_main(hold_handler_lock)
def check_handler_lock_held(place: str) -> None:
    stop = hold_handler_lock() if place != "main" else None
    try:
        for method in available():
            with anyfork.spawn(log_through_held_handler, method=method) as child:
                same(child.result(LIMIT), "logged")
    finally:
        if stop is not None:
            stop()


# ---- output ------------------------------------------------------------------------

OUTPUT = os.path.join(tempfile.gettempdir(), f"attack-output-{os.environ.get('ATTACK_PID')}")


def to_file(name: str) -> Callable[[], None]:
    saved = sys.stdout
    sys.stdout = open(f"{OUTPUT}-{name}", "w")  # noqa: SIM115
    sys.stdout.write("unflushed in the parent\n")
    log = logging.FileHandler(f"{OUTPUT}-{name}.log")
    memory = logging.handlers.MemoryHandler(100, target=log)
    logger = logging.getLogger("attack.output")
    logger.propagate = False
    logger.handlers[:] = [memory]
    logger.warning("logged by the parent")

    def back() -> None:
        sys.stdout.close()
        sys.stdout = saved
        memory.close()
        log.close()
        logger.handlers.clear()
        os.unlink(f"{OUTPUT}-{name}")
        os.unlink(f"{OUTPUT}-{name}.log")

    return back


def print_and_log(word: str) -> None:
    print(word)
    logging.getLogger("attack.output").warning(word)


@with_main(lambda: to_file("main"))
def check_output_arrives_once(place: str) -> None:
    back = to_file(place) if place != "main" else None
    try:
        words: dict[str, list[str]] = {}
        in_main = {row.name for row in anyfork.methods() if row.target == "main"}
        for method in available():
            with anyfork.spawn(print_and_log, f"from {method}", method=method) as child:
                same(child.wait(LIMIT), 0)
            name = "main" if method in in_main else place
            words.setdefault(name, []).append(f"from {method}")
        for name, expected in words.items():
            with open(f"{OUTPUT}-{name}") as f:
                same(f.read().splitlines(), expected)
            with open(f"{OUTPUT}-{name}.log") as f:
                same(f.read().splitlines(), expected)
    finally:
        if back is not None:
            back()


class Custom:
    def __init__(self) -> None:
        self.text: list[str] = []

    def write(self, text: str) -> int:
        self.text.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def use_custom() -> object:
    print("hello")
    text = getattr(sys.stdout, "text", None)
    return text and "".join(text)


def custom_in_main() -> Callable[[], None]:
    saved, sys.stdout = sys.stdout, Custom()

    def back() -> None:
        sys.stdout = saved

    return back


@with_main(custom_in_main)
def check_custom_stdout_is_kept(place: str) -> None:
    saved, sys.stdout = sys.stdout, Custom()
    try:
        for method in available():
            same(anyfork.run(use_custom, method=method), "hello\n")
    finally:
        sys.stdout = saved


class Tee:
    """What wraps the stream that the interpreter made."""

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(text)  # type: ignore[attr-defined, no-any-return]

    def flush(self) -> None:
        self.stream.flush()  # type: ignore[attr-defined]


def tee_in_main() -> Callable[[], None]:
    blocked = Blocked()
    saved, sys.__stdout__ = sys.__stdout__, sys.stdout  # type: ignore[misc]
    sys.stdout = Tee(sys.stdout)

    def back() -> None:
        sys.stdout = sys.stdout.stream  # type: ignore[attr-defined]
        sys.__stdout__ = saved  # type: ignore[misc]
        blocked.release()

    return back


def write_through_tee() -> str:
    os.set_blocking(sys.stdout.stream.fileno(), False)  # type: ignore[attr-defined]
    with contextlib.suppress(BlockingIOError):
        print("w")
    return "used"


@with_main(tee_in_main)
def check_stream_behind_a_wrapper(place: str) -> None:
    back = tee_in_main() if place != "main" else None
    try:
        for method in available():
            with anyfork.spawn(write_through_tee, method=method) as child:
                same(child.result(LIMIT), "used")
    finally:
        if back is not None:
            back()


def no_streams() -> str:
    sys.stdout = sys.stderr = sys.__stdout__ = None  # type: ignore[assignment]
    print("to nowhere")
    sys.exit("to nowhere either")


def check_worker_without_streams(place: str) -> None:
    for method in available():
        with anyfork.spawn(no_streams, method=method) as child:
            same(child.wait(LIMIT), 1)


# ---- imports -------------------------------------------------------------------------

SLOW = {
    "slow_top.py": "FIRST = 1\nimport attack_prelude as p\np.hold('slow_top')\nLAST = 1\n",
    # A package whose complete submodule outlives its own half.
    "slow_pkg/__init__.py": "from . import done\nimport attack_prelude as p\n"
    "p.hold('slow_pkg')\nLAST = 1\n",
    "slow_pkg/done.py": "LAST = 1\n",
    "slow_outer/__init__.py": "LAST = 1\n",
    "slow_outer/inner.py": "import attack_prelude as p\np.hold('slow_outer.inner')\nLAST = 1\n",
    # A complete module that knows a half one.
    "slow_a.py": "import slow_b\nimport attack_prelude as p\np.hold('slow_a')\nLAST = 1\n",
    "slow_b.py": "import slow_a\nLAST = 1\n",
}
HELD = ("slow_top", "slow_pkg", "slow_outer.inner", "slow_a")


def hold(name: str) -> None:
    """Called by a slow module: in the parent, stay there until released."""
    state = getattr(builtins, "attack_hold", None)
    if state is not None and os.getpid() == int(os.environ["ATTACK_PID"]):
        state["reached"].add(name)
        state["release"].wait()


def import_slowly() -> Callable[[], None]:
    folder = tempfile.mkdtemp(prefix="attack-slow-")
    for name, text in SLOW.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    state = {"reached": set(), "release": threading.Event()}
    builtins.attack_hold = state  # type: ignore[attr-defined]
    threads = [threading.Thread(target=importlib.import_module, args=(n,)) for n in HELD]
    for thread in threads:
        thread.start()
    until(lambda: len(state["reached"]) == len(HELD), "modules half imported")

    def stop() -> None:
        state["release"].set()
        for thread in threads:
            thread.join()
        del builtins.attack_hold  # type: ignore[attr-defined]
        sys.path.remove(folder)
        shutil.rmtree(folder)
        for name in [n for n in sys.modules if n.startswith("slow_")]:
            del sys.modules[name]

    return stop


def import_all() -> list[int]:
    import slow_a
    import slow_b
    import slow_outer
    import slow_outer.inner
    import slow_pkg
    import slow_pkg.done
    import slow_top
    from slow_pkg import done

    assert slow_b.slow_a is slow_a
    assert slow_pkg.done is done
    return [
        slow_top.LAST,
        slow_pkg.LAST,
        slow_pkg.done.LAST,
        slow_outer.LAST,
        slow_outer.inner.LAST,
        slow_a.LAST,
        slow_b.slow_a.LAST,
    ]


@with_main(import_slowly)
def check_modules_half_imported(place: str) -> None:
    stop = import_slowly() if place != "main" else None
    try:
        for method in available():
            with anyfork.spawn(import_all, method=method) as child:
                same(child.result(LIMIT), [1] * 7)
    finally:
        if stop is not None:
            stop()


OWN = """
import anyfork, attack_common, builtins
builtins.attack_own_runs = getattr(builtins, "attack_own_runs", 0) + 1
class Result:
    pass
def target():
    import threading
    import {name} as me
    assert me.target is target
    seen = []
    def look():
        import {name} as me
        seen.append(me.target)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join(attack_common.LIMIT / 2)
    assert seen == [target], "a thread of the worker cannot import it"
    return builtins.attack_own_runs
def result():
    return Result()
ANSWER = anyfork.spawn(target, method={method!r}).result(attack_common.LIMIT)
MADE = type(anyfork.spawn(result, method={method!r}).result(attack_common.LIMIT)) is Result
LAST = 1
"""


def check_start_during_own_import(place: str) -> None:
    """The caller's own half-import is the worker's: it is not run again."""
    folder = tempfile.mkdtemp(prefix="attack-own-")
    sys.path.insert(0, folder)
    try:
        for method in available():
            if method != "fork" and place != "main":
                continue  # its target would be imported by main, from the start
            builtins.attack_own_runs = 0  # type: ignore[attr-defined]
            name = f"attack_own_{method}"
            with open(os.path.join(folder, f"{name}.py"), "w") as f:
                f.write(OWN.format(name=name, method=method))
            importlib.invalidate_caches()
            module = importlib.import_module(name)
            same((module.ANSWER, module.MADE, module.LAST), (1, True, 1))
            del sys.modules[name]
    finally:
        sys.path.remove(folder)
        shutil.rmtree(folder)


def check_import_in_twin_child(place: str) -> None:
    if not twin_works():
        return
    stop = import_slowly()
    try:

        def body() -> str:
            for name in ("colorsys", "sched", "wave", "xml.dom.minidom"):
                sys.modules.pop(name, None)
                importlib.import_module(name)
            return "imported"

        same(in_child(body), b"'imported'")
    finally:
        stop()


# ---- atexit, finalizers, threads of the parent -----------------------------------------

WITNESS = os.path.join(tempfile.gettempdir(), f"attack-witness-{os.environ.get('ATTACK_PID')}")


def witness(word: str) -> None:
    with open(WITNESS, "a") as f:
        f.write(f"{word} {os.getpid()}\n")


def witnessed() -> list[str]:
    try:
        with open(WITNESS) as f:
            lines = f.read().splitlines()
        os.unlink(WITNESS)
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in lines]


class Thing:
    pass


class Loud:
    """Says who destroys it: an object of the parent is not the worker's to end."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.pid = os.getpid()

    def __del__(self, witness: Callable[[str], None] = witness) -> None:
        if os.getpid() != self.pid:
            witness(self.word)


keep: list[object] = []


def leave_finalizers() -> Callable[[], None]:
    folder = tempfile.TemporaryDirectory(prefix="attack-folder-")
    thing = Thing()
    parent_exit = lambda: os.getpid() == int(os.environ["ATTACK_PID"]) or witness("atexit")  # noqa: E731
    atexit.register(parent_exit)
    exits = threading._threading_atexits  # type: ignore[attr-defined]
    threading._register_atexit(parent_exit)  # type: ignore[attr-defined]
    registered = exits[-1]
    finalize = weakref.finalize(thing, witness, "finalize")
    keep[:] = [folder, thing]

    def back() -> None:
        finalize.detach()
        keep.clear()
        folder.cleanup()
        atexit.unregister(parent_exit)
        exits.remove(registered)

    return back


def own_finalizers(drop: bool) -> str:
    atexit.register(witness, "own-atexit")
    own = Thing()
    weakref.finalize(own, witness, "own-finalize")
    keep.append(own)
    own_folder = tempfile.TemporaryDirectory(prefix="attack-own-folder-")
    keep.append(own_folder)
    parent_folder = keep[0].name  # type: ignore[attr-defined]
    if drop:  # as the end of an interpreter does
        keep.clear()
    assert os.path.isdir(parent_folder)
    return own_folder.name


@with_main(leave_finalizers)
def check_finalizers_of_the_parent(place: str) -> None:
    back = leave_finalizers() if place != "main" else None
    witnessed()
    try:
        for method in available():
            for drop in (False, True):
                with anyfork.spawn(own_finalizers, drop, method=method) as child:
                    folder = child.result(LIMIT)
                same(sorted(witnessed()), ["own-atexit", "own-finalize"])
                assert not os.path.exists(folder), folder
    finally:
        if back is not None:
            back()


def check_thread_locals_of_the_parent(place: str) -> None:
    """What the calling thread keeps for itself is not destroyed in a worker."""
    local = threading.local()
    local.folder = tempfile.TemporaryDirectory(prefix="attack-local-")
    local.loud = Loud("thread-local")
    started, stop = threading.Event(), threading.Event()

    def other() -> None:
        local.loud = Loud("thread-local-of-another")
        started.set()
        stop.wait()

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    try:
        for method in available():
            anyfork.run(int, method=method)
            same((method, witnessed()), (method, []))
            assert os.path.isdir(local.folder.name), method
    finally:
        stop.set()
        thread.join()
        local.folder.cleanup()


def check_finalizers_in_twin_child(place: str) -> None:
    if not twin_works() or place == "main":  # main's fork() keeps all that os.fork() keeps
        return
    back = leave_finalizers()
    folder = keep[0].name  # type: ignore[attr-defined]
    witnessed()
    try:

        def body() -> str:
            atexit.register(witness, "own")
            keep.clear()
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            return "done"

        same(in_child(body), b"'done'")
        same(witnessed(), ["own"])
        assert os.path.isdir(folder)
    finally:
        back()


# ---- signals ------------------------------------------------------------------------------


def worker_signals() -> dict[str, int]:
    return signal_sets()


def check_mask_is_empty(place: str) -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for method in available():
            same(anyfork.run(worker_signals, method=method)["SigBlk"], 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def grandchild_and_thread_masks() -> list[int]:
    import subprocess

    masks = [signal_sets()["SigBlk"]]
    thread = threading.Thread(target=lambda: masks.append(signal_sets()["SigBlk"]))
    thread.start()
    thread.join()
    process = subprocess.Popen(["sleep", "600"])
    process.terminate()
    masks.append(process.wait(LIMIT))
    from_hook = getattr(builtins, "attack_hook_saw", None)
    if from_hook is not None:
        masks.append(from_hook)
    return masks


def hook_that_starts() -> Callable[[], None]:
    """An after-in-child hook that starts a process and a thread: neither may
    inherit a mask under which it could never be terminated."""
    active = [True]

    def hook() -> None:
        if not active:
            return
        seen: list[int] = []

        def run() -> None:
            pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
            os.kill(pid, signal.SIGTERM)
            seen.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            seen.append(signal_sets()["SigBlk"])

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(LIMIT)
        builtins.attack_hook_saw = seen  # type: ignore[attr-defined]

    os.register_at_fork(after_in_child=hook)
    return active.clear


@with_main(hook_that_starts)
def check_grandchildren_can_be_terminated(place: str) -> None:
    stop = hook_that_starts() if place != "main" else None
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for method in available():
            same(
                anyfork.run(grandchild_and_thread_masks, method=method),
                [0, 0, -signal.SIGTERM, [-signal.SIGTERM, 0]],
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        if stop is not None:
            stop()


def install_handlers() -> Callable[[], None]:
    """Handlers of Python, of faulthandler and of C, and two ignored signals."""
    import ctypes
    import faulthandler

    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler = ctypes.cast(libc.abs, ctypes.c_void_p).value  # harmless as a handler
    old_c = libc.signal(signal.SIGUSR2, handler)
    old = {
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    }
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable()

    def back() -> None:
        libc.signal(signal.SIGUSR2, old_c)
        for number, handler in old.items():
            signal.signal(number, handler)
        if not was_enabled:
            faulthandler.disable()

    return back


def bits(*numbers: int) -> int:
    return sum(1 << (n - 1) for n in numbers)


def worker_dispositions() -> tuple[int, int, list[str]]:
    sets = signal_sets()
    wrong = []
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        ignored = bool(sets["SigIgn"] & bits(number))
        if handler != (signal.SIG_IGN if ignored else signal.SIG_DFL):
            wrong.append(f"{number}: {handler!r}, ignored={ignored}")
    return sets["SigCgt"], sets["SigIgn"], wrong


# 32 and 33 are glibc's own
LIBC = bits(32, 33)


@with_main(install_handlers)
def check_dispositions_are_default(place: str) -> None:
    for method in available():
        caught, ignored, wrong = anyfork.run(worker_dispositions, method=method)
        same((method, caught & ~LIBC), (method, 0))
        kept = bits(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP)
        # What make(1) starts may have one of glibc's own ignored. SIGINT is the owner's.
        same((method, ignored & ~kept & ~LIBC), (method, bits(signal.SIGINT)))
        assert ignored & bits(signal.SIGPIPE), method
        assert ignored & bits(signal.SIGHUP), method
        same((method, wrong), (method, []))


def crash_with_faulthandler(path: str) -> None:
    import faulthandler

    with open(path, "w") as f:
        faulthandler.enable(f)
        os.kill(os.getpid(), signal.SIGABRT)


@with_main(install_handlers)
def check_faulthandler_can_be_enabled(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for method in available():
            if (place, method) == ("isolated", "fork"):
                continue  # the target runs there, and CPython has no faulthandler there
            path = os.path.join(folder, method)
            with anyfork.spawn(crash_with_faulthandler, path, method=method) as child:
                same(child.wait(LIMIT), -signal.SIGABRT)
            with open(path) as f:
                assert "crash_with_faulthandler" in f.read(), method


def sleep_for_ever() -> None:
    while True:
        select.select([], [], [], 10)


@with_main(install_handlers)
def check_signals_end_a_worker(place: str) -> None:
    for method in available():
        with anyfork.spawn(sleep_for_ever, method=method) as child:
            child.wait_ready(LIMIT)
            child.signal(signal.SIGINT)  # ignored
            child.terminate()
            same(child.wait(LIMIT), -signal.SIGTERM)
        with anyfork.spawn(sleep_for_ever, method=method, sigint="own") as child:
            child.wait_ready(LIMIT)
            child.signal(signal.SIGINT)
            if method == "fork" and place != "main":  # Python's handlers run in main only
                same(child.wait(LIMIT), -signal.SIGINT)
            else:
                raises(KeyboardInterrupt, child.result, LIMIT)
                same(child.returncode, 1)


def signal_yourself() -> str:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    return "signalled"


@places("main")
def check_wakeup_fd_of_the_parent(place: str) -> None:
    r, w = os.pipe()
    os.set_blocking(r, False)
    os.set_blocking(w, False)
    old = signal.set_wakeup_fd(w)
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        for method in available():
            same(anyfork.run(signal_yourself, method=method), "signalled")
            raises(BlockingIOError, os.read, r, 10)
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGUSR1, previous)
        os.close(r)
        os.close(w)


# ---- threads and exit ----------------------------------------------------------------------


def threads_of_the_worker(path: str) -> list[object]:
    seen = [
        threading.current_thread().name,
        threading.current_thread() is threading.main_thread(),
        threading.active_count(),
    ]
    go = threading.Event()

    def late() -> None:
        go.wait()
        with open(path, "w") as f:
            f.write("waited for")

    def for_ever() -> None:
        threading.Event().wait()

    threading.Thread(target=late).start()
    with contextlib.suppress(RuntimeError):  # an isolated interpreter has no daemons
        threading.Thread(target=for_ever, daemon=True).start()
    atexit.register(lambda: os.path.exists(path) or witness("atexit-before-threads"))
    go.set()
    return seen


def check_threads_of_the_worker(place: str) -> None:
    witnessed()
    with tempfile.TemporaryDirectory() as folder:
        for method in available():
            path = os.path.join(folder, method)
            with anyfork.spawn(threads_of_the_worker, path, method=method) as child:
                same(child.result(LIMIT), ["MainThread", True, 1])
            assert os.path.exists(path), method
    same(witnessed(), [])


def comm() -> str:
    with open("/proc/self/comm") as f:
        return f.read()


@places("main")
def check_its_name_stays(place: str) -> None:
    """What ps shows of a worker that was not given a name is what it shows of its owner."""
    same(anyfork.run(comm, method="fork"), comm())
    same(anyfork.run(comm, method="fork", name="given"), "given\n")


def use_executors() -> int:
    from concurrent.futures import ThreadPoolExecutor

    return sum(ThreadPoolExecutor(2).map(int, ["1", "2"]))


def executor_in_main() -> Callable[[], None]:
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(2)
    started, stop = threading.Event(), threading.Event()
    pool.submit(int)
    pool.submit(lambda: (started.set(), stop.wait()))
    started.wait()

    def back() -> None:
        stop.set()
        pool.shutdown()

    return back


@with_main(executor_in_main)
def check_executors(place: str) -> None:
    """The parent has one with a busy and an idle thread; the worker makes its own
    and does not shut it down."""
    back = executor_in_main() if place == "legacy" else None
    try:
        for method in available():
            with anyfork.spawn(use_executors, method=method) as child:
                same(child.result(LIMIT), 3)
                same(child.returncode, 0)
    finally:
        if back is not None:
            back()
