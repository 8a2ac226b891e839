"""Templates of templates, snapshots, workers by the dozen, and what stats() says of them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any

from attack_common import LIMIT, is_gone, places, raises, same, until
from attack_template import (
    ROOT,
    children_of,
    drop_a_capability,
    give,
    imported,
    module,
    no_new_privs,
    pid_of,
    set_value,
)

import anyfork

STATE: dict[str, Any] = {}


def state() -> dict[str, Any]:
    """A snapshot's workers find this module as it was."""
    return STATE


def parent() -> int:
    return os.getppid()


def seed_of_hashes() -> int:
    return hash("of this process")


# ---- many at once -----------------------------------------------------------------------


@places("main", "isolated")
def check_many_at_once(place: str) -> None:
    with anyfork.Template(standby=(1, 4)) as template:
        until(lambda: len(children_of(pid_of(template))) == 4, "standbys")
        children = template.spawn_many(give, [(n,) for n in range(70)])
        same([child.result(LIMIT) for child in children], list(range(70)))
        same(len({child.pid for child in children}), 70)
        for child in children:
            child.close()
        stats = template.stats()
        same((stats.starts, stats.made), (70, 1))
        assert 60 <= stats.missed < 70, stats
        same(template.spawn_many(give, []), [])


@places("main", "isolated")
def check_options_of_many(place: str) -> None:
    def name() -> tuple[str, int]:
        with open("/proc/self/comm") as f:
            print("out", flush=True)
            return f.read().strip(), os.getpriority(os.PRIO_PROCESS, 0)

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    children = anyfork.spawn_many(name, [()] * 40, name="of many", nice=2, stdout=-1)
    for child in children:
        same(child.result(LIMIT), ("of-many", mine + 2))
        assert child.stdout is not None
        same(child.stdout.read(), b"out\n")
        child.close()


@places("main", "isolated")
def check_bad_input_of_many(place: str) -> None:
    template = anyfork.warm()
    until(lambda: template.stats().standbys == 4, "standbys")
    before = template.stats().starts
    for kind, call in (
        (TypeError, lambda: anyfork.spawn_many(give, [1])),
        (TypeError, lambda: anyfork.spawn_many(give, 7)),  # type: ignore[arg-type]
        (TypeError, lambda: anyfork.spawn_many(None, [()])),  # type: ignore[arg-type]
        (TypeError, lambda: anyfork.spawn_many(give, [(threading.Lock(),)])),
        (TypeError, lambda: anyfork.spawn_many(give, [()], nonsense=1)),
        (ValueError, lambda: anyfork.spawn_many(give, [()], fresh=True)),
        (anyfork.SpawnError, lambda: anyfork.spawn_many(give, [()], stdin="/nowhere/at/all")),
    ):
        raises(kind, call)
    same(template.stats().starts, before)


@places("main", "isolated")
def check_some_of_many_that_fail(place: str) -> None:
    def fail(n: int) -> int:
        return 100 // n

    children = anyfork.spawn_many(fail, [(n,) for n in (1, 0, 2)])
    same((children[0].result(LIMIT), children[2].result(LIMIT)), (100, 50))
    raises(ZeroDivisionError, children[1].result)
    for child in children:
        child.close()


@places("main", "isolated")
def check_standbys_that_die_under_many(place: str) -> None:
    """Those that were dead when they were asked are passed over, and in their order."""
    with anyfork.Template(standby=(4, 8)) as template:
        for _ in range(3):
            until(lambda: template.stats().standbys == 8, "standbys")
            for standby in children_of(pid_of(template))[::2]:
                os.kill(standby, signal.SIGKILL)
                until(lambda pid=standby: is_gone(pid), "its end")
            children = template.spawn_many(give, [(n,) for n in range(12)])
            same([child.result(LIMIT) for child in children], list(range(12)))
            for child in children:
                child.close()


# ---- a process of its own ---------------------------------------------------------------


@places("main", "isolated")
def check_fresh(place: str) -> None:
    with module("VALUE = 1\n") as name, anyfork.Template([name]) as template:
        shared = {template.run(seed_of_hashes) for _ in range(2)}
        same(len(shared), 1)
        fresh = {template.run(seed_of_hashes, fresh=True) for _ in range(2)}
        same(len(fresh | shared), 3)
        same(template.run(imported, name, fresh=True), (True, 1))
        same(template.stats().made, 1)
        raises(ValueError, lambda: anyfork.spawn(give, method="fork", fresh=True))
        raises(TypeError, lambda: template.spawn(give, fresh=1))


