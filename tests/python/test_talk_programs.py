"""Programs that have workers at something, and end in some way; and forks beside workers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import IO

import pytest
from attack_helpers import PROGRAMS, leftovers, parametrized, run_check, run_program
from talking import APIS

TIMEOUT = 60.0
AT = ("run", "pool_run", "pool_map", "stream", "idle")

pytestmark = pytest.mark.timeout(3 * TIMEOUT)


@pytest.fixture(params=[api.name for api in APIS])
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@parametrized("attack_talk")
def test_processes(check: str, place: str) -> None:
    run_check("attack_talk", check, place)


def test_out_of_memory() -> None:
    done = run_program("attack_run.py", "attack_talk", "out_of_memory", "main")
    assert done.returncode == 0, done.stderr
    if "skip: " in done.stdout:
        pytest.skip(done.stdout.splitlines()[0].removeprefix("skip: "))


# ---- owners ---------------------------------------------------------------------------------


class Owner:
    """talk_owner.py, as a terminal runs it: in a process group of its own, in front."""

    def __init__(self, *words: str) -> None:
        self.tag = f"TALK_TAG={uuid.uuid4().hex}"
        key, _, value = self.tag.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / "talk_owner.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            env={**os.environ, key: value},
        )
        self._said = b""

    def until_begun(self, workers: int = 1) -> None:
        """Until so many of its workers are at it."""
        assert self.process.stdout is not None
        while self._said.count(b"begun") < workers:
            self._said += self._read(self.process.stdout)

    def _read(self, file: IO[bytes]) -> bytes:
        ready, _, _ = select.select([file], [], [], TIMEOUT)
        data = os.read(file.fileno(), 4096) if ready else b""
        if not data:
            self._kill()
            out, err = self.process.communicate()
            pytest.fail(f"it said {self._said + out!r} only\n{err.decode()}")
        return data

    def ended(self) -> tuple[int, str, str]:
        """Exit code, what it said and its standard error; nothing of it is left then."""
        try:
            out, err = self.process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self._kill()
            out, err = self.process.communicate()
            pytest.fail(f"it hangs\n{out.decode()}\n{err.decode()}")
        end = time.monotonic() + 10
        while (left := leftovers(self.tag)) and time.monotonic() < end:
            time.sleep(0.005)
        assert not left, f"left: {left}\n{err.decode()}"
        return self.process.returncode, (self._said + out).decode(), err.decode()

    def _kill(self) -> None:
        for pid in leftovers(self.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self._kill()
        self.process.wait(TIMEOUT)
        for file in (self.process.stdout, self.process.stderr):
            assert file is not None
            file.close()


@pytest.fixture
def owners() -> Iterator[list[Owner]]:
    made: list[Owner] = []
    yield made
    for owner in made:
        owner.close()


def tracebacks(text: str) -> int:
    return text.count("Traceback (most recent call last)")


@pytest.mark.parametrize("what", AT)
def test_ctrl_c(api: str, what: str) -> None:
    """As without workers: one traceback, the owner's, and its end by the signal."""
    plain = _interrupted(api, "plain")
    code, out, err = _interrupted(api, what)
    assert code == plain[0] == -signal.SIGINT, err
    assert "ended" not in out
    assert err.rstrip().splitlines()[-1].startswith("KeyboardInterrupt"), err
    assert tracebacks(err) == tracebacks(plain[2]), err
    assert "Exception" not in err.replace("another exception", ""), err


def _interrupted(api: str, what: str, times: int = 1) -> tuple[int, str, str]:
    owner = Owner(api, what)
    try:
        owner.until_begun(2 if what == "pool_map" else 1)
        for _ in range(times):
            os.killpg(owner.process.pid, signal.SIGINT)
            time.sleep(0.001)
        return owner.ended()
    finally:
        owner.close()


def test_impatient_ctrl_c(api: str) -> None:
    """Again and again: whatever it is at then, it ends, and nothing is left."""
    for what in AT:
        code, _out, err = _interrupted(api, what, times=20)
        assert code in (-signal.SIGINT, 1), err
        assert "KeyboardInterrupt" in err


@pytest.mark.parametrize("what", AT)
def test_owner_is_killed(api: str, what: str, owners: list[Owner]) -> None:
    owners.append(owner := Owner(api, what))
    owner.until_begun()
    owner.process.kill()
    assert owner.ended()[0] == -signal.SIGKILL


@pytest.mark.parametrize("what", ["leave", "leave_at_once"])
def test_exit_within_the_blocks(api: str, what: str, owners: list[Owner]) -> None:
    owners.append(owner := Owner(api, what))
    code, out, err = owner.ended()
    assert (code, err) == (7, "")
    assert out.startswith("begun") and "ended" not in out


def test_nobody_closes_them(api: str, owners: list[Owner]) -> None:
    owners.append(owner := Owner(api, "dropped"))
    code, out, err = owner.ended()
    assert (code, out.count("begun")) == (0, 2), err
    assert "ended" in out
