"""Options of one start: each arrives in the worker, by every method that has a process;
and each bad value is an error that names it, with nothing started."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from attack_bad_input import nothing_started
from attack_common import IN_MAIN_OF_ANOTHER, LIMIT, is_gone, places, raises, same, until

import anyfork

CPU = min(os.sched_getaffinity(0))
ROOT = os.geteuid() == 0


def processes() -> list[str]:
    rows = [row for row in anyfork.methods() if row.has_process and row.available]
    assert rows
    return [row.name for row in rows]


def main_targets() -> list[str]:
    """Those whose target runs in a main interpreter, which has signal handlers."""
    return [name for name in processes() if name not in ("subint_forkserver", "fork")]


def state() -> dict[str, Any]:
    """What the options are about, as this process has it."""
    with open("/proc/self/status") as f:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    mask = os.umask(0)
    os.umask(mask)
    return {
        "cwd": os.getcwd(),
        "umask": mask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "cpus": sorted(os.sched_getaffinity(0)),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "oom": int(open("/proc/self/oom_score_adj").read()),
        "comm": open("/proc/self/comm").read().rstrip("\n"),
        "title": open("/proc/self/cmdline").read().partition("\0")[0],
        "session": os.getsid(0) == os.getpid(),
        "leader": os.getpgid(0) == os.getpid(),
        "uid": os.getresuid(),
        "gid": os.getresgid(),
        "groups": sorted(os.getgroups()),
        "blocked": int(status["SigBlk"], 16),
        "ignored": int(status["SigIgn"], 16),
        "env": dict(os.environ),
    }


def state_by(method: str, **options: Any) -> dict[str, Any]:
    got: dict[str, Any] = anyfork.run(state, method=method, **options)
    return got


def bit(sig: int) -> int:
    return 1 << (sig - 1)


def check_nothing_asked_for(place: str) -> None:
    here = state()
    for method in processes():
        there = state_by(method)
        for name in ("cwd", "umask", "nice", "cpus", "core", "oom", "uid", "gid", "groups"):
            same((method, name, there[name]), (method, name, here[name]))
        same((method, there["session"], there["leader"]), (method, False, False))
        same((method, there["blocked"]), (method, 0))
        assert there["ignored"] & bit(signal.SIGINT), method


def check_numbers(place: str) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with tempfile.TemporaryDirectory() as folder:
        for method in processes():
            there = state_by(
                method,
                cwd=folder,
                umask=0o137,
                nice=3,
                cpus=[CPU],
                rlimits={resource.RLIMIT_CORE: (0, 4096)},
                oom_score_adj=500,
            )
            same((method, there["cwd"]), (method, os.path.realpath(folder)))
            same((method, there["umask"]), (method, 0o137))
            same((method, there["nice"]), (method, min(nice + 3, 19)))
            same((method, there["cpus"]), (method, [CPU]))
            same((method, list(there["core"])), (method, [0, 4096]))
            same((method, there["oom"]), (method, 500))


def numbers_of_each_thread() -> list[tuple[int, list[int]]]:
    tids = [int(name) for name in os.listdir("/proc/self/task")]
    return [
        (os.getpriority(os.PRIO_PROCESS, tid), sorted(os.sched_getaffinity(tid))) for tid in tids
    ]


def start_a_thread() -> None:
    threading.Thread(target=sleep_for_ever, daemon=True).start()


@places("main")
def check_numbers_of_threads_that_hooks_start(place: str) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    os.register_at_fork(after_in_child=start_a_thread)
    for method in main_targets():
        there = anyfork.run(numbers_of_each_thread, method=method, nice=3, cpus=[CPU])
        assert len(there) > 1 or method in IN_MAIN_OF_ANOTHER, method
        same((method, there), (method, [(min(nice + 3, 19), [CPU])] * len(there)))


def use_the_stacks_of_dead_threads() -> None:
    threads = [threading.Thread(target=time.sleep, args=(0,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def numbers_and_texts() -> list[Any]:
    core = list(resource.getrlimit(resource.RLIMIT_CORE))
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return [os.getcwd(), nice, os.environ.get("GREETING"), core]


@places("main")
def check_options_outlive_the_stack_of_the_caller(place: str) -> None:
    """By a launch pad another thread forks, and the caller's stack is free in the child."""
    os.register_at_fork(after_in_child=use_the_stacks_of_dead_threads)
    wanted = ["/", min(os.getpriority(os.PRIO_PROCESS, 0) + 3, 19), "hello", [0, 4096]]
    got: list[Any] = []

    def start() -> None:
        for method in main_targets():
            options = {"cwd": "/", "nice": 3, "env": {**os.environ, "GREETING": "hello"}}
            limits = {resource.RLIMIT_CORE: (0, 4096)}
            try:
                got.append(anyfork.run(numbers_and_texts, method=method, rlimits=limits, **options))
            except Exception as exc:
                got.append(f"{method}: {exc!r}")

    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(8)]
    caller = threading.Thread(target=start)
    for thread in (*others, caller):
        thread.start()
    caller.join()
    stop.set()
    for thread in others:
        thread.join()
    same(got, [wanted] * len(main_targets()))