# ---- trees --------------------------------------------------------------------------------


@places("main", "isolated")
def check_a_tree(place: str) -> None:
    with (
        module("VALUE = 1\n") as trunk,
        module("VALUE = 2\n") as branch,
        anyfork.Template([trunk], setup=lambda: set_value(trunk, 5)) as root,
        root.child([branch]) as child,
        child.child() as leaf,
    ):
        same(child.run(imported, trunk), (True, 5))
        same(child.run(imported, branch), (True, 2))
        same(root.run(imported, branch), (False, None))
        same(leaf.run(imported, branch), (True, 2))
        same(leaf.run(parent), pid_of(leaf))
        assert pid_of(leaf) in children_of(pid_of(child))
        assert pid_of(child) in children_of(pid_of(root))
        same(leaf.run(imported, trunk, fresh=True), (True, 5))
        # A root that ends takes nothing with it.
        old = pid_of(root)
        os.kill(old, signal.SIGKILL)
        until(lambda: is_gone(old), "the root's end")
        same([leaf.run(give, n) for n in range(6)], list(range(6)))
        same(leaf.stats().made, 1)
        # A branch is made again from its root, or what was left of it.
        for template in (leaf, child):
            pid = pid_of(template)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: is_gone(pid), "its end")
        same([leaf.run(imported, trunk) for n in range(6)], [(True, 5)] * 6)
        for template in (leaf, child):
            until(lambda t=template: t.run(give, t.stats().made) == 2, "a new process")


@places("main", "isolated")
def check_branches_that_fail(place: str) -> None:
    with anyfork.Template() as root, module("raise KeyError('of the branch')") as name:
        for _ in range(2):
            exc = raises(KeyError, root.child([name]).warm)
            assert "of the branch" in str(exc), exc
        same(root.run(give, 1), 1)
        same(root.stats().made, 1)
    closed = root.child()
    raises(ValueError, closed.warm)


# ---- snapshots ------------------------------------------------------------------------------


def use_a_snapshot() -> list[str]:
    """In a process of its own: what has gone wrong."""
    wrong = []

    def expect(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            wrong.append(f"{what}: {found!r}, not {wanted!r}")

    STATE["kept"] = ["of then", lambda: 1]  # no pickle could bring it there
    sys.modules["attack_made_here"] = type(sys)("attack_made_here")
    template = anyfork.snapshot(standby=(1, 2))
    STATE["kept"] = ["of now"]
    expect("state", template.run(lambda: 7), 7)
    expect("module state", template.run(first_of_state), "of then")
    expect("module", template.run(imported, "attack_made_here"), (True, None))
    expect("parent", template.run(parent), template.stats().pid)
    with template.spawn(time.sleep, 0.3) as child:
        pid = template.stats().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        expect("a worker of a lost one", child.wait(LIMIT), 0)
    for _ in range(10):  # at first with the standbys that are left
        try:
            template.run(give)
        except anyfork.TemplateLost as exc:
            if "take another" not in str(exc):
                wrong.append(str(exc))
            break
    else:
        wrong.append("it was not lost")
    with anyfork.snapshot() as another, another.child(["json"]) as child:
        STATE["kept"] = ["later"]
        expect("a child of a snapshot", child.run(first_of_state), "of now")
        STATE["kept"] = ["of now"]
        try:
            child.spawn(give, fresh=True)
            wrong.append("a fresh one of a snapshot's child")
        except ValueError:
            pass
    expect("another", anyfork.snapshot().run(first_of_state), "of now")
    for call in (template.reload, lambda: template.spawn(give, fresh=True)):
        try:
            call()
            wrong.append("no ValueError")
        except ValueError:
            pass
    return wrong


def first_of_state() -> str:
    text: str = STATE["kept"][0]
    return text


@places("main")
def check_a_snapshot(place: str) -> None:
    same(anyfork.run(use_a_snapshot, method="exec"), [])


def snapshot_beside(what: str) -> str:
    held = threading.Lock()
    STATE["holder"] = type("Holder", (), {})()
    STATE["holder"].held = held
    end = threading.Event()
    if what == "lock":
        held.acquire()
    thread = threading.Thread(target=end.wait, args=(LIMIT,), name="beside it")
    if what == "thread":
        thread.start()
    try:
        anyfork.snapshot()
    except RuntimeError as exc:
        return str(exc)
    finally:
        end.set()
    return "it was taken"


@places("main")
def check_a_snapshot_looks_first(place: str) -> None:
    for what, words in (("thread", "beside it"), ("lock", "held"), ("nothing", "it was taken")):
        text = anyfork.run(snapshot_beside, what, method="exec")
        assert words in text, (what, text)


@places("isolated", "legacy")
def check_no_snapshot_of_a_sub_interpreter(place: str) -> None:
    exc = raises(anyfork.MethodUnavailable, anyfork.snapshot)
    assert "main interpreter" in str(exc), exc


# ---- the default template, of workers too ------------------------------------------------------


def parents(depth: int) -> list[int]:
    """Of this worker, and of the workers that it starts."""
    return [os.getppid(), *(anyfork.run(parents, depth - 1) if depth else ())]


@places("main", "isolated")
def check_workers_share_the_default_template(place: str) -> None:
    mine = pid_of(anyfork.warm())
    same(anyfork.run(parents, 3), [mine] * 4)
    children = anyfork.spawn_many(parents, [(1,)] * 5)
    same([child.result(LIMIT) for child in children], [[mine] * 2] * 5)
    for child in children:
        child.close()
    with anyfork.Template() as template:  # others are their owner's alone
        same(len(set(template.run(parents, 1))), 2)


def powers() -> dict[str, str]:
    """Of this thread."""
    names = ("CapBnd", "CapEff", "NoNewPrivs")
    with open("/proc/thread-self/status") as f:
        rows = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    return {"securebits": str(securebits()), **{name: rows[name] for name in names}}


def parents_with_less(how: str) -> tuple[list[int], int]:
    """Of this worker, and of one that it starts after it has given something up."""
    if how == "capability":
        drop_a_capability()
    elif how == "new_privs":
        no_new_privs()
    elif how == "session":
        os.setsid()
    elif how == "securebits":
        same(ctypes.CDLL(None).prctl(28, 3, 0, 0, 0), 0)  # PR_SET_SECUREBITS: SECBIT_NOROOT, locked
    elif how == "thread":
        return in_a_thread_of_its_own(parents_with_less, "new_privs")
    with anyfork.spawn(more_than, powers()) as child:
        return [os.getppid(), child.result(LIMIT)[0]], child.result(LIMIT)[1]


def in_a_thread_of_its_own(fn: Any, *args: Any) -> Any:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(fn(*args)))
    thread.start()
    thread.join()
    return answers[0]


