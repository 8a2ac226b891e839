"""The command line: arguments, help, exit statuses, methods and doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig

import pytest

from anyfork import MethodUnavailable, _anyfork, _cli, _console, _doctor, _errors

COMMANDS = ("methods", "doctor", "smoketest", "serve", "demo")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
TIMEOUT = 300


def anyfork(*args: str, code: str = "from anyfork._cli import main; raise SystemExit(main())"):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    run = anyfork(command, "--help")
    assert run.returncode == 0, run.stderr
    for word in ("Exit status: 0", "Example:     anyfork " + command, "See also:    anyfork"):
        assert word in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_help_names_every_command():
    run = anyfork("--help")
    assert run.returncode == 0
    assert all(command in run.stdout for command in COMMANDS)


def test_python_m_anyfork_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "anyfork", "--version"], capture_output=True, text=True,
        timeout=TIMEOUT,
    )
    assert (run.returncode, run.stdout.split()[0]) == (0, "anyfork"), run.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required: COMMAND"),
        (["nosuch"], "invalid choice"),
        (["methods", "nosuch"], "known are: fork(), zygote, exec, fork, subint_fork"),
        (["methods", "--from", "nowhere"], "invalid choice"),
        (["smoketest", "--scenario", "nosuch"], "known are: control_subint_thread_fork"),
        (["doctor", "nosuch"], "unrecognized arguments"),
        (["demo", "--workers", "0"], "must be from 1 to 1000"),
        (["demo", "--workers", "x"], "not a number"),
        (["serve", "--idle", "-1"], "must be from 0 to 1e9"),
        (["serve", "--name", "a/b"], "a name has letters"),
        (["serve", "--stop", "--status"], "not allowed with"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_one_clear_line(args, says):
    run = anyfork(*args)
    assert run.returncode == 2
    assert says in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.mark.timeout(TIMEOUT)
def test_methods_tries_every_method_from_every_interpreter():
    run = anyfork("methods", "--json")
    rows = {row["name"]: row for row in json.loads(run.stdout)["methods"]}
    assert list(rows) == ["fork()", *(row["name"] for row in _anyfork.method_traits())]
    caller = {row["name"] for row in _anyfork.method_traits() if row["target"] == "caller"}
    for name, row in rows.items():
        assert list(row["from"]) == list(_cli.ORIGINS)
        for origin, cell in row["from"].items():
            refused = FREE_THREADED and origin != "main" and name in {"fork()", *caller}
            assert cell["works"] != refused, (name, origin, cell)
            if refused:
                assert "free-threaded" in cell["reason"]
            else:
                assert cell["ms"] > 0
    assert run.returncode == (1 if FREE_THREADED else 0), run.stderr


@pytest.mark.timeout(TIMEOUT)
def test_methods_prints_a_table_of_what_was_asked_for():
    run = anyfork("methods", "--from", "isolated", "subint_fork")
    assert run.returncode == 0, run.stderr
    header, _line, row = run.stdout.splitlines()[2:5]
    assert header.split() == ["method", "from", "isolated"]
    assert row.split()[:2] == ["subint_fork", "works"]
    (method,) = (row for row in _anyfork.methods() if row["name"] == "subint_fork")
    for trait in ("summary", "runs_in", "memory", "may_wait_for"):
        assert method[trait] in run.stdout, trait


def test_what_is_unavailable_names_this_command_and_no_file_of_the_source():
    error = _errors.from_c(_errors._EUNAVAILABLE, "layout", 0, "fork", "the reason", 0)
    assert isinstance(error, MethodUnavailable)
    assert "the reason" in str(error)
    assert "`anyfork methods`" in str(error)
    assert "docs/" not in str(error)


def crash(name: str, origin: str) -> None:
    os.abort()


def test_a_crash_is_an_answer_about_one_cell(monkeypatch):
    monkeypatch.setattr(_cli, "_try_method", crash)
    monkeypatch.setattr(sys, "path", [os.path.dirname(__file__), *sys.path])
    cell = _cli.try_methods(["fork"], ["main"])["fork"]["main"]
    assert not cell.works
    assert "killed by SIGABRT" in cell.reason


@pytest.mark.timeout(TIMEOUT)
def test_doctor_reports_and_all_promises_hold():
    run = anyfork("doctor", "--json")
    report = json.loads(run.stdout)
    assert report["problems"] == []
    assert run.returncode == 0, run.stderr
    assert report["python"]["version"] == sys.version.split()[0]
    assert report["python"]["free_threaded"] == FREE_THREADED
    assert len(report["anyfork"]["library"]) == 1
    assert report["threads"]["runtime"]["interpreters"] >= 1
    assert report["layout"]["hop"] == "ready"
    assert [worker["method"] for worker in report["workers"]] == [
        row["name"] for row in _anyfork.method_traits() if row["has_process"]
    ]
    for worker in report["workers"]:
        assert worker["lifeline_ms"] >= 0
        assert worker["fds_per_worker"] == 4
    kernel = {feature["name"]: feature for feature in report["kernel"]}
    assert {"pidfd_open(2)", "clone3(2)", "cgroup.kill", "PIDFD_GET_INFO"} <= kernel.keys()
    for feature in kernel.values():
        assert feature["available"] == (feature["why_not"] == ""), feature
    gate, beside, dangling, _at_exit = report["cpython_bugs"]
    assert gate["present"], "CPython may fork in sub-interpreters now: say so in the docs"
    assert "status" in beside["found"] or "killed" in beside["found"]
    assert dangling["found"] in ("alive", "dangling")


@pytest.mark.timeout(TIMEOUT)
def test_doctor_is_a_text_to_attach():
    run = anyfork("doctor")
    assert run.returncode == 0, run.stdout + run.stderr
    for word in ("version:", "libc:", "kernel:", "hop:", "gh-139759", "after its owner was killed"):
        assert word in run.stdout
    assert "\x1b" not in run.stdout


def test_doctor_names_what_is_wrong():
    report = {
        "layout": {"hop": "refused: interpreter.next", "twin": "ready"},
        "anyfork": {"library": ["/a/libanyfork-3.14.so", "/b/libanyfork-3.14.so"]},
        "workers": [{"method": "fork", "problem": "the worker outlived its owner by 20 s"}],
    }
    problems = "\n".join(_doctor._problems(report))
    for word in ("hop refused: interpreter.next", "2 copies", "fork: the worker outlived"):
        assert word in problems


def test_a_lifeline_that_cannot_be_tried_is_reported():
    assert _doctor.try_lifeline("nosuch") == (None, "no worker was started")


def test_a_closed_pipe_ends_it_quietly():
    r, w = os.pipe()
    os.close(r)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "anyfork", "smoketest", "--list"], stdout=w,
            stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
        )
    finally:
        os.close(w)
    assert (run.returncode, run.stderr) == (1, "")


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_closed_standard_streams(closed):
    run = subprocess.run(
        [sys.executable, "-m", "anyfork", "methods", "exec"],  # works everywhere
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        preexec_fn=lambda: [os.close(fd) for fd in closed],
    )
    assert run.returncode == 0, run.stderr
    assert ("exec" in run.stdout) == (1 not in closed)


def test_plain_tables_are_aligned(capsys):
    _console.table(["name", "in\nms"], [["a", "1.5"], ["long", "10.25"]], right=[1])
    assert capsys.readouterr().out.splitlines() == [
        "         in",
        "name     ms",
        "----  -----",
        "a       1.5",
        "long  10.25",
    ]


def test_no_progress_without_a_terminal(capsys):
    with _console.Progress(1) as progress:
        progress.begin("x", 2)
        progress.advance(2)
    assert capsys.readouterr() == ("", "")
