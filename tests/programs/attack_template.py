"""Templates: what their workers are given, what they may do, and what is left when
templates, standbys and owners die."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from attack_common import LIMIT, is_gone, places, raises, same, until

import anyfork

PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, CAP_SYS_TIME = 38, 24, 25
ROOT = os.geteuid() == 0


def started(template: anyfork.Template) -> int:
    return template.stats().starts


def pid_of(template: anyfork.Template) -> int:
    pid = template.stats().pid
    assert pid is not None
    return pid


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(word) for word in f.read().split()]


def give(value: Any = None) -> Any:
    return value


def sleep_for_ever() -> None:
    time.sleep(1000)


def status_lines() -> dict[str, str]:
    with open("/proc/self/status") as f:
        rows = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    names = ("Umask", "Uid", "Gid", "Groups", "CapBnd", "CapEff", "NoNewPrivs", "Seccomp")
    return {name: rows[name].strip() for name in names}


# ---- as the owner has it ------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    """What a start does not say, as it is in this process."""
    with open("/proc/self/status") as f:
        ignored = next(int(line.split()[1], 16) for line in f if line.startswith("SigIgn"))
    with open("/proc/self/oom_score_adj") as f:
        oom = int(f.read())
    unlike = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGCHLD - 1)
    return {
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "umask": status_lines()["Umask"],
        "ignored": ignored & ~unlike,
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "cpus": sorted(os.sched_getaffinity(0)),
        "oom": oom,
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "argv": list(sys.argv),
    }


def change_all_and_compare(folder: str) -> list[str]:
    """In a process of its own. What a worker has that its owner has not."""
    before = anyfork.run(surroundings)
    unlike = [key for key, value in surroundings().items() if before[key] != value]
    os.chdir(folder)
    os.environ["ATTACK_NEW"] = "ä\n=x"
    del os.environ["HOME"]
    os.umask(0o027)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + 1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("700")
    os.setpgid(0, 0)
    sys.argv.append("one more")
    after = anyfork.run(surroundings)
    stats = anyfork.warm().stats()
    same(stats.made, 1)
    return unlike + [key for key, value in surroundings().items() if after[key] != value]


@places("main")
def check_as_the_owner_has_it(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        same(anyfork.run(change_all_and_compare, folder, method="exec"), [])


def write_streams() -> None:
    print("out", sys.stdin.read(), flush=True)
    print("err", file=sys.stderr)


def change_streams(folder: str) -> str:
    """Standard streams that were replaced after the template had been made."""
    anyfork.warm()
    path = os.path.join(folder, "log")
    with open(path, "w+") as log, open(os.path.join(folder, "in"), "w+") as question:
        question.write("question")
        question.seek(0)
        for fd, there in ((question.fileno(), 0), (log.fileno(), 1), (log.fileno(), 2)):
            os.dup2(fd, there)
    anyfork.run(write_streams)
    with open(path) as log:
        return log.read()


@places("main")
def check_streams_of_now(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        same(anyfork.run(change_streams, folder, method="exec"), "out question\nerr\n")


def module_of_now(folder: str) -> str:
    anyfork.warm()
    sys.path.insert(0, folder)
    with open(os.path.join(folder, "attack_late_module.py"), "w") as f:
        f.write("def name():\n    return __name__\n")
    import attack_late_module  # type: ignore[import-not-found]

    name: str = anyfork.run(attack_late_module.name)
    return name


@places("main")
def check_a_path_of_now(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        same(anyfork.run(module_of_now, folder, method="exec"), "attack_late_module")


# ---- never more than the owner may ------------------------------------------------------


def no_new_privs() -> None:
    same(ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0)


def drop_a_capability() -> None:
    same(ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0), 0)


def drop_groups() -> None:
    os.setgroups([4711])


def change_group() -> None:
    os.setresgid(1234, 1234, 1234)


def in_a_thread(change: Callable[[], None]) -> None:
    """glibc changes the ids of all threads, and prctl(2) of one only."""
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


def drop_and_compare(name: str) -> None:
    change: Callable[[], None] = globals()[name]
    same(anyfork.run(status_lines), status_lines())
    old = pid_of(anyfork.warm())
    live = anyfork.spawn(sleep_for_ever)
    change()
    mine = status_lines()
    for _ in range(3):
        there = anyfork.run(status_lines)
        # An execution loses what is not in the bounding set any more, capabilities(7).
        same(int(there["CapEff"], 16) & ~int(mine["CapEff"], 16), 0)
        same((name, {**there, "CapEff": ""}), (name, {**mine, "CapEff": ""}))
    stats = anyfork.warm().stats()
    same((name, stats.made, stats.pid == old), (name, 2, False))
    assert live.is_alive()
    live.close()
    until(lambda: is_gone(old), "the end of the template that may do more")


@places("main")
def check_privileges_that_were_dropped(place: str) -> None:
    names = ["no_new_privs"]
    if ROOT:
        names += ["drop_a_capability", "drop_groups", "change_group"]
    for name in names:
        anyfork.run(drop_and_compare, name, method="exec")


def namespace(kind: str) -> str:
    return os.readlink(f"/proc/self/ns/{kind}")


def unshare_and_compare(flag: int, kind: str) -> None:
    old = pid_of(anyfork.warm())
    os.unshare(flag)
    same(anyfork.run(namespace, kind), namespace(kind))
    assert pid_of(anyfork.warm()) != old


@places("main")
def check_namespaces_that_were_left(place: str) -> None:
    for flag, kind in (
        (os.CLONE_NEWUTS, "uts"),
        (os.CLONE_NEWIPC, "ipc"),
        (os.CLONE_NEWNET, "net"),
        (os.CLONE_NEWNS, "mnt"),
    ):
        pid = os.fork()
        if pid == 0:
            try:
                os.unshare(flag)
            except OSError:
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1] != 0:
            print(f"{kind}: not permitted here", file=sys.stderr)
            continue
        anyfork.run(unshare_and_compare, flag, kind, method="exec")


def unshare_pids() -> None:
    anyfork.warm()
    os.unshare(os.CLONE_NEWPID)
    exc = raises(anyfork.MethodUnavailable, anyfork.run, give)
    assert "pid namespace" in str(exc), exc


@places("main")
def check_a_new_pid_namespace_is_refused(place: str) -> None:
    if ROOT:
        anyfork.run(unshare_pids, method="exec")


def unshare_in_a_thread() -> None:
    """Of that thread alone: the others' template is good for them."""
    wanted: list[str] = []
    got: list[str] = []

    def other() -> None:
        os.unshare(os.CLONE_NEWUTS)
        wanted.append(os.readlink("/proc/thread-self/ns/uts"))
        got.append(anyfork.run(namespace, "uts"))

    anyfork.warm()
    in_a_thread(other)
    same(got, wanted)
    same(anyfork.run(namespace, "uts"), namespace("uts"))


