"""docs/methods.md from the table in src/methods.c.

usage: tools/methods_doc.py [--write]
Without --write: exit status 1 if the file's tables are not those of the build.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyfork

DOC = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table() -> str:
    """The Markdown table of all methods."""
    lines = [
        "| method | how the child comes to be | its target runs in | whose memory | may wait for |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` | {m.summary} | {m.runs_in} | {m.memory} | {m.may_wait_for} |"
        for m in anyfork.methods()
    ]
    return "\n".join(lines)


def main() -> int:
    """Compare or write."""
    text = DOC.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    wanted = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--write" in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if text != wanted:
        print(f"{DOC} is not what the table says: run tools/methods_doc.py --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
