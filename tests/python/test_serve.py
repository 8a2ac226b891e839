"""`anyfork serve` and `anyfork-run`: a program as if it was run directly; and the server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import anyfork
from anyfork import _serve

TIMEOUT = 60
# Not one long sleep: a signal that comes just before that does not end it, in any Python.
LONG = "import time; print('up', flush=True)\nwhile True: time.sleep(0.05)"
STATUS = Path("/proc/self/status").read_text()
ROOT = os.geteuid() == 0 and "CapEff:\t0000000000000000" not in STATUS


def client() -> str:
    """`anyfork-run` of the package that is tested: installed as a script, or beside it."""
    beside = Path(anyfork.__file__).resolve().parents[1] / "bin"
    for folder in (beside, Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if (folder / "anyfork-run").exists():
            return str(folder / "anyfork-run")
    pytest.fail("anyfork-run is not installed")


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.02)
    return found


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state in "ZX"


def after(code: str) -> list[str]:
    """Words before a command, which is executed after that. (ctypes leaves a file open.)"""
    program = (
        "import ctypes, os, sys\nlibc = ctypes.CDLL(None)\n"
        "exec(sys.argv[1])\nos.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", program, code]


class Ended(NamedTuple):
    returncode: int
    out: str
    err: str


class Served:
    """A folder for sockets, and the servers in it."""

    def __init__(self, runtime: Path, home: Path) -> None:
        self.runtime, self.home = runtime, home
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        self.client = client()
        self.names: set[str] = set()

    def serve(self, *args: str, name: str = "default", **more: Any) -> Ended:
        env = more.pop("env", self.env)
        before = after(more.pop("after")) if "after" in more else []
        run = subprocess.run(
            [*before, sys.executable, "-m", "anyfork", "serve", "--name", name, *args],
            capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL,
            env=env, **more,
        )  # fmt: skip
        return Ended(run.returncode, run.stdout, run.stderr)

    def start(self, *args: str, name: str = "default", **more: Any) -> int:
        """Detached; its pid."""
        self.names.add(name)
        ended = self.serve("--detach", *args, name=name, **more)
        assert ended.returncode == 0, ended
        return int(ended.out.split()[-1])

    def status(self, name: str = "default") -> dict[str, Any]:
        ended = self.serve("--status", "--json", name=name)
        assert ended.returncode == 0, ended
        found: dict[str, Any] = json.loads(ended.out)
        return found

    def stop(self, name: str = "default") -> None:
        self.serve("--stop", name=name)

    def popen(self, *args: str, **more: Any) -> subprocess.Popen[bytes]:
        more.setdefault("env", self.env)
        more.setdefault("stdin", subprocess.DEVNULL)
        more.setdefault("stdout", subprocess.PIPE)
        more.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen([self.client, *args], **more)

    def run(self, *args: str, python: bool = False, **more: Any) -> Ended:
        more.setdefault("env", self.env)
        if "input" not in more:
            more.setdefault("stdin", subprocess.DEVNULL)
        more.setdefault("cwd", self.home)
        command = [sys.executable] if python else [self.client]
        if "after" in more:
            command = [*after(more.pop("after")), *command]
        run = subprocess.run(
            [*command, *args], capture_output=True, text=True, timeout=TIMEOUT, **more
        )
        return Ended(run.returncode, run.stdout, run.stderr)

    @contextlib.contextmanager
    def running(self, code: str = LONG, *args: str, **more: Any) -> Iterator[Any]:
        """A client whose worker has said its pid: (client, pid)."""
        code = f"import os; print(os.getpid(), flush=True)\n{code}"
        process = self.popen(*args, "-c", code, **more)
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=TIMEOUT)


@pytest.fixture(scope="module", autouse=True)
def default_signals() -> Iterator[None]:
    """Programs inherit what is ignored: under nohup(1), or in a shell's background."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With the server `default`, which preloads json."""
    runtime = tmp_path_factory.mktemp("runtime")
    home = tmp_path_factory.mktemp("home")
    found = Served(runtime, home)
    found.start("--preload", "json,decimal")
    yield found
    for name in found.names:
        found.stop(name)


@pytest.fixture
def files(served: Served) -> Path:
    (served.home / "script.py").write_text(
        "import sys\n\n\ndef fail():\n    raise ValueError(sys.argv[1:])\n\n\n"
        "print(sys.argv, __file__, sys.path[0], __name__, sorted(globals()))\n"
        "if len(sys.argv) > 1:\n    fail()\n"
    )
    (served.home / "module.py").write_text(
        "import sys\nprint(__name__, sys.argv, sys.path[0], __spec__.name, sorted(globals()))\n"
        "if len(sys.argv) > 1:\n    1 / 0\n"
    )
    (served.home / "broken.py").write_text("a b\n")
    package = served.home / "package"
    package.mkdir(exist_ok=True)
    (package / "__main__.py").write_text("import sys\nprint(sys.argv, sys.path[0])\n1 / 0\n")
    return served.home


# ---- as python runs it ----------------------------------------------------------------