@places("main")
def check_a_namespace_of_one_thread(place: str) -> None:
    if ROOT:
        anyfork.run(unshare_in_a_thread, method="exec")


def memory_can_be_read(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/mem", "rb"):
            return True
    except PermissionError:
        return False


def own_files() -> list[str]:
    """Of /proc, that a process which must not be dumped cannot open."""
    refused = []
    for name, mode in (("environ", "r"), ("io", "r"), ("mem", "rb"), ("oom_score_adj", "r+")):
        try:
            open(f"/proc/self/{name}", mode).close()
        except OSError:
            refused.append(name)
    return refused


def look_at_memories() -> None:
    """By a process of the same user, who has no privileges over them."""
    with anyfork.Template(standby=(1, 1)) as template:
        worker = template.spawn(sleep_for_ever)
        worker.wait_ready(LIMIT)
        server = pid_of(template)
        until(lambda: len(children_of(server)) == 2, "a standby")
        (standby,) = (pid for pid in children_of(server) if pid != worker.pid)
        assert worker.pid is not None
        by_fork = anyfork.spawn(sleep_for_ever, method="fork")
        by_fork.wait_ready(LIMIT)
        assert by_fork.pid is not None
        readable = [memory_can_be_read(pid) for pid in (worker.pid, by_fork.pid)]
        same(readable, [True, True])
        same([memory_can_be_read(pid) for pid in (server, standby)], [False, False])
        same(template.run(own_files), own_files())
        raises(PermissionError, os.readlink, f"/proc/{server}/fd/3")
        by_fork.close()
        worker.close()


@places("main")
def check_memory_of_a_template_is_not_for_others(place: str) -> None:
    if not ROOT:
        look_at_memories()
        return
    setup = f"import sys; sys.path[:] = {sys.path!r}; import attack_template as a"
    another = ["--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    # For a Python in the home of root: root who may read files, and nothing else of others.
    unprivileged = ["--bounding-set=-all,+dac_override,+dac_read_search"]
    for who in (another, unprivileged):
        command = ["setpriv", "--inh-caps=-all", *who, sys.executable, "-c"]
        if subprocess.run([*command, setup], stderr=subprocess.DEVNULL).returncode == 0:
            done = subprocess.run([*command, f"{setup}; a.look_at_memories()"], timeout=3 * LIMIT)
            same(done.returncode, 0)
            return
    print("there is no setpriv(1) here, or it may not drop privileges", file=sys.stderr)


# ---- ends -----------------------------------------------------------------------------------


@places("main", "isolated")
def check_a_template_that_dies(place: str) -> None:
    """Live workers go on, and their status is not lost; the next start has a new one."""
    with anyfork.Template(standby=(1, 2)) as template:
        workers = [template.spawn(sleep_for_ever) for _ in range(2)]
        for worker in workers:
            worker.wait_ready(LIMIT)
        finishing = template.spawn(time.sleep, 0.2)
        old = pid_of(template)
        os.kill(old, signal.SIGKILL)
        until(lambda: is_gone(old), "the template's end")
        for n in range(5):  # at first with the standbys that are left
            same(template.run(give, n), n)
        assert pid_of(template) != old
        same([worker.is_alive() for worker in workers], [True, True])
        same(finishing.wait(LIMIT), 0)
        workers[0].kill()
        with contextlib.suppress(anyfork.WorkerDied):  # before Linux 6.15 nobody knows
            same(workers[0].wait(LIMIT), -signal.SIGKILL)
        for worker in (*workers, finishing):
            worker.close()


@places("main", "isolated")
def check_standbys_that_die(place: str) -> None:
    with anyfork.Template(standby=(2, 4)) as template:
        pid = pid_of(template)
        for _ in range(3):
            until(lambda: len(children_of(pid)) == 4, "standbys")
            for standby in children_of(pid):
                os.kill(standby, signal.SIGKILL)
                until(lambda pid=standby: is_gone(pid), "its end")
            same([template.run(give, n) for n in range(3)], [0, 1, 2])
        same(template.stats().made, 1)


@places("main", "isolated")
def check_standbys_are_refilled_and_expire(place: str) -> None:
    with anyfork.Template(standby=(1, 3), idle=3.0) as template:
        pid = pid_of(template)
        until(lambda: len(children_of(pid)) == 3, "three standbys")
        template.run(give)
        until(lambda: len(children_of(pid)) == 1, "the end of those that nobody wants")
        same([template.run(give, n) for n in range(5)], list(range(5)))
        same(template.stats().made, 1)


def die_by(sig: int) -> None:
    signal.signal(sig, signal.SIG_DFL) if sig not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), sig)
    time.sleep(LIMIT)