def streams() -> list[str | None]:
    # ctypes, which is imported with this module, may keep libffi open.
    here = {fd: path for fd, path in open_here().items() if ".so" not in path}
    return [here.get(fd) for fd in range(3)]


def own_without_streams(pipe: int, folder: str) -> None:
    """As a daemon: what a start opens gets the numbers of standard streams."""
    log = os.path.join(folder, "log")
    for fd in range(3):
        os.close(fd)
    found = []
    for options in ({"stderr": log}, {"stdin": subprocess.DEVNULL, "stdout": log}):
        for method in processes():
            if method != "exec":  # whose interpreter opens what is missing
                with anyfork.spawn(streams, method=method, **options) as child:
                    found.append([method, sorted(options), child.result(LIMIT)])
    os.write(pipe, json.dumps(found).encode())


@places("main")
def check_an_owner_without_streams(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        r, w = os.pipe()
        with anyfork.spawn(own_without_streams, w, folder, method="fork", pass_fds=[w]) as owner:
            os.close(w)
            assert select.select([r], [], [], LIMIT)[0], "it hangs"
            text = os.read(r, 10000)
            os.close(r)
            assert text, owner.exception(LIMIT)
        log = os.path.join(folder, "log")
        for method, names, found in json.loads(text):
            wanted = [None, None, log] if names == ["stderr"] else ["/dev/null", log, None]
            same((method, names, found), (method, names, wanted))


def check_name(place: str) -> None:
    for method in processes():
        there = state_by(method, name="crunch-the-numbers")
        if method != "subint_forkserver":  # reads the name of the target's thread
            same((method, there["comm"]), (method, "crunch-the-numb"))
        if method != "exec":  # an interpreter finds its files by argv[0]
            same((method, there["title"]), (method, "crunch-the-numbers"))


def check_sessions(place: str) -> None:
    for method in processes():
        there = state_by(method, start_new_session=True)
        same((method, there["session"], there["leader"]), (method, True, True))
        there = state_by(method, process_group=0)
        same((method, there["session"], there["leader"]), (method, False, True))
        there = state_by(method, sigint="group")
        same((method, there["session"], there["leader"]), (method, False, True))
        same((method, there["ignored"] & bit(signal.SIGINT)), (method, 0))


def check_ids(place: str) -> None:
    if not ROOT:
        return
    fresh = {row.name for row in anyfork.methods() if row.target == "fresh"}
    loadable = readable_by_all()
    for method in processes():
        if method in fresh and not loadable:
            continue
        there = state_by(method, user=12345, group=23456, extra_groups=[3, 4])
        same((method, there["uid"]), (method, (12345,) * 3))
        same((method, there["gid"]), (method, (23456,) * 3))
        same((method, there["groups"]), (method, [3, 4]))
        assert state_by(method, user="nobody", extra_groups=[])["uid"][0] > 0, method


def readable_by_all() -> bool:
    """Whether a fresh interpreter can load Python and this program as another user."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import anyfork, attack_options"],
            user=12345,
            group=23456,
            extra_groups=[],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def check_environment(place: str) -> None:
    wanted = {"PATH": os.environ["PATH"], "GREETING": "hällo", "EMPTY": ""}
    keep = {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "LD_", "ASAN", "LC_"))}
    before = dict(os.environ)
    for method in processes():
        there = state_by(method, env={**keep, **wanted})["env"]
        there.pop("LC_CTYPE", None)  # PEP 538: a fresh interpreter coerces the C locale
        expected = {**keep, **wanted}
        expected.pop("LC_CTYPE", None)
        same((method, there), (method, expected))
    same(dict(os.environ), before)


def child_of_the_worker() -> str:
    return subprocess.run(
        ["sh", "-c", 'echo "$GREETING"'], capture_output=True, text=True, check=True
    ).stdout


@places("main", "legacy")
def check_environment_of_the_workers_children(place: str) -> None:
    env = {**os.environ, "GREETING": "hello"}
    for method in processes():
        if method != "subint_forkserver":  # an isolated interpreter has no subprocess
            got = anyfork.run(child_of_the_worker, method=method, env=env)
            same((method, got), (method, "hello\n"))


def check_signals(place: str) -> None:
    for method in processes():
        there = state_by(
            method,
            signal_mask=[signal.SIGUSR2],
            ignored_signals=[signal.SIGUSR1],
            default_signals=[signal.SIGPIPE],
        )
        if method != "subint_forkserver":  # of its thread
            same((method, there["blocked"]), (method, bit(signal.SIGUSR2)))
        assert there["ignored"] & bit(signal.SIGUSR1), method
        if method != "exec":  # Python ignores SIGPIPE itself
            same((method, there["ignored"] & bit(signal.SIGPIPE)), (method, 0))


def handler_of_sigint() -> str:
    return str(signal.getsignal(signal.SIGINT))


def check_sigint(place: str) -> None:
    for method in main_targets():
        got = anyfork.run(handler_of_sigint, method=method)
        assert "SIG_IGN" in got or got == "1", (method, got)
        got = anyfork.run(handler_of_sigint, method=method, sigint="own")
        assert "default_int_handler" in got, (method, got)


# ---- standard streams and descriptors ----------------------------------------------------


def talk() -> str:
    line = sys.stdin.readline()
    print("out", line.strip(), flush=True)
    print("err", line.strip(), file=sys.stderr, flush=True)
    return line


def check_pipes(place: str) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for method in processes():
        with anyfork.spawn(talk, method=method, **pipes) as child:
            assert child.stdin is not None and child.stdout is not None
            assert child.stderr is not None and child.stdin is child.stdin
            child.stdin.write(b"hello\n")
            child.stdin.close()
            same((method, child.stdout.read()), (method, b"out hello\n"))
            same((method, child.stderr.read()), (method, b"err hello\n"))
            same((method, child.result(LIMIT)), (method, "hello\n"))
        assert child.stdout.closed and child.stderr.closed
        with anyfork.spawn(
            talk,
            method=method,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as child:
            assert child.stdin is None and child.stderr is None and child.stdout is not None
            same((method, child.stdout.read()), (method, b"out \nerr \n"))
            same((method, child.result(LIMIT)), (method, ""))


def read_all() -> str:
    return sys.stdin.read()


def check_pipes_end_beside_forks(place: str) -> None:
    """A worker that inherits all, or a child of os.fork(), would keep the other end of
    another worker's pipes open; and so would that worker itself."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    inherit: dict[str, dict[str, Any]] = {
        name: {} if name == "zygote" else {"fd_policy": "inherit"} for name in processes()
    }
    sleepers = [name for name in processes() if name != "exec"]
    for method in processes():
        with contextlib.ExitStack() as stack:
            child = stack.enter_context(
                anyfork.spawn(read_all, method=method, **pipes, **inherit[method])
            )
            for name in sleepers:
                stack.enter_context(anyfork.spawn(sleep_for_ever, method=name, **inherit[name]))
            if place == "main":
                pid = os.fork()
                if pid == 0:
                    sleep_for_ever()
                stack.callback(os.waitpid, pid, 0)
                stack.callback(os.kill, pid, signal.SIGKILL)
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(b"until the end of the file")
            child.stdin.close()
            same((method, child.result(LIMIT)), (method, "until the end of the file"))
            same((method, child.stdout.read()), (method, b""))