AS_PYTHON = {
    "code": ["-c", "import sys; print(sys.argv, sys.path[0], sys.orig_argv[1:])", "a", "b c"],
    "globals": ["-c", "print(sorted(globals()), __name__, __builtins__)"],
    "script": ["script.py"],
    "script with arguments raises": ["script.py", "x", "-c"],
    "dotted path": ["./script.py", "x"],
    "module": ["-m", "module"],
    "module raises": ["-m", "module", "x"],
    "no such module": ["-m", "no.such"],
    "no such script": ["nosuch.py"],
    "syntax error": ["broken.py"],
    "syntax error in code": ["-c", "a b"],
    "folder": ["package"],
    "folder without main": ["."],
    "traceback": ["-c", "def f():\n    1 / 0\nf()"],
    "chained": ["-c", "try:\n    1/0\nexcept Exception as e:\n    raise ValueError from e"],
    "exit": ["-c", "raise SystemExit"],
    "exit with a number": ["-c", "import sys; sys.exit(300)"],
    "exit with a text": ["-c", "import sys; sys.exit('farewell')"],
    "exit at once": ["-c", "import os; os._exit(7)"],
    "interrupted": ["-c", "raise KeyboardInterrupt"],
    "segmentation fault": ["-c", "import os; os.kill(os.getpid(), 11)"],
    "abort": ["-c", "import os; os.abort()"],
    "terminated": ["-c", "import os; os.kill(os.getpid(), 15)"],
    "atexit": ["-c", "import atexit; atexit.register(print, 'bye'); print('hi')"],
    "thread": [
        "-c",
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('t'))).start(); print('m')",
    ],
    "finalizer": ["-c", "class A:\n    def __del__(self):\n        print('del')\na = A()"],
    "hook": ["-c", "import sys\nsys.excepthook = lambda *a: print('hook', a[0])\n1/0"],
    "failing hook": [
        "-c", "import sys\ndef h(*a):\n    1/0\nsys.excepthook = h\nraise ValueError(3)",
    ],
    "streams": [
        "-c", "import sys; print(sys.stdin, sys.stdout, sys.stderr, sys.stdin.mode)",
    ],
    "state": [
        "-c",
        "import os, resource, signal\n"
        "print(os.getcwd(), os.umask(0), sorted(os.environ.items()))\n"
        "print([resource.getrlimit(i) for i in range(16)])\n"
        "print([(s, signal.getsignal(s)) for s in range(1, 32)], signal.pthread_sigmask(0, []))\n"
        "print(os.getpriority(0, 0), sorted(os.sched_getaffinity(0)))",
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", AS_PYTHON)
def test_as_python(served: Served, files: Path, what: str) -> None:
    args = AS_PYTHON[what]
    assert served.run(*args) == served.run(*args, python=True)


@pytest.mark.parametrize("args", [["-"], ["-", "x"], []])
def test_program_from_standard_input(served: Served, args: list[str]) -> None:
    program = "import sys\nprint(sys.argv, sys.path[0])\nif len(sys.argv) > 1:\n    1/0\n"
    assert served.run(*args, input=program) == served.run(*args, python=True, input=program)


def test_it_is_warm(served: Served) -> None:
    code = "import sys; print('decimal' in sys.modules, sys.modules['__main__'].__name__)"
    assert served.run("-c", code).out == "True __main__\n"


def test_files_that_are_left_open_are_written(served: Served, tmp_path: Path) -> None:
    (tmp_path / "holder.py").write_text("f = open('second', 'w')\nf.write('b')\n")
    code = "import holder\nf = open('first', 'w'); f.write('a')"
    ended = served.run("-c", code, cwd=tmp_path)  # debug builds warn of them
    assert (ended.returncode, ended.out) == (0, ""), ended
    assert (tmp_path / "first").read_text() == "a"
    assert (tmp_path / "second").read_text() == "b"


def test_python_path(served: Served, tmp_path: Path) -> None:
    code = "import sys; print(sys.path[:3])"
    path = os.pathsep.join([str(tmp_path), "relative", os.environ.get("PYTHONPATH", "")])
    for more in ({"PYTHONPATH": path}, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}):
        env = {**served.env, **more}
        assert served.run("-c", code, env=env) == served.run("-c", code, python=True, env=env)


def test_unbuffered(served: Served) -> None:
    env = {**served.env, "PYTHONUNBUFFERED": "1"}
    code = "import os\nprint('a')\nos._exit(0)"
    assert served.run("-c", code, env=env).out == "a\n"
    del env["PYTHONUNBUFFERED"]
    assert served.run("-c", code, env=env).out == ""


def test_environment_that_only_an_interpreter_reads_is_refused(served: Served) -> None:
    ended = served.run("-c", "1", env={**served.env, "PYTHONHASHSEED": "7"})
    assert (ended.returncode, ended.out) == (125, "")
    assert "PYTHONHASHSEED is '7' here and not set at the server" in ended.err


def test_environment_is_the_clients(served: Served) -> None:
    code = "import os; print(sorted(os.environb.items()))"
    env = {"XDG_RUNTIME_DIR": served.env["XDG_RUNTIME_DIR"], "A": "1=2", "EMPTY": ""}
    if "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    for name in _serve._AT_START:
        if name in os.environ:
            env[name] = os.environ[name]
    found = sorted((os.fsencode(name), os.fsencode(value)) for name, value in env.items())
    assert served.run("-c", code, env=env).out == f"{found}\n"


def test_large_environment_and_arguments(served: Served) -> None:
    env = {**served.env, **{f"LARGE{n}": "x" * 100_000 for n in range(8)}}
    code = "import os, sys; print(sum(map(len, os.environ.values())) > 800000, len(sys.argv[1]))"
    assert served.run("-c", code, "y" * 120_000, env=env).out == "True 120000\n"


def test_limits_umask_and_nice(served: Served) -> None:
    def lower() -> None:
        os.umask(0o27)
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    args = AS_PYTHON["state"]
    ours = served.run(*args, preexec_fn=lower)
    assert ours == served.run(*args, python=True, preexec_fn=lower)
    assert "(64, 1024)" in ours.out