@places("main", "isolated")
def check_status_of_every_end(place: str) -> None:
    with anyfork.Template(standby=(1, 3)) as template:
        for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT):
            with template.spawn(die_by, int(sig)) as child:
                same((sig, child.wait(LIMIT)), (sig, -sig))
        for code in (0, 1, 77):
            with template.spawn(os._exit, code) as child:
                same((code, child.wait(LIMIT)), (code, code))
            with template.spawn(sys.exit, code) as child:
                same((code, child.wait(LIMIT)), (code, code))


def own(pipe: int, how: str) -> None:
    template = anyfork.Template(standby=(2, 3)).warm()
    worker = template.spawn(sleep_for_ever)
    worker.wait_ready(LIMIT)
    until(lambda: len(children_of(pid_of(template))) == 4, "standbys")
    pids = [pid_of(template), *children_of(pid_of(template))]
    os.write(pipe, " ".join(map(str, pids)).encode())
    os.close(pipe)
    if how == "stopped":
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    if how == "exit":
        return
    os.kill(os.getpid(), signal.SIGKILL)


@places("main")
def check_an_owner_that_dies(place: str) -> None:
    for how in ("kill", "stopped", "exit"):
        r, w = os.pipe()
        with anyfork.spawn(own, w, how, method="exec", pass_fds=[w]) as owner:
            os.close(w)
            assert select.select([r], [], [], LIMIT)[0]
            text = os.read(r, 1000)
            os.close(r)
            assert text, owner.exception(LIMIT)
            owner.wait(LIMIT)
            for pid in map(int, text.split()):
                until(lambda pid=pid: is_gone(pid), f"the end of {pid}, {how}")


