"""``anyfork demo``: files, shares, verification, and the whole of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest

from anyfork import _anyfork, _console, _demo, _lab

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
TIMEOUT = 300
# Not imported: trio's imports keep a file descriptor open on 3.15.
needs_trio = pytest.mark.skipif(
    importlib.util.find_spec("trio") is None, reason="trio is not installed"
)


def demo(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyfork", "demo", *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
        **options,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with all that a folder can hold."""
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    for i in range(40):
        (top / "sub" / f"{i}.bin").write_bytes(os.urandom(i * 997))
    (top / "empty").touch()
    (top / "strange\nname\udc80").write_bytes(b"x")
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    (top / "link").symlink_to("sub")
    (top / "dangling").symlink_to("nowhere")
    return top


def found(top: Path, leave_out: frozenset[bytes] = frozenset()):
    skipped: Counter[str] = Counter()
    files = list(_demo.find_files(os.fsencode(top), skipped, set(leave_out)))
    return files, skipped


def test_only_regular_files_are_taken_and_the_rest_is_counted(tree):
    files, skipped = found(tree)
    assert len(files) == 42
    assert skipped == {"fifo, socket or device": 2, "symbolic link": 2}
    assert len(found(tree, frozenset([b"sub"]))[0]) == 2


def test_digest_is_sha256_and_never_waits_for_a_fifo(tree):
    path = os.fsencode(tree / "sub" / "39.bin")
    assert _demo.digest(path) == hashlib.sha256((tree / "sub" / "39.bin").read_bytes()).digest()
    with pytest.raises(OSError, match="no regular file"):
        _demo.digest(os.fsencode(tree / "fifo"))


def test_what_cannot_be_read_is_counted(tree, monkeypatch):
    files, skipped = found(tree)
    real = _demo.digest

    def digest(path: bytes) -> bytes:
        if path.endswith(b"/7.bin"):
            raise PermissionError(path)
        return real(path)

    monkeypatch.setattr(_demo, "digest", digest)
    (tree / "sub" / "8.bin").unlink()
    kept, digests = _demo.read_all(files, skipped, _console.Progress(1))
    assert len(kept) == len(digests) == 40
    assert (skipped["unreadable"], skipped["vanished"]) == (1, 1)


