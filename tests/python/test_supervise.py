"""Supervision: specs, the command, and open_supervisor() on each loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import supervise_targets
from attack_helpers import parametrized, run_check
from hypothesis import given, settings
from hypothesis import strategies as st

import anyfork
from anyfork import _supervise_command as command
from anyfork._supervise import ChildSpec, HeartbeatSpec, Runner, SpecError, SupervisorSpec

TIMEOUT = 60.0
PROGRAMS = Path(supervise_targets.__file__).parent
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROOT = os.geteuid() == 0


@pytest.mark.timeout(300)
@parametrized("attack_supervise")
def test_processes(check: str, place: str) -> None:
    run_check("attack_supervise", check, place)


# ---- specs ----------------------------------------------------------------------------------

SLEEP = {"name": "a", "argv": ["sleep", "1"]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"name": "a"}, "child 'a': either a target or a command is wanted"),
    "name": ({**SLEEP, "name": "a b"}, "name: letters, digits"),
    "no name": ({**SLEEP, "name": ""}, "name: from 1 to 64"),
    "both": ({**SLEEP, "target": len}, "child 'a': either a target"),
    "target": ({"name": "a", "target": "module.function"}, "target: 'module:function'"),
    "callable": ({"name": "a", "target": 7}, "target: a callable is wanted, not 7"),
    "words": ({"name": "a", "argv": "sleep 1"}, "argv: a list of words"),
    "method": ({"name": "a", "target": len, "method": "spoon"}, "method: 'spoon' is none of"),
    "thread": ({"name": "a", "target": len, "method": "subint"}, "a thread of this process"),
    "restart": ({**SLEEP, "restart": "always"}, "restart: 'always' is none of 'permanent'"),
    "ready": ({**SLEEP, "ready": "yes"}, "ready: 'yes' is none of 'started', 'report'"),
    "ready fd": ({**SLEEP, "ready": 2}, "ready: a descriptor from 3"),
    "ready of target": ({"name": "a", "target": len, "ready": 5}, "anyfork.notify_ready()"),
    "signal": ({**SLEEP, "stop_signal": "TERM"}, "stop_signal: a signal is wanted, 'SIGTERM'"),
    "grace": ({**SLEEP, "grace": "soon"}, "grace: a number of seconds, 'brutal_kill'"),
    "negative": ({**SLEEP, "grace": -1}, "grace: from 0 to"),
    "bool": ({**SLEEP, "healthy": True}, "healthy: a number of seconds is wanted, not True"),
    "backoff": ({**SLEEP, "backoff": 9, "backoff_max": 1}, "backoff_max: less than backoff"),
    "option": ({**SLEEP, "options": {"colour": 1}}, "unknown option 'colour'"),
    "pipe": ({**SLEEP, "options": {"stdout": subprocess.PIPE}}, "stdout: nobody would have"),
    "env": ({**SLEEP, "env": {"A": 1}}, "env: a table of strings"),
    "heartbeat": ({**SLEEP, "heartbeat": 1}, "heartbeat: a HeartbeatSpec is wanted"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_child_is_named(what: str) -> None:
    members, text = WRONG[what]
    with pytest.raises(SpecError) as caught:
        ChildSpec(**members)
    assert text in str(caught.value)


def test_what_is_wrong_with_a_supervisor_is_named() -> None:
    child = ChildSpec(**SLEEP)  # type: ignore[arg-type]
    for more, text in (
        ({"children": []}, "children: from 1"),
        ({"children": [child, child]}, "two of the name 'a'"),
        ({"strategy": "all"}, "strategy: 'all' is none of"),
        ({"intensity": 1001}, "intensity: from 0 to 1000"),
        ({"period": 0}, "period: from 0.001"),
        ({"preload": "numpy"}, "preload: a list of modules"),
    ):
        with pytest.raises(SpecError) as caught:
            SupervisorSpec(**{"children": [child], **more})  # type: ignore[arg-type]
        assert text in str(caught.value)
    for members, text in (
        ({"interval": 0}, "interval: from 0.01"),
        ({"stopped": 1.0}, "stopped: at least four intervals (4 s)"),
    ):
        with pytest.raises(SpecError, match="".join(text.split("(")[:1])) as caught:
            HeartbeatSpec(**members)
        assert text in str(caught.value)


FILE = """
[supervisor]
strategy = "rest_for_one"
intensity = "infinity"
period = 60
preload = ["json"]