kept: list[object] = []


def outlive() -> tuple[int, int]:
    template = anyfork.warm()
    worker = anyfork.spawn(time.sleep, 1.5, lifeline=False)
    detached = template.spawn(time.sleep, 1.5)
    detached.detach()
    kept.append(worker)  # it would be killed with its handle
    assert worker.pid is not None and detached.pid is not None
    return worker.pid, detached.pid


@places("main")
def check_workers_that_outlive_their_owner(place: str) -> None:
    pids = anyfork.run(outlive, method="exec")
    same([is_gone(pid) for pid in pids], [False, False])
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), "its own end")


@places("main")
def check_no_host_meets_it(place: str) -> None:
    """A host that waits for all of its children."""
    with anyfork.Template() as template, template.spawn(sleep_for_ever) as child:
        child.wait_ready(LIMIT)
        raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)
        os.kill(pid_of(template), signal.SIGKILL)
        time.sleep(0.05)
        raises(ChildProcessError, os.waitpid, -1, os.WNOHANG)


# ---- forks, threads, workers of workers --------------------------------------------------------


@places("main")
def check_a_forked_child_has_its_own(place: str) -> None:
    with anyfork.Template() as template:
        same(template.run(give, 1), 1)
        mine = pid_of(template)
        pid = os.fork()
        if pid == 0:
            try:
                same((template.run(give, 2), started(template)), (2, 1))
                assert pid_of(template) != mine
                template.close()
                os._exit(0)
            except BaseException as exc:
                print(repr(exc), file=sys.stderr)
            os._exit(1)
        same(os.waitpid(pid, 0)[1], 0)
        same((template.run(give, 3), pid_of(template)), (3, mine))


def run_one_more(depth: int) -> int:
    return 1 + (anyfork.run(run_one_more, depth - 1) if depth else 0)


@places("main", "isolated")
def check_workers_of_workers(place: str) -> None:
    same(anyfork.run(run_one_more, 2), 3)


@places("main", "isolated")
def check_starts_of_many_threads(place: str) -> None:
    answers: list[int] = []
    with anyfork.Template(standby=(2, 4)) as template:

        def start() -> None:
            for n in range(10):
                answers.append(template.run(give, n))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        same(sorted(answers), sorted([*range(10)] * 4))
        same((started(template), template.stats().made), (40, 1))


@places("main", "isolated")
def check_a_burst(place: str) -> None:
    with anyfork.Template(standby=(1, 4)) as template:
        children = [template.spawn(give, n) for n in range(60)]
        same([child.result(LIMIT) for child in children], list(range(60)))
        for child in children:
            child.close()


# ---- targets -------------------------------------------------------------------------------------


@places("main", "isolated")
def check_targets_without_a_name(place: str) -> None:
    factor = 3

    class Local:
        def __init__(self, n: int) -> None:
            self.n = n

    same(anyfork.run(lambda n: n * factor, 14), 42)
    same(anyfork.run(lambda: Local(7)).n, 7)
    got = anyfork.run(Local, 8)
    assert isinstance(got, Local), got

    class Refused(Exception):
        pass

    def fail() -> None:
        raise Refused("of here")

    raises(Refused, anyfork.run, fail)