def check_files(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        question, answer = os.path.join(folder, "q"), os.path.join(folder, "a")
        with open(question, "w") as f:
            f.write("from a file\n")
        for method in processes():
            open(answer, "w").close()
            with open(answer, "a") as f:
                anyfork.run(talk, method=method, stdin=question, stdout=answer, stderr=f)
            with open(answer) as g:
                same((method, g.read()), (method, "out from a file\nerr from a file\n"))


def open_here() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: path for fd, path in found.items() if not path.endswith("/fd")}


def use_descriptor(fd: int) -> bytes:
    with socket.socket(fileno=fd) as s:
        s.send(b"from the worker")
        return s.recv(100)


def check_descriptors(place: str) -> None:
    for method in processes():
        a, b = socket.socketpair()
        with a, b:
            a.send(b"for the worker")
            there = 77
            got = anyfork.run(use_descriptor, there, method=method, fds={there: b})
            same((method, got, a.recv(100)), (method, b"for the worker", b"from the worker"))
            a.send(b"again")
            got = anyfork.run(use_descriptor, b.fileno(), method=method, pass_fds=[b])
            same((method, got, a.recv(100)), (method, b"again", b"from the worker"))


def read_both(first: int, second: int) -> list[bytes]:
    return [os.read(first, 10), os.read(second, 10)]


