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
# A comment that ends on a line of its own, and the declarations up to an empty line.
BLOCK = re.compile(r"^/\*(.*?)\*/\n((?:[^\n]+\n)+)", re.MULTILINE | re.DOTALL)
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


def section(header: str) -> str:
    """All that a header declares."""
    text = (ROOT / "include/anyfork" / header).read_text()
    head = re.match(r"/\*(.*?)\*/", text, re.DOTALL)
    assert head is not None
    parts = [f"## `<anyfork/{header}>`", f"```text\n{prose(head[1])}\n```"]
    body = text[head.end() :]
    for match in BLOCK.finditer(body):
        comment, code = match[1], match[2].rstrip()
        if comment.lstrip().startswith("----") or code.startswith(("/*", "#if", "#endif")):
            continue
        names = re.findall(r"\b(anyfork_\w+)\s*[({;]", code)
        names = names or re.findall(r"^#define (ANYFORK_[A-Z]+_MAP)", code)
        title = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
        if not title:
            continue
        code = code.replace("ANYFORK_API ", "")
        parts.append(f"### {title}\n\n```c\n{code}\n```\n\n```text\n{prose(comment)}\n```")
    return "\n\n".join(parts)


def main() -> int:
    """Compare or write."""
    wanted = INTRODUCTION + "\n" + "\n\n".join(section(header) for header in HEADERS) + "\n"
    if "--write" in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if not DOC.exists() or DOC.read_text() != wanted:
        print(f"{DOC} is not what the headers say: run tools/c_api_doc.py --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