def securebits() -> int:
    bits: int = ctypes.CDLL(None).prctl(27, 0, 0, 0, 0)  # PR_GET_SECUREBITS
    return bits


def more_than(owner: dict[str, str]) -> tuple[int, int]:
    """Its parent; and in how much it may do what its owner may not."""
    mine = powers()
    more = [int(mine[key], 16) & ~int(owner[key], 16) != 0 for key in ("CapBnd", "CapEff")]
    less = mine["NoNewPrivs"] < owner["NoNewPrivs"] or mine["securebits"] < owner["securebits"]
    return os.getppid(), sum(more) + less


@places("main")
def check_a_worker_with_less_is_not_served(place: str) -> None:
    """The template asks the kernel what the worker is by now."""
    mine = pid_of(anyfork.warm())
    of_root = ["capability", "securebits"] if ROOT else []
    for how in ("nothing", "session", "new_privs", "thread", *of_root):
        (own, of_its_worker), more = anyfork.run(parents_with_less, how)
        same((how, own, more), (how, mine, 0))
        same((how, of_its_worker == mine), (how, how == "nothing"))
    with anyfork.spawn(parents, 1, start_new_session=True) as child:
        same(child.result(LIMIT)[0], mine)
        assert child.result(LIMIT)[1] != mine


def door() -> list[int]:
    """The sockets of this worker but for the one that it reports to."""
    names = [int(name) for name in os.listdir("/proc/self/fd")]
    found = []
    for fd in names:
        try:
            with socket.socket(fileno=os.dup(fd)) as one:
                if one.type == socket.SOCK_SEQPACKET:
                    found.append(fd)
        except OSError:
            continue
    return found


def memory_of_others() -> bool:
    """Whether this process may look at one that is not dumpable: CAP_SYS_PTRACE."""
    with open("/proc/self/status") as f:
        return any(line.startswith("CapEff") and int(line.split()[1], 16) >> 19 & 1 for line in f)