def check_descriptors_that_change_places(place: str) -> None:
    """Each other's numbers, and numbers that the library uses for itself."""
    for method in processes():
        pipes = [os.pipe() for _ in range(2)]
        (r1, w1), (r2, w2) = pipes
        os.write(w1, b"one")
        os.write(w2, b"two")
        got = anyfork.run(read_both, r1, r2, method=method, fds={r1: r2, r2: r1})
        same((method, got), (method, [b"two", b"one"]))
        for number in range(3, 40):
            os.write(w1, b"one")
            os.write(w2, b"two")
            got = (
                anyfork.run(
                    read_both, number, number + 1, method=method, fds={number: r1, number + 1: r2}
                )
                if number % 12 == 3
                else read_both(r1, r2)
            )
            same((method, number, got), (method, number, [b"one", b"two"]))
        for fd in (r1, w1, r2, w2):
            os.close(fd)


def check_nothing_else_is_inherited(place: str) -> None:
    with tempfile.NamedTemporaryFile() as secret:
        os.set_inheritable(secret.fileno(), True)
        for method in processes():
            there = anyfork.run(open_here, method=method)
            assert secret.name not in there.values(), (method, there)
            if method == "exec":  # its report socket alone; and 3.15 opens libffi itself
                left = sorted(fd for fd, path in there.items() if fd > 2 and ".so" not in path)
                same((method, left), (method, [3]))
            elif method == "zygote":  # report socket, lifeline, and the default template's door
                paths = [path for fd, path in there.items() if fd > 2 and ".so" not in path]
                left = sorted(path.partition(":")[0] for path in paths)
                same((method, left), (method, ["pipe", "socket", "socket"]))
            else:
                same((method, there[secret.fileno()]), (method, "/"))
            closed = anyfork.run(open_here, method=method, fd_policy="close")
            assert closed.get(secret.fileno()) != secret.name, (method, closed)
            if method == "zygote":
                exc = raises(ValueError, anyfork.spawn, int, method=method, fd_policy="inherit")
                assert "list them in fds" in str(exc), exc
            elif method != "exec":
                kept = anyfork.run(open_here, method=method, fd_policy="inherit")
                same((method, kept[secret.fileno()]), (method, secret.name))


KEPT: Any = None


def close_the_copy() -> list[str]:
    """Of what the memory still knows; a new file has another number, and is not harmed."""
    raises(OSError, os.write, KEPT.fileno(), b"x")
    with open("/dev/zero", "rb") as new:
        KEPT.close()
        return [new.read(1).hex()]


