"""docs/c-api.md from the comments of include/anyfork/*.h.

usage: tools/c_api_doc.py [--write]
Without --write: exit status 1 if the file is not what the headers say.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "c-api.md"
HEADERS = ("anyfork.h", "anyfork_python.h")
# A comment that ends on a line of its own, if there is one, and the declarations up to an
# empty line. A comment with nothing below it, a section's line say, is none of either.
BLOCK = re.compile(
    r"^(?:/\*((?:(?!\*/).)*)\*/\n)?((?!/\*| \*)[^\n]+\n(?:[^\n]+\n)*)", re.MULTILINE | re.DOTALL
)
# What a declaration declares: a macro, a type, a type of functions, a function.
DECLARED = re.compile(
    r"^#define (ANYFORK_\w+)|\b(?:struct|enum|union) (anyfork_\w+)\s*[{;]"
    r"|\btypedef\b[^;]*?\(\*(anyfork_\w+)\)|\b(anyfork_\w+)\s*\(",
    re.MULTILINE,
)
ENUM = re.compile(r"\benum \w+\s*\{(.*?)\}", re.DOTALL)
# Of no use to a reader: what keeps a header from being read twice, and how a function
# is exported.
PRIVATE = {"ANYFORK_ANYFORK_H", "ANYFORK_ANYFORK_PYTHON_H", "ANYFORK_API"}
INTRODUCTION = """\
# C API

Made from the headers by `tools/c_api_doc.py`; `examples/supervisor.c` uses the first.

Every function says what its arguments own, how it fails, which thread may call it, what it blocks
for, and since when it exists. A function that can fail returns 0 or a negative `enum anyfork_code`,
and fills a `struct anyfork_error` if it is given one: stage, errno, and what was found. Nothing is
left behind by a start that failed.

```console
$ cc program.c $(pkg-config --cflags --libs anyfork)         # without Python
$ cc program.c $(pkg-config --cflags --libs anyfork-3.14)    # with CPython 3.14's
```

The `.pc` files are beside the libraries, in the package's folder:
`python -c 'import anyfork, os; print(os.path.dirname(anyfork.__file__) + "/lib/pkgconfig")'`.
"""


def prose(comment: str) -> str:
    """The comment without its stars."""
    lines = [re.sub(r"^ \* ?", "", line).rstrip() for line in comment.strip("* \n").splitlines()]
    return "\n".join(line.removeprefix("* ").removeprefix("*") for line in lines).strip()


def expanded(text: str) -> str:
    """An enum that a macro makes, with the constants that come of it."""

    def constants(match: re.Match[str]) -> str:
        prefix, macro = match[1], match[2]
        rows = re.search(rf"#define {macro}\(X\)(.*?[^\\])\n", text, re.DOTALL)
        assert rows is not None, macro
        ids = re.findall(r"\bX\((\w+),", rows[1])
        return "".join(f"    {prefix}{name},\n" for name in ids)

    return re.sub(
        r"#define X\([^\n]*?(ANYFORK_\w*)##id,\n\s*(\w+)\(X\)\n#undef X\n", constants, text
    )


def without_comments(code: str) -> str:
    return re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)


def heads(code: str) -> list[str]:
    """The names that a piece of a header declares, but for constants of enums."""
    found = [next(filter(None, match)) for match in DECLARED.findall(without_comments(code))]
    return [name for name in dict.fromkeys(found) if name not in PRIVATE]


def declared(code: str) -> set[str]:
    """All public names that a piece of a header declares."""
    names = set(heads(code))
    for body in ENUM.findall(without_comments(code)):
        names.update(re.findall(r"(?:^|,)\s*(ANYFORK_\w+)", body))
    return names


def read(header: str) -> str:
    return expanded((ROOT / "include/anyfork" / header).read_text())


def section(header: str) -> str:
    """All that a header declares."""
    text = read(header)
    head = re.match(r"/\*(.*?)\*/", text, re.DOTALL)
    assert head is not None
    parts = [f"## `<anyfork/{header}>`", f"```text\n{prose(head[1])}\n```"]
    for match in BLOCK.finditer(text[head.end() :]):
        comment, code = match[1], match[2].rstrip()
        names = heads(code)
        if not names:
            continue
        title = ", ".join(f"`{name}`" for name in names)
        code = code.replace("ANYFORK_API ", "")
        parts.append(f"### {title}\n\n```c\n{code}\n```")
        if comment is not None:
            parts.append(f"```text\n{prose(comment)}\n```")
    return "\n\n".join(parts)


def missing(page: str) -> list[str]:
    """The public names of the headers that the page does not declare. A name that a header
    uses and that no pattern of ours sees declared is one of them."""
    there = declared("\n".join(re.findall(r"^```c\n(.*?)^```", page, re.MULTILINE | re.DOTALL)))
    wanted = set()
    for header in HEADERS:
        code = re.sub(r"^#include .*", "", without_comments(read(header)), flags=re.MULTILINE)
        wanted.update(re.findall(r"\b(?:anyfork|ANYFORK)_\w+", code))
    return sorted(wanted - there - PRIVATE)


def main() -> int:
    """Compare or write."""
    wanted = INTRODUCTION + "\n" + "\n\n".join(section(header) for header in HEADERS) + "\n"
    if names := missing(wanted):
        print(f"{DOC} would lack {', '.join(names)}: see BLOCK and DECLARED of tools/c_api_doc.py")
        return 1
    if "--write" in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if not DOC.exists() or DOC.read_text() != wanted:
        print(f"{DOC} is not what the headers say: run tools/c_api_doc.py --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
