"""``anyfork doctor``: what anyfork sees here, as a text to attach to a bug report.

Rule: facts are read, claims are tried; nothing is concluded from a version number.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from . import __version__, _anyfork, _audit, _console, _kernel, _lab
from ._errors import describe_status
from ._install import is_installed
from ._methods import methods
from ._request import spawn

_LIFELINE_TIMEOUT = 20.0
_SLEEP = 600.0  # of a worker that is to be killed


# ---- facts ----------------------------------------------------------------------------


def _limit(what: int) -> str:
    def text(value: int) -> str:
        return "unlimited" if value == resource.RLIM_INFINITY else str(value)

    soft, hard = resource.getrlimit(what)
    return f"{text(soft)} (hard {text(hard)})"


def _libc() -> str:
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        version = None
    return version or " ".join(platform.libc_ver()).strip() or "unknown (not glibc)"


def _os_threads() -> list[str]:
    names = []
    for tid in sorted(os.listdir("/proc/self/task"), key=int):
        with open(f"/proc/self/task/{tid}/comm") as file:
            names.append(file.read().strip())
    return names


def _library_paths() -> list[str]:
    """The copies of libanyfork in this process; there must be one."""
    with open("/proc/self/maps") as file:
        fields = [line.split(maxsplit=5) for line in file]
    return sorted({f[5].strip() for f in fields if len(f) == 6 and "libanyfork-" in f[5]})


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def facts() -> dict[str, dict[str, Any]]:
    """By section; everything here is only read."""
    python = _lab.python_info()
    gil_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    python["gil_enabled"] = gil_enabled()
    return {
        "anyfork": {
            "version": __version__,
            "extension": _anyfork.__file__,
            "library": _library_paths(),
            "fault injection": _anyfork.FAULTS,
            "os.fork replaced": is_installed(),
        },
        "python": python,
        "system": {
            "libc": _libc(),
            "kernel": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(),
            "cpus": f"{os.process_cpu_count()} of {os.cpu_count()}",
            "pid": os.getpid(),
            "open files": _fds(),
            "limit of open files": _limit(resource.RLIMIT_NOFILE),
            "limit of processes": _limit(resource.RLIMIT_NPROC),
        },
        "threads": {
            "os": _os_threads(),
            "python": [thread.name for thread in threading.enumerate()],
            "runtime": _anyfork.runtime(),
        },
        "layout": {
            feature: f"{state}: {why}" if why else state
            for feature, (state, why) in _anyfork.layout().items()
        },
    }


# ---- CPython's own bugs -----------------------------------------------------------------


def _fork_beside_interpreter() -> str:
    """Status of the child of a plain os.fork() in main, with a live sub-interpreter."""
    interp = _lab.SubInterpreter("legacy")
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    del interp
    return describe_status(status)


def _fork_in_subinterpreter() -> str:
    """Status of the child of a plain os.fork() in a legacy sub-interpreter."""
    status: int = _lab.SubInterpreter("legacy").call(_plain_fork)
    return describe_status(status)


def _plain_fork() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def _main_tstate_after_thread_fork() -> str:
    """In the child of a plain os.fork() in a thread: is runtime.main_tstate alive?"""
    statuses: list[int] = []
    _anyfork.layout()  # read here: in the child it may not be possible any more

    def body() -> None:
        pid = os.fork()
        if pid == 0:
            runtime = _anyfork.runtime()
            os._exit(2 if runtime is None else int(not runtime["main_tstate_alive"]))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return {0: "alive", 1: "dangling"}.get(statuses[0], f"not known ({statuses[0]})")


def _exit_after_datetime() -> str:
    """Import datetime in two sub-interpreters, one of them isolated, destroy the older
    one first, then end; no fork at all."""
    import _interpreters

    older, newer = _interpreters.create("isolated"), _interpreters.create("legacy")
    for interp in (older, newer):
        _interpreters.exec(interp, "import datetime")
    for interp in (older, newer):
        _interpreters.destroy(interp)
    return "ended"


class Bug(NamedTuple):
    """One of CPython's, and how to see whether it is here."""

    title: str
    trial: Callable[[], str]
    healthy: str  # what the trial answers where the bug is not
    remedy: str