[[child]]
name = "web"
command = ["serve", "--fast"]
cwd = "/"
umask = "027"
env = {A = "1"}
rlimits = {nofile = [64, 128], core = 0, cpu = "infinity"}
stdout = "/dev/null"
stderr = "stdout"
restart = "transient"
ready = 3
ready_timeout = "infinity"
stop_signal = "SIGINT"
grace = "infinity"

[[child]]
name = "worker"
target = "module.sub:function"
args = [1, "two"]
kwargs = {three = 3}
method = "exec"
clear_env = true
heartbeat = {interval = 0.5, in_c = 10, stopped = "infinity"}
backoff = 1
backoff_max = 2
healthy = 3
"""


def test_a_file() -> None:
    import resource

    spec = command.spec_of(tomllib.loads(FILE))
    assert (spec.strategy, spec.intensity, spec.period) == ("rest_for_one", None, 60)
    web, worker = spec.children
    assert web.argv == ["serve", "--fast"] and web.env == {"A": "1"}
    assert (web.ready, web.ready_timeout, web.grace) == (3, None, "infinity")
    assert web.options == {
        "cwd": "/", "umask": 0o27, "stdout": "/dev/null", "stderr": subprocess.STDOUT,
        "rlimits": {
            resource.RLIMIT_NOFILE: (64, 128), resource.RLIMIT_CORE: 0,
            resource.RLIMIT_CPU: resource.RLIM_INFINITY,
        },
    }  # fmt: skip
    assert (worker.target, worker.args, worker.kwargs) == (
        "module.sub:function", (1, "two"), {"three": 3},
    )  # fmt: skip
    assert worker.options == {"env": {}}
    assert worker.heartbeat == HeartbeatSpec(interval=0.5, in_c=10, stopped=None)


WRONG_FILES = {
    "child = 3": "child: at least one table [[child]]",
    "": "child: at least one",
    "[[child]]": "child: name: a name is wanted",
    "[supervisors]": "unknown key 'supervisors'; known are: child, supervisor",
    "supervisor = 1": "supervisor: a table is wanted",
    "[supervisor]\nretries = 1\n[[child]]\nname='a'": "supervisor: unknown key 'retries'",
    "[[child]]\nname = 'a'\ncommand = 'sleep 1'": "child 'a': command: a list of words",
    "[[child]]\nname = 'a'\ncommand = ['x']\nuser = true": "child 'a': user: str or int is wanted",
    "[[child]]\nname = 'a'\ncommand = ['x']\numask = '9'": "child 'a': umask: octal digits",
    "[[child]]\nname = 'a'\ncommand = ['x']\nuser = 'no such'": "child 'a': user: 'no such' is not",
    "[[child]]\nname = 'a'\ncommand = ['x']\nrlimits = {files = 1}": "'files' is no limit",
    "[[child]]\nname = 'a'\ncommand = ['x']\nrlimits = {core = 'x'}": "rlimits: core: a number",
    "[[child]]\nname = 'a'\ncommand = ['x']\nheartbeat = {beat = 1}": "heartbeat: unknown key",
    "[[child]]\nname = 'a'\ncommand = ['x']\nheartbeat = {in_c = 1}": "child 'a': heartbeat: in_c",
    "[[child]]\nname = 'a'\ncommand = ['x']\nargs = [1]": "child 'a': args, kwargs, method",
    "[[child]]\nname = 'a'\ncommand = ['x']\nclear_env = 1": "clear_env: true or false",
    "[supervisor]\nintensity = 'many'\n[[child]]\nname='a'\ncommand=['x']": "supervisor: intensity",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_what_is_wrong_with_a_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        command.read_spec(str(path))
    assert WRONG_FILES[text] in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["infinity", "permanent", "report", "SIGTERM", "a:b", "fork", "stdout"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from((*command._CHILD, "other")), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(command._SUPERVISOR), VALUES, max_size=1),
)
def test_whatever_a_file_says_is_understood_or_named(
    child: dict[str, Any], own: dict[str, Any]
) -> None:
    with contextlib.suppress(SpecError):
        row = {"name": "a", "command": ["x"], **child}
        Runner(command.spec_of({"child": [row], "supervisor": own}), lambda event: None).close()


# ---- the command ----------------------------------------------------------------------------


class Supervised:
    """`anyfork supervise --json SPEC`, and what it has told."""

    def __init__(self, spec: Path, *before: str, **more: Any) -> None:
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join([str(PROGRAMS), *(os.path.abspath(p) for p in given if p)])
        self.events: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "anyfork", "supervise", "--json", str(spec)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path}, **more,
        )  # fmt: skip

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def until(self, kind: str, child: str | None = None) -> dict[str, Any]:
        """The next event of that kind; the test's own timeout is the bound."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if event["event"] == kind and child in (None, event.get("child")):
                return event
        pytest.fail(f"no {kind!r}, but {self.events}")

    def pid(self, child: str) -> int:
        pids = [e["pid"] for e in self.events if (e["event"], e.get("child")) == ("started", child)]
        return int(pids[-1])

    def told(self, kind: str) -> list[str]:
        return [e["child"] for e in self.events if e["event"] == kind]

    def end(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        self.until("finished")
        return self.process.wait(TIMEOUT)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    return path


def child(name: str, *words: str, **more: Any) -> str:
    lines = ["[[child]]", f"name = {json.dumps(name)}"]
    if words:
        lines.append(f"command = {json.dumps(list(words))}")
    lines += [f"{key} = {_toml(value)}" for key, value in more.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + "}"
    return json.dumps(value)


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_order_of_start_and_stop(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        child("first", "sh", "-c", "sleep 0.1; echo >&7; exec sleep 1000", ready=7)
        + child("second", target="supervise_targets:ready_after", args=[0.1], ready="report")
        + child("third", "sleep", "1000"),
    )
    for sig in (signal.SIGTERM, signal.SIGINT):
        with Supervised(spec) as supervised:
            supervised.until("all_ready")
            assert supervised.end(sig) == 0
        assert [
            (e["event"], e["child"]) for e in supervised.events
            if e["event"] in ("started", "ready", "stopping", "stopped")
        ] == [
            ("started", "first"), ("ready", "first"), ("started", "second"), ("ready", "second"),
            ("started", "third"), ("ready", "third"), ("stopping", "third"), ("stopped", "third"),
            ("stopping", "second"), ("stopped", "second"), ("stopping", "first"),
            ("stopped", "first"),
        ]  # fmt: skip


def test_a_crash_loop_ends_it(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "[supervisor]\nintensity = 2\n"
        + child("other", "sleep", "1000")
        + child("loops", "sh", "-c", "exit 3", backoff=0.01),
    )
    with Supervised(spec, stderr=subprocess.PIPE) as supervised:
        supervised.until("finished")
        assert supervised.process.wait(TIMEOUT) == 1
        assert supervised.process.stderr is not None
        with supervised.process.stderr as stream:
            assert stream.read() == (
                "anyfork supervise: max restart intensity reached: to restart 'loops' would be "
                "more than 2 in 5 s; the last time, it exited with status 3\n"
            )
    assert supervised.told("died") == ["loops"] * 3
    delays = [e["delay"] for e in supervised.events if e["event"] == "restarting"]
    assert delays == [0.01, 0.02]
    assert supervised.told("stopped") == ["other"]


def test_it_ends_with_its_children(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        child("job", "true", restart="transient")
        + child("once", target="supervise_targets:fail", args=["x"], restart="temporary"),
    )
    with Supervised(spec) as supervised:
        supervised.until("finished")
        assert supervised.process.wait(TIMEOUT) == 0
    died = next(e for e in supervised.events if e["event"] == "died")
    assert died["detail"] == "exited with status 1: ValueError: x"


def test_a_reload(tmp_path: Path) -> None:
    spec = write(tmp_path, child("a", "sleep", "1001") + child("b", "sleep", "1002"))
    with Supervised(spec) as supervised:
        supervised.until("all_ready")
        a, b = supervised.pid("a"), supervised.pid("b")
        spec.write_text("[[child]]\nname = 3")
        supervised.process.send_signal(signal.SIGHUP)
        failed = supervised.until("reload_failed")
        assert "spec.toml: child: name: a name is wanted, not 3" in failed["detail"]
        spec.write_text(child("a", "sleep", "1001", grace=1) + child("c", "sleep", "1003"))
        supervised.process.send_signal(signal.SIGHUP)
        supervised.until("all_ready")
        assert gone(b) and not gone(a, 0)
        c = supervised.pid("c")
        spec.write_text(child("a", "sleep", "1001") + child("c", "sleep", "1004"))
        supervised.process.send_signal(signal.SIGHUP)
        supervised.until("all_ready")
        assert gone(c) and not gone(a, 0)
        assert supervised.end() == 0
    assert supervised.told("stopped") == ["b", "c", "c", "a"]


def test_nothing_is_left_of_one_that_is_killed(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        child("program", "sleep", "1000")
        + child("zygote", target="supervise_targets:wait")
        + child("exec", target="supervise_targets:deaf", method="exec", ready="report"),
    )
    with Supervised(spec) as supervised:
        supervised.until("all_ready")
        pids = [supervised.pid(name) for name in ("program", "zygote", "exec")]
        supervised.process.kill()
        assert all(gone(pid) for pid in pids)


def test_the_second_signal_kills(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        child("deaf", target="supervise_targets:deaf", ready="report", grace="infinity")
        + child("deaf2", target="supervise_targets:deaf", ready="report", grace=1000),
    )
    with Supervised(spec) as supervised:
        supervised.until("all_ready")
        supervised.process.send_signal(signal.SIGTERM)
        supervised.until("stopping")
        assert supervised.end() == 0
    assert supervised.told("stopping") == ["deaf2"]
    assert sorted(supervised.told("stopped")) == ["deaf", "deaf2"]


def test_its_status(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        child("a", target="supervise_targets:loop", heartbeat={"interval": 0.02, "stopped": 30}),
    )
    with Supervised(spec) as supervised:
        supervised.until("all_ready")
        for _ in range(500):
            supervised.process.send_signal(signal.SIGUSR1)
            row = supervised.until("status")["children"][0]
            if row["verdict"] == "running":
                break
            time.sleep(0.02)
        assert (row["name"], row["state"], row["starts"]) == ("a", "ready", 1)
        assert row["verdict"] == "running" and row["pid"] == supervised.pid("a")
        assert supervised.end() == 0


def test_lines(tmp_path: Path) -> None:
    """What a human sees: on standard error; what children write stays where it is."""
    spec = write(tmp_path, child("say", "echo", "said", restart="temporary"))
    words = [sys.executable, "-m", "anyfork", "supervise", str(spec)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (0, "said\n")
    lines = [line.removeprefix("anyfork supervise: ") for line in done.stderr.splitlines()]
    assert lines[0].startswith("say: started, process ")
    assert lines[1:] == [
        "say: ready", "all are ready", "say: exited with status 0", "say: is not started again",
        "all have ended",
    ]  # fmt: skip
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=TIMEOUT)
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events == ["started", "ready", "all_ready", "exited", "done", "finished"]
    assert done.stderr == "said\n"


def test_check(tmp_path: Path) -> None:
    spec = write(tmp_path, child("a", "no such program", ready=4))
    words = [sys.executable, "-m", "anyfork", "supervise", "--check", str(spec)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{spec}: valid; one_for_one, 3 restarts in 5 s" in done.stdout
    spec.write_text("x = ")
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"anyfork supervise: {spec}: not TOML: ")
    done = subprocess.run([*words[:-1], str(tmp_path / "none")], capture_output=True, text=True,
                          timeout=TIMEOUT)  # fmt: skip
    assert done.stderr == f"anyfork supervise: {tmp_path / 'none'}: No such file or directory\n"
    assert done.returncode == 1


def test_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    show = "echo $A $(pwd) $(umask) $(ulimit -n) $(id -u); echo err >&2"
    target = "supervise_targets:write"
    more: dict[str, Any] = {"user": 65534} if ROOT else {}
    spec = write(
        tmp_path,
        child("sh", "sh", "-c", show, cwd="/", umask="027", env={"A": "1"}, stdout=str(out),
              stderr="stdout", rlimits={"nofile": [64, 64]}, restart="temporary", **more)
        + child("py", target=target, args=[str(tmp_path / "py")], kwargs={"text": "x"}),
    )  # fmt: skip
    with Supervised(spec) as supervised:
        supervised.until("done", "sh")
        end = time.monotonic() + TIMEOUT
        while not (tmp_path / "py").exists() or not (tmp_path / "py").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert supervised.end() == 0
    uid = 65534 if ROOT else os.getuid()
    assert out.read_text() == f"1 / 0027 64 {uid}\nerr\n"


def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    """It reaps orphans, hears signals, and all ends with it."""
    unshare = shutil.which("unshare")
    in_new = [unshare or "", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if ROOT:
        del in_new[1:3]
    if not unshare or subprocess.run([*in_new, "true"], capture_output=True).returncode != 0:
        pytest.skip("no pid namespace can be made here (unshare(1))")
    orphans = "for i in 1 2 3 4 5; do (sleep 0.0$i &); done; sleep 0.3; exec ps -o pid,stat,comm"
    spec = write(
        tmp_path,
        child("orphans", "sh", "-c", orphans, restart="temporary", stdout=str(tmp_path / "ps"))
        + child("zygote", target="supervise_targets:wait"),
    )
    # unshare(1) passes no signal on; the supervisor is its only child.
    with Supervised(spec, *in_new) as supervised:
        supervised.until("done", "orphans")
        children = Path(f"/proc/{supervised.process.pid}/task/{supervised.process.pid}/children")
        first = int(children.read_text())
        os.kill(first, signal.SIGTERM)
        supervised.until("finished")
        assert supervised.process.wait(TIMEOUT) == 0
    assert not [line for line in (tmp_path / "ps").read_text().splitlines() if " Z" in line]


def test_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C is for the supervisor alone; and a terminal that is closed ends it all."""
    deaf = "trap '' INT TERM; echo >&5; while :; do sleep 0.05; done"
    spec = write(
        tmp_path,
        child("sh", "sh", "-c", f"echo $$ >pid; {deaf}", ready=5, cwd=str(tmp_path), grace=0.05),
    )
    words = [sys.executable, "-m", "anyfork", "supervise", str(spec)]
    for how in ("ctrl-c", "closed"):
        pid, terminal = anyfork.forkpty()
        if pid == 0:
            os.execv(sys.executable, words)
        try:
            text = b""
            while b"all are ready" not in text:
                text += os.read(terminal, 4096)
            running = int((tmp_path / "pid").read_text())
            if how == "ctrl-c":
                os.write(terminal, b"\x03")
                while b"all have ended" not in text:
                    text += os.read(terminal, 4096)
                assert b"sh: is being stopped (SIGTERM)" in text
                assert gone(pid)  # before its terminal is
        finally:
            os.close(terminal)
        assert gone(running)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("in_python", [True, False])
def test_programs_take_part(tmp_path: Path, in_python: bool) -> None:
    """In readiness by the environment, and in a heartbeat."""
    program = (
        "import anyfork\n"
        "assert anyfork.begin_heartbeat() and not anyfork.begin_heartbeat()\n"
        "assert anyfork.notify_ready() and not anyfork.notify_ready()\n"
        "import os\nassert not {'ANYFORK_READY_FD', 'ANYFORK_HEARTBEAT_FD'} & os.environ.keys()\n"
        "while True: pass"
    )
    words = [sys.executable, "-c", program]
    if not in_python:
        words = ["sh", "-c", 'eval "echo >&$ANYFORK_READY_FD"; exec sleep 1000']
    beats = {"interval": 0.05, "stopped": 0.5}
    spec = write(tmp_path, child("a", *words, ready="report", heartbeat=beats, restart="temporary"))
    with Supervised(spec) as supervised:
        supervised.until("ready")
        if in_python:
            with contextlib.suppress(ProcessLookupError):  # a slow machine is late itself
                os.kill(supervised.pid("a"), signal.SIGSTOP)
        assert supervised.until("late")["verdict"] == "stopped"  # sleep(1) has no heartbeat
        supervised.until("finished")


def test_the_example(tmp_path: Path) -> None:
    """With a worker that is killed, and started again; and stopped in order."""
    for name in ("supervise.toml", "supervised.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    with Supervised(tmp_path / "supervise.toml", cwd=tmp_path) as supervised:
        supervised.until("all_ready")
        os.kill(supervised.pid("counter"), signal.SIGKILL)
        supervised.until("ready", "counter")
        assert supervised.end() == 0
    assert supervised.told("stopped") == ["counter", "log"]


# ---- on a loop ------------------------------------------------------------------------------


def wait_spec(*more: ChildSpec, **options: Any) -> SupervisorSpec:
    """By fork: the default template would be left open, as it is to be."""
    children = [
        ChildSpec(name="program", argv=["sleep", "1000"], backoff=0.01),
        ChildSpec(name="target", target=supervise_targets.wait, method="fork", backoff=0.01),
        *more,
    ]
    return SupervisorSpec(children=children, **options)


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """anyio.run() on that loop."""
    anyio = pytest.importorskip("anyio")
    if request.param == "trio":
        pytest.importorskip("trio")

    def in_loop(fn: Callable[..., Any], *args: object) -> Any:
        async def bounded() -> Any:
            with anyio.fail_after(TIMEOUT):
                return await fn(*args)

        return anyio.run(bounded, backend=request.param)

    return in_loop


@pytest.fixture
def open_supervisor() -> Callable[..., Any]:
    pytest.importorskip("anyio")
    from anyfork.anyio import open_supervisor

    return open_supervisor


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not gone(pid, 5)]


def test_a_block(run: Callable[..., Any], open_supervisor: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_supervisor(wait_spec()) as supervisor:
            await supervisor.wait_ready()
            pids = [child.pid for child in supervisor.children()]
            assert [child.state for child in supervisor.children()] == ["ready", "ready"]
            os.kill(pids[1], signal.SIGKILL)
            seen = []
            async for event in supervisor.events():
                seen.append((event.child, event.kind))
                if seen.count(("target", "ready")) == 2:
                    break
            assert ("target", "died") in seen and ("target", "restarting") in seen
            supervisor.restart("program")
            with pytest.raises(KeyError, match="no child is named 'x'"):
                supervisor.restart("x")
            async for event in supervisor.events():
                seen.append((event.child, event.kind))
                if seen.count(("program", "ready")) == 3:  # of which one is seen twice
                    break
            counters = supervisor.counters()
            assert counters["target"]["died"] == counters["program"]["stopped"] == 1
            pids += [child.pid for child in supervisor.children()]
        assert not alive(pids)
        assert [e.kind async for e in supervisor.events()][-1] == "finished"

    run(main)


def test_stop_and_reload(run: Callable[..., Any], open_supervisor: Callable[..., Any]) -> None:
    async def main() -> None:
        async with open_supervisor(wait_spec()) as supervisor:
            await supervisor.wait_ready()
            new = ChildSpec(name="new", argv=["sleep", "1000"])
            supervisor.reload(SupervisorSpec(children=[new]))
            async for event in supervisor.events():
                if (event.child, event.kind) == ("new", "ready"):
                    break
            assert [child.name for child in supervisor.children()] == ["new"]
            await supervisor.stop()
            assert [child.state for child in supervisor.children()] == ["done"]
            await supervisor.wait()

    run(main)


def test_a_template_of_its_own(
    run: Callable[..., Any], open_supervisor: Callable[..., Any]
) -> None:
    """Its loop goes on while that is made; cancelled in the middle of it, nothing is left."""
    import anyio

    child = ChildSpec(name="a", target="supervise_targets:wait")
    spec = SupervisorSpec(children=[child], preload=["decimal"])

    async def main() -> None:
        with anyio.move_on_after(0.02):
            async with open_supervisor(spec):
                await anyio.sleep(1000)
        async with open_supervisor(spec) as supervisor:
            await anyio.sleep(0)
            assert supervisor.children()[0].state in ("queued", "starting")
            await supervisor.wait_ready()
            assert supervisor.children()[0].state == "ready"

    run(main)


def test_it_fails_out_of_its_block(
    run: Callable[..., Any], open_supervisor: Callable[..., Any]
) -> None:
    import anyio

    from anyfork.supervision import SupervisorFailed

    bad = ChildSpec(
        name="bad", target=supervise_targets.fail, args=("no",), method="fork", backoff=0
    )
    pids: list[int] = []

    async def main() -> None:
        with pytest.raises(SupervisorFailed) as caught:
            async with open_supervisor(wait_spec(bad, intensity=1)) as supervisor:
                async for _event in supervisor.events():
                    pids.extend(child.pid for child in supervisor.children() if child.pid)
                await anyio.sleep(1000)  # cancelled
        assert (caught.value.child, str(caught.value.__cause__)) == ("bad", "no")
        assert caught.value.event is not None and caught.value.event.returncode == 1
        assert "to restart 'bad' would be more than 1 in 5 s" in str(caught.value)
        assert "in the worker" in "".join(caught.value.__cause__.__notes__)  # type: ignore[union-attr]
        # With an error of the block's own, both are told.
        with pytest.raises(ExceptionGroup) as both:
            async with open_supervisor(wait_spec(bad, intensity=0)):
                try:
                    await anyio.sleep(1000)
                finally:
                    raise LookupError("mine")
        assert [type(exc) for exc in both.value.exceptions] == [SupervisorFailed, LookupError]

    run(main)
    assert pids and not alive(pids)


def test_errors_and_cancellation_leave_nothing(
    run: Callable[..., Any], open_supervisor: Callable[..., Any]
) -> None:
    import anyio

    deaf = ChildSpec(
        name="deaf", target=supervise_targets.deaf, method="fork", ready="report", grace=0.05
    )
    pids: list[int] = []

    async def main() -> None:
        with pytest.raises(LookupError, match="mine"):
            async with open_supervisor(wait_spec(deaf)) as supervisor:
                await supervisor.wait_ready()
                pids.extend(child.pid for child in supervisor.children())
                raise LookupError("mine")
        assert not alive(pids)
        for seconds in (0, 0.01, 0.05, 0.3):
            with anyio.move_on_after(seconds) as scope:
                async with open_supervisor(wait_spec(deaf)) as supervisor:
                    try:
                        await anyio.sleep(1000)
                    finally:
                        pids.extend(c.pid for c in supervisor.children() if c.pid)
            assert scope.cancelled_caught

    run(main)
    assert not alive(pids)


def test_the_end_of_a_block_is_cancelled(
    run: Callable[..., Any],
    open_supervisor: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that may take for ever, by the spec."""
    import anyio

    monkeypatch.setattr("anyfork._aio_supervise._CANCELLED_GRACE", 0.05)
    deaf = ChildSpec(
        name="deaf", target=supervise_targets.deaf, method="fork", ready="report", grace="infinity"
    )
    pids: list[int] = []

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with open_supervisor(wait_spec(deaf)) as supervisor:
                await supervisor.wait_ready()
                pids.extend(child.pid for child in supervisor.children())
                scope.deadline = anyio.current_time() + 0.1
        assert scope.cancelled_caught

    run(main)
    assert len(pids) == 3 and not alive(pids)


def test_a_cancelled_task_of_asyncio(open_supervisor: Callable[..., Any]) -> None:
    pids: list[int] = []

    async def block() -> None:
        async with open_supervisor(wait_spec()) as supervisor:
            await supervisor.wait_ready()
            pids.extend(child.pid for child in supervisor.children())
            await asyncio.sleep(1000)

    async def main() -> None:
        task = asyncio.create_task(block())
        while not pids:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))
    assert pids and not alive(pids)


def test_ctrl_c(run: Callable[..., Any], open_supervisor: Callable[..., Any]) -> None:
    import anyio

    pids: list[int] = []

    async def main() -> None:
        async with open_supervisor(wait_spec()) as supervisor:
            await supervisor.wait_ready()
            pids.extend(child.pid for child in supervisor.children())
            signal.raise_signal(signal.SIGINT)
            await anyio.sleep(1000)

    with pytest.raises(KeyboardInterrupt):
        run(main)
    assert pids and not alive(pids)


# ---- the runner, with a clock of its own ----------------------------------------------------


@contextlib.contextmanager
def runner_at(spec: SupervisorSpec) -> Iterator[tuple[Runner, list[str], list[int]]]:
    now, told = [0], list[str]()
    runner = Runner(spec, lambda event: told.append(str(event)), clock=lambda: now[0])
    try:
        yield runner, told, now
    finally:
        runner.close()


def test_what_is_due_is_told_by_its_timeout() -> None:
    spec = SupervisorSpec(
        children=[ChildSpec(name="a", argv=["/no/such"], backoff=8, backoff_max=9)], intensity=2
    )
    with runner_at(spec) as (runner, told, now):
        assert runner.timeout() is None
        runner.begin()
        assert runner.timeout() == 8
        now[0] = 3 * 10**9
        runner.handle()
        assert runner.timeout() == 5
        now[0] = 8 * 10**9
        runner.handle()
        assert runner.timeout() == 9
        now[0] = 17 * 10**9
        runner.handle()
        assert not runner.finished  # the first one was more than the period ago
    assert told.count("a: is started again in 9 s") == 2


def test_closing_twice_and_waking_later_does_no_harm() -> None:
    with runner_at(wait_spec()) as (runner, _told, _now):
        runner.begin()
        pids = list(runner.pids())
        runner.close()
        runner.wake()
    assert pids and not alive(pids)


def test_outside_of_a_supervisor() -> None:
    assert not anyfork.notify_ready()
    assert not anyfork.begin_heartbeat()
