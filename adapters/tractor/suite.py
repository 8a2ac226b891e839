#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run tractor's own test suite on anyfork's methods, beside its default, and compare.

usage: adapters/tractor/suite.py CHECKOUT [--python NAME] [--methods M...] [--rounds N]
                                 [--all | --tests FILE...] [--tpt tcp|uds] [--json FILE]
       adapters/tractor/suite.py CHECKOUT [--python NAME] --adapter

CHECKOUT is a clone of tractor, which is not changed. NAME is one of tools/pythons (3.13,
3.14, host); a venv with tractor's dependencies is made under build/tractor. Methods that
fork run under the name main_thread_forkserver, for which tractor's suite has its budgets
and skips. Default: the spawn set, nine files; methods trio (tractor's own), fork,
subint_fork, main_thread_forkserver, exec. Each file runs in a process of its own: a test
that is stopped by its time limit leaves a trio behind that fails every later one.

--adapter runs the adapter's own tests with that tractor, and nothing else.

Prints a table, with the actors that lived on when their tests had ended, and every test
that failed or was skipped, by name. Exit status: 0; 1 if
a test fails in most rounds of a method and in none of trio's; 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = Path(__file__).resolve().parent / "src"
SITE = Path(__file__).resolve().parent / "suite_site"
SPAWN_SET = (
    "test_spawning", "test_cancellation", "test_advanced_faults", "test_runtime", "test_rpc",
    "test_local", "test_root_runtime", "test_child_manages_service_nursery",
    "test_oob_cancellation",
)  # fmt: skip
DEFAULT = "trio"
FORKS = ("fork", "subint_fork", "main_thread_forkserver")
METHODS = (DEFAULT, *FORKS, "exec")
# Whose events may be used as booleans, as tractor's debugger does. Newer ones, which keep the
# cause of an error that they take out of its group (0.34), are for all but tractor's suite.
TRIO_OF_SUITE = "trio<0.31"
FORKS_RUN_AS = "main_thread_forkserver"
REQUIREMENTS = (
    "pytest>=9.0.3", "pexpect>=4.9,<5", "pytest-timeout>=2.3", "psutil>=7", "cffi>=1.17.1",
    "stackscope>=0.2.2,<0.3", "typing-extensions>=4.14.1",
)  # fmt: skip
# One name for one test, whatever the method, and in each round.
VARIES_IN_NAME = re.compile(r"start_method=\w+-|-?start_method=\w+(?=\])| at 0x[0-9a-f]+")
Rows = dict[str, list[tuple[float, dict[str, str], int]]]  # of a method: seconds, results, orphans
DEFAULT_SIGNALS = "--default-signal=INT,QUIT"  # a shell's background jobs ignore them
TEST_SECONDS = 150
FILE_SECONDS = 1500


def run(name: str, *command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """With that CPython's environment; stopped by its process group if it takes too long."""
    words = [str(word) for word in command]
    full = [str(ROOT / "tools/pythons"), "run", name, "--", *words]
    timeout = options.pop("timeout", None)
    process = subprocess.Popen(full, start_new_session=True, text=True, **options)  # type: ignore[call-overload]
    try:
        out, err = process.communicate(timeout=timeout)  # type: ignore[arg-type]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return subprocess.CompletedProcess(full, process.returncode, out, err)


def venv_of(name: str, checkout: Path, trio: str = "trio") -> Path:
    """With tractor's dependencies; made once."""
    place = ROOT / "build/tractor" / name / ("venv" if trio == "trio" else "venv-suite")
    done = place / "done"
    if not done.exists():
        print(f"{name}: making a venv with tractor's dependencies", file=sys.stderr)
        python = "$ANYFORK_PYTHON"
        script = f'"{python}" -m venv --clear {shlex.quote(str(place))}'
        steps = (
            ("sh", "-c", script),
            (place / "bin/python", "-m", "pip", "install", "-q", checkout, *REQUIREMENTS, trio),
            # The checkout itself is what is tested, and not a copy of it.
            (place / "bin/python", "-m", "pip", "uninstall", "-q", "-y", "tractor"),
        )
        for step in steps:
            if run(name, *step, stdout=sys.stderr).returncode != 0:
                raise SystemExit(2)
        done.touch()
    return place


def python_path(name: str, checkout: Path) -> str:
    site = subprocess.run(
        [ROOT / "tools/build", name, "--tag", "tractor"], check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    return f"PYTHONPATH={site}:{ADAPTER}:{checkout}"


def adapter_tests(name: str, checkout: Path) -> int:
    return run(
        name, "env", python_path(name, checkout), "PYTHONWARNINGS=ignore",
        venv_of(name, checkout) / "bin/python", "-m", "pytest", "-q", f"--timeout={TEST_SECONDS}",
        ADAPTER.parent / "tests", stdin=subprocess.DEVNULL, timeout=FILE_SECONDS,
    ).returncode  # fmt: skip


def end_orphans(venv: Path) -> int:
    """How many actors lived on when their test had ended; the next file's would meet them,
    on ports that examples have in common. They are those who have loaded what is in the venv."""
    count = 0
    for _generation in range(20):  # children of one that is killed are orphans then
        orphans = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == "1" and f"{venv}/" in (process / "maps").read_text():
                    orphans.append(int(process.name))
        if not orphans:
            break
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        count += len(orphans)
        time.sleep(0.2)
    return count


def one_file(
    name: str, method: str, checkout: Path, path: str, test: str, tpt: str, out: Path
) -> dict[str, str]:
    """{test: passed, failed, skipped, xfailed}; what was expected to fail and did not has passed"""
    venv = venv_of(name, checkout, TRIO_OF_SUITE)
    backend = ["--spawn-backend", FORKS_RUN_AS if method in FORKS else method]
    settings = ["-u", "PYTHONDONTWRITEBYTECODE", path, "PYTHONWARNINGS=ignore"]
    if method in FORKS:
        backend += ["--anyfork-method", method]
        settings += [f"{path}:{SITE}", f"ANYFORK_METHOD_OF_SUITE={method}"]
    xml = out.with_suffix(".xml")
    xml.unlink(missing_ok=True)
    # The suite runs some programs by the name "python".
    script = f'PATH={shlex.quote(str(venv / "bin"))}:$PATH exec "$@"'
    # Where sockets are: none is left there by a test before that was killed.
    runtime = tempfile.TemporaryDirectory(prefix="tractor-")
    settings.append(f"XDG_RUNTIME_DIR={runtime.name}")
    with runtime, open(out.with_suffix(".log"), "w") as log:
        run(
            name, "env", "-C", checkout, DEFAULT_SIGNALS, *settings, "sh", "-c", script, "sh",
            venv / "bin/python", "-m", "pytest", "-p", "anyfork_tractor.pytest_plugin", "-q",
            "-rsxX", "--capture=sys", "--tpt-proto", tpt, f"--timeout={TEST_SECONDS}",
            f"--junit-xml={xml}", "-o", "junit_family=xunit1", "-o", "xfail_strict=false", *backend,
            test, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            timeout=FILE_SECONDS,
        )  # fmt: skip
    if not xml.exists():
        print(f"{name} {method}: no result; see {log.name}", file=sys.stderr)
        return {f"{Path(test).stem}::(no result)": "failed"}
    results = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        test = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        test = VARIES_IN_NAME.sub("", test).replace("[]", "")
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            results[test] = "failed"
        elif skipped is not None:
            results[test] = "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"
        else:
            results[test] = "passed"
    return results


def one_round(
    name: str, method: str, checkout: Path, tests: list[str], tpt: str, folder: Path
) -> tuple[dict[str, str], int]:
    """The results of all files, and how many orphans they left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = python_path(name, checkout)
    results: dict[str, str] = {}
    orphans = 0
    for test in tests:
        out = folder / Path(test).stem
        results |= one_file(name, method, checkout, path, test, tpt, out)
        time.sleep(0.2)  # what ends with its parent has ended
        orphans += end_orphans(venv_of(name, checkout, TRIO_OF_SUITE))
    return results, orphans


def save(path: Path, rows: Rows) -> None:
    data = {
        m: [{"seconds": round(s, 1), "orphans": o, "results": r} for s, r, o in rows[m]]
        for m in rows
    }
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def files_of(checkout: Path) -> list[str]:
    files = (checkout / "tests").rglob("test_*.py")
    return sorted(str(file.relative_to(checkout)) for file in files)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default="3.13")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tests", nargs="+")
    parser.add_argument("--tpt", choices=("tcp", "uds"), default="tcp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--adapter", action="store_true")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if not (checkout / "tractor/spawn/_spawn.py").exists():
        parser.error(f"{checkout} is no checkout of tractor")
    if options.adapter:
        return adapter_tests(options.python, checkout)
    tests = options.tests or (
        files_of(checkout) if options.all else [f"tests/{n}.py" for n in SPAWN_SET]
    )
    folder = ROOT / "build/tractor" / options.python

    rows: Rows = {m: [] for m in options.methods}
    for n in range(options.rounds):  # interleaved: the machine's load is everybody's
        for method in options.methods:
            begin = time.monotonic()
            out = folder / f"{method}-{options.tpt}-{n}"
            results, orphans = one_round(options.python, method, checkout, tests, options.tpt, out)
            rows[method].append((time.monotonic() - begin, results, orphans))
            counts = Counter(results.values())
            print(
                f"{options.python} {method:24} round {n + 1}: {dict(counts)} "
                f"{rows[method][-1][0]:.0f} s, {orphans} orphans", flush=True,
            )  # fmt: skip
            if options.json is not None:
                save(options.json, rows)

    def bad(method: str) -> Counter[str]:
        return Counter(t for _, r, _ in rows[method] for t, how in r.items() if how == "failed")

    print(f"\n{'method':24} {'pass':>5} {'fail':>5} {'skip':>5} {'xfail':>5} {'s':>6} orphans")
    for method in options.methods:
        for seconds, results, orphans in rows[method]:
            c = Counter(results.values())
            print(
                f"{method:24} {c['passed']:5} {c['failed']:5} {c['skipped']:5} {c['xfailed']:5} "
                f"{seconds:6.0f} {orphans:7}"
            )
    baseline = bad(DEFAULT) if DEFAULT in rows else Counter()
    regressions = []
    for method in options.methods:
        for test, times in sorted(bad(method).items()):
            new = method != DEFAULT and times * 2 > options.rounds and baseline[test] == 0
            regressions += [test] if new else []
            mark = "  <- new" if new else ""
            print(f"{method}: failed {times} of {options.rounds}: {test}{mark}")
        skipped = {t for _, r, _ in rows[method] for t, how in r.items() if how == "skipped"}
        for test in sorted(skipped):
            print(f"{method}: skipped: {test}")
    if not any(results for runs in rows.values() for _, results, _ in runs):
        return 2
    return int(bool(regressions))


if __name__ == "__main__":
    sys.exit(main())