BUGS = [
    Bug(
        "os.fork() in a sub-interpreter kills its child",
        _fork_in_subinterpreter,
        "exited with status 0",
        "anyfork.fork() returns twice there; anyfork.install() makes os.fork() do the same",
    ),
    Bug(
        "os.fork() in main beside a live sub-interpreter kills its child (gh-139759)",
        _fork_beside_interpreter,
        "exited with status 0",
        "anyfork.fork() takes the interpreters off the child's list before CPython sees them",
    ),
    Bug(
        "os.fork() in a thread leaves the child's runtime.main_tstate dangling: signal handlers "
        "do not run in busy loops, finalization crashes",
        _main_tstate_after_thread_fork,
        "alive",
        "anyfork.fork() and every worker set it to the thread that survives",
    ),
    Bug(
        "memory is freed twice if two sub-interpreters, one of them isolated, have imported "
        "datetime and the older one is destroyed first",
        _exit_after_datetime,
        "ended",
        "a worker ends with _exit() and destroys none of them; in its host nothing can: have "
        "datetime in one of them, or in legacy ones only",
    ),
]


def try_bug(bug: Bug) -> dict[str, Any]:
    """Whether a bug is here: tried in a process of its own."""
    trial = _lab.try_in_fresh_python(bug.trial)
    failure = trial.failure()
    found = failure or str(trial.value)
    return {
        "title": bug.title,
        "present": found != bug.healthy,
        "found": found,
        "remedy": bug.remedy,
    }


# ---- anyfork's own promises ---------------------------------------------------------------


def _spin() -> None:
    """A worker that looks after nothing: blocked signals, a busy loop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    end = time.monotonic() + _SLEEP
    while time.monotonic() < end:
        pass


def _be_owner(method: str, pid_fd: int) -> None:
    """Own a worker, say which, and wait to be killed."""
    child = spawn(_spin, method=method)
    child.wait_ready(_LIFELINE_TIMEOUT)
    assert child.pid is not None
    os.write(pid_fd, child.pid.to_bytes(4, "little"))
    time.sleep(_SLEEP)


def try_lifeline(method: str) -> tuple[float | None, str | None]:
    """Kill a worker's owner with SIGKILL: (milliseconds until the worker was dead, or
    None; what went wrong)."""
    r, w = os.pipe()
    pidfd = -1
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from anyfork import _doctor\n_doctor._be_owner({method!r}, {w})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(w,),
    ) as owner:
        os.close(w)
        try:
            # The owner's death ends the wait too: then there is nothing to read.
            if not _readable(r, _LIFELINE_TIMEOUT) or len(data := os.read(r, 4)) < 4:
                return None, "no worker was started"
            worker = int.from_bytes(data, "little")
            pidfd = os.pidfd_open(worker)
            begin = time.perf_counter()
            owner.kill()
            if not _readable(pidfd, _LIFELINE_TIMEOUT):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return None, f"the worker outlived its owner by {_LIFELINE_TIMEOUT:.0f} s"
            return (time.perf_counter() - begin) * 1000, None
        finally:
            owner.kill()
            os.close(r)
            if pidfd >= 0:
                os.close(pidfd)


def _readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _fds_of_a_worker(method: str) -> int:
    """How many fds its owner holds for one worker."""
    with spawn(time.sleep, _SLEEP, method=method):  # whatever the first start opens
        pass
    before = _fds()
    with spawn(time.sleep, _SLEEP, method=method):
        during = _fds()
    return during - before


def try_method(method: str) -> dict[str, Any]:
    """The promises of one method."""
    ms, wrong = try_lifeline(method)
    trial = _lab.try_in_fresh_python(_fds_of_a_worker, method)
    wrong = wrong or trial.failure()
    return {
        "method": method,
        "lifeline_ms": None if ms is None else round(ms, 1),
        "fds_per_worker": trial.value,
        "problem": wrong,
    }


# ---- the command -----------------------------------------------------------------------------


def command(as_json: bool) -> int:
    """The subcommand; returns its exit status."""
    report: dict[str, Any] = dict(facts())
    available = [method for method in methods() if method.available and method.has_process]
    with _console.Progress(1) as progress:
        progress.begin("trying", len(BUGS) + len(available))
        bugs, workers = [], []
        for bug in BUGS:
            bugs.append(try_bug(bug))
            progress.advance(1)
        for method in available:
            workers.append(try_method(method.name))
            progress.advance(1)
    features = _lab.try_in_fresh_python(_kernel.try_features)
    report["kernel"] = features.value or []
    report["cpython_bugs"] = bugs
    report["workers"] = workers
    problems = _problems(report)
    if failure := features.failure():
        problems.append(f"the kernel's features could not be tried: {failure}")
    report["problems"] = problems
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 1 if problems else 0


def _counting_environment() -> dict[str, str]:
    """In which fork handlers of C are counted, see src/shim/atfork.c, if the path of this
    package allows it."""
    env = dict(os.environ)
    path = os.path.join(os.path.dirname(_anyfork.__file__), "lib", "anyfork-atfork.so")
    if os.path.isfile(path) and not any(c in path for c in " :$"):  # as of ld.so(8)
        env["LD_PRELOAD"] = ":".join(filter(None, (path, env.get("LD_PRELOAD"))))
    return env


def _handlers_text(handlers: _audit.Handlers) -> str:
    def text(what: str, number: int | None, names: list[str]) -> str:
        if number is None:
            return f"of {what} not known"
        return f"{number} of {what}" + (f" ({', '.join(names)})" if names else "")

    c, python = handlers
    counted = [name if n == 1 else f"{name} {n} times" for name, n in sorted((c or {}).items())]
    return "; ".join(
        (
            text("C", None if c is None else sum(c.values()), counted),
            text("Python", None if python is None else len(python), python or []),
        )
    )


def template_command(names: list[str], as_json: bool) -> int:
    """`anyfork doctor --template MODULE...`; returns its exit status."""
    # Nothing is preloaded into a template that serves: what is counted there is for the reader.
    with spawn(_audit.inspect, names, method="exec", env=_counting_environment()) as child:
        modules, findings, handlers = child.result()
    failed = [module for module in modules if module.error]
    if as_json:
        report = {
            "modules": [module._asdict() for module in modules],
            "findings": [finding._asdict() for finding in findings],
            "fork_handlers": handlers._asdict(),
        }
        print(json.dumps(report, indent=2))
        return 1 if failed or findings else 0
    _console.table(
        ["module", "import", "memory", "threads", "result"],
        [
            [
                module.name,
                f"{module.seconds * 1000:.1f} ms",
                f"{module.kb / 1024:.1f} MB",
                str(module.threads),
                f"FAILED {module.error}" if module.error else "ok",
            ]
            for module in modules
        ],
        right={1, 2, 3},
    )
    print(f"called at each fork: {_handlers_text(handlers)}")
    for finding in findings:
        print(f"refused: {finding}")
    if not findings and not failed:
        print("ok: a template may preload this")
    return 1 if failed or findings else 0


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [
        f"layout: {feature} {state}"
        for feature, state in report["layout"].items()
        if state != "ready" and not _is_known_refusal(state)
    ]
    copies = report["anyfork"]["library"]
    if len(copies) != 1:
        problems.append(f"{len(copies)} copies of libanyfork in this process: {copies}")
    problems += [f"{w['method']}: {w['problem']}" for w in report["workers"] if w["problem"]]
    missing = [m.name for m in methods() if not m.available]
    return problems + [f"method {name} does not work from main" for name in missing]


def _is_known_refusal(state: str) -> bool:
    """Free-threaded builds: the twin fork is refused, and that is no surprise."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED")) and "free-threaded" in state


