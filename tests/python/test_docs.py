"""The programs in the documentation print what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("workers.md",)
# A program, and what it prints; or a module, which begins with its name.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
MODULE = re.compile(r"# (\w+\.py)\n")


class Program(NamedTuple):
    """``modules``: those of the page that stand before it."""

    code: str
    prints: str
    modules: dict[str, str]


def _programs(page: str) -> list[object]:
    text = (DOCS / page).read_text()
    modules: dict[str, str] = {}
    found = []
    for match in BLOCK.finditer(text):
        code, prints = match[1], match[2]
        name = MODULE.match(code)
        if name is not None:
            modules = {**modules, name[1]: code}
            continue
        line = text.count("\n", 0, match.start()) + 2
        assert prints is not None, f"{page}:{line}: what this program prints is missing"
        found.append(pytest.param(Program(code, prints, modules), id=f"{page}:{line}"))
    return found


def _same_everywhere(text: str) -> str:
    """Without the numbers of processes."""
    return re.sub(r"\bworker \d+", "worker PID", text)


@pytest.mark.parametrize("program", [p for page in PAGES for p in _programs(page)])
def test_program(program: Program, tmp_path: Path) -> None:
    for library in re.findall(r"^import (numpy|trio|anyio)$", program.code, re.MULTILINE):
        pytest.importorskip(library)
    for name, code in program.modules.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "program.py").write_text(program.code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert _same_everywhere(done.stdout) == _same_everywhere(program.prints), done.stderr
