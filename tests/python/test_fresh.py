"""Methods whose target runs in an interpreter that is made for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from attack_helpers import parametrized, run_check, run_program

import anyfork

FRESH = [row for row in anyfork.methods() if row.target == "fresh"]


@pytest.mark.timeout(300)
@parametrized("attack_fresh")
def test_fresh(check: str, place: str) -> None:
    run_check("attack_fresh", check, place)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", [row.name for row in FRESH])
def test_a_target_of_the_program_itself(method: str) -> None:
    """The program is imported again, under the name that multiprocessing gives it; or its
    target comes by value, and nothing is imported."""
    name = "__main__" if method == "zygote" else "__mp_main__"
    for mode in ("result", "nested"):
        done = run_program("fresh_main.py", method, mode)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n") == ["the target ends", name, ""]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mode", "code"), [("end", 0), ("raise", 3)])
@pytest.mark.parametrize("row", FRESH, ids=lambda row: row.name)
def test_the_end_of_the_program(row: anyfork.Method, mode: str, code: int) -> None:
    """It kills its processes, and waits for its threads."""
    done = run_program("fresh_main.py", row.name, mode)
    assert done.returncode == code, done.stderr
    assert ("the target ends" in done.stdout) == (not row.has_process), done.stdout


UNGUARDED = """
import anyfork
def f(): return 1
anyfork.run(f, method={method!r})
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", [row.name for row in FRESH])
def test_a_program_without_the_guard_is_told_so(method: str, tmp_path: Path) -> None:
    program = tmp_path / "unguarded.py"
    program.write_text(UNGUARDED.format(method=method))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=100
    )
    if method == "zygote":  # by value: the program does not run again
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 1
    assert "if __name__ == '__main__'" in done.stderr, done.stderr