def test_shares_hold_every_file_once_and_about_the_same_number_of_bytes(tree):
    files, _ = found(tree)
    shares = _demo.shares_of(files, 4)
    assert sorted(i for share in shares for i in share) == list(range(len(files)))
    sizes = [sum(files[i].size for i in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * max(file.size for file in files)


# ---- verification ------------------------------------------------------------------------


@pytest.fixture
def job(tree):
    files, skipped = found(tree)
    return _demo.Job(*_demo.read_all(files, skipped, _console.Progress(1)), 3)


def raw_of(job: _demo.Job) -> _demo.Raw:
    """What perfect workers would have sent."""
    results = [
        _demo.Hashed(b"".join(job.digests[i] for i in share), {}, True) for share in job.shares
    ]
    return _demo.Raw(0.0, 1.0, [0.1] * 3, results, [None] * 3, [11, 12, 13])


def test_right_digests_verify(job):
    assert job.check(raw_of(job)) == (42, 0, [])


def test_one_wrong_bit_is_a_problem_that_names_the_file(job):
    raw = raw_of(job)
    first = raw.results[0]
    wrong = bytes([first.digests[0] ^ 1]) + first.digests[1:]
    raw.results[0] = first._replace(digests=wrong)
    verified, changed, problems = job.check(raw)
    assert (verified, changed) == (41, 0)
    assert problems == [
        f"{os.fsdecode(job.files[job.shares[0][0]].path)}: its digest differs from the parent's"
    ]


def test_missing_digests_and_dead_workers_are_problems(job):
    raw = raw_of(job)
    raw.results[0] = raw.results[0]._replace(digests=raw.results[0].digests[:-1])
    raw.results[1], raw.errors[1] = None, "WorkerDied: worker 12 was killed by SIGKILL"
    _verified, _changed, problems = job.check(raw)
    assert len(problems) == 2
    assert "killed by SIGKILL" in problems[0]
    assert "digests for" in problems[1]


def test_a_file_that_somebody_changed_meanwhile_is_no_mismatch(job, tree):
    raw = raw_of(job)
    nth = next(i for i, file in enumerate(job.files) if file.path.endswith(b"/39.bin"))
    (tree / "sub" / "39.bin").write_bytes(b"new")
    share = next(n for n, share in enumerate(job.shares) if nth in share)
    place = job.shares[share].index(nth) * 32
    old = raw.results[share].digests
    raw.results[share] = raw.results[share]._replace(
        digests=old[:place] + bytes(32) + old[place + 32 :]
    )
    assert job.check(raw) == (41, 1, [])


def test_any_problem_is_exit_status_1():
    good = _demo.Batch("fork", "main", "main", 4, 1.0, 1.0, 1.0, 9, 9, 9.0, 9, 0, 1.0, [])
    assert _demo._problems([good], [], True) == []
    assert _demo._problems([good._replace(problems=["x"])], [], True) == ["fork from main: x"]
    assert "left over" in _demo._problems([good], [4711], True)[0]
    assert _demo._problems([good], [], False)
    assert _demo._problems([_demo.Gap("fork", "main", "no", False)], [], True) == []
    assert _demo._problems([_demo.Gap("fork", "main", "no", True)], [], True)


# ---- the command ------------------------------------------------------------------------------


# Their targets run in the main interpreter of a process that was executed.
IN_MAIN = ("exec", "zygote")


@needs_trio
@pytest.mark.timeout(TIMEOUT)
def test_every_method_from_main_and_from_a_sub_interpreter(tree):
    run = demo(str(tree), "--workers", "3", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert (report["ok"], report["files"], report["left_over"]) == (True, 42, [])
    assert report["skipped"] == {"fifo, socket or device": 2, "symbolic link": 2}
    lines = {(b["method"], b["started_from"]): b for b in report["batches"]}
    where = {"caller": None, "main": "main", "fresh": "isolated"}
    expected = {
        (row["name"], origin): "main" if row["name"] in IN_MAIN else where[row["target"]] or origin
        for row in _anyfork.method_traits()
        for origin in ("main", "isolated")
    }
    if FREE_THREADED:
        del expected["fork", "isolated"]
        (gap,) = report["unavailable"]
        assert (gap["method"], gap["started_from"], gap["failed"]) == ("fork", "isolated", False)
        assert "free-threaded" in gap["reason"]
    assert {where: line["runs_in"] for where, line in lines.items()} == expected
    for line in lines.values():
        assert (line["workers"], line["verified"], line["problems"]) == (3, 42, [])
        assert line["start_ms"] > 0
        assert line["first_result_ms"] > 0
    assert report["parent"]["busy_rounds"] > 0
    assert report["parent"]["loop_ticks"] > 0


@needs_trio
@pytest.mark.timeout(TIMEOUT)
def test_a_single_file_gets_a_single_worker(tree):
    run = demo(str(tree / "sub" / "39.bin"), "--method", "fork", "--method", "exec")
    assert run.returncode == 0, run.stdout + run.stderr
    tried = {line.split()[0] for line in run.stdout.splitlines() if line.strip()}
    assert not tried & {"subint_fork", "main_thread_forkserver", "subint_forkserver"}
    assert "started from an isolated sub-interpreter" in run.stdout
    assert "1 files, 0.0 MB" in run.stdout


@needs_trio
@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("workers", ["1", "12"])
def test_results_larger_than_a_pipe_arrive(tmp_path, workers):
    for i in range(3000):  # 96 kB of digests
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
    only = ("--method", "subint_fork", "--method", "exec")
    run = demo(str(tmp_path), "--workers", workers, "--json", *only)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {b["verified"] for b in json.loads(run.stdout)["batches"]} == {3000}


@needs_trio
@pytest.mark.parametrize("what", ["missing", "empty", "fifo", "dangling"])
def test_a_path_without_files_is_a_clear_error(tree, what):
    path = tree / what
    if what == "empty":
        path = tree / "folder"
        path.mkdir()
    run = demo(str(path))
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert ("no such file or folder" if what == "missing" else "no file to read in") in line
    assert run.stdout == ""


@needs_trio
def test_too_many_workers_for_the_limit_of_open_files(tree):

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    run = demo(str(tree), "--workers", "500", preexec_fn=limit)
    assert run.returncode == 2
    assert "RLIMIT_NOFILE" in run.stderr
    assert "Traceback" not in run.stderr


def test_without_trio_one_line_says_what_to_install():
    code = "import sys; sys.modules['trio'] = None; from anyfork._cli import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "demo"], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 2
    assert run.stderr == "anyfork demo: trio is not installed: pip install 'anyfork[demo]'\n"


FORKS = ("fork", "subint_fork", "main_thread_forkserver")


@needs_trio
@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("batch", [1, 5])
def test_interrupted_it_leaves_nothing(tmp_path, batch):
    """SIGINT while workers run, at the first of them or later."""
    for i in range(2):
        with open(tmp_path / f"{i}", "wb") as file:
            file.truncate(400_000_000)
    with subprocess.Popen(
        [sys.executable, "-m", "anyfork", "demo", str(tmp_path), "--workers", "2",
         *(word for name in FORKS for word in ("--method", name))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        seen: set[int] = set()
        deadline = time.monotonic() + 120
        while len(seen) < batch and process.poll() is None and time.monotonic() < deadline:
            seen |= {p.pid for p in _lab.processes() if p.parent == process.pid}
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=120)
    left = [p for p in _lab.processes() if p.group == process.pid and p.state not in "ZX"]
    assert left == []
    if FREE_THREADED and process.returncode == 0:
        pytest.skip("it was over before that many workers had been seen")
    assert (process.returncode, err) == (130, "anyfork: interrupted\n")