def test_ignored_and_blocked_signals(served: Served) -> None:
    def prepare() -> None:
        for sig in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(sig, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    args = AS_PYTHON["state"]
    assert served.run(*args, preexec_fn=prepare) == served.run(
        *args, python=True, preexec_fn=prepare
    )


def test_working_directory_that_was_removed(served: Served, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os\ntry:\n    os.getcwd()\nexcept OSError as e:\n    print(e.errno)"
    run = served.run("-c", code, cwd=gone, preexec_fn=lambda: os.rmdir(gone))
    assert run == Ended(0, "2\n", "")


# ---- streams and descriptors -----------------------------------------------------------


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams(served: Served, tmp_path: Path, closed: tuple[int, ...]) -> None:
    code = (
        "import os, sys\n"
        f"f = open({str(tmp_path / 'found')!r}, 'w')\n"
        "print([s is None for s in (sys.stdin, sys.stdout, sys.stderr)], f.fileno() > 2, file=f)"
    )

    def close() -> None:
        for fd in closed:
            os.close(fd)

    found = []
    for python in (False, True):
        assert served.run("-c", code, python=python, preexec_fn=close).returncode == 0
        found.append((tmp_path / "found").read_text())
    assert found[0] == found[1]


def test_large_streams(served: Served) -> None:
    code = "import sys; data = sys.stdin.read(); sys.stdout.write(data); sys.stderr.write(data)"
    text = "0123456789abcdef" * 500_000
    assert served.run("-c", code, input=text) == Ended(0, text, text)


def test_a_reader_that_has_gone(served: Served) -> None:
    code = "import sys\nfor n in range(100000): print(n)"
    found = []
    for command in ([served.client], [sys.executable]):
        r, w = os.pipe()
        os.close(r)
        run = subprocess.run(
            [*command, "-c", code], stdin=subprocess.DEVNULL, stdout=w, stderr=subprocess.PIPE,
            env=served.env, timeout=TIMEOUT,
        )  # fmt: skip
        os.close(w)
        found.append(run)
    assert found[0].returncode == found[1].returncode
    assert b"BrokenPipeError" in found[0].stderr


def test_inherited_descriptors(served: Served) -> None:
    r, w = os.pipe()
    try:
        code = f"import os; os.write({w}, b'x'); print(os.get_inheritable({w}))"
        run = served.run("-c", code, pass_fds=[w])
        assert run == Ended(0, "True\n", "")
        assert os.read(r, 10) == b"x"
    finally:
        os.close(r)
        os.close(w)


def test_process_substitution(served: Served) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    code = "import sys; print(open(sys.argv[1]).read())"
    run = subprocess.run(
        [bash, "-c", f'"$1" -c "{code}" <(echo there)', "bash", served.client],
        env=served.env, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.stdout == "there\n\n", run.stderr


def test_the_server_keeps_no_descriptor(served: Served) -> None:
    pid = served.status()["pid"]

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    served.run("-c", "1")
    before = until(lambda: served.status()["running"] == 0 and descriptors())
    for _ in range(5):
        served.run("-c", "import sys; sys.exit(3)")
        served.run("-c", "1", env={**served.env, "PYTHONHASHSEED": "7"})
        with served.running() as (process, _pid):
            process.kill()
    # Offers of standbys lie in a queue, not in the table.
    until(lambda: descriptors() <= before)


# ---- signals, and whose death is whose ----------------------------------------------------


def test_signals_are_passed_on(served: Served) -> None:
    code = (
        "import signal, time\n"
        "for sig in (1, 10, 12, 15, 28):\n"
        "    signal.signal(sig, lambda n, _f: print(n, flush=True))\n"
        "print('set', flush=True)\n"
        "while True:\n    time.sleep(0.05)\n"
    )
    with served.running(code) as (process, _pid):
        assert process.stdout.readline() == b"set\n"
        for sig in (1, 10, 12, 15, 28):
            process.send_signal(sig)
            assert process.stdout.readline() == b"%d\n" % sig


def test_interrupt(served: Served) -> None:
    with served.running() as (process, pid):
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGINT
        assert err.endswith(b"KeyboardInterrupt\n")
        assert b"anyfork" not in err
        assert is_gone(pid)


def test_termination(served: Served) -> None:
    with served.running() as (process, pid):
        process.terminate()
        assert process.wait(TIMEOUT) == -signal.SIGTERM
        assert is_gone(pid)


def test_a_signal_before_the_start_ends_the_client(served: Served, tmp_path: Path) -> None:
    with silent_server(tmp_path) as env:
        # No pipes: their other ends lie in the queue of the server.
        null = subprocess.DEVNULL
        process = served.popen("-c", "1", env=env, stdout=null, stderr=null)
        until(lambda: b"poll" in Path(f"/proc/{process.pid}/wchan").read_bytes())
        process.terminate()
        assert process.wait(TIMEOUT) == -signal.SIGTERM


def test_a_killed_client_takes_its_worker_along(served: Served) -> None:
    with served.running() as (process, pid):
        process.kill()
        until(lambda: is_gone(pid))
    until(lambda: served.status()["running"] == 0)


def test_a_killed_client_takes_a_stopped_worker_along(served: Served) -> None:
    with served.running() as (process, pid):
        os.kill(pid, signal.SIGSTOP)
        process.kill()
        until(lambda: is_gone(pid))


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR1])
def test_a_killed_worker_kills_its_client(served: Served, sig: int) -> None:
    with served.running() as (process, pid):
        os.kill(pid, sig)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -sig


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment(served: Served, sig: int) -> None:
    chance = random.Random(sig)
    null = subprocess.DEVNULL
    for _ in range(40):
        process = served.popen("-c", "while True: pass", stdout=null, stderr=null)
        time.sleep(chance.random() * 0.02)
        process.send_signal(sig)
        assert process.wait(TIMEOUT) == -sig
    until(lambda: served.status()["running"] == 0)


def test_no_core_file_of_the_client(served: Served, tmp_path: Path) -> None:
    def allow() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    with served.running(cwd=tmp_path, preexec_fn=allow) as (process, pid):
        os.kill(pid, signal.SIGSEGV)
        _pid, status = os.waitpid(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == -signal.SIGSEGV
        assert not os.WCOREDUMP(status)


def test_a_server_that_is_killed(served: Served) -> None:
    server = served.start(name="killed")
    with served.running(LONG, "--name", "killed") as (process, pid):
        os.kill(server, signal.SIGKILL)
        _out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 125
        assert b"the server has gone" in err
        until(lambda: is_gone(pid))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT)


def test_programs_end_while_the_template_is_stopped(served: Served) -> None:
    served.start(name="no-template")
    args = ("--name", "no-template", "-c", "raise SystemExit(3)")
    null = subprocess.DEVNULL
    until(lambda: served.status("no-template")["standbys"] == 8)
    time.sleep(0.2)  # the last one is offered
    with stopped(served.status("no-template")["template_pid"]):
        for _ in range(8):
            with killed_after(served.popen(*args, stdout=null, stderr=null)) as process:
                assert process.wait(10) == 3
        # Nobody makes another standby.
        with killed_after(served.popen(*args, stdout=null, stderr=null)) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            process.terminate()
            assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_programs_are_killed_while_the_template_is_stopped(served: Served, sig: int) -> None:
    with served.running() as (process, pid), stopped(served.status()["template_pid"]):
        assert process.stdout.readline() == b"up\n"
        if sig == signal.SIGKILL:
            os.kill(pid, sig)
        else:
            process.send_signal(sig)
        assert process.wait(10) == -sig


def test_a_signal_while_the_server_is_stopped(served: Served) -> None:
    server = served.start(name="no-server")
    with (
        served.running(LONG, "--name", "no-server") as (process, pid),
        served.running("input()", "--name", "no-server", stdin=subprocess.PIPE) as (other, its_pid),
        stopped(server),
    ):
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
        assert is_gone(pid)
        other.stdin.write(b"\n")
        other.stdin.flush()
        until(lambda: is_gone(its_pid))
        other.terminate()
        assert other.wait(10) in (0, -signal.SIGTERM)  # the kernel tells, or not


def test_stop_and_continue(served: Served) -> None:
    code = "import time\nn = 0\nwhile True:\n    n += 1; print(n, flush=True); time.sleep(0.02)"

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    # A group of its own in our session: else the kernel would ignore the signal.
    with served.running(code, process_group=0) as (process, pid):
        process.stdout.readline()
        process.send_signal(signal.SIGTSTP)
        until(lambda: state(pid) == "T" and state(process.pid) == "T")
        process.send_signal(signal.SIGCONT)
        until(lambda: state(pid) != "T" and state(process.pid) != "T")
        assert int(process.stdout.readline()) > 0


def test_many_at_once(served: Served) -> None:
    running = [served.popen("-c", f"import sys; print({n}); sys.exit({n})") for n in range(30)]
    for n, process in enumerate(running):
        out, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out, err) == (n, b"%d\n" % n, b"")
    until(lambda: served.status()["running"] == 0)