def _show(report: dict[str, Any]) -> None:
    print(f"anyfork doctor, anyfork {__version__}")
    for section in ("anyfork", "python", "system", "threads", "layout"):
        print(f"\n{section}")
        width = max(map(len, report[section]))
        for name, value in report[section].items():
            _console.field(name.replace("_", " "), _text(value), width)
    print("\nkernel, by trying")
    width = max((len(feature["name"]) for feature in report["kernel"]), default=0)
    for feature in report["kernel"]:
        state = f"yes: {feature['used_for']}"
        if not feature["available"]:
            why = f"{feature['why_not']}; Linux {feature['since']} has it"
            state = f"no ({why}): {feature['without']}"
        _console.field(feature["name"], state, width)
    print("\nknown bugs of CPython, by trying")
    for bug in report["cpython_bugs"]:
        print(f"  {'here' if bug['present'] else 'not here'}: {bug['title']}")
        print(f"      found:   {bug['found']}")
        if bug["present"]:
            print(f"      anyfork: {bug['remedy']}")
    print("\nworkers, by trying")
    width = max((len(worker["method"]) for worker in report["workers"]), default=0)
    for worker in report["workers"]:
        if worker["problem"]:
            _console.field(worker["method"], f"FAILED {worker['problem']}", width)
        else:
            _console.field(
                worker["method"],
                f"ok, died {worker['lifeline_ms']} ms after its owner was killed; "
                f"{worker['fds_per_worker']} fds in its owner",
                width,
            )
    print()
    for problem in report["problems"]:
        print(f"FAILED: {problem}")
    if not report["problems"]:
        print("All of anyfork's own checks hold.")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_text(v)}" for name, v in value.items())
    return "not known" if value is None else str(value)
