"""What `anyfork-run` runs, in a worker of the server: a program as `python` itself runs it.

Loaded in the server's template. It begins where CPython's Modules/main.c has an interpreter
and ends where Python/pylifecycle.c has finalized one, but for modules that the template
loaded: those are left as they are.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib.machinery
import importlib.util
import linecache
import os
import pkgutil
import runpy
import signal
import sys
import sysconfig
import termios
import textwrap
import threading
import types
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from . import _boot

_FLUSH_FAILED = 120  # the exit status, of pylifecycle.c


class Work(NamedTuple):
    """What the client asked for. ``path``: sys.path without the program's own entry."""

    kind: str
    words: list[str]
    path: list[str]
    cwd: int
    closed: list[int]
    terminal: int
    kept: list[int]
    unbuffered: bool
    safe_path: bool
    write_bytecode: bool


class Loaded(NamedTuple):
    """What the template has: the files of its modules beside the standard library."""

    files: list[str]


def loaded() -> Loaded:
    """For the server, which makes the template anew when one of the files changes."""
    paths = sysconfig.get_paths()
    standard = tuple({paths["stdlib"] + "/", paths["platstdlib"] + "/"})
    sites = ("/site-packages/", "/dist-packages/")
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not os.path.isabs(file):
            continue
        if file.startswith(standard) and not any(site in file for site in sites):
            continue
        found.add(file)
    return Loaded(sorted(found))


# ---- ahead of a start --------------------------------------------------------------

# Modules that were there before the program: not torn down with it. Made in the standby, for
# it touches all of their names.
_before: frozenset[str] = frozenset()


def _rehearse() -> None:
    """In a standby, once: all of the way that can be gone ahead. The first touch of a page
    that it shares with its template is most of what a start would take otherwise."""
    global _before
    if _before:  # a worker's own workers
        return
    _before = frozenset(sys.modules)
    _boot.set_environment([name + b"=" + value for name, value in os.environb.items()])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, f"__{name}__", None) is not None:
            _boot._kept.append(_boot.new_stream(number, name))
    main = sys.modules["__main__"]
    names = _new_main()
    try:
        _run_code("import sys", names)
        _clear(names)
        gc.collect()
    finally:
        sys.modules["__main__"] = main
        linecache.clearcache()


_boot.register_child_reset(_rehearse)


def work(work: Work) -> NoReturn:
    """The target of a worker."""
    interrupted = False
    raised = _call(work)
    if raised is None:
        code = 0
    elif isinstance(raised, SystemExit):
        code = _exit_code(raised)
    else:
        interrupted = isinstance(raised, KeyboardInterrupt)
        code = _report(raised)
    del raised  # its frames hold what the program has
    code = _finish(code)
    if interrupted and code != _FLUSH_FAILED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(code)


def _call(work: Work) -> BaseException | None:
    try:
        _begin(work)
        _run(work)
    except BaseException as exc:
        return exc
    return None


# ---- before it -----------------------------------------------------------------------


def _begin(work: Work) -> None:
    os.fchdir(work.cwd)
    os.close(work.cwd)
    for fd in work.kept:
        os.set_inheritable(fd, True)
    if work.terminal >= 0:
        fcntl.ioctl(work.terminal, termios.TIOCSCTTY, 0)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in work.closed:
            os.close(number)
            stream = None
        elif work.unbuffered or getattr(sys, name, None) is None:
            stream = _boot.new_stream(number, name, work.unbuffered)
        else:
            continue
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.dont_write_bytecode = not work.write_bytecode
    sys.path[:] = work.path
    flag = [f"-{work.kind}"] if work.kind in ("c", "m") else []
    sys.orig_argv = [sys.executable, *flag, *work.words]
    sys.argv = [*(flag or work.words[:1]), *work.words[1:]]


def _new_main() -> dict[str, Any]:
    """A __main__ as interpreters begin with."""
    module = types.ModuleType("__main__")
    names = vars(module)
    names["__builtins__"] = sys.modules["builtins"]
    names["__loader__"] = importlib.machinery.BuiltinImporter
    if sys.version_info < (3, 14):
        names["__annotations__"] = {}
    sys.modules["__main__"] = module
    return names


# ---- the program -----------------------------------------------------------------------


def _run(work: Work) -> None:
    names = _new_main()
    what = work.words[0]
    if work.kind == "c":
        _first_entry(work, "")
        _run_code(what, names)
    elif work.kind == "m":
        _first_entry(work, os.getcwd())
        runpy._run_module_as_main(what)  # type: ignore[attr-defined]
    elif work.kind == "-":
        _first_entry(work, "")
        _run_input(names)
    else:
        _run_file(work, what, names)


def _first_entry(work: Work, entry: str) -> None:
    if not work.safe_path:
        sys.path.insert(0, entry)