def knock(data: bytes, n: int) -> bool:
    """Send the template nonsense, from a worker and from a child of it that is no worker;
    whether it can start workers afterwards."""
    (fd,) = door()
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(fileno=os.dup(fd)) as there:
        for _ in range(n):
            try:
                socket.send_fds(there, [data], [theirs.fileno()], socket.MSG_DONTWAIT)
            except BlockingIOError:
                time.sleep(0.01)
    return bool(anyfork.run(give, True))


@places("main")
def check_nonsense_at_the_door(place: str) -> None:
    template = anyfork.warm()
    pid = pid_of(template)
    for data in (b"", b"x", b"AFKZ\1\0\5\0", os.urandom(472), os.urandom(100_000)):
        same(anyfork.run(knock, data, 300), True)
    same(anyfork.run(give, 1), 1)
    same((pid_of(template), template.stats().made), (pid, 1))
    with open(f"/proc/{pid}/limits") as f:
        assert "Max open files" in f.read()
    if memory_of_others():
        same(len([name for name in os.listdir(f"/proc/{pid}/fd")]) < 60, True)


def start_and_die(pipe: int) -> None:
    worker = anyfork.spawn(time.sleep, 1000)
    worker.wait_ready(LIMIT)
    os.write(pipe, str(worker.pid).encode())
    os.kill(os.getpid(), signal.SIGKILL)


@places("main", "isolated")
def check_workers_of_a_worker_that_dies(place: str) -> None:
    mine = pid_of(anyfork.warm())
    for _ in range(3):
        r, w = os.pipe()
        with anyfork.spawn(start_and_die, w, pass_fds=[w]) as child:
            os.close(w)
            grandchild = int(os.read(r, 20))
            os.close(r)
            same(child.wait(LIMIT), -signal.SIGKILL)
            until(lambda pid=grandchild: is_gone(pid), "the end of its worker")
    same(pid_of(anyfork.warm()), mine)
    same(anyfork.run(parents, 1), [mine] * 2)


def fork_and_start() -> list[int]:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(anyfork.run(parent) == os.getppid())
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
        os._exit(7)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.getppid(), anyfork.run(parent)]


@places("main")
def check_a_forked_child_of_a_worker_has_its_own(place: str) -> None:
    mine = pid_of(anyfork.warm())
    same(anyfork.run(fork_and_start), [0, mine, mine])


# ---- workers that are the owner's children --------------------------------------------------


def zombies() -> list[str]:
    """Children of this process that nobody has waited for."""
    found = []
    for task in os.listdir("/proc/self/task"):
        for pid in map(str, children_of_task(task)):
            with open(f"/proc/{pid}/stat") as f:
                name, _, rest = f.read().rpartition(")")
            if rest.split()[0] == "Z":
                found.append(name.partition("(")[2])
    return found


def children_of_task(task: str) -> list[int]:
    with open(f"/proc/self/task/{task}/children") as f:
        return [int(word) for word in f.read().split()]


def signal_own_thread() -> tuple[int, bool, list[int]]:
    """Its parent; whether the C library knows the number of its thread, by which it is
    signalled, before and after threads and forks of its own."""
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda sig, _frame: got.append(sig))
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    same(threading.get_native_id(), os.getpid())
    answers: list[bool] = []

    def other() -> None:
        signal.pthread_kill(threading.get_ident(), 0)
        answers.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    pid = os.fork()
    if pid == 0:
        signal.pthread_kill(threading.get_ident(), 0)
        os._exit(5)
    same(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 5)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    return os.getppid(), answers == [True], got


@places("main", "isolated")
def check_the_owner_is_the_parent(place: str) -> None:
    me = os.getpid()
    with anyfork.Template(standby=(1, 3), parent="owner", idle=3.0) as template:
        for _ in range(5):
            same(
                template.run(signal_own_thread),
                (me, True, [signal.SIGUSR1] * 2),
            )
        children = template.spawn_many(parent, [()] * 20)
        same({child.result(LIMIT) for child in children}, {me})
        for child in children:
            child.close()
        for status, end in ((-9, lambda: os.kill(os.getpid(), 9)), (3, lambda: sys.exit(3))):
            with template.spawn(end) as child:
                same(child.wait(LIMIT), status)
        with template.child() as leaf:
            same(leaf.run(parent), me)
        # One that dies is replaced, and reaped by the next start.
        until(lambda: template.stats().standbys == 3, "standbys")
        for pid in [p for task in os.listdir("/proc/self/task") for p in children_of_task(task)]:
            with open(f"/proc/{pid}/comm") as f:
                standby = f.read() == "anyfork-standby\n"
            if standby:
                os.kill(pid, signal.SIGKILL)
        until(lambda: template.stats().standbys == 3, "new standbys")
        until(lambda: template.stats().standbys == 1, "the end of those that nobody wants")
        same([template.run(give, n) for n in range(6)], list(range(6)))
        same(template.stats().made, 1)
    until(lambda: "anyfork-standby" not in zombies(), "the end of standbys")
    raises(ValueError, lambda: anyfork.Template(parent="init"))  # type: ignore[arg-type]