@places("main")
def check_a_stale_wrapper_closes_a_placeholder(place: str) -> None:
    global KEPT
    for method in processes():
        if method in ("fork", "subint_fork", "main_thread_forkserver"):
            with open("/dev/zero", "r+b", buffering=0) as KEPT:
                same(anyfork.run(close_the_copy, method=method)[0], "00")


def log_something(path: str) -> str:
    logging.getLogger("attack.options").warning("from %s", "a worker")
    with open(path) as f:
        return f.read()


@places("main")
def check_logs_and_replaced_streams_go_on(place: str) -> None:
    logger = logging.getLogger("attack.options")
    logger.propagate = False
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "log")
        handler = logging.FileHandler(path)
        logger.addHandler(handler)
        saved = sys.stdout
        out = open(os.path.join(folder, "out"), "w+")  # noqa: SIM115
        sys.stdout = out
        try:
            for n, method in enumerate(("fork", "subint_fork", "main_thread_forkserver"), 1):
                if method in processes():
                    same(anyfork.run(log_something, path, method=method), "from a worker\n" * n)
                    with anyfork.spawn(print, "said", method=method) as child:
                        child.result(LIMIT)
            out.seek(0)
            same(out.read(), "said\n" * n)
            exc = raises(
                anyfork.SpawnError,
                lambda: anyfork.run(print, method="main_thread_forkserver", fds={out.fileno(): 0}),
            )
            assert "a stream or log has that number" in str(exc), exc
        finally:
            sys.stdout = saved
            out.close()
            logger.removeHandler(handler)
            handler.close()


def check_many_descriptors(place: str) -> None:
    """Almost as many as the limit allows; the tombstones count."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    held = []
    try:
        while len(os.listdir("/proc/self/fd")) < 235:
            held.append(os.dup(0))
        for method in processes():
            here = anyfork.run(open_here, method=method)
            same(method in IN_MAIN_OF_ANOTHER, held[-1] not in here)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- the lifeline as an option, and detach -------------------------------------------------


def sleep_for_ever() -> None:
    while True:
        select.select([], [], [], 10)


def own(method: str, pipe: int, how: str) -> None:
    """In an owner that ends at once: tells the worker's pid."""
    options: dict[str, Any] = {"lifeline": how != "off"}
    if how == "term":
        options = {"lifeline": signal.SIGTERM}
    child = anyfork.spawn(sleep_for_ever, method=method, **options)
    if how == "detach":
        child.detach()  # at once, before it can have armed anything
    child.wait_ready(LIMIT)
    os.write(pipe, str(child.pid).encode())
    os._exit(0)


@places("main")
def check_lifeline_on_and_off(place: str) -> None:
    for method in processes():
        for how, lives in (("on", False), ("term", False), ("off", True), ("detach", True)):
            r, w = os.pipe()
            with anyfork.spawn(own, method, w, how, method="exec", pass_fds=[w]) as owner:
                os.close(w)
                text = os.read(r, 100)
                os.close(r)
                same((method, how, owner.wait(LIMIT)), (method, how, 0))
            worker = int(text)
            if lives:
                time.sleep(0.05)
                assert not is_gone(worker), (method, how)
                os.kill(worker, signal.SIGKILL)
            until(lambda pid=worker: is_gone(pid), f"the end of {method} {how}")


def grandchild(pipe: int) -> None:
    pid = anyfork.fork()
    if pid == 0:
        os.write(pipe, str(os.getpid()).encode())
        sleep_for_ever()
    sleep_for_ever()


@places("main")
def check_scope_group(place: str) -> None:
    """The whole group goes, not the worker alone."""
    for method in main_targets():
        r, w = os.pipe()
        with anyfork.spawn(own_group, method, w, method="exec", pass_fds=[w]) as owner:
            os.close(w)
            pid = int(os.read(r, 100))
            owner.kill()
        until(lambda pid=pid: is_gone(pid), f"the end of a child of a worker by {method}")
        os.close(r)


