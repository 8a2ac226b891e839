"""The checkers of tools/, on the sources as they are and on doctored copies.

A checker that cannot fail checks nothing: every rule is broken once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyfork

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = Path(anyfork.__file__).resolve().parent / "lib"


def _run(tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def library() -> Path:
    if shutil.which("nm") is None:
        pytest.skip("no nm: install binutils")
    found = sorted(LIBRARIES.glob("libanyfork-*.so"))
    if not found:
        pytest.skip(f"the package is not laid out as installed: no library in {LIBRARIES}")
    return found[0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, to be doctored."""
    for name in ("src", "include"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_the_sources_keep_to_their_layers(library: Path) -> None:
    done = _run("check_layers.py", "--library", library)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("src/core/core.h", "#include <Python.h>\n", "src/core/child.c:1: includes Python.h"),
        ("src/core/report.c", '#include "cpython/cpython.h"\n', "src/core/report.c:1: includes"),
        ("include/anyfork/anyfork.h", "#include <Python.h>\n", "anyfork.h:1: includes"),
        ("src/cpython/hop.c", "char *r = (char *)&_PyRuntime;\n", "_PyRuntime: private layout"),
        (
            "src/cpython/twin.c",
            "size_t f(struct afk_layout *lo) { return lo->interp_next; }\n",
            "lo->interp_next: private layout",
        ),
        ("src/core/process.c", "int f(void) { return fork(); }\n", "fork: processes are made"),
        (
            "src/cpython/pad.c",
            "long f(void) { return syscall(SYS_clone3, 0, 0); }\n",
            "SYS_clone3: processes",
        ),
        ("include/anyfork/anyfork.h", "ANYFORK_API int anyfork_x(void);\n", "export anyfork_x"),
        (
            "include/anyfork/anyfork_python.h",
            "ANYFORK_API int anyfork_y(void);\n",
            "export anyfork_y",
        ),
        (
            "src/symbols.map",
            "ANYFORK_PRIVATE { global: afk_nothing; };\n",
            "exports afk_start, which nothing",
        ),
    ],
)
def test_what_is_out_of_place_is_found(
    copy: Path, library: Path, file: str, text: str, complaint: str
) -> None:
    path = copy / file
    if file == "src/symbols.map":
        path.write_text(text)
    else:
        _append(path, text)
    done = _run("check_layers.py", "--root", copy, "--library", library)
    assert done.returncode == 1
    assert complaint in done.stdout


def test_words_in_comments_and_strings_are_no_code(copy: Path, library: Path) -> None:
    _append(
        copy / "src/core/error.c",
        '/* fork() and _PyRuntime */\nstatic const char s[] = "vfork()"; // clone(\n',
    )
    done = _run("check_layers.py", "--root", copy, "--library", library)
    assert done.returncode == 0, done.stdout


def test_no_library_is_an_error(copy: Path) -> None:
    assert _run("check_layers.py", "--root", copy).returncode == 2


def _compile_child(source: Path, into: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no C compiler and nm")
    obj = into / f"src_core_{source.stem}.c.o"
    subprocess.run(
        [
            *(compiler, "-std=c11", "-O2", "-fPIC", "-D_GNU_SOURCE", "-w", "-c", str(source)),
            *(f"-I{ROOT}/include", f"-I{ROOT}/src", f"-I{ROOT}/src/core", "-o", str(obj)),
        ],
        check=True,
        timeout=60,
    )
    return obj


def test_the_child_calls_only_what_is_safe(tmp_path: Path) -> None:
    for name in ("child.c", "child_options.c"):
        _compile_child(ROOT / "src/core" / name, tmp_path)
    done = _run("check_child.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["puts", "setenv", "pthread_mutex_lock"])
def test_a_child_that_calls_more_is_found(tmp_path: Path, name: str) -> None:
    source = tmp_path / "child.c"
    shutil.copy(ROOT / "src/core/child.c", source)
    _append(source, f"extern int {name}();\nvoid *doctored(void) {{ return (void *){name}; }}\n")
    done = _run("check_child.py", _compile_child(source, tmp_path))
    assert done.returncode == 1
    assert name in done.stdout


def test_a_child_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert _run("check_child.py", tmp_path).returncode == 2
    assert _run("check_child.py", tmp_path / "child.o").returncode == 2


def test_thread_storage_that_a_child_would_allocate_is_found(tmp_path: Path) -> None:
    _compile_child(ROOT / "src/core/child.c", tmp_path)
    source = tmp_path / "lifeline.c"
    source.write_text("static _Thread_local int mine;\nint *look(void) { return &mine; }\n")
    _compile_child(source, tmp_path)
    done = _run("check_child.py", tmp_path)
    assert done.returncode == 1
    assert "thread storage" in done.stdout
