#!/usr/bin/env python3
"""Check that the layers of the sources keep to themselves.

usage: tools/check_layers.py [--root FOLDER] [--library LIBANYFORK]

 - Python.h only in src/cpython, src/ext, src/methods.* and anyfork_python.h; no
   file of src/core reaches it, nor anyfork.h, not even through another header.
 - CPython's private names and offsets only in src/cpython/layout.c, its thread-local
   variables only in attach.c beside it.
 - fork(2), or anything that makes a process, only in src/core/fork.c; and in the
   guard, which is a program of its own.
 - Each library exports the functions that its header declares ANYFORK_API, and what
   its symbols.map lists as private; no more and no less.

LIBANYFORK is the one of a CPython, libanyfork-3.14.so say, with that of core beside
it: the newest one under build unless it is named. Exit status: 0, 1 if
something is out of place, 2 if there is nothing to check.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
COMMENT_OR_STRING = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+'""",
    re.DOTALL | re.VERBOSE,
)
PRIVATE = re.compile(
    r"\b(_PyRuntime|_Py_DebugOffsets|Py_BUILD_CORE\w*|pycore_\w+"
    r"|_Py(?:Interpreter|Thread|Eval|Runtime)\w+"
    r"|lo->(?:runtime|interp_|gil_|frame_)\w*)"
)
THREAD_LOCALS = re.compile(r"\b(__tls_get_addr|dlpi_tls_\w+|lo->tls|bound_gilstate)\b")
MAKES_A_PROCESS = re.compile(
    r"(?<![\w.>])(fork|vfork|_Fork|clone|clone3|forkpty|posix_spawnp?|SYS_(?:fork|vfork|clone3?)"
    r"|PyOS_fork\w*)\b(?=\s*[(,])"
)
DECLARED = re.compile(r"^ANYFORK_API\b[^;{(]*?\b(\w+)\s*\(", re.MULTILINE)
# Only in builds with fault points.
OPTIONAL = re.compile(r"^afk_fault_\w+$")


def code_of(text: str) -> str:
    """The text without comments and strings; lines stay where they are."""
    return COMMENT_OR_STRING.sub(lambda m: "\n" * m[0].count("\n") + " ", text)


class Checker:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: list[str] = []
        self.files = sorted(
            p for d in ("src", "include") for p in (root / d).rglob("*") if p.suffix in (".c", ".h")
        )

    def report(self, path: Path, line: int, what: str) -> None:
        self.found.append(f"{path.relative_to(self.root)}:{line}: {what}")

    # ---- includes -----------------------------------------------------------------

    def resolve(self, path: Path, name: str) -> Path | None:
        for folder in (path.parent, self.root / "include", self.root / "src"):
            candidate = (folder / name).resolve()
            if candidate.is_file():
                return candidate
        return None

    def may_use_python(self, path: Path) -> bool:
        inside = path.relative_to(self.root).as_posix()
        return (
            inside.startswith(("src/cpython/", "src/ext/", "src/methods."))
            or inside == "include/anyfork/anyfork_python.h"
        )

    def reaches_python(self, path: Path, seen: set[Path]) -> bool:
        seen.add(path)
        for name in INCLUDE.findall(path.read_text()):
            if Path(name).name == "Python.h":
                return True
            target = self.resolve(path, name)
            if target and target not in seen and self.reaches_python(target, seen):
                return True
        return False

    def check_includes(self) -> None:
        for path in self.files:
            if not self.may_use_python(path) and self.reaches_python(path.resolve(), set()):
                self.report(path, 1, "includes Python.h, directly or through another header")

    # ---- names ----------------------------------------------------------------------

    def names(self, path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
        text = code_of(path.read_text())
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, match[1]

    def check_names(self) -> None:
        for path in self.files:
            inside = path.relative_to(self.root).as_posix()
            if inside != "src/cpython/layout.c":
                for line, name in self.names(path, PRIVATE):
                    self.report(path, line, f"{name}: private layout, for layout.c only")
            if inside != "src/cpython/attach.c":
                for line, name in self.names(path, THREAD_LOCALS):
                    self.report(path, line, f"{name}: thread-locals, for attach.c only")
            if inside not in ("src/core/fork.c", "src/guard/guard.c"):
                for line, name in self.names(path, MAKES_A_PROCESS):
                    self.report(path, line, f"{name}: processes are made in fork.c only")

    # ---- exports ----------------------------------------------------------------------

    def private(self, symbols: str) -> set[str]:
        text = code_of((self.root / symbols).read_text())
        block = re.search(r"ANYFORK_PRIVATE\s*\{\s*global:(.*?)\}", text, re.DOTALL)
        return set(re.findall(r"([\w*]+)\s*;", block[1])) if block else set()

    def check_exports(self, library: Path, header: str, symbols: str) -> None:
        out = subprocess.run(
            ["nm", "--dynamic", "--defined-only", "--format=posix", str(library)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        exported = {
            line.split()[0].split("@")[0] for line in out.splitlines() if line.split()[1] != "A"
        }
        private = self.private(symbols)
        patterns = {name for name in private if "*" in name}
        expected = set(DECLARED.findall(code_of((self.root / header).read_text())))
        expected |= private - patterns
        for name in sorted(exported - expected):
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                self.found.append(f"{library.name}: exports {name}, which nothing declares")
        for name in sorted(expected - exported):
            if not OPTIONAL.match(name):
                self.found.append(f"{library.name}: does not export {name}")


def newest_library(root: Path) -> Path | None:
    found = [p for p in (root / "build").glob("**/libanyfork-*.so") if p.is_file()]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--library", type=Path)
    options = parser.parse_args(arguments)
    checker = Checker(options.root.resolve())
    library = options.library or newest_library(options.root)
    core = library.with_name("libanyfork.so") if library is not None else None
    if not checker.files or library is None or core is None or not core.is_file():
        print("check_layers: no sources, or no library: build first", file=sys.stderr)
        return 2
    checker.check_includes()
    checker.check_names()
    checker.check_exports(core, "include/anyfork/anyfork.h", "src/core/symbols.map")
    checker.check_exports(library, "include/anyfork/anyfork_python.h", "src/symbols.map")
    for line in checker.found:
        print(line)
    if not checker.found:
        print(f"check_layers: {len(checker.files)} files and {library.name} keep to their layers")
    return int(bool(checker.found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
