"""``anyfork smoketest``: fork in every place that matters, and see what happens.

Each scenario runs in a process of its own, and says what it found as a short
text; that text must be the expected one. Scenarios import nothing third-party,
except trio where their name is in ``NEED_TRIO``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from . import _anyfork, _console, _lab
from ._errors import MethodUnavailable, describe_status
from ._request import run

TIMEOUT = 120.0
_FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# A release build ends at the gate, by Py_ExitStatusException(): it prints a fatal
# error and exits with 1. A debug build gets only as far as an assertion before it,
# in _PyEval_ReInitThreads() of Python/ceval_gil.c.
_DEBUG = hasattr(sys, "gettotalrefcount")
_GATE = "_PyEval_ReInitThreads" if _DEBUG else "_PyInterpreterState_DeleteExceptMain"


# ---- what the scenarios share -----------------------------------------------------


def _ended(pid: int) -> str:
    return describe_status(os.waitpid(pid, 0)[1])


def _threads_work() -> bool:
    """Whether this process can start a thread and wait for it."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(1))
    thread.start()
    thread.join(30)
    return seen == [1]


def _plain_fork() -> str:
    """os.fork(); the child uses a thread and exits with 42."""
    pid = os.fork()
    if pid == 0:
        os._exit(42 if _threads_work() else 1)
    return _ended(pid)


def _anyfork_fork() -> str:
    pid = _anyfork.fork()
    if pid == 0:
        os._exit(42 if _threads_work() else 1)
    return _ended(pid)


def _on_thread(fn: Callable[..., Any], *args: object) -> Any:
    """Call on a thread of its own; return its result or raise what it raised."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def body() -> None:
        try:
            outcome.append((fn(*args), None))
        except BaseException as exc:
            outcome.append((None, exc))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    value, exc = outcome[0]
    if exc is not None:
        raise exc
    return value


def _trio_in_this_interpreter() -> tuple[int, bool]:
    """Run trio here with two tasks: (what they summed up, in the main interpreter?)."""
    import trio

    async def main() -> int:
        total = 0

        async def add(n: int) -> None:
            nonlocal total
            await trio.sleep(0.001)
            total += n

        async with trio.open_nursery() as nursery:
            nursery.start_soon(add, 40)
            nursery.start_soon(add, 2)
        return total

    return trio.run(main), _anyfork.in_main()


# ---- the scenarios ------------------------------------------------------------------


def control_subint_thread_fork() -> str:
    interp = _lab.SubInterpreter("legacy")
    return f"child {_on_thread(interp.call, _plain_fork)}"


def main_thread_fork() -> str:
    return f"child {_plain_fork()}"


def worker_thread_fork() -> str:
    return f"child {_on_thread(_plain_fork)}"


def full_architecture() -> str:
    def fork_from_thread() -> str:
        pid = _anyfork.fork()
        if pid == 0:
            code = 1
            try:
                interp = _lab.SubInterpreter("isolated")
                answer = _on_thread(interp.call, _trio_in_this_interpreter)
                if answer == (42, False):
                    code = 42
                else:
                    print(f"trio answered {answer}", file=sys.stderr)
            except BaseException as exc:
                print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
            os._exit(code)
        return _ended(pid)

    return f"child {_on_thread(fork_from_thread)}"


def _run_by_subint_fork() -> tuple[int, bool]:
    answer: tuple[int, bool] = run(_trio_in_this_interpreter, method="subint_fork")
    return answer


def subint_fork() -> str:
    answers = [_run_by_subint_fork()]
    for kind in _lab.KINDS:
        with _lab.SubInterpreter(kind) as interp:
            answers.append(_on_thread(interp.call, _run_by_subint_fork))
    if answers == [(42, True)] * 3:
        return "3 workers ran trio in main"
    return f"workers answered {answers}"


def _twin(fd: int) -> int:
    """fork() that returns twice here: the child says so through fd, and both go on."""
    before = os.getpid()
    pid = _anyfork.fork()
    if pid == 0:
        same = os.getppid() == before and not _anyfork.in_main() and _threads_work()
        os.write(fd, b"T" if same else b"F")
    return pid


def _twin_from_host(interp: _lab.SubInterpreter) -> str:
    """Both returns of a fork() in that sub-interpreter, called from main's code."""
    r, w = os.pipe()
    try:
        pid = interp.call(_twin, w)
    except _lab.SubInterpreterError as exc:
        refused = MethodUnavailable.__name__
        return f"refused with {refused}" if refused in str(exc) else str(exc)
    if pid == 0:  # out of the sub-interpreter, in its host's code
        os._exit(42 if _anyfork.in_main() and _threads_work() else 1)
    os.close(w)
    said = os.read(r, 1)
    os.close(r)
    ended = _ended(pid)
    if said == b"T" and ended == "exited with status 42":
        return "returned twice"
    return f"child {pid} said {said!r} and {ended}"


def subint_fork_twice() -> str:
    seen: dict[str, str] = {}
    for kind in _lab.KINDS:
        with _lab.SubInterpreter(kind) as interp:
            seen[f"{kind}, thread"] = _on_thread(_twin_from_host, interp)
            seen[f"{kind}, main thread"] = _twin_from_host(interp)
    if len(set(seen.values())) == 1:
        return next(iter(seen.values()))
    return "; ".join(f"{where}: {what}" for where, what in seen.items())


def live_interpreter_fork() -> str:
    interps = [_lab.SubInterpreter(kind) for kind in _lab.KINDS]
    plain, ours = _plain_fork(), _anyfork_fork()
    print(f"plain os.fork() here: its child {plain} (gh-139759)")
    del interps
    return f"child {ours}"


