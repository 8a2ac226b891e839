"""The examples do what they say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RunProgram

import anyfork

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIBRARIES = Path(anyfork.__file__).parent / "lib"


def _python(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name), *args],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pool() -> None:
    lines = _python("pool.py", "3", "8").splitlines()
    assert len(lines) == 9
    assert lines[-1] == "2262 primes below 20000"


def test_trio_worker() -> None:
    pytest.importorskip("trio")
    assert _python("trio_worker.py").splitlines() == [
        "7 * 7 = 49", "cancelled", "a program says Linux",
    ]  # fmt: skip


def test_stream() -> None:
    pytest.importorskip("trio")
    lines = _python("stream.py", "100000").splitlines()
    assert len(lines) == 8
    for n, line in zip((1, 0, 2, 1, 0), lines, strict=False):
        assert line.startswith(f"sensor {n}: 500.0, where "), line
    assert [line.split(": ")[0] for line in lines[5:]] == ["sensor 0", "sensor 1", "sensor 2"]


def test_web_service_under_load(run_program: RunProgram) -> None:
    """Its workers are killed meanwhile: see tests/programs/load_web_service.py."""
    pytest.importorskip("aiohttp", reason="the service's library, aiohttp, is not installed")
    pytest.importorskip("numpy", reason="what its workers compute with, numpy, is not installed")
    run_program("load_web_service", 3, timeout=40)


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Compiled as the README says, against the installed library."""
    if shutil.which("pkg-config") is None or shutil.which("cc") is None:
        pytest.skip("no pkg-config, or no C compiler")
    if not (LIBRARIES / "pkgconfig/anyfork.pc").exists():
        pytest.skip(f"the package is not laid out as installed: no .pc file in {LIBRARIES}")
    env = {**os.environ, "PKG_CONFIG_PATH": str(LIBRARIES / "pkgconfig")}
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "anyfork"],
        capture_output=True, text=True, check=True, env=env,
    ).stdout.split()  # fmt: skip
    program = tmp_path_factory.mktemp("supervisor") / "supervisor"
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror",
         str(EXAMPLES / "supervisor.c"), *flags, "-o", str(program)],
        check=True, timeout=60,
    )  # fmt: skip
    needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
    assert "libanyfork.so" in needed and "python" not in needed.lower().replace(str(LIBRARIES), "")
    return str(program)


def test_supervisor_starts_again(supervisor: str) -> None:
    done = subprocess.run(
        [supervisor, "2", "sh", "-c", "echo oops >&2; exit 3"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("oops") == 2
    assert done.stderr.endswith("supervisor: it exited with 3; 0 left\n")
    assert subprocess.run([supervisor, "5", "true"], timeout=60).returncode == 0
    done = subprocess.run([supervisor, "5", "nosuch"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1, "supervisor: the program cannot be executed: nosuch: No such file or directory\n",
    )  # fmt: skip


def test_supervisor_takes_all_along(supervisor: str) -> None:
    """The program, and what the program has started."""
    process = subprocess.Popen(
        [supervisor, "1", "sh", "-c", "sleep 1000 & echo $! $$ >&2; wait"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    pids = [int(word) for word in process.stderr.readline().split("] ")[1].split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 20
    for pid in pids:
        while os.path.exists(f"/proc/{pid}") and _state(pid) not in "ZX":
            assert time.monotonic() < deadline, f"{pid} lives on"
            time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
