"""usage: sanitized.py [--under TOOL] [--brief] [N]

Every kind of fork and every spawn method N times, for tools/sanitize: it runs this
where each call costs ten times as much, so that methods which import everything anew
have one round in each interpreter. All answers are checked; nothing may be left. The
last part starts workers from several threads at once: the hand-offs to the launch pad
and to the threads that hold a GIL. --brief leaves out what imports everything anew, but for
exec and zygote in main, and has the options of one start for these and fork only.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading

import subint

import anyfork
from anyfork import _anyfork

# It takes a clone(2) that shares memory for a fork, and what it forgets in a forked child
# it then forgets here: which calls of this thread wait for others.
CLONE = "it reports races after a clone(2) that shares memory"
# (TOOL, what it cannot run): the reason.
LEFT_OUT = {
    ("valgrind", "name"): "what the kernel says of the command line's place is not true of its "
    "program, so that the write there is invalid for it",
    ("tsan", "exec"): CLONE,
    ("tsan", "zygote"): CLONE,
    ("valgrind", "zygote"): "it makes a fork of a clone that shares memory, through which the "
    "template's pid is told",
    ("tsan", "guard"): CLONE,
    ("tsan", "subint_forkserver"): "it gives up a forked child of a process with threads that "
    "starts one itself (dup thread with used id)",
}

# Of those that import everything anew.
BRIEF = {"exec", "zygote"}


def left_out(what: str) -> bool:
    """Whether the tool that we run under cannot; said then."""
    # The environment, for sub-interpreters look there too.
    tool = os.environ.get("SANITIZED_UNDER", "")
    reason = LEFT_OUT.get((tool, what))
    if reason is not None:
        print(f"{what}: skipped under {tool}: {reason}", flush=True)
    return reason is not None


def methods(slow: bool) -> list[str]:
    """Those that work in this interpreter; the slow ones, or the others."""
    found = []
    for row in anyfork.methods():
        if (row.target == "fresh") != slow:
            continue
        if row.available:
            if not left_out(row.name):
                found.append(row.name)
        else:
            place = "main" if _anyfork.in_main() else "a sub-interpreter"
            print(f"{row.name}: skipped in {place}: {row.reason}", flush=True)
    return found


def reap(pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"a child ended with {code}"


def fork_once() -> None:
    pid = anyfork.fork()
    if pid == 0:
        os._exit(0 if sum(range(100)) == 4950 else 1)
    reap(pid)
    pid, master = anyfork.forkpty()
    if pid == 0:
        os._exit(0 if os.isatty(0) else 1)
    reap(pid)
    os.close(master)


def spawn_once(method: str) -> None:
    assert anyfork.run(str.upper, "a" * 100_000, method=method) == "A" * 100_000
    with anyfork.spawn(divmod, 1, 0, method=method) as child:
        assert isinstance(child.exception(), ZeroDivisionError)


def state(fd: int) -> tuple[object, ...]:
    """What the options have made of this process."""
    print("told", flush=True)
    os.write(fd, b"x")
    with open("/proc/self/comm") as f:
        name = f.read().rstrip()
    umask, limit = os.umask(0), resource.getrlimit(resource.RLIMIT_CPU)[0]
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return os.getcwd(), os.environ["SANITIZED"], umask, nice, limit, name


def with_options(method: str) -> None:
    """One worker with several, and one that the guard holds too."""
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + 1, 19)
    expected = ("/", method, 0o27, nice, 5000)
    options: anyfork.Options = {
        "cwd": "/",
        "env": {**os.environ, "SANITIZED": method},
        "umask": 0o27,
        "nice": 1,
        "rlimits": {resource.RLIMIT_CPU: 5000},  # valgrind has a RLIMIT_NOFILE of its own
        "stdout": subprocess.PIPE,
    }
    if not left_out("name"):
        options["name"] = "sanitized"
    r, w = os.pipe()
    with anyfork.spawn(state, 7, method=method, fds={7: w}, **options) as child:
        os.close(w)
        *got, name = child.result()
        assert tuple(got) == expected, (method, got)
        assert name == options.get("name", name), (method, name)
        assert child.stdout is not None
        assert (child.stdout.read(), os.read(r, 2)) == (b"told\n", b"x")
    os.close(r)
    if not left_out("guard"):
        assert anyfork.run(int, "1", method=method, guard=True) == 1


def talk() -> None:
    """Messages of all kinds from one thread to another, which keeps some of the views."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = _anyfork.Channel(a.detach()), _anyfork.Channel(b.detach())
    sizes = (0, 100, 20_000, 70_000, 3_000_000)
    n_messages = 20 * len(sizes)

    def send() -> None:
        for i in range(n_messages):
            while not ours.send(1, i, [bytes(sizes[i % len(sizes)]), b"end"], (0,)):
                ours.wait_writable()
        ours.close()

    thread = threading.Thread(target=send)
    thread.start()
    kept: list[object] = []
    for i in range(n_messages):
        while (message := theirs.receive()) is None:
            theirs.wait()
        _kind, number, parts, fds = message
        assert number == i
        assert [len(part) for part in parts] == [sizes[i % len(sizes)], 3]
        assert sum(memoryview(parts[0])[::4096]) == 0
        os.close(fds[0])
        kept = [*kept[-10:], parts]
    thread.join()
    try:
        theirs.receive()
    except EOFError:
        theirs.close()
    else:
        raise AssertionError("no end")


def everything(n: int) -> None:
    fast = methods(slow=False)
    for _ in range(n):
        talk()
        if "fork" in fast:
            fork_once()
        for method in fast:
            spawn_once(method)


def slowly(brief: bool) -> None:
    """What costs most, once in an interpreter."""
    has_process = {row.name for row in anyfork.methods() if row.has_process}
    slow = methods(slow=True)
    if brief:
        has_process &= {*BRIEF, "fork"}
        slow = [name for name in slow if name in BRIEF]
    for method in slow:
        spawn_once(method)
    if "exec" in slow:
        with anyfork.spawn(argv=["/bin/sh", "-c", "exit 7"]) as child:
            assert child.wait() == 7
    for method in (*methods(slow=False), *slow):
        if method in has_process:
            with_options(method)


def on_threads(n: int) -> None:
    """The same from three threads at once."""
    failures: list[BaseException] = []
    fast = methods(slow=False)

    def body() -> None:
        try:
            for _ in range(n):
                talk()
                for method in fast:
                    anyfork.run(int, "1", method=method)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=body) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--under"]:
        os.environ["SANITIZED_UNDER"] = arguments[1]
        del arguments[:2]
    brief = arguments[:1] == ["--brief"]
    del arguments[: int(brief)]
    n = int(arguments[0]) if arguments else 3
    everything(n)
    slowly(brief)
    on_threads(n)
    for kind in subint.KINDS:
        with subint.interpreter(kind) as made:
            made.run(f"import sanitized; sanitized.everything({n})")
            if not brief:
                made.run("import sanitized; sanitized.slowly(False)")
            made.run(f"import sanitized; sanitized.everything({n})", where="thread")
            made.run(f"import sanitized; sanitized.on_threads({n})")
    print("all right", flush=True)


if __name__ == "__main__":
    main()