def own_group(method: str, pipe: int) -> None:
    with anyfork.spawn(
        grandchild, pipe, method=method, start_new_session=True, scope="group", pass_fds=[pipe]
    ):
        sleep_for_ever()


def check_a_detached_worker_is_reaped(place: str) -> None:
    for method in processes():
        child = anyfork.spawn(sleep_for_ever, method=method)
        child.wait_ready(LIMIT)
        pid = child.pid
        assert pid is not None
        child.detach()
        child.close()
        child.close()
        assert not is_gone(pid), method
        os.kill(pid, signal.SIGKILL)

        def reaped(pid: int = pid, method: str = method) -> bool:
            anyfork.run(int, method=method)  # a start reaps those that were let go
            return not os.path.exists(f"/proc/{pid}")

        until(reaped, f"the reaping of a worker by {method}")


def check_detach_of_a_thread(place: str) -> None:
    with anyfork.spawn(time.sleep, 0.01, method="subint") as child:
        raises(anyfork.MethodUnavailable, child.detach)
        child.result(LIMIT)


# ---- programs --------------------------------------------------------------------------------


def output_of(*argv: Any, **options: Any) -> tuple[bytes, int]:
    with anyfork.spawn(argv=argv, stdout=subprocess.PIPE, **options) as child:
        assert child.stdout is not None
        return child.stdout.read(), child.wait(LIMIT)


def check_programs(place: str) -> None:
    same(output_of("echo", "hello"), (b"hello\n", 0))
    same(output_of("/bin/sh", "-c", "exit 3"), (b"", 3))
    same(output_of("sh", "-c", "kill -TERM $$"), (b"", -signal.SIGTERM))
    same(
        output_of("sh", "-c", 'echo "$0" "$A"', env={"A": "b", "PATH": "/bin:/usr/bin"}),
        (b"sh b\n", 0),
    )
    same(
        output_of("ignored", "-c", "echo $0", executable="/bin/sh", name="called"), (b"called\n", 0)
    )
    same(output_of("cat", stdin=subprocess.DEVNULL), (b"", 0))
    out, code = output_of("sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status")
    same(code, 0)
    ignored = int(out.split()[-1], 16)
    same(ignored & (bit(signal.SIGPIPE) | bit(signal.SIGXFSZ)), 0)
    assert ignored & bit(signal.SIGINT)
    out, _ = output_of("sh", "-c", "echo /proc/self/fd/*")
    same(len(out.split()), 4)  # 0 to 2, and the folder itself
    with anyfork.spawn(argv=["sleep", "60"]) as child:
        child.wait_ready(0)
        pid = child.pid
        assert child.is_alive() and pid is not None
    assert is_gone(pid)


def check_programs_that_cannot_run(place: str) -> None:
    def failing(error: type[BaseException], errno: int | None, *argv: Any, **options: Any) -> None:
        exc = nothing_started(lambda: anyfork.spawn(argv=argv, **options), error)
        same((argv, getattr(exc, "errno", None)), (argv, errno))
        if isinstance(exc, anyfork.SpawnError):
            same((argv, exc.stage), (argv, "exec"))

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        failing(anyfork.SpawnError, 2, "no-such-program-at-all")
        failing(anyfork.SpawnError, 2, "/no/such/program")
        failing(anyfork.SpawnError, 13, text.name)
        failing(anyfork.SpawnError, 13, "/")
        os.chmod(text.name, 0o755)
        text.file.close()  # or it is busy
        failing(anyfork.SpawnError, 8, text.name)
    failing(ValueError, None)
    failing(ValueError, None, "")
    failing(ValueError, None, "a\0b")
    failing(TypeError, None, 5)
    nothing_started(lambda: anyfork.spawn(argv="echo hello"), TypeError)
    nothing_started(lambda: anyfork.spawn(int, argv=["echo"]), TypeError)
    nothing_started(lambda: anyfork.spawn(argv=["echo"], method="fork"), ValueError)


