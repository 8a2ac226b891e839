#!/usr/bin/env python3
"""Check the patches of upstream/ without building anything.

usage: tools/check_upstream.py [--source FOLDER]

Of each patch: git can read it; its subject has CPython's form and fits in 72 columns; it brings a
news entry, and tests or documentation; it adds no white space at the end of a line. With the source
tree of that CPython, which upstream/check leaves in the cache of tools/pythons, also that `git am`
would apply the series. Exit status: 0, or 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
SUBJECT = re.compile(r"^Subject: \[PATCH \d+/\d+\] (.*(?:\n .*)*)", re.MULTILINE)


def git(tree: Path, *words: str) -> str:
    """What it says, or an error."""
    command = ["git", "-c", "user.name=check", "-c", "user.email=check@localhost", *words]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"git {words[0]} failed")
    return done.stdout


def check_patch(patch: Path) -> list[str]:
    text = patch.read_text()
    wrong = []
    match = SUBJECT.search(text)
    subject = " ".join(match[1].split()) if match else ""
    if not re.match(r"gh-(\d{5,6}|XXXXX): [A-Z]", subject) or len(subject) > 72:
        wrong.append(f"subject: {subject!r}")
    try:
        files = git(ROOT, "apply", "--numstat", str(patch)).split()[2::3]
    except RuntimeError as error:
        return [*wrong, str(error)]
    if not any(name.startswith("Misc/NEWS.d/next/") for name in files):
        wrong.append("it has no news entry")
    if not any(name.startswith(("Lib/test/", "Doc/")) for name in files):
        wrong.append("it has neither tests nor documentation")
    for n, line in enumerate(text.splitlines(), 1):
        if line.startswith("+") and line != line.rstrip():
            wrong.append(f"line {n}: white space at its end")
    return wrong


def apply_series(source: Path, patches: list[Path]) -> None:
    """On a tree of the touched files alone."""
    touched = {
        name for p in patches for name in git(ROOT, "apply", "--numstat", str(p)).split()[2::3]
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        git(tree, "init", "-q")
        for name in touched:
            if (source / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes((source / name).read_bytes())
        git(tree, "add", "-A", "-f")
        git(tree, "commit", "-q", "-m", "release")
        git(tree, "am", "-q", *map(str, patches))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path)
    options = parser.parse_args()
    cache = Path(
        os.environ.get("ANYFORK_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyfork"
    )
    wrong = False
    for series in sorted(path for path in (ROOT / "upstream").iterdir() if path.is_dir()):
        patches = sorted(series.glob("*.patch"))
        for patch in patches:
            for what in check_patch(patch):
                print(f"{patch.relative_to(ROOT)}: {what}")
                wrong = True
        source = options.source or cache / "upstream" / series.name / "before"
        if not patches:
            continue
        if not (source / "Include/patchlevel.h").exists():
            print(f"{series.name}: not applied: there is no source tree at {source}")
            continue
        try:
            apply_series(source, patches)
            print(f"{series.name}: {len(patches)} patches apply")
        except RuntimeError as error:
            print(f"{series.name}: {error}")
            wrong = True
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
