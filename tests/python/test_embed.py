"""C programs that embed CPython and use the installed library by pkg-config.

Rule: what is linked is the library of the very package under test, found through
its own .pc file; nothing of the checkout's sources is compiled in.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import anyfork

SOURCES = Path(__file__).resolve().parent.parent / "embed"
PKGCONFIG = Path(anyfork.__file__).resolve().parent / "lib" / "pkgconfig"
FORKS = 500
RUN_SECONDS = 600
CANNOT_WORK = 77


def _library_name() -> str:
    names = sorted(PKGCONFIG.glob("anyfork-*.pc"))
    if not names:
        pytest.skip(f"the package is not laid out as installed: no .pc file in {PKGCONFIG}")
    return names[0].stem


def _libpython_flags() -> list[str]:
    """What links a program with this interpreter's libpython, or a skip."""

    def var(name: str) -> str:
        return str(sysconfig.get_config_var(name) or "")

    lib = f"python{var('LDVERSION')}"
    folders = [var("LIBDIR"), os.path.join(var("LIBDIR"), var("MULTIARCH")), var("LIBPL")]
    rest = shlex.split(" ".join((var("LIBS"), var("SYSLIBS"), var("LINKFORSHARED"))))
    for folder in folders:
        if var("Py_ENABLE_SHARED") == "1" or (Path(folder) / f"lib{lib}.so").exists():
            if (Path(folder) / f"lib{lib}.so").exists():
                return [f"-L{folder}", f"-Wl,-rpath,{folder}", f"-l{lib}", *rest]
        elif (Path(folder) / f"lib{lib}.a").exists():
            # Whole, and exported: extension modules need symbols that we do not.
            archive = str(Path(folder) / f"lib{lib}.a")
            return ["-Wl,--whole-archive", archive, "-Wl,--no-whole-archive", *rest]
    pytest.skip(f"no lib{lib} in {', '.join(folders)}: install this Python's -dev package")


def _build(name: str, tmp_path: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        pytest.skip("no pkg-config")
    library = subprocess.run(
        [pkg_config, "--cflags", "--libs", _library_name()],
        env={**os.environ, "PKG_CONFIG_PATH": str(PKGCONFIG)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    program = tmp_path / name
    command = [
        compiler,
        "-std=c11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-g",
        f"-I{sysconfig.get_path('include')}",
        f"-I{sysconfig.get_path('platinclude')}",
        str(SOURCES / f"{name}.c"),
        "-o",
        str(program),
        *shlex.split(library),
        *_libpython_flags(),
        "-pthread",
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, f"{shlex.join(command)}\n{built.stderr}"
    return program


def _run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(anyfork.__file__).resolve().parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    python = getattr(sys, "_base_executable", sys.executable)
    return subprocess.run(
        [program, python, *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )


@pytest.mark.timeout(RUN_SECONDS + 180)
def test_two_interpreters_on_two_threads_both_fork(tmp_path: Path) -> None:
    done = _run(_build("two_interpreters", tmp_path), FORKS)
    if done.returncode == CANNOT_WORK:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{2 * FORKS} children, 0 bad") == 2, done.stdout


@pytest.mark.timeout(300)
def test_extension_and_program_share_one_copy(tmp_path: Path) -> None:
    done = _run(_build("one_copy", tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