BAD: list[tuple[dict[str, Any], type[BaseException], str]] = [
    ({"cwd": 5}, TypeError, "cwd"),
    ({"cwd": ""}, ValueError, "cwd"),
    ({"cwd": "a\0b"}, ValueError, "cwd"),
    ({"umask": 0o1000}, ValueError, "umask"),
    ({"umask": -1}, ValueError, "umask"),
    ({"umask": True}, TypeError, "umask"),
    ({"user": -1}, ValueError, "user"),
    ({"user": 2**32}, ValueError, "user"),
    ({"user": "no such user"}, ValueError, "user"),
    ({"user": 1.5}, TypeError, "user"),
    ({"group": 1.5}, TypeError, "group"),
    ({"extra_groups": 5}, TypeError, "extra_groups"),
    ({"extra_groups": ["no such group"]}, ValueError, "extra_groups"),
    ({"rlimits": [1]}, TypeError, "rlimits"),
    ({"rlimits": {resource.RLIMIT_CORE: (2, 1)}}, ValueError, "rlimits"),
    ({"rlimits": {resource.RLIMIT_CORE: (1, 2, 3)}}, ValueError, "rlimits"),
    ({"rlimits": {1000: 1}}, ValueError, "rlimits"),
    ({"rlimits": {1000: (1, 1)}}, ValueError, "rlimits"),
    ({"rlimits": {-1: (1, 1)}}, ValueError, "rlimits"),
    ({"nice": 100}, ValueError, "nice"),
    ({"nice": "low"}, TypeError, "nice"),
    ({"cpus": [-1]}, ValueError, "cpus"),
    ({"cpus": [10**6]}, ValueError, "cpus"),
    ({"cpus": 0}, TypeError, "cpus"),
    ({"cgroup": "/tmp"}, ValueError, "cgroup"),
    ({"oom_score_adj": 2000}, ValueError, "oom_score_adj"),
    ({"name": ""}, ValueError, "name"),
    ({"env": ["A=b"]}, TypeError, "env"),
    ({"env": {"A=": "b"}}, ValueError, "env"),
    ({"env": {"": "b"}}, ValueError, "env"),
    ({"env": {"A": "b\0"}}, ValueError, "env"),
    ({"env": {"A": 5}}, TypeError, "env"),
    ({"start_new_session": 1}, TypeError, "start_new_session"),
    ({"start_new_session": True, "process_group": 0}, ValueError, "process_group"),
    ({"process_group": -1}, ValueError, "process_group"),
    ({"sigint": "group", "process_group": 99}, ValueError, "process_group"),
    ({"stdin": 999}, ValueError, "stdin"),
    ({"stdin": subprocess.STDOUT}, ValueError, "stdin"),
    ({"stdout": object()}, TypeError, "stdout"),
    ({"stdout": io.StringIO()}, ValueError, "stdout: StringIO has no file descriptor"),
    ({"stderr": -9}, ValueError, "stderr"),
    ({"fds": [3]}, TypeError, "fds"),
    ({"fds": {3: 999}}, ValueError, "fds"),
    ({"fds": {2: 0}}, ValueError, "fds"),
    ({"fds": {10**6: 0}}, ValueError, "fds"),
    ({"fds": {2**40: 0}}, ValueError, "fds"),
    ({"fds": {40: 0}, "pass_fds": [999]}, ValueError, "fds"),
    ({"fd_policy": "default"}, ValueError, "fd_policy"),
    ({"signal_mask": [0]}, ValueError, "signal_mask"),
    ({"signal_mask": [65]}, ValueError, "signal_mask"),
    ({"ignored_signals": [signal.SIGKILL]}, ValueError, "ignored_signals"),
    (
        {"ignored_signals": [signal.SIGUSR1], "default_signals": [signal.SIGUSR1]},
        ValueError,
        "ignored_signals",
    ),
    ({"sigint": "mine"}, ValueError, "sigint"),
    ({"lifeline": 100}, ValueError, "lifeline"),
    ({"lifeline": signal.SIGINT}, ValueError, "lifeline"),
    ({"lifeline": signal.SIGTERM, "signal_mask": [signal.SIGTERM]}, ValueError, "lifeline"),
    ({"lifeline": "yes"}, TypeError, "lifeline"),
    ({"scope": "world"}, ValueError, "scope"),
    ({"scope": "group"}, ValueError, "scope"),
    ({"scope": "group", "process_group": 7}, ValueError, "scope"),
    ({"nonsense": 1}, TypeError, "nonsense"),
]


