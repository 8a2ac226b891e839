"""``anyfork smoketest``: every scenario, and the harness that judges them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from anyfork import _lab, _smoketest

TIMEOUT = 300
BY_NAME = {scenario.name: scenario for scenario in _smoketest.SCENARIOS}


def smoketest(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyfork", "smoketest", *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("name", _smoketest.NAMES)
def test_scenario_has_the_expected_outcome(name):
    outcome = _smoketest.play(BY_NAME[name])
    if outcome.verdict == "skipped":
        pytest.skip(outcome.outcome)
    assert outcome.verdict == "ok", f"{outcome.outcome}\n{outcome.output}"


def test_the_scenarios_are_the_known_ones():
    assert _smoketest.NAMES == [
        "control_subint_thread_fork",
        "main_thread_fork",
        "worker_thread_fork",
        "full_architecture",
        "subint_fork",
        "subint_fork_twice",
        "live_interpreter_fork",
    ]
    assert [s.name for s in _smoketest.SCENARIOS if s.need_trio] == [
        "full_architecture",
        "subint_fork",
    ]


@pytest.mark.timeout(TIMEOUT)
def test_text_has_a_banner_the_cpython_and_a_table():
    run = smoketest("--scenario", "main_thread_fork", "--scenario", "control_subint_thread_fork")
    assert run.returncode == 0, run.stdout + run.stderr
    assert sys.version.split()[0] in run.stdout.splitlines()[0]
    assert "== main_thread_fork ==" in run.stdout
    assert "2 as expected, 0 failed, 0 skipped" in run.stdout


@pytest.mark.timeout(TIMEOUT)
def test_json():
    run = smoketest("--scenario", "live_interpreter_fork", "--json")
    report = json.loads(run.stdout)
    assert (run.returncode, report["ok"]) == (0, True)
    assert report["python"]["executable"] == sys.executable
    (scenario,) = report["scenarios"]
    assert scenario["verdict"] == "ok"
    assert "gh-139759" in scenario["output"]


def test_list_runs_nothing():
    run = smoketest("--list")
    assert run.returncode == 0
    assert [line.split()[0] for line in run.stdout.splitlines()] == _smoketest.NAMES


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize(("asked", "status"), [([], 0), (["--scenario", "subint_fork"], 2)])
def test_without_trio_its_scenarios_are_named_skips(asked, status):
    code = (
        "import sys; sys.modules['trio'] = None\n"
        "from anyfork import _cli, _smoketest\n"
        "keep = [s for s in _smoketest.SCENARIOS if s.need_trio]\n"
        "_smoketest.SCENARIOS[:] = keep\n"
        f"sys.exit(_cli.main(['smoketest', *{asked!r}]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert "skipped trio is not installed: pip install 'anyfork[demo]'" in " ".join(
        run.stdout.split()
    )


# ---- the harness -------------------------------------------------------------------------


def trial(**changes) -> _lab.Trial:
    return _lab.Trial(0, "child exited with status 42", "", "", 0.1, [])._replace(**changes)


@pytest.mark.parametrize(
    "wrong",
    [
        trial(value="child exited with status 0"),
        trial(value=None),
        trial(status=signal.SIGSEGV),
        trial(status=1 << 8, stderr="Traceback\nValueError: x"),
        trial(status=None),
        trial(left_over=[1234]),
    ],
)
def test_another_outcome_fails(wrong):
    scenario = BY_NAME["main_thread_fork"]
    assert _smoketest.judge(scenario, trial()).verdict == "ok"
    assert _smoketest.judge(scenario, wrong).verdict == "FAILED"


def test_the_control_needs_the_message_of_the_gate():
    control = BY_NAME["control_subint_thread_fork"]
    good = trial(value=control.expected, stderr=f"Fatal Python error: {control.on_stderr}")
    assert _smoketest.judge(control, good).verdict == "ok"
    silent = _smoketest.judge(control, good._replace(stderr=""))
    assert silent.verdict == "FAILED"
    assert "without" in silent.outcome


def test_a_control_that_survives_fails_the_harness(capsys, monkeypatch):
    control = BY_NAME["control_subint_thread_fork"]
    survivor = trial(value="child exited with status 42")
    monkeypatch.setattr(_smoketest, "play", lambda s: _smoketest.judge(s, survivor))
    assert _smoketest.command([control.name], False) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_trial_that_hangs_is_killed():
    found = _lab.try_in_fresh_python(time.sleep, 1000, timeout=1.0)
    assert found.status is None
    assert "killed" in found.failure()


def test_a_trial_that_leaves_a_process_behind_is_reported_and_that_is_killed():
    found = _lab.try_in_fresh_python(os.system, "sleep 1000 &", timeout=60, wait=0.2)
    assert found.status == 0
    assert len(found.left_over) == 1
    assert "left processes behind" in found.failure()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not [p for p in _lab.processes() if p.pid in found.left_over and p.state not in "ZX"]:
            return
    pytest.fail("it still lives")


def test_a_trial_that_raises_says_what():
    found = _lab.try_in_fresh_python(os.listdir, "/nosuch/folder")
    assert found.status == 1 << 8
    assert "FileNotFoundError" in found.failure()


@pytest.mark.parametrize("kind", _lab.KINDS)
def test_a_sub_interpreter_answers_and_raises(kind):
    with _lab.SubInterpreter(kind) as interp:
        assert interp.call(os.getpid) == os.getpid()
        assert interp.call(max, 3, 4) == 4
        with pytest.raises(_lab.SubInterpreterError, match="FileNotFoundError"):
            interp.call(os.listdir, "/nosuch/folder")
        big = "x" * 3_000_000
        assert interp.call(str.upper, big) == big.upper()


def test_last_line_prefers_the_fatal_error():
    text = "noise\nFatal Python error: Segmentation fault\n\nCurrent thread\n  File x\n"
    assert _lab.last_line(text) == "Fatal Python error: Segmentation fault"
    assert _lab.last_line("") == "no message"
