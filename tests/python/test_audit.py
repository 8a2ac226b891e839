"""What a template finds in itself: drivers and pools of libraries, and fork handlers.

Threads, sockets and locks are in attack_template.py. The libraries are compiled here, for
what they stand for needs hardware that few have.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 120

# As much of the driver's interface as is asked for; the environment says how it is.
LIBCUDA = r"""
#include <stdlib.h>
static const char *state(void) { const char *s = getenv("STUB_CUDA"); return s ? s : "off"; }
static int is(const char *what) { const char *a = state();
    while (*a && *a == *what) a++, what++; return *a == *what; }
int cuDeviceGetCount(int *n) { *n = 3; return is("off") ? 3 : 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{ *flags = 0; *active = is("primary") && device != 1; return is("off") ? 3 : 0; }
int cuCtxGetCurrent(void **context) { *context = is("current") ? &state : 0; return 0; }
"""
OTHER_LIBRARY = "int nothing(void) { return 0; }\n"
POOL = r"""
#include <omp.h>
int begin(void) { int n = 0;
#pragma omp parallel num_threads(3) reduction(+ : n)
    n += 1;
    return n; }
"""
HANDLERS = r"""
#include <pthread.h>
static void handler(void) {}
int begin(void) { return pthread_atfork(handler, 0, 0) | pthread_atfork(0, 0, handler); }
"""


def _compile(folder: Path, name: str, text: str, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / f"{name}.c", folder / name
    source.write_text(text)
    command = [compiler, "-shared", "-fPIC", "-O1", *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode != 0 and "-fopenmp" in flags:
        pytest.skip(f"this compiler has no OpenMP: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return library


def _python(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def _doctor(folder: Path, **env: str) -> dict[str, Any]:
    done = _python(folder, "-m", "anyfork", "doctor", "--json", "--template", "preload", **env)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert [module["error"] for module in report["modules"]] == [None], report
    assert done.returncode == int(bool(report["findings"])), report
    return report


def _preload(folder: Path, library: Path, call: str = "") -> None:
    text = f"import ctypes\nL = ctypes.CDLL({str(library)!r})\n{call}\n"
    (folder / "preload.py").write_text(text)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("off", None),
        ("on", "the driver is initialized"),
        ("primary", "a context on device 0, 2"),
        ("current", "a context of this thread"),
    ],
)
def test_a_cuda_that_is_in_use_is_refused(tmp_path: Path, state: str, words: str | None) -> None:
    _preload(tmp_path, _compile(tmp_path, "libcuda.so.1", LIBCUDA))
    found = _doctor(tmp_path, STUB_CUDA=state)["findings"]
    assert [(f["kind"], f["what"]) for f in found] == ([("cuda", words)] if words else [])
    code = "import anyfork; print(anyfork.Template(['preload']).run(int, '5'))"
    done = _python(tmp_path, "-c", code, STUB_CUDA=state)
    if words is None:
        assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
    else:
        assert done.returncode == 1
        assert f"cuda: {words}; " in done.stderr
        assert "first call of CUDA in workers" in done.stderr


def test_a_driver_that_does_not_tell(tmp_path: Path) -> None:
    _preload(tmp_path, _compile(tmp_path, "libcuda.so.1", OTHER_LIBRARY))
    (finding,) = _doctor(tmp_path)["findings"]
    assert "does not tell whether it is in use" in finding["what"]


def test_torch_that_uses_a_gpu_is_refused(tmp_path: Path) -> None:
    """By what torch says of itself: another driver than CUDA's may be beneath."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "cuda.py").write_text("def is_initialized(): return True\n")
    (tmp_path / "preload.py").write_text("import torch.cuda\n")
    (finding,) = _doctor(tmp_path)["findings"]
    assert (finding["kind"], finding["what"]) == ("cuda", "torch.cuda is initialized")


def test_a_real_gpu(tmp_path: Path) -> None:
    name = ctypes.util.find_library("cuda")
    if name is None or not os.path.exists("/dev/nvidiactl"):
        pytest.skip("needs an NVIDIA GPU and its driver (libcuda, /dev/nvidiactl)")
    _preload(tmp_path, Path(name))
    assert _doctor(tmp_path)["findings"] == []
    _preload(tmp_path, Path(name), "assert L.cuInit(0) == 0")
    assert "cuda" in [finding["kind"] for finding in _doctor(tmp_path)["findings"]]


def test_a_pool_is_called_by_its_name(tmp_path: Path) -> None:
    library = _compile(tmp_path, "libparallel.so", POOL, "-fopenmp")
    _preload(tmp_path, library, "assert L.begin() == 3")
    found = _doctor(tmp_path, OMP_DYNAMIC="false", OMP_THREAD_LIMIT="8")["findings"]
    assert len(found) == 2, found
    for finding in found:
        assert finding["what"].endswith(("of the pool of libgomp", "of the pool of libomp"))
        assert "OMP_NUM_THREADS=1" in finding["remedy"]
    _preload(tmp_path, library)  # loaded only: no pool yet
    assert _doctor(tmp_path)["findings"] == []


def test_fork_handlers_are_counted(tmp_path: Path) -> None:
    library = _compile(tmp_path, "libhandlers.so", HANDLERS, "-pthread")
    _preload(tmp_path, library)
    before = _doctor(tmp_path)["fork_handlers"]
    _preload(
        tmp_path,
        library,
        "assert L.begin() == 0\n"
        "import functools, os, subprocess, sys\n"
        "def hook(): pass\n"
        "os.register_at_fork(before=hook, after_in_child=functools.partial(hook))\n"
        "assert 'LD_PRELOAD' not in os.environ\n"
        "out = subprocess.check_output([sys.executable, '-c',\n"
        "    \"print('anyfork-atfork' in open('/proc/self/maps').read())\"], text=True)\n"
        "assert out == 'False\\n', out",
    )
    after = _doctor(tmp_path)["fork_handlers"]
    assert sorted(after["python"]) == sorted([*before["python"], *["preload.hook"] * 2])
    if before["c"] is None:  # a static interpreter, say: nothing can be preloaded
        assert after["c"] is None
    else:
        assert after["c"] == {**before["c"], "libhandlers.so": 2}
        assert before["c"]["libanyfork.so"] >= 1


def test_fork_handlers_beside_another_preload(tmp_path: Path) -> None:
    other = _compile(tmp_path, "libother.so", OTHER_LIBRARY)
    (tmp_path / "preload.py").write_text(
        f"import os\nassert os.environ['LD_PRELOAD'] == {str(other)!r}, os.environ['LD_PRELOAD']\n"
    )
    assert _doctor(tmp_path, LD_PRELOAD=str(other))["fork_handlers"]["python"]


def test_without_the_library_that_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from anyfork import _doctor

    monkeypatch.setattr(_doctor, "_counting_environment", lambda: dict(os.environ))
    assert _doctor.template_command(["json"], False) == 0
    assert "called at each fork: of C not known; " in capsys.readouterr().out