# ---- on a terminal -----------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with a program that it controls."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Path) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=cwd,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.slave = slave
        self.seen = ""

    def read(self, pattern: str, seconds: float = 20) -> re.Match[str]:
        """What has come up to the end of the pattern is taken."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.seen)
            if found is not None:
                self.seen = self.seen[found.end() :]
                return found
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], min(left, 0.5))[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self) -> int:
        """Its end, while what it writes is read."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.02)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return self.process.returncode

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):  # the test has closed it
                os.close(fd)


@pytest.fixture
def terminal(served: Served) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: str) -> Terminal:
        opened.append(Terminal([served.client, *args], served.env, served.home))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def shell(served: Served) -> Iterator[Terminal]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash, whose job control this is")
    env = {**served.env, "PS1": "ready> ", "TERM": "dumb"}
    found = Terminal([bash, "--norc", "--noprofile", "-i"], env, served.home)
    found.read("ready> ")
    yield found
    found.close()


def test_terminal_is_one(terminal: Callable[..., Terminal]) -> None:
    code = (
        "import os, sys\n"
        "print([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)])\n"
        "print(os.get_terminal_size(), os.ttyname(0) == os.ttyname(1))\n"
        "print(os.tcgetpgrp(0) == os.getpgrp(), open('/dev/tty').isatty())\n"
        "print(repr(input('? ')))\n"
        "sys.exit(5)"
    )
    t = terminal("-c", code)
    t.read(r"\[True, True, True\]")
    t.read(r"columns=111, lines=33\) True")
    t.read("True True")
    t.read(r"\? ")
    until(t.is_raw)
    t.type("hello\r")
    t.read("'hello'")
    assert t.wait() == 5
    assert termios.tcgetattr(t.slave) == t.before


def test_end_of_file(terminal: Callable[..., Terminal]) -> None:
    t = terminal("-c", "import sys; print('go', flush=True); print(repr(sys.stdin.read()))")
    t.read("go")
    until(t.is_raw)
    t.type("a\r\x04")
    t.read(r"'a\\n'")
    assert t.wait() == 0


def test_interrupt_by_key(terminal: Callable[..., Terminal]) -> None:
    t = terminal("-c", LONG)
    t.read("up")
    until(t.is_raw)
    t.type("\x03")
    t.read("KeyboardInterrupt")
    assert t.wait() == -signal.SIGINT
    assert termios.tcgetattr(t.slave) == t.before


def test_keys_as_they_are(terminal: Callable[..., Terminal]) -> None:
    code = (
        "import os, sys, tty\n"
        "tty.setraw(0); print('raw', flush=True)\n"
        "print([os.read(0, 1) for _ in range(3)])"
    )
    t = terminal("-c", code)
    t.read("raw")
    until(t.is_raw)
    t.type("\x03\x1a\x04")  # no signal, no stop, no end of file
    t.read(re.escape(r"[b'\x03', b'\x1a', b'\x04']"))
    assert t.wait() == 0


