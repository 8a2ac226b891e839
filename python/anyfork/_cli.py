"""The command ``anyfork``; also ``python -m anyfork``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Literal, NamedTuple

from . import __version__, _anyfork, _console, _lab
from ._request import spawn

ORIGINS = ("main", *_lab.KINDS)
TRAITS = {"runs_in": "runs in", "memory": "memory", "may_wait_for": "may wait for"}
CALL = "fork()"  # not a spawn method, but the first thing one wants to know


# ---- anyfork methods ------------------------------------------------------------------


class Cell(NamedTuple):
    """One method, tried from one interpreter."""

    works: bool
    reason: str | None
    ms: float | None


def _start_and_stop(name: str) -> tuple[str | None, float]:
    """Start a worker, or fork(), in the calling interpreter: (what went wrong,
    milliseconds from the start until it had ended). The second time counts: the first
    start also reads the interpreter's layout."""
    for _ in range(2):
        begin = time.perf_counter()
        wrong = _start_once(name)
        ms = (time.perf_counter() - begin) * 1000
        if wrong is not None:
            break
    return wrong, ms


def _start_once(name: str) -> str | None:
    if name == CALL:
        pid = _anyfork.fork()
        if pid == 0:
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        return None if status == 0 else f"the child's wait status was {status}"
    with spawn(os.getpid, method=name) as child:
        pid = child.result(30)
        expected = os.getpid() if child.pid is None else child.pid
        return None if pid == expected else f"worker {expected} said it was {pid}"


def _try_method(name: str, origin: Literal["main"] | _lab.Kind) -> tuple[str | None, float]:
    """:func:`_start_and_stop` from an interpreter of that kind."""
    try:
        if origin == "main":
            return _start_and_stop(name)
        with _lab.SubInterpreter(origin) as interp:
            answer: tuple[str | None, float] = interp.call(_start_and_stop, name)
            return answer
    except Exception as exc:
        # The last line of a sub-interpreter's traceback is its exception.
        return str(exc).strip().splitlines()[-1], 0.0


def try_methods(names: list[str], origins: list[str]) -> dict[str, dict[str, Cell]]:
    """Try each method from each interpreter, in a process of its own."""
    cells: dict[str, dict[str, Cell]] = {}
    with _console.Progress(1) as progress:
        progress.begin("trying", len(names) * len(origins))
        for name in names:
            cells[name] = {}
            for origin in origins:
                trial = _lab.try_in_fresh_python(_try_method, name, origin)
                failure = trial.failure()
                if failure is None and trial.value[0] is None:
                    cells[name][origin] = Cell(True, None, round(trial.value[1], 2))
                else:
                    cells[name][origin] = Cell(False, failure or trial.value[0], None)
                progress.advance(1)
    return cells