@places("main", "isolated")
def check_targets_of_any_size(place: str) -> None:
    for size in (0, 1000, 65_000, 66_000, 10_000_000):
        same((size, anyfork.run(len, bytes(size))), (size, size))


def read_all(fds: list[int]) -> list[bytes]:
    return [os.read(fd, 10) for fd in fds]


@places("main", "isolated")
def check_many_descriptors_at_once(place: str) -> None:
    pairs = [os.pipe() for _ in range(100)]
    try:
        for n, (_r, w) in enumerate(pairs):
            os.write(w, str(n).encode())
        fds = {3 + n: r for n, (r, _w) in enumerate(pairs)}
        got = anyfork.run(read_all, sorted(fds), fds=fds)
        same(got, [str(n).encode() for n in range(100)])
        with socket.socket() as s:
            exc = raises(ValueError, anyfork.run, give, fds={3 + n: s for n in range(260)})
            assert "too many" in str(exc), exc
    finally:
        for pair in pairs:
            for fd in pair:
                os.close(fd)


def open_here() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}").partition(":")[0])
    return sorted(path for path in found if path in ("socket", "pipe", "anon_inode"))


@places("main", "isolated")
def check_nothing_of_the_template_is_reachable(place: str) -> None:
    """Its report socket and its lifeline, both ends elsewhere."""
    with anyfork.Template(standby=(4, 8)) as template:
        running = [template.spawn(sleep_for_ever) for _ in range(3)]
        there = template.run(open_here, stdout="/dev/null", stderr="/dev/null")
        same(there.count("socket"), 1)
        for child in running:
            child.close()


# ---- preloads -------------------------------------------------------------------------------