# ---- the table of them ----------------------------------------------------------------


class Scenario(NamedTuple):
    play: Callable[[], str]
    what: str
    expected: str
    need_trio: bool = False
    on_stderr: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        return self.play.__name__


SCENARIOS = [
    Scenario(
        control_subint_thread_fork,
        "plain os.fork() in a legacy sub-interpreter, on a thread: CPython must kill the "
        "child, or this harness is wrong",
        "child was killed by SIGABRT" if _DEBUG else "child exited with status 1",
        on_stderr=_GATE,
        note="a debug build asserts before the gate" if _DEBUG else "",
    ),
    Scenario(
        main_thread_fork,
        "plain os.fork() in the main thread of the main interpreter",
        "child exited with status 42",
    ),
    Scenario(
        worker_thread_fork,
        "plain os.fork() in another thread of the main interpreter",
        "child exited with status 42",
    ),
    Scenario(
        full_architecture,
        "anyfork.fork() in a thread of main; in the child a sub-interpreter whose own thread "
        "runs trio.run",
        "child exited with status 42",
        need_trio=True,
    ),
    Scenario(
        subint_fork,
        "method subint_fork, from main and from both kinds of sub-interpreter; each worker runs "
        "trio.run in main",
        "3 workers ran trio in main",
        need_trio=True,
    ),
    Scenario(
        subint_fork_twice,
        "anyfork.fork() in a sub-interpreter of either kind, on a thread and on the main one: it "
        "returns twice, and the child goes on into its host",
        "refused with MethodUnavailable" if _FREE_THREADED else "returned twice",
        note="free-threaded: a clear refusal is the expected outcome" if _FREE_THREADED else "",
    ),
    Scenario(
        live_interpreter_fork,
        "anyfork.fork() in main beside live sub-interpreters, where os.fork() kills its child "
        "(gh-139759)",
        "child exited with status 42",
    ),
]
NAMES = [scenario.name for scenario in SCENARIOS]


class Outcome(NamedTuple):
    scenario: Scenario
    verdict: str  # ok, FAILED or skipped
    outcome: str
    seconds: float
    output: str  # the scenario's own notes, and all of stderr if it failed


def has_trio() -> bool:
    return importlib.util.find_spec("trio") is not None


def judge(scenario: Scenario, trial: _lab.Trial) -> Outcome:
    """Compare what came of a scenario with what should."""
    failure = trial.failure()
    outcome = failure or str(trial.value)
    ok = failure is None and trial.value == scenario.expected
    if scenario.on_stderr and scenario.on_stderr not in trial.stderr:
        ok = False
        outcome += f", without {scenario.on_stderr} on stderr"
    output = (trial.stdout if ok else trial.stdout + trial.stderr).strip()
    return Outcome(scenario, "ok" if ok else "FAILED", outcome, trial.seconds, output)


def play(scenario: Scenario) -> Outcome:
    """Run one scenario in a process of its own."""
    if scenario.need_trio and not has_trio():
        reason = "trio is not installed: pip install 'anyfork[demo]'"
        return Outcome(scenario, "skipped", reason, 0.0, "")
    return judge(scenario, _lab.try_in_fresh_python(scenario.play, timeout=TIMEOUT))


def _show(outcome: Outcome) -> None:
    scenario = outcome.scenario
    _console.field("what", scenario.what)
    expected = scenario.expected
    if scenario.on_stderr:
        expected += f", with {scenario.on_stderr} on stderr"
    _console.field("expected", expected + (f" ({scenario.note})" if scenario.note else ""))
    _console.field("outcome", outcome.outcome)
    for line in outcome.output.splitlines()[-30:]:
        print(f"    | {line}")
    _console.field("verdict", f"{outcome.verdict} ({outcome.seconds:.2f} s)")
    print(flush=True)


def command(names: list[str], as_json: bool) -> int:
    """The subcommand; returns its exit status."""
    chosen = [s for s in SCENARIOS if not names or s.name in names]
    if not as_json:
        print(f"anyfork smoketest on {_lab.python_line()}\n", flush=True)
    outcomes: list[Outcome] = []
    for scenario in chosen:
        if not as_json:
            _console.banner(scenario.name)
        outcomes.append(play(scenario))
        if not as_json:
            _show(outcomes[-1])
    failed = [o for o in outcomes if o.verdict == "FAILED"]
    skipped = [o for o in outcomes if o.verdict == "skipped"]
    if as_json:
        print(json.dumps(_report(outcomes), indent=2))
    else:
        _console.table(
            ["scenario", "verdict", "outcome", "seconds"],
            [[o.scenario.name, o.verdict, o.outcome, f"{o.seconds:.2f}"] for o in outcomes],
            right=[3],
        )
        ok = len(outcomes) - len(failed) - len(skipped)
        print(f"\n{ok} as expected, {len(failed)} failed, {len(skipped)} skipped")
    if failed:
        return 1
    # Asked for by name, and not done: that must not look like success.
    return 2 if skipped and names else 0


def _report(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "python": _lab.python_info(),
        "ok": all(o.verdict != "FAILED" for o in outcomes),
        "scenarios": [
            {
                "name": o.scenario.name,
                "what": o.scenario.what,
                "expected": o.scenario.expected,
                "note": o.scenario.note or None,
                "outcome": o.outcome,
                "verdict": o.verdict.lower(),
                "seconds": round(o.seconds, 3),
                "output": o.output,
            }
            for o in outcomes
        ],
    }