def _methods(args: argparse.Namespace) -> int:
    known = {CALL: "fork on the calling thread; returns twice, in any interpreter"}
    traits: dict[str, Any] = {CALL: {}}
    for row in _anyfork.methods():
        known[row["name"]] = "; ".join(filter(None, (row["summary"], row["lacks"])))
        fields: dict[str, Any] = {**row}
        traits[row["name"]] = {trait: fields[trait] for trait in TRAITS}
    names = args.method or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(
            f"anyfork methods: unknown: {', '.join(unknown)}; known are: {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    origins = [args.origin] if args.origin else list(ORIGINS)
    cells = try_methods(names, origins)
    if args.json:
        rows = [
            {
                "name": name,
                "summary": known[name],
                **traits[name],
                "from": {origin: cell._asdict() for origin, cell in cells[name].items()},
                "works": all(cell.works for cell in cells[name].values()),
            }
            for name in names
        ]
        print(json.dumps({"python": _lab.python_info(), "methods": rows}, indent=2))
    else:
        _print_methods(names, known, traits, origins, cells)
    return 0 if all(cell.works for row in cells.values() for cell in row.values()) else 1


def _print_methods(
    names: list[str],
    known: dict[str, str],
    traits: dict[str, dict[str, str]],
    origins: list[str],
    cells: dict[str, dict[str, Cell]],
) -> None:
    print(_lab.python_line() + "\n")
    reasons: list[str] = []

    def shown(cell: Cell) -> str:
        if cell.works:
            return f"works {cell.ms:7.2f} ms"
        reason = cell.reason or "no reason given"
        if reason not in reasons:
            reasons.append(reason)
        return f"no [{reasons.index(reason) + 1}]"

    _console.table(
        ["method", *(f"from {origin}" for origin in origins)],
        [[name, *(shown(cells[name][origin]) for origin in origins)] for name in names],
    )
    print()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {known[name]}")
        for trait, text in traits[name].items():
            print(f"{'':<{width}}    {TRAITS[trait]}: {text}")
    print("\nms: from the start of a worker until it was gone, the second one of its process")
    for i, reason in enumerate(reasons, 1):
        print(f"[{i}] {reason}")


# ---- the other commands -------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    from . import _doctor

    if args.template:
        return _doctor.template_command(args.template, args.json)
    return _doctor.command(args.json)


def _smoketest(args: argparse.Namespace) -> int:
    from . import _smoketest

    if args.list:
        if args.json:
            print(json.dumps(_smoketest.NAMES))
        else:
            width = max(map(len, _smoketest.NAMES))
            for scenario in _smoketest.SCENARIOS:
                needs = " (needs trio)" if scenario.need_trio else ""
                print(f"{scenario.name:<{width}}  {scenario.what}{needs}")
        return 0
    unknown = [name for name in args.scenario if name not in _smoketest.NAMES]
    if unknown:
        print(
            f"anyfork smoketest: unknown scenario: {', '.join(unknown)}; "
            f"known are: {', '.join(_smoketest.NAMES)}",
            file=sys.stderr,
        )
        return 2
    return _smoketest.command(args.scenario, args.json)


def _demo(args: argparse.Namespace) -> int:
    from . import _demo

    return _demo.command(args.path, args.workers, args.json, args.method)


def _serve(args: argparse.Namespace) -> int:
    from . import _serve

    if args.status:
        return _serve.command(lambda: _serve.status(args.name, args.json))
    if args.stop:
        return _serve.command(lambda: _serve.stop(args.name))
    preload = tuple(name for words in args.preload for name in words.split(",") if name)
    config = _serve.Config(args.name, preload, args.idle, args.audit)
    if args.detach:
        return _serve.command(lambda: _serve.detach(config))
    return _serve.command(lambda: _serve.serve(config, args.ready_fd))


def _supervise(args: argparse.Namespace) -> int:
    from . import _supervise_command as supervise

    what = supervise.check if args.check else supervise.supervise
    return supervise.command(lambda: what(args.spec, args.json))


# ---- arguments --------------------------------------------------------------------------------


def _workers(text: str) -> int:
    try:
        n = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
    if not 1 <= n <= 1000:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1000, not {n}")
    return n


def _name(text: str) -> str:
    from . import _serve

    try:
        return _serve.check_name(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1e9, not {text}")
    return seconds


_METHODS = """\
Show which spawn methods work here, from which interpreter, and why the others
do not. Each answer comes from trying: a fresh process starts one worker and
waits for its end. Takes a few seconds; changes nothing.
"""
_METHODS_END = """\
Exit status: 0 if every method asked for works from every interpreter asked
             for, 1 if one does not, 2 on wrong usage.
Example:     anyfork methods --from legacy subint_fork && python service.py
See also:    anyfork doctor, for a full report to attach to an issue
"""
_DOCTOR = """\
Report what anyfork sees here: the CPython, its layout, threads, limits, which
known CPython bugs hit here and what anyfork does about them, and whether a
worker dies with its owner. All by trying, in processes of their own; takes some
seconds, changes nothing. The text is made to be attached to a bug report.
"""
_DOCTOR_END = """\
Exit status: 0 if all of anyfork's own checks hold (bugs of CPython do not
             count), 1 if one does not, 2 on wrong usage.
Example:     anyfork doctor > doctor.txt
             anyfork doctor --template numpy myapp.jobs
See also:    anyfork smoketest, for forks in every place that matters
"""
_SMOKETEST = """\
Fork from every place that matters, and compare what happens with what should.
Answers: can this CPython do what anyfork promises? One scenario is a control:
the plain os.fork() that CPython must kill. Each runs in a process of its own.
"""
_SMOKETEST_END = """\
Exit status: 0 if every outcome is the expected one (skips are named), 1 if one
             is not, 2 on wrong usage, or if a scenario asked for by name needs
             trio and there is none: pip install 'anyfork[demo]'
Example:     anyfork smoketest --scenario subint_fork_twice
See also:    anyfork methods, for what can be used here
"""
_SERVE = """\
Keep an interpreter warm for the command line: import modules once, and start
the programs of `anyfork-run` in workers that have them already. They run as if
started directly: streams, environment, directory, limits, signals, exit status.
"""
_SERVE_END = """\
Exit status: 0 once it was stopped, or nobody has used it for SECONDS; with
             --detach once it listens; 1 if it cannot listen or load, or if
             none runs that could be shown or stopped; 2 on wrong usage.
Example:     anyfork serve --detach --preload numpy,pandas
             anyfork-run -c 'import numpy; print(numpy.__version__)'
See also:    anyfork doctor --template MODULE..., for what can be preloaded
"""
_SUPERVISE = """\
Start the programs and Python functions that SPEC names, in their order, and keep
them running: each is started again as its restart type says, with its back-off,
until that happens too often. They end when this command does, however it ends.
"""
_SUPERVISE_END = """\
Signals:     SIGHUP    read SPEC again: what has changed is started again, what
                       is new started, what is gone stopped; an invalid file
                       changes nothing
             SIGTERM   stop all, the last one first; so does SIGINT (Ctrl-C), or
                       closing the terminal; the second time it kills them
             SIGUSR1   print what is running
Exit status: 0 once all were stopped as asked, or have ended for good; 1 if SPEC is
             not valid, or restarts were too many; 2 on wrong usage.
Output:      events, as lines on standard error; with --json one object a line on
             standard output, where no child writes then
Example:     anyfork supervise --check service.toml && anyfork supervise service.toml
See also:    docs/supervision.md, for what SPEC may say
"""
_DEMO = """\
Do real work in workers of every method: with trio running in the main
interpreter, four busy Python threads and a live isolated interpreter, start
workers, from main and from that sub-interpreter; each runs trio in its own
process and hashes (SHA-256) its share of the files under PATH. The digests are
checked against the parent's own.
"""
_DEMO_END = """\
Exit status: 0 if all digests agree and no process is left, 1 if not, 2 on wrong
             usage, if PATH has no readable file, or without trio:
             pip install 'anyfork[demo]'
Example:     anyfork demo ~/src --workers 8
See also:    anyfork methods, for the methods; anyfork smoketest
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="anyfork",
        formatter_class=raw,
        description="Fork from any interpreter, any thread. See what works here, and see it work.",
        epilog="Exit status: 0 as hoped, 1 not so, 2 wrong usage; see each command's --help.\n"
        "Example:     anyfork demo",
    )
    parser.add_argument("--version", action="version", version=f"anyfork {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, text: str, end: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=text, epilog=end, formatter_class=raw
        )
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.set_defaults(run=run)
        return sub

    sub = add("methods", "which spawn methods work here", _METHODS, _METHODS_END, _methods)
    sub.add_argument("method", nargs="*", metavar="METHOD", help="only these (default: all)")
    sub.add_argument(
        "--from", dest="origin", choices=ORIGINS, help="only from this interpreter (default: all)"
    )
    sub = add("doctor", "a report about this machine and Python", _DOCTOR, _DOCTOR_END, _doctor)
    sub.add_argument(
        "--template", nargs="+", metavar="MODULE",
        help="instead: what these modules would mean as preload of a template",
    )
    sub = add("smoketest", "fork in every place that matters", _SMOKETEST, _SMOKETEST_END,
              _smoketest)
    sub.add_argument(
        "--scenario", action="append", default=[], metavar="NAME",
        help="only this one (may be given again; default: all)",
    )
    sub.add_argument("--list", action="store_true", help="list the scenarios, run none")
    sub = add("serve", "a warm interpreter for anyfork-run", _SERVE, _SERVE_END, _serve)
    sub.add_argument(
        "--preload", action="append", default=[], metavar="MODULE,...",
        help="what is imported ahead (may be given again)",
    )
    sub.add_argument(
        "--name", type=_name, default="default", help="which server (default: default)"
    )
    sub.add_argument(
        "--idle", type=_seconds, default=3600.0, metavar="SECONDS",
        help="end when nobody has used it for so long (default: 3600; 0: never)",
    )
    sub.add_argument(
        "--audit", choices=("refuse", "warn"), default="refuse",
        help="what is done about threads and sockets of what it preloads (default: refuse)",
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument(
        "--detach", action="store_true", help="return once it listens, and leave it running"
    )
    what.add_argument("--status", action="store_true", help="show the server that runs")
    what.add_argument(
        "--stop", action="store_true", help="stop it, and the programs that it runs"
    )
    sub.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    sub = add("supervise", "keep the children of a spec running", _SUPERVISE, _SUPERVISE_END,
              _supervise)
    sub.add_argument("spec", metavar="SPEC", help="a file in TOML")
    sub.add_argument("--check", action="store_true", help="only say whether SPEC is valid")
    sub = add("demo", "real work in workers of every method", _DEMO, _DEMO_END, _demo)
    sub.add_argument(
        "path", nargs="?", metavar="PATH",
        help="a folder or a file (default: Python's standard library)",
    )
    sub.add_argument(
        "--workers", type=_workers, default=4, metavar="N", help="workers per method (default: 4)"
    )
    names = [row["name"] for row in _anyfork.method_traits()]
    sub.add_argument(
        "--method", action="append", choices=names, metavar="NAME",
        help=f"only this one (may be given again; default: all of {', '.join(names)})",
    )
    return parser


def _open_closed_streams() -> None:
    """The next files to be opened would get their numbers: a report, say, that of stdin."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _open_closed_streams()
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("anyfork: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # a reader such as head(1) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return status