@contextlib.contextmanager
def module(text: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        name = f"attack_preload_{os.path.basename(folder).removeprefix('tmp')}"
        with open(os.path.join(folder, f"{name}.py"), "w") as f:
            f.write(text)
        sys.path.append(folder)
        try:
            yield name
        finally:
            sys.path.remove(folder)


def imported(name: str) -> tuple[bool, Any]:
    return name in sys.modules, getattr(sys.modules.get(name), "VALUE", None)


def set_value(name: str, value: int) -> None:
    sys.modules[name].VALUE = value  # type: ignore[attr-defined]


@places("main", "isolated")
def check_preloads(place: str) -> None:
    with module("VALUE = 1\n") as name:
        with anyfork.Template([name]) as template:
            same(template.run(imported, name), (True, 1))
            template.run(set_value, name, 2)  # in its worker alone
            same(template.run(imported, name), (True, 1))
        same(anyfork.run(imported, name), (False, None))
        with anyfork.Template([name], setup=lambda: set_value(name, 3)) as template:
            same(template.run(imported, name), (True, 3))


@places("main", "isolated")
def check_preloads_are_reloaded(place: str) -> None:
    with module("VALUE = 1\n") as name, anyfork.Template([name]) as template:
        same(template.run(imported, name), (True, 1))
        folder = sys.path[-1]
        with open(os.path.join(folder, f"{name}.py"), "w") as f:
            f.write("VALUE = 'another'\n")
        same(template.reload().run(imported, name), (True, "another"))
        same(template.stats().made, 2)


FAILING = {
    "raise KeyError('of the module')": (KeyError, "of the module"),
    "import nowhere_at_all": (ImportError, "nowhere_at_all"),
    "import os; os._exit(3)": (anyfork.SpawnError, "before it was ready"),
    "import sys; sys.exit(4)": (anyfork.SpawnError, "before it was ready"),
    "import os; os.kill(os.getpid(), 9)": (anyfork.SpawnError, "before it was ready"),
    "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()": (
        RuntimeError,
        "thread: Thread-1",
    ),
}


@places("main", "isolated")
def check_preloads_that_fail(place: str) -> None:
    for text, (kind, words) in FAILING.items():
        with module(text) as name:
            template = anyfork.Template([name])
            for _ in range(2):
                exc = raises(kind, template.run, give)
                assert words in str(exc), (text, exc)
            same(template.stats().made, 0)
            template.close()


def import_here(name: str) -> None:
    importlib.import_module(name)


def text_on_stderr(name: str, on_error: Any) -> str:
    """What a template says that goes on without this module."""
    with tempfile.TemporaryFile() as log:
        before = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with anyfork.Template([name, "json"], on_error=on_error) as template:
                same(template.run(imported, name), (False, None))
                same(template.run(imported, "json"), (True, None))
                for _ in range(2):
                    exc = raises(BaseException, template.run, import_here, name)
                    assert isinstance(exc, KeyError | anyfork.WorkerDied), exc
                same(template.stats().made, 1)
        finally:
            os.dup2(before, 2)
            os.close(before)
        log.seek(0)
        return log.read().decode()


@places("main", "isolated")
def check_preloads_that_may_fail(place: str) -> None:
    for text, words in (
        ("raise KeyError('of the module')", "KeyError: 'of the module'"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
    ):
        with module(text) as name:
            same(text_on_stderr(name, "ignore"), "")
            said = text_on_stderr(name, "warn")
            assert f"{name!r} is not preloaded" in said and words in said, said


@places("main", "isolated")
def check_a_preload_that_hangs(place: str) -> None:
    with module("import time; time.sleep(1000)") as name:
        template = anyfork.Template([name], timeout=0.5)
        exc = raises(anyfork.SpawnError, template.warm)
        assert name in str(exc), exc
        template.close()


@places("main", "isolated")
def check_a_preload_that_forks(place: str) -> None:
    text = "import os\nPID = os.fork()\nif PID == 0:\n    os._exit(5)\n"
    with module(text) as name, anyfork.Template([name]) as template:
        same([template.run(give, n) for n in range(6)], list(range(6)))


@places("main", "isolated")
def check_bad_input(place: str) -> None:
    for kind, arguments in (
        (TypeError, {"preload": "json"}),
        (TypeError, {"preload": [7]}),
        (TypeError, {"setup": 5}),
        (TypeError, {"preload": None}),
        (TypeError, {"standby": 2}),
        (TypeError, {"standby": (False, True)}),
        (TypeError, {"timeout": "5"}),
        (ValueError, {"standby": (2, 1)}),
        (ValueError, {"standby": (-1, 1)}),
        (ValueError, {"standby": (0, 1000)}),
        (ValueError, {"idle": 0}),
        (ValueError, {"timeout": -1}),
        (ValueError, {"audit": "ignore"}),
        (ValueError, {"on_error": "refuse"}),
    ):
        raises(kind, lambda a=arguments: anyfork.Template(**a))
    raises(TypeError, lambda: anyfork.spawn(give, template="json"))
    raises(ValueError, lambda: anyfork.spawn(give, method="fork", template=anyfork.Template()))
    closed = anyfork.Template()
    closed.close()
    exc = raises(ValueError, closed.run, give)
    assert "closed" in str(exc), exc
    exc = raises(TypeError, anyfork.run, give, threading.Lock())
    assert "lock" in str(exc) and "fork" in str(exc), exc
    raises(TypeError, anyfork.spawn, subprocess)


@places("main", "isolated")
def check_what_the_audit_finds(place: str) -> None:
    for text, words in (
        ("import socket\nS = socket.socket()\n", "socket"),
        ("import threading\nLOCK = threading.Lock()\nLOCK.acquire()\n", ".LOCK"),
        ("import threading\nLOCK = threading.RLock()\nLOCK.acquire()\n", ".LOCK"),
        (
            "import threading\n"
            "class Pool:\n    def __init__(self): self.lock = threading.Lock()\n"
            "POOL = Pool()\nPOOL.lock.acquire()\n",
            "Pool.lock",
        ),
    ):
        with module(text) as name:
            exc = raises(RuntimeError, anyfork.Template([name]).warm)
            assert words in str(exc), (text, exc)
            with anyfork.Template([name], audit="warn") as template:
                same(template.run(give, 1), 1)


def multiply() -> float:
    import numpy

    return float((numpy.ones((300, 300)) @ numpy.ones((300, 300))).sum())


@places("main")
def check_pools_that_stop_for_a_fork(place: str) -> None:
    """numpy's OpenBLAS has threads when it is loaded, and no more after a fork handler."""
    if importlib.util.find_spec("numpy") is None:
        print("numpy is not installed here", file=sys.stderr)
        return
    with anyfork.Template(["numpy"]) as template:
        same([template.run(multiply) for _ in range(3)], [300.0**3] * 3)


# ---- what a second pair of eyes has found ---------------------------------------------------


def write_there(data: bytes, fd: int) -> int:
    return os.write(fd, b"x") + len(data)


@places("main", "isolated")
def check_large_targets_with_descriptors(place: str) -> None:
    r, w = os.pipe()
    for there in (5, 50):
        same(anyfork.run(write_there, bytes(200_000), there, fds={there: w}), 200_001)
        same(os.read(r, 10), b"x")
    os.close(r)
    os.close(w)


def change_directory_and_close(folder: str) -> str:
    anyfork.warm()
    os.chdir(folder)
    name: str = anyfork.run(os.getcwd, fd_policy="close")
    return name


@places("main")
def check_a_directory_of_now_with_all_closed(place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        got = anyfork.run(change_directory_and_close, folder, method="exec")
        same(got, os.path.realpath(folder))


def without_capabilities() -> list[str]:
    """An execution by root regains what capset(2) has taken."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    same(ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()), 0)
    with open("/proc/self/status") as f:
        mine = [line for line in f if line.startswith(("CapPrm", "CapEff"))]
    there: list[str] = anyfork.run(capability_lines)
    return [line for line in there if line not in mine]


def capability_lines() -> list[str]:
    with open("/proc/self/status") as f:
        return [line for line in f if line.startswith(("CapPrm", "CapEff"))]


@places("main")
def check_an_execution_regains_nothing(place: str) -> None:
    if ROOT:
        same(anyfork.run(without_capabilities, method="exec"), [])


def with_many_groups() -> tuple[int, int]:
    os.setgroups(range(100_000, 100_900))
    before = len(anyfork.run(os.getgroups))
    os.setgroups(range(100_000, 100_895))
    return before, len(anyfork.run(os.getgroups))


@places("main")
def check_many_groups(place: str) -> None:
    if ROOT:
        same(anyfork.run(with_many_groups, method="exec"), (900, 895))


def change_all_in_the_template() -> None:
    os.chdir("/usr")
    os.umask(0o123)
    os.environ["ATTACK_OF_TEMPLATE"] = "1"


@places("main", "isolated")
def check_not_as_the_template_had_it(place: str) -> None:
    mine = surroundings()
    with anyfork.Template(setup=change_all_in_the_template) as template:
        there = template.run(surroundings)
    same(
        {k: v for k, v in there.items() if k != "argv"},
        {k: v for k, v in mine.items() if k != "argv"},
    )


def report_half(kind: int) -> None:
    """A record of a result whose payload never comes."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                head = struct.pack("<IHHiiQ40s", 0x314B4641, kind, 0, 0, 0, 30, b"")
                os.write(int(name), head + b"x" * 10)
    os.kill(os.getpid(), signal.SIGKILL)


@places("main", "isolated")
def check_half_a_result(place: str) -> None:
    with anyfork.spawn(report_half, 3) as child:
        died = raises(anyfork.WorkerDied, child.result, LIMIT)
        same(died.returncode, -signal.SIGKILL)


@places("main", "isolated")
def check_a_closed_template_is_closed(place: str) -> None:
    template = anyfork.Template()
    same(template.run(give, 1), 1)
    worker = template.spawn(sleep_for_ever)
    worker.wait_ready(LIMIT)
    template.close()
    raises(ValueError, template.run, give)
    time.sleep(0.7)
    assert worker.is_alive()
    worker.kill()
    same(worker.wait(LIMIT), -signal.SIGKILL)
    worker.close()