def _run_code(source: str, names: dict[str, Any]) -> None:
    if sys.version_info >= (3, 14):
        source = textwrap.dedent(source)
    code = compile(source + "\n", "<string>", "exec", dont_inherit=True)
    # For tracebacks.
    register: Any = getattr(linecache, "_register_code", None)
    if register is not None:
        by_code = hasattr(linecache, "_interactive_cache")  # 3.14, and later ones of 3.13
        register(code if by_code else "<string>", source, "<string>")
    exec(code, names)


def _run_input(names: dict[str, Any]) -> None:
    source = sys.stdin.buffer.read() if sys.stdin is not None else b""
    exec(compile(source, "<stdin>", "exec", dont_inherit=True), names)


def _run_file(work: Work, name: str, names: dict[str, Any]) -> None:
    if pkgutil.get_importer(name) is not None:  # a folder, or an archive
        sys.path.insert(0, os.path.abspath(name))
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    path = name if name.startswith("/") else os.path.join(os.getcwd(), name)
    try:
        with open(path, "rb") as file:
            if os.path.isdir(path):
                raise IsADirectoryError
            data = file.read()
    except OSError as exc:
        print(
            f"{sys.executable}: can't open file {path!r}: [Errno {exc.errno}] {exc.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    _first_entry(work, os.path.dirname(os.path.realpath(path)))
    machinery = importlib.machinery
    compiled = data.startswith(importlib.util.MAGIC_NUMBER)
    loader = machinery.SourcelessFileLoader if compiled else machinery.SourceFileLoader
    names["__file__"] = path
    if sys.version_info < (3, 15):
        names["__cached__"] = None
    names["__loader__"] = loader("__main__", path)
    code: Any
    if compiled:
        code = names["__loader__"].get_code("__main__")
    else:
        code = compile(data, path, "exec", dont_inherit=True)
    exec(code, names)


# ---- its end ------------------------------------------------------------------------------


def _exit_code(exc: SystemExit) -> int:
    """As handle_system_exit() of pythonrun.c."""
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code & 0xFF if -(2**63) <= exc.code < 2**63 else 0xFF
    _flush("stdout")
    if sys.stderr is not None:
        print(exc.code, file=sys.stderr)
    return 1


def _without_ours(exc: BaseException) -> BaseException:
    """Its traceback begins where that of an interpreter of its own would."""
    tb = exc.__traceback__
    while tb is not None and tb.tb_frame.f_globals is globals():
        tb = tb.tb_next
    return exc.with_traceback(tb)


def _report(exc: BaseException) -> int:
    """As PyErr_Print(); the exit status."""
    exc = _without_ours(exc)
    sys.last_exc = exc
    sys.last_type, sys.last_value, sys.last_traceback = type(exc), exc, exc.__traceback__
    failure = _call_hook(exc)
    if isinstance(failure, SystemExit):
        return _exit_code(failure)
    if failure is not None and sys.stderr is not None:
        print("Error in sys.excepthook:", file=sys.stderr)
        failure = _without_ours(failure)
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(exc), exc, exc.__traceback__)
    return 1


def _call_hook(exc: BaseException) -> BaseException | None:
    hook = getattr(sys, "excepthook", None)
    try:
        sys.audit("sys.excepthook", hook, type(exc), exc, exc.__traceback__)
        if hook is None:
            print("sys.excepthook is missing", file=sys.stderr)
            hook = sys.__excepthook__
        hook(type(exc), exc, exc.__traceback__)
    except BaseException as failure:
        return failure
    return None


def _flush(name: str) -> bool:
    stream = getattr(sys, name, None)
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except BaseException as exc:
        if name == "stdout":
            unraisable = types.SimpleNamespace(
                exc_type=type(exc), exc_value=exc, exc_traceback=None, err_msg=None, object=stream
            )
            sys.unraisablehook(unraisable)
        return False
    return True


def _finish(code: int) -> int:
    """As Py_FinalizeEx(), for what the program has made; the exit status."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException as exc:
        _report(exc)
    atexit._run_exitfuncs()
    ok = _flush("stdout") & _flush("stderr")
    _drop_modules()
    ok &= _flush("stdout") & _flush("stderr")
    return code if ok else _FLUSH_FAILED


def _drop_modules() -> None:
    """What the program holds ends with it: files that it has not closed are written."""
    modules = []
    for name in reversed(sys.modules):
        if name in _before:  # what is new is behind what was there
            break
        modules.append(sys.modules[name])
    threading.excepthook = _nothing  # daemon threads, which CPython stops here
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, f"__{name}__", None))
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    _clear(vars(sys.modules["__main__"]))
    gc.collect()
    for module in modules:
        if isinstance(module, types.ModuleType):
            _clear(vars(module))
    if modules:
        gc.collect()


def _nothing(_args: object) -> None:
    pass


def _clear(names: dict[str, Any]) -> None:
    """As _PyModule_ClearDict(): first what begins with one underscore."""

    def drop(which: Iterable[str]) -> None:
        for name in which:
            names[name] = None

    keys = [key for key in names if isinstance(key, str)]
    drop(key for key in keys if key.startswith("_") and not key.startswith("__"))
    drop(key for key in keys if not key.startswith("_"))