def check_bad_values(place: str) -> None:
    for method in processes():
        anyfork.run(int, method=method)
        for options, error, named in BAD:
            exc = nothing_started(
                lambda m=method, o=options: anyfork.spawn(int, method=m, **o), error
            )
            assert named in str(exc), (method, options, exc)


def check_none_is_as_the_owner_has_it(place: str) -> None:
    nothing: dict[str, Any] = dict.fromkeys(anyfork.Options.__annotations__)
    for method in processes():
        theirs = [anyfork.run(state, method=method, **options) for options in ({}, nothing)]
        same(theirs[0], theirs[1])


def check_a_thread_has_no_options(place: str) -> None:
    for options in ({"umask": 0}, {"stdin": subprocess.DEVNULL}, {"lifeline": True}):
        exc = nothing_started(
            lambda o=options: anyfork.spawn(int, method="subint", **o), ValueError
        )
        assert next(iter(options)) in str(exc), exc


def check_what_the_system_refuses(place: str) -> None:
    """The error has the stage, the option and the errno; nothing is left."""
    refused: list[tuple[dict[str, Any], str, int]] = [
        ({"cwd": "/no/such/folder"}, "cwd", 2),
        ({"process_group": 4000000}, "process_group", 1),
        ({"stdin": "/no/such/file"}, "stdin", 2),
        ({"cgroup": "/no/such/cgroup"}, "cgroup", 2),
    ]
    if len(os.sched_getaffinity(0)) < 512:
        refused.append(({"cpus": [4095]}, "cpus", 22))
    for method in processes():
        for options, named, errno in refused:
            exc = raises(
                anyfork.SpawnError,
                lambda m=method, o=options: anyfork.run(int, method=m, **o),
            )
            same((method, options, exc.stage, exc.errno), (method, options, "option", errno))
            assert named in exc.detail, exc


# ---- reset hooks ---------------------------------------------------------------------------


COUNT = 0


def count() -> None:
    global COUNT
    COUNT += 1


def counted() -> int:
    return COUNT


def fail() -> None:
    raise LookupError("this reset fails")


@places("main")
def check_registered_resets(place: str) -> None:
    from anyfork import _boot

    raises(TypeError, anyfork.register_child_reset, 5)
    assert anyfork.register_child_reset(count) is count
    try:
        for method in ("fork", "subint_fork", "main_thread_forkserver"):
            if method in processes():
                same(anyfork.run(counted, method=method), 1)
        same(COUNT, 0)
        anyfork.register_child_reset(fail)
        exc = raises(anyfork.SpawnError, anyfork.run, counted, method="main_thread_forkserver")
        assert isinstance(exc.__cause__, LookupError), exc.__cause__
    finally:
        _boot._resets.clear()


def random_numbers() -> list[str]:
    import random

    return [str(random.random()), os.urandom(4).hex()]


@places("main")
def check_random_generators_differ(place: str) -> None:
    import random

    random.seed(1)
    for method in processes():
        seen = {tuple(anyfork.run(random_numbers, method=method)) for _ in range(3)}
        same(len({first for first, _ in seen}), 3)


# ---- beside locks of the caller --------------------------------------------------------------


def check_exec_from_many_threads(place: str) -> None:
    """Starts at once, each with descriptors of its own, nothing of the others'."""
    failures: list[str] = []

    def one(n: int) -> None:
        try:
            out, code = output_of("sh", "-c", f"echo {n}; echo /proc/self/fd/*")
            lines = out.split(b"\n")
            if code != 0 or lines[0] != str(n).encode() or len(lines[1].split()) != 4:
                failures.append(json.dumps([n, code, out.decode()]))
        except BaseException as exc:
            failures.append(repr(exc))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(failures, [])


Check = Callable[[str], None]