def test_window_size(terminal: Callable[..., Terminal]) -> None:
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGWINCH, lambda *_: print(os.get_terminal_size(), flush=True))\n"
        "print('set', flush=True)\n"
        "while True:\n    time.sleep(0.05)"
    )
    t = terminal("-c", code)
    t.read("set")
    until(t.is_raw)
    fcntl.ioctl(t.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    t.read("columns=60, lines=20")


def test_all_that_is_written_arrives(terminal: Callable[..., Terminal]) -> None:
    t = terminal("-c", "import sys; sys.stdout.write('x' * 300000 + 'end')")
    assert t.wait() == 0
    assert t.seen == "x" * 300000 + "end"


def test_terminal_is_restored_when_it_is_killed(terminal: Callable[..., Terminal]) -> None:
    t = terminal("-c", "import os; print(os.getpid(), flush=True)\n" + LONG)
    pid = int(t.read(r"(\d+)\r\n").group(1))
    until(t.is_raw)
    os.kill(pid, signal.SIGKILL)
    assert t.wait() == -signal.SIGKILL
    assert termios.tcgetattr(t.slave) == t.before


def test_terminal_is_restored_when_the_client_is_terminated(
    terminal: Callable[..., Terminal],
) -> None:
    t = terminal("-c", LONG)
    t.read("up")
    until(t.is_raw)
    t.process.terminate()
    assert t.wait() == -signal.SIGTERM
    assert termios.tcgetattr(t.slave) == t.before


def test_terminal_is_restored_when_the_server_is_killed(
    served: Served, terminal: Callable[..., Terminal]
) -> None:
    server = served.start(name="killed2")
    t = terminal("--name", "killed2", "-c", LONG)
    t.read("up")
    until(t.is_raw)
    os.kill(server, signal.SIGKILL)
    t.read("the server has gone")
    assert t.wait() == 125
    assert termios.tcgetattr(t.slave) == t.before


def test_a_terminal_that_hangs_up(served: Served, terminal: Callable[..., Terminal]) -> None:
    t = terminal("-c", "import os; print(os.getpid(), flush=True)\n" + LONG)
    pid = int(t.read(r"(\d+)\r\n").group(1))
    until(t.is_raw)
    os.close(t.master)
    os.close(t.slave)
    t.process.wait(TIMEOUT)
    until(lambda: is_gone(pid))
    t.master, t.slave = os.openpty()  # to be closed


def test_part_of_a_terminal(served: Served, shell: Terminal) -> None:
    code = "import sys; print([s.isatty() for s in (sys.stdin, sys.stdout)], sys.stdin.read())"
    shell.type(f"echo in | {served.client} -c '{code}' | cat; echo $?.\r")
    shell.read(r"\[False, False\] in\r\n")
    shell.read(r"0\.\r\n")
    code = "import sys; print(1 + 1, file=sys.stderr); print(input())"
    shell.type(f"{served.client} -c '{code}' | cat\r")
    shell.read("\n2\r\n")
    shell.type("typed\r")
    shell.read("typed\r\ntyped")
    shell.read("ready> ")


def test_job_control(served: Served, shell: Terminal) -> None:
    code = (
        "import signal, time\n"
        "print(\\\"pid\\\", __import__(\\\"os\\\").getpid(), flush=True)\n"
        "while True:\n"
        "    print(repr(input(\\\"? \\\")))\n"
    ).replace("\n", "\\n")
    shell.type(f'{served.client} -c "exec(\'\'\'{code}\'\'\')"\r')
    pid = int(shell.read(r"pid (\d+)\r\n").group(1))
    shell.read(r"\? ")

    def state() -> str:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    time.sleep(0.3)
    shell.type("\x1a")
    shell.read("Stopped")
    shell.read("ready> ")
    until(lambda: state() == "T")
    assert termios.tcgetattr(shell.slave)[3] & termios.ISIG
    shell.type("fg\r")
    until(lambda: state() == "S")
    time.sleep(0.3)
    shell.type("again\r")
    shell.read("'again'")
    shell.type("\x1a")
    shell.read("Stopped")
    shell.type("bg\r")
    until(lambda: state() == "S")
    shell.type("echo the shell has the $((40 + 2)) keys\r")
    shell.read("the shell has the 42 keys")
    shell.type("fg\r")
    time.sleep(1)
    shell.type("third\r")
    shell.read("'third'")
    time.sleep(0.3)  # not just before it reads again: see LONG
    shell.type("\x03")
    shell.read("KeyboardInterrupt")
    shell.read("ready> ")
    shell.type("echo $?.\r")
    shell.read(r"130\.")
    until(lambda: is_gone(pid))


def test_background_job(served: Served, shell: Terminal) -> None:
    shell.type(f"{served.client} -c 'print(6 * 7, flush=True)' & wait; echo done.\r")
    shell.read("42\r\n")
    shell.read(r"done\.\r\n")


# ---- the server ---------------------------------------------------------------------------


def connect(served: Served, name: str = "default") -> socket.socket:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(served.runtime / "anyfork", os.O_PATH)
    try:
        s.connect(f"/proc/self/fd/{folder}/{name}.sock")
    finally:
        os.close(folder)
    s.settimeout(20)
    return s


@contextlib.contextmanager
def silent_server(runtime: Path) -> Iterator[dict[str, str]]:
    """One that never answers; the environment of its clients."""
    (runtime / "anyfork").mkdir(mode=0o700)
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(runtime / "anyfork", os.O_PATH)
    s.bind(f"/proc/self/fd/{folder}/default.sock")
    os.close(folder)
    s.listen()
    try:
        yield {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    finally:
        s.close()


def head(op: int, magic: int = _serve._MAGIC, version: int = _serve._VERSION) -> bytes:
    return _serve._HEAD.pack(magic, version, op)


def request(**changes: Any) -> bytes:
    """As a client would send it, but for the changes."""
    fields: dict[str, Any] = {
        "magic": _serve._MAGIC, "version": _serve._VERSION, "op": _serve.RUN, "kind": b"c",
        "streams": 7, "terminal": 0, "padding": 0, "umask": 0o22, "nice": 0, "n_words": 1,
        "n_env": 0, "n_fds": 0, "mask": 0, "ignored": 0, "body_bytes": 2,
    } | changes  # fmt: skip
    limits = [limit % 2**64 for i in range(16) for limit in resource.getrlimit(i)]
    body = fields.pop("body_bytes")
    numbers = fields.pop("numbers", [])
    numbers = [*numbers, *[0] * (240 - len(numbers))]
    return _serve._REQUEST.pack(*fields.values(), *limits, body, *numbers)


def body(data: bytes = b"1\0", sealed: bool = True) -> int:
    fd = os.memfd_create("body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _serve._SEALS)
    return fd


MALFORMED: dict[str, tuple[bytes, int]] = {
    "noise": (b"x" * 100, 0),
    "short": (b"x", 0),
    "magic": (head(_serve.STATUS, magic=7), 0),
    "operation": (head(99), 0),
    "version": (head(_serve.STATUS, version=99), 0),
    "too short": (request()[:-1], 5),
    "too long": (request() + b"x", 5),
    "no descriptors": (request(), 0),
    "too few descriptors": (request(), 4),
    "too many descriptors": (request(), 6),
    "kind": (request(kind=b"x"), 5),
    "streams": (request(streams=255), 5),
    "terminal that is no stream": (request(streams=3, terminal=4), 4),
    "no words": (request(n_words=0), 5),
    "words": (request(n_words=2**32 - 1), 5),
    "number of a stream": (request(n_fds=1, numbers=[1]), 6),
    "numbers": (request(n_fds=2**32 - 1), 5),
    "the same number": (request(n_fds=2, numbers=[9, 9]), 7),
    "body": (request(body_bytes=2**63), 5),
    "longer than its body": (request(body_bytes=3), 5),
    "umask": (request(umask=0o7777), 5),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests_are_refused(served: Served, what: str) -> None:
    data, n_fds = MALFORMED[what]
    fds = [body(), os.open(".", os.O_PATH), *(os.open("/dev/null", os.O_RDWR) for _ in range(5))]
    try:
        with connect(served) as s:
            socket.send_fds(s, [data], fds[:n_fds]) if n_fds else s.send(data)
            answer = s.recv(65536)
            _magic, _version, op, _value = _serve._ANSWER.unpack_from(answer)
            assert op == _serve.REFUSED, answer
            assert s.recv(10) == b""
    finally:
        for fd in fds:
            os.close(fd)
    assert served.run("-c", "print(1)").out == "1\n"


@pytest.mark.parametrize("kind", ["unsealed", "pipe", "file"])
def test_a_body_that_could_make_the_server_wait_is_not_read(
    served: Served, kind: str, tmp_path: Path
) -> None:
    r, w = os.pipe()
    (tmp_path / "file").write_bytes(b"1\0")
    file = os.open(tmp_path / "file", os.O_RDONLY)
    fds = {"unsealed": body(sealed=False), "pipe": r, "file": file}
    null = os.open("/dev/null", os.O_RDWR)
    here = os.open(".", os.O_PATH)
    try:
        with connect(served) as s:
            socket.send_fds(s, [request()], [fds[kind], here, null, null, null])
            assert b"its body" in s.recv(65536)
    finally:
        for fd in (r, w, file, null, here, fds["unsealed"]):
            os.close(fd)


def test_noise_does_no_harm(served: Served) -> None:
    """Requests with some bytes changed, and with some descriptors."""
    chance = random.Random(7)
    pid = served.status()["pid"]
    fds = [body(), os.open(".", os.O_PATH), *(os.open("/dev/null", os.O_RDWR) for _ in range(5))]
    served.run("-c", "1")
    before = len(os.listdir(f"/proc/{pid}/fd"))
    try:
        for _ in range(300):
            data = bytearray(request())
            for _ in range(chance.randrange(1, 5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with connect(served) as s, contextlib.suppress(ConnectionError):
                socket.send_fds(s, [data], chance.choices(fds, k=chance.randrange(1, 8)))
                if chance.random() < 0.5:
                    s.recv(65536)
    finally:
        for fd in fds:
            os.close(fd)
    assert served.run("-c", "print(1)").out == "1\n"
    assert served.status()["pid"] == pid
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before)


def test_a_well_formed_request_by_hand(served: Served) -> None:
    fds = [body(b"1\0"), os.open("/", os.O_PATH), *(os.open("/dev/null", 2) for _ in range(3))]
    env = {name: os.environ[name] for name in _serve._AT_START if name in os.environ}
    words = b"1\0" + b"".join(f"{k}={v}\0".encode() for k, v in env.items())
    os.close(fds[0])
    fds[0] = body(words)
    try:
        with connect(served) as s:
            socket.send_fds(s, [request(n_env=len(env), body_bytes=len(words))], fds)
            answers = []
            while answer := s.recv(65536):
                answers.append(answer)
        assert _serve._ANSWER.unpack_from(answers[-1])[2:] == (_serve.ENDED, 0), answers
    finally:
        for fd in fds:
            os.close(fd)


def test_who_says_nothing_is_let_go(served: Served) -> None:
    with connect(served) as s:
        begun = time.monotonic()
        assert b"in time" in s.recv(65536)
        assert s.recv(10) == b""
        assert time.monotonic() - begun < 15
    with connect(served):  # and who leaves at once
        pass
    assert served.run("-c", "print(1)").out == "1\n"


def test_who_says_more_loses_its_worker(served: Served) -> None:
    with served.running() as (_process, pid):
        assert served.status()["running"] == 1
    until(lambda: is_gone(pid))


def test_status(served: Served) -> None:
    found = served.status()
    assert found["preload"] == ["json", "decimal"]
    assert found["version"] == sys.version.split()[0]
    assert found["starts"] >= 0 and found["uptime_seconds"] > 0
    assert not is_gone(found["pid"]) and not is_gone(found["template_pid"])
    text = served.serve("--status").out
    assert re.search(r"^preload: +json, decimal$", text, re.MULTILINE)


def test_no_server(served: Served) -> None:
    ended = served.run("--name", "nobody", "-c", "1")
    assert ended.returncode == 2
    assert "anyfork serve --detach --name nobody --preload" in ended.err
    for option in ("--status", "--stop"):
        ended = served.serve(option, name="nobody")
        assert (ended.returncode, ended.out) == (1, "")
        assert "no server named 'nobody' runs" in ended.err


def test_a_second_one_of_a_name_is_refused(served: Served) -> None:
    ended = served.serve("--detach")
    assert ended.returncode == 1
    assert "a server named 'default' runs" in ended.err
    assert "Traceback" not in ended.err
    assert served.run("-c", "print(1)").out == "1\n"


def test_stale_socket(served: Served) -> None:
    pid = served.start(name="stale")
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid))
    path = served.runtime / "anyfork" / "stale.sock"
    assert path.exists()
    ended = served.run("--name", "stale", "-c", "1")
    assert (ended.returncode, "no server listens" in ended.err) == (2, True)
    served.start(name="stale")
    assert served.run("--name", "stale", "-c", "print(1)").out == "1\n"
    served.stop("stale")
    assert not path.exists()


def test_a_server_that_still_loads(served: Served, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.02)\n"
    )
    env = {**served.env, "PYTHONPATH": str(tmp_path), "GO": str(tmp_path / "go")}
    if "PYTHONPATH" in served.env:
        env["PYTHONPATH"] += os.pathsep + served.env["PYTHONPATH"]
    args = ["serve", "--detach", "--name", "slow", "--preload", "slow"]
    served.names.add("slow")
    starting = subprocess.Popen([sys.executable, "-m", "anyfork", *args], env=env)
    try:
        until((served.runtime / "anyfork" / "slow.sock").exists)
        ended = served.run("--name", "slow", "-c", "1")
        assert (ended.returncode, "once it has loaded its modules" in ended.err) == (2, True)
    finally:
        (tmp_path / "go").touch()
        assert starting.wait(TIMEOUT) == 0
    assert served.run("--name", "slow", "-c", "print(1)").out == "1\n"
    served.stop("slow")


def test_stop_ends_programs(served: Served) -> None:
    pid = served.start(name="stopped")
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LONG
    with (
        served.running(LONG, "--name", "stopped") as (first, one),
        served.running(deaf, "--name", "stopped") as (second, two),
    ):
        assert second.stdout.readline() == b"up\n"
        assert served.serve("--stop", name="stopped") == Ended(0, "", "")
        assert is_gone(pid) and is_gone(one) and is_gone(two)
        assert first.wait(TIMEOUT) == -signal.SIGTERM
        assert second.wait(TIMEOUT) == -signal.SIGKILL


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it(served: Served, sig: int) -> None:
    command = [sys.executable, "-m", "anyfork", "serve", "--name", "fore"]
    process = subprocess.Popen(
        command, env=served.env, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    assert process.stderr is not None
    assert "'fore' listens" in process.stderr.readline()
    assert served.run("--name", "fore", "-c", "print(1)").out == "1\n"
    process.send_signal(sig)
    _out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (0, "")
    assert not (served.runtime / "anyfork" / "fore.sock").exists()


def test_nohup(served: Served) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    pid = served.start(name="nohup", preexec_fn=ignore)
    os.kill(pid, signal.SIGHUP)
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)"
    assert served.run("--name", "nohup", "-c", code).out == "True\n"
    served.stop("nohup")


def test_idle_exit(served: Served) -> None:
    pid = served.start("--idle", "1", name="idle")
    with served.running("import time; time.sleep(2)", "--name", "idle") as (process, _worker):
        assert process.wait(TIMEOUT) == 0  # a program that runs is no idleness
    until(lambda: is_gone(pid))
    assert not (served.runtime / "anyfork" / "idle.sock").exists()


def test_folder_of_others_is_refused(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "anyfork"
    folder.mkdir()
    folder.chmod(0o755)
    env = {**served.env, "XDG_RUNTIME_DIR": str(tmp_path)}
    for ended in (served.serve(env=env), served.run("-c", "1", env=env)):
        assert ended.returncode in (1, 125)
        assert "must be yours alone" in ended.err
    env["XDG_RUNTIME_DIR"] = str(tmp_path / "no" / "such")
    ended = served.serve(env=env)
    assert (ended.returncode, "set XDG_RUNTIME_DIR" in ended.err) == (1, True), ended
    env["XDG_RUNTIME_DIR"] = str(tmp_path)
    folder.rmdir()
    folder.symlink_to(served.runtime / "anyfork")
    for ended in (served.serve(env=env), served.run("-c", "1", env=env)):
        assert ended.returncode in (1, 125)


def test_both_look_in_the_same_folder(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in ("/nowhere/at/all", "relative", "", None):
        env = {name: value for name, value in served.env.items() if name != "XDG_RUNTIME_DIR"}
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if runtime is not None:
            env["XDG_RUNTIME_DIR"] = runtime
            monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        ended = served.run("--name", "no-such-server", "-c", "1", env=env)
        assert ended.returncode == 2
        assert f"no server listens at {_serve.folder()}/no-such-server.sock" in ended.err


def test_folder_and_socket_are_private(served: Served) -> None:
    folder = served.runtime / "anyfork"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "default.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(not ROOT, reason="needs root, to be another user")
def test_another_user_is_refused(served: Served) -> None:
    ended = served.run("-c", "1", user=65534, cwd="/")
    assert ended.returncode != 0
    assert "anyfork" in ended.err


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("no_new_privs", "libc.prctl(38, 1, 0, 0, 0)"),
        ("capabilities", "libc.prctl(24, 25, 0, 0, 0)"),  # PR_CAPBSET_DROP, CAP_SYS_TIME
        ("groups", "os.setgroups([12345])"),
    ],
)
def test_a_client_that_may_do_less_is_refused(served: Served, what: str, code: str) -> None:
    if what != "no_new_privs" and not ROOT:
        pytest.skip("needs root, to give it up")
    ended = served.run("-c", "print(1)", after=code)
    assert (ended.returncode, ended.out) == (125, "")
    assert f"its {what} would be the server's, not yours" in ended.err
    assert "anyfork serve --detach --name NAME" in ended.err


def cgroup_mount() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line and line.split()[3] == "/":
            return Path(line.split()[4])
    pytest.skip("no cgroup v2 is mounted")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    here = next(
        line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )  # fmt: skip
    path = cgroup_mount() / here.lstrip("/") / f"anyfork-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"no cgroup can be made: {exc}")
    yield path
    until(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


def test_worker_is_in_its_clients_cgroup(served: Served, cgroup: Path) -> None:
    def move() -> None:
        (cgroup / "cgroup.procs").write_text("0")

    code = "print(open('/proc/self/cgroup').read().splitlines()[-1])"
    ended = served.run("-c", code, preexec_fn=move)
    assert ended.out.rstrip().endswith(cgroup.name), ended


def test_a_cgroup_that_it_cannot_move_to_is_refused(served: Served, cgroup: Path) -> None:
    """Of another user, and without the capability that makes that nothing."""
    # PR_CAPBSET_DROP, of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    drop = "libc.prctl(24, 1, 0, 0, 0); libc.prctl(24, 2, 0, 0, 0)"
    move = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')"
    if not ROOT:
        pytest.skip("needs root, to give a cgroup away")
    os.chown(cgroup / "cgroup.procs", 65534, 65534)
    served.start(name="weak", after=drop)
    code = ("--name", "weak", "-c", "print(1)")
    assert served.run(*code, after=drop) == Ended(0, "1\n", "")
    ended = served.run(*code, after=f"{move}\n{drop}")
    assert (ended.returncode, ended.out) == (125, ""), ended
    assert "cgroup" in ended.err and "anyfork serve --detach --name NAME" in ended.err
    served.stop("weak")


def changed(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_a_preloaded_file_that_changes(served: Served, tmp_path: Path) -> None:
    module = tmp_path / "preloaded_by_test.py"
    module.write_text("value = 1\n")
    env = {**served.env, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    served.start("--preload", "preloaded_by_test", name="changing", env=env)

    def value() -> Ended:
        code = "import sys\nprint(sys.modules['preloaded_by_test'].value)"
        return served.run("--name", "changing", "-c", code)

    assert value().out == "1\n"
    made = served.status("changing")["templates_made"]
    changed(module, "value = 22\n")
    assert value().out == "22\n"
    assert served.status("changing")["templates_made"] == made + 1
    changed(module, "value = 1 / 0\n")
    ended = value()
    assert ended.returncode == 125
    assert "ZeroDivisionError" in ended.err
    module.write_text("value = 333\n")  # in place
    assert value().out == "333\n"
    served.stop("changing")


def test_a_module_that_cannot_be_preloaded(served: Served) -> None:
    ended = served.serve("--detach", "--preload", "no.such.module", name="broken")
    assert ended.returncode == 1
    assert "ModuleNotFoundError" in ended.err
    assert not (served.runtime / "anyfork" / "broken.sock").exists()


def test_an_interpreter_that_changes(served: Served, tmp_path: Path) -> None:
    """By a link to it: what it leads to is looked at."""
    fake = tmp_path / "venv"
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a venv, of which a copy could be made")
    shutil.copytree(Path(sys.prefix) / "bin", fake / "bin", symlinks=True)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", fake / "pyvenv.cfg")
    (fake / "lib").symlink_to(Path(sys.prefix) / "lib")
    python = fake / "bin" / "python"
    real = python.resolve()
    python.unlink()
    shutil.copy2(real, python)
    env = {**served.env, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    lib = sysconfig.get_config_var("LIBDIR")
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        env["LD_LIBRARY_PATH"] = lib
    served.names.add("renewed")
    subprocess.run(
        [python, "-m", "anyfork", "serve", "--name", "renewed", "--detach"], env=env, check=True,
        timeout=TIMEOUT, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    run_env = env if "LD_LIBRARY_PATH" in env else served.env
    before = served.status("renewed")
    with served.running(LONG, "--name", "renewed", env=run_env):
        changed_python = python.with_name("new")
        shutil.copy2(real, changed_python)
        changed_python.replace(python)
        ended = served.run("--name", "renewed", "-c", "print(1)", env=run_env)
        assert ended.returncode == 125
        assert "has changed" in ended.err
    until(lambda: served.run("--name", "renewed", "-c", "print(1)", env=run_env).out == "1\n")
    after = served.status("renewed")
    assert after["pid"] == before["pid"]
    assert after["uptime_seconds"] < before["uptime_seconds"] + TIMEOUT
    assert after["starts"] == 1
    served.stop("renewed")


def test_a_server_that_cannot_become_anew(served: Served) -> None:
    """Who waits in its socket is told why."""
    name, folder = "unfounded", served.runtime / "anyfork"
    code = (
        "import os\n"
        "from anyfork import _exec, _serve\n"
        "_exec.interpreter = lambda: os.environ['BROKEN']\n"
        f"config = _serve.Config({name!r}, (), 0, 'refuse')\n"
        "raise SystemExit(_serve.command(lambda: _serve.serve(config, -1)))\n"
    )
    broken = served.home / "broken-python"
    broken.write_text("#!/bin/sh\necho no encodings >&2\nexit 1\n")
    broken.chmod(0o755)
    null = subprocess.DEVNULL
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / f"{name}.sock"))
        listener.listen(8)
        waiting = served.popen("--name", name, "-c", "1", stdout=null)
        until(lambda: select.select([listener], [], [], 0)[0])
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        run = subprocess.run(
            [sys.executable, "-c", code], timeout=TIMEOUT, capture_output=True, text=True,
            pass_fds=(lock, listener.fileno()),
            env={
                **served.env,
                "BROKEN": str(broken),
                "ANYFORK_SERVE_HANDOVER": f"{lock},{listener.fileno()}",
            },
        )  # fmt: skip
        os.close(lock)
    _out, err = waiting.communicate(timeout=TIMEOUT)
    assert run.returncode == 1, run
    assert waiting.returncode == 125
    for said in (run.stderr, err.decode()):
        assert "the template cannot be made" in said
        assert "no encodings" in said
    assert not (folder / f"{name}.sock").exists()


# ---- the command line ----------------------------------------------------------------------


def test_help_of_the_client(served: Served) -> None:
    ended = served.run("--help")
    assert ended.returncode == 0
    for word in ("Exit status:", "Example:     anyfork serve", "See also:"):
        assert word in ended.out
    assert max(map(len, ended.out.splitlines())) <= 82
    assert served.run("--version").out == f"anyfork-run {anyfork.__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nosuch"], "unknown option --nosuch"),
        (["-c"], "-c wants the code"),
        (["-m"], "-m wants a module"),
        (["--name"], "--name wants a name"),
        (["--name", "../x", "-c", "1"], "a name has letters"),
        (["--name=", "-c", "1"], "a name has letters"),
    ],
)
def test_wrong_usage_of_the_client(served: Served, args: list[str], says: str) -> None:
    ended = served.run(*args)
    assert (ended.returncode, ended.out) == (2, "")
    assert says in ended.err


def test_options_behind_the_program_are_its_own(served: Served) -> None:
    ended = served.run("-c", "import sys; print(sys.argv)", "--name", "x", "--help")
    assert ended.out == "['-c', '--name', 'x', '--help']\n"


def test_the_end_of_options(served: Served) -> None:
    (served.home / "-c").write_text("import sys; print('script', sys.argv)\n")
    for args in (["--", "-c", "--name", "x"], ["-c", "import sys; print(sys.argv)", "--", "x"]):
        assert served.run(*args) == served.run(*args, python=True)
    assert served.run("--name", "default", "--", "-c").out == "script ['-c']\n"
    assert served.run("--", "-", "a", input="import sys; print(sys.argv)").out == "['-', 'a']\n"
    assert served.run("--", input="print(1)").out == "1\n"


def test_no_interactive_mode(terminal: Callable[..., Terminal]) -> None:
    t = terminal()
    assert t.wait() == 2
    assert "no interactive mode" in t.seen