@places("main")
def check_more_standbys_than_can_be_offered(place: str) -> None:
    """The socket holds some 160 offers: the others are not made, and killed, again and again."""
    with anyfork.Template(standby=(256, 256), parent="owner") as template:
        until(lambda: template.stats().standbys >= 100, "standbys")
        time.sleep(1.0)
        same(zombies(), [])
        children = template.spawn_many(give, [(n,) for n in range(200)])
        same([child.result(LIMIT) for child in children], list(range(200)))
        for child in children:
            child.close()
    same(zombies(), [])


def fork_without_warnings() -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return [str(one.message) for one in seen]


@places("main")
def check_a_name_does_not_make_threads(place: str) -> None:
    """CPython counts threads by /proc/self/stat, and takes a space in the name for a field."""
    for options in ({}, {"nice": 5}, {"name": "a b c d"}):
        for method in ("zygote", "exec"):
            same(anyfork.run(fork_without_warnings, method=method, **options), [])


def local_hour() -> int:
    return time.localtime(0).tm_hour


@places("main")
def check_the_time_zone_is_the_owners(place: str) -> None:
    before = os.environ.get("TZ")
    try:
        for zone, hour in (("UTC0", 0), ("JST-9", 9), ("UTC0", 0)):
            os.environ["TZ"] = zone
            time.tzset()
            same((zone, anyfork.run(local_hour)), (zone, hour))
            same(anyfork.run(local_hour, env={**os.environ, "TZ": "XXX-3"}), 3)
            same(anyfork.run(local_hour, env={**os.environ, "TZ": "XXX-3"}, method="fork"), 3)
    finally:
        del os.environ["TZ"]
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


@places("main")
def check_workers_of_a_parent_that_dies(place: str) -> None:
    for _ in range(3):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            template = anyfork.Template(parent="owner")
            worker = template.spawn(time.sleep, 1000)
            worker.wait_ready(LIMIT)
            os.write(w, f"{worker.pid} {pid_of(template)}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(w)
        pids = [int(word) for word in os.read(r, 50).split()]
        os.close(r)
        same(os.waitpid(pid, 0)[1], signal.SIGKILL)
        for one in pids:
            until(lambda pid=one: is_gone(pid), "its end")
        same(len(pids), 2)


@places("main")
def check_a_snapshot_of_the_parent(place: str) -> None:
    same(anyfork.run(snapshot_parents, method="exec"), True)


def snapshot_parents() -> bool:
    with anyfork.snapshot(parent="owner") as template:
        return bool(template.run(parent) == os.getpid())


# ---- what it says of itself -------------------------------------------------------------------


def import_there(name: str) -> int:
    __import__(name)
    value: int = sys.modules[name].VALUE  # type: ignore[attr-defined]
    return value


@places("main", "isolated")
def check_stats(place: str) -> None:
    template = anyfork.Template(standby=(1, 3))
    same(template.stats(), (0, 0, 0, None, 0, 0, None, None, ()))
    with template.warm():
        until(lambda: template.stats().standbys == 3, "standbys")
        with template.spawn(time.sleep, LIMIT) as child:
            child.wait_ready(LIMIT)
            until(lambda: template.stats().standbys == 3, "the next standby")
            stats = template.stats()
            same((stats.starts, stats.missed, stats.made, stats.workers), (1, 0, 1, 1))
            assert stats.call is not None
            assert 0 < stats.call[0] <= stats.call[1] < LIMIT, stats
            if memory_of_others():
                assert stats.pss is not None
                assert 1000 < stats.pss < 1_000_000, stats
            else:
                assert stats.pss is None, stats
        same(template.run(give, 1), 1)
        same(template.stats().starts, 2)
        assert "attack_template" in template.stats().late, template.stats()
        with module("raise KeyError(1)\n") as failing, module("VALUE = 1\n") as name:
            raises(KeyError, template.run, __import__, failing)
            same(template.run(import_there, name), 1)
        late = template.stats().late
        same((name in late, failing in late, "sys" in late), (True, False, False))
    same((template.stats().starts, template.stats().pid), (4, None))
