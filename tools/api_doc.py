"""docs/api.md from the docstrings of the package.

usage: tools/api_doc.py [--write]
Without --write: exit status 1 if the file is not what the docstrings say, or if something public
has none.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "api.md"
# Module, and what of it is described: all that is public, or these names.
MODULES: list[tuple[str, tuple[str, ...]]] = [
    ("anyfork", ()),
    ("anyfork.anyio", ()),
    ("anyfork.trio", ("open_worker", "open_pool", "open_supervisor")),
    ("anyfork.asyncio", ("open_worker", "open_pool", "open_supervisor")),
    ("anyfork.sync", ()),
    ("anyfork._worker", ("WorkerStream", "AsyncWorkerStream")),
    ("anyfork.supervision", ()),
]
TITLES = {"anyfork._worker": "What the target of a stream is given"}
NOTES = {
    "anyfork.trio": "Its classes are those of [`anyfork.anyio`](#anyforkanyio).",
    "anyfork.asyncio": "Its classes are those of [`anyfork.anyio`](#anyforkanyio).",
}
# Of no use to a reader: made by functions, not by a call of the class; what spawn() uses.
NOT_MADE = ("Child", "Pool", "Results", "Stream", "Supervisor", "Worker", "WorkerStream")
NOT_MADE += ("AsyncWorkerStream",)
PRIVATE = {"Template.start", "Template.start_many"}
SECTION = re.compile(r"(Args|Attributes|Raises|Returns)( of [^\n]*)?:")
ENTRY = re.compile(r"(\w+(?:, \w+)*): ")
ROLE = re.compile(r":(?:func|meth|class|mod|data|attr):`~?(?:anyfork\.(?=\w+`))?([^`]+)`")
INTRODUCTION = """\
# Python API

Made from the docstrings by `tools/api_doc.py`. [workers.md](workers.md) introduces the workers that
talk, [methods.md](methods.md) those of `spawn()`, [templates.md](templates.md) templates,
[supervision.md](supervision.md) supervisors.

What holds unless a description says otherwise: times are in seconds, sizes in bytes. Errors are
raised before anything has changed. Functions of `anyfork` and `anyfork.sync` may be called from any
thread of their interpreter, and block it; what is of `anyfork.anyio`, `trio` and `asyncio` belongs
to its event loop, is called by that loop's tasks, and does not block it for longer than a start
takes. What is awaited is a checkpoint, and is cancelled by whatever cancels its task.
"""


def class_definitions() -> dict[str, ast.ClassDef]:
    """Those of the package, by name, for what inspect does not tell of fields."""
    found = {}
    for path in sorted((ROOT / "python/anyfork").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
    return found


CLASSES = class_definitions()


# ---- docstrings -------------------------------------------------------------------------


def prose(text: str) -> str:
    """A docstring as Markdown."""
    text = ROLE.sub(r"``\1``", inspect.cleandoc(text)).replace("``", "`")
    parts = []
    for paragraph in re.split(r"\n\n+", text):
        lines = paragraph.split("\n")
        head = SECTION.fullmatch(lines[0])
        if head is not None:
            title = head[0].removesuffix(":")
            parts.append(f"**{title}**\n\n" + entries([line[2:] for line in lines[1:]]))
        elif lines[0].startswith("    "):
            code = "\n".join(line[4:] for line in lines)
            parts[-1] = parts[-1].removesuffix("::") + ":"
            parts.append(f"```python\n{code}\n```")
        elif ENTRY.match(lines[0]) and not SECTION.match(lines[0]) and is_list(lines):
            parts.append(entries(lines))
        else:
            parts.append(re.sub(r"^(Args|Attributes|Raises|Returns)\b", r"**\1**", paragraph))
    return "\n\n".join(parts)


def is_list(lines: list[str]) -> bool:
    """Whether each of them begins an entry, or belongs to one."""
    return len(lines) > 1 and all(line.startswith("  ") or ENTRY.match(line) for line in lines)


def entries(lines: list[str]) -> str:
    """Lines of "name: text", and of what belongs to it further in, as a list."""
    made = []
    for line in lines:
        entry = ENTRY.match(line)
        if entry is not None:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            made.append(f"- {names}: {line[entry.end() :]}".replace("- `Others`", "- Others"))
        elif line.startswith("  ") or not made:
            made.append("  " + line.strip())
        else:
            made.append("- " + line)
    return "\n".join(made)


# ---- signatures -------------------------------------------------------------------------


def default_of(value: object) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{value.name}"
    return repr(value)


def annotation_of(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def parameter(of: inspect.Parameter) -> str:
    star = {of.VAR_POSITIONAL: "*", of.VAR_KEYWORD: "**"}.get(of.kind, "")
    text = star + of.name
    if of.annotation is not of.empty:
        text += f": {annotation_of(of.annotation)}"
    if of.default is not of.empty:
        equals = " = " if of.annotation is not of.empty else "="
        text += equals + default_of(of.default)
    return text


def parameters(fn: Callable[..., Any]) -> tuple[list[str], str]:
    """Those that are public, and what it returns."""
    signature = inspect.signature(fn)
    found: list[str] = []
    before: Any = None
    for of in signature.parameters.values():
        if before is inspect.Parameter.POSITIONAL_ONLY and of.kind is not before:
            found.append("/")
        if of.kind is of.KEYWORD_ONLY and before not in (of.KEYWORD_ONLY, of.VAR_POSITIONAL):
            found.append("*")
        before = of.kind
        if not of.name.startswith("_"):
            found.append(parameter(of))
    if before is inspect.Parameter.POSITIONAL_ONLY:
        found.append("/")
    returns = signature.return_annotation
    return found, "" if returns is signature.empty else f" -> {annotation_of(returns)}"


def function(fn: Callable[..., Any], name: str, method: bool = False) -> str:
    """Its head, over several lines if it is long."""
    inner = getattr(fn, "__wrapped__", fn)
    decorator = ""
    if inspect.isasyncgenfunction(inner):
        decorator = "@asynccontextmanager\n"
    elif inspect.isgeneratorfunction(inner) and inner is not fn:
        decorator = "@contextmanager\n"
    asynchronous = inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)
    found, returns = parameters(fn)
    if method:
        found = found[1:]
    if found[:1] == ["/"]:
        del found[0]
    head = f"{decorator}{'async ' if asynchronous else ''}def {name}"
    line = f"{head}({', '.join(found)}){returns}"
    if max(map(len, line.split("\n"))) <= 90:
        return line
    return f"{head}(\n" + "".join(f"    {text},\n" for text in found) + f"){returns}"


# ---- what there is -----------------------------------------------------------------------


def documented(name: str, thing: object) -> str:
    text = thing.__doc__ if isinstance(thing, property) else inspect.getdoc(thing)
    if not text:
        raise ValueError(f"{name} has no docstring")
    return prose(text)


def fields(cls: type) -> list[str]:
    """Of a dataclass, a NamedTuple or a TypedDict, as the source has them."""
    if not hasattr(cls, "__dataclass_fields__") and not issubclass(cls, tuple | dict):
        return []
    node = CLASSES[cls.__name__]
    return [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]


def head_of_class(cls: type) -> str:
    bases = [base.__name__ for base in cls.__bases__ if issubclass(base, BaseException)]
    if found := fields(cls):
        return f"class {cls.__name__}:\n" + "\n".join(f"    {line}" for line in found)
    if bases:
        return f"class {cls.__name__}({', '.join(bases)})"
    if "__init__" not in vars(cls) or cls.__name__ in NOT_MADE:
        return f"class {cls.__name__}"
    head = function(vars(cls)["__init__"], cls.__name__, method=True)
    return "class " + head.removeprefix("def ").removesuffix(" -> None")


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public ones, in the order of the source; inherited ones of the package too."""
    seen: set[str] = set()
    for base in cls.__mro__:
        module = base.__module__ or ""
        if not module.startswith("anyfork"):
            continue
        for name, thing in vars(base).items():
            if name in seen or name.startswith("_") or f"{cls.__name__}.{name}" in PRIVATE:
                continue
            if not (callable(thing) or inspect.isdatadescriptor(thing)):
                continue
            if inspect.ismemberdescriptor(thing) or "_tuplegetter" in type(thing).__name__:
                continue
            seen.add(name)
            yield name, thing


def describe_class(cls: type, name: str) -> Iterator[str]:
    yield f"### `{name}`\n\n```python\n{head_of_class(cls)}\n```"
    yield documented(name, cls)
    for member, thing in members(cls):
        whole = f"{name}.{member}"
        if inspect.isdatadescriptor(thing):
            returns = getattr(getattr(thing, "fget", None), "__annotations__", {}).get("return")
            yield f"#### `{whole}{f': {annotation_of(returns)}' if returns else ''}`"
            yield documented(whole, thing)
        else:
            yield f"#### `{whole}()`\n\n```python\n{function(thing, member, method=True)}\n```"
            yield documented(whole, thing)


def describe(module: str, names: tuple[str, ...]) -> Iterator[str]:
    loaded: Any = importlib.import_module(module)
    yield f"## {TITLES.get(module) or f'`{module}`'}"
    if module != "anyfork" and module not in TITLES:
        yield prose(loaded.__doc__)
    if module in NOTES:
        yield NOTES[module]
    for name in names or loaded.__all__:
        thing = getattr(loaded, name)
        if isinstance(thing, type):
            yield from describe_class(thing, name)
        else:
            yield f"### `{name}()`\n\n```python\n{function(thing, name)}\n```"
            yield documented(f"{module}.{name}", thing)


def main() -> int:
    """Compare or write."""
    try:
        parts = [part for module, names in MODULES for part in describe(module, names)]
    except ValueError as exc:
        print(exc)
        return 1
    wanted = INTRODUCTION + "\n" + "\n\n".join(parts) + "\n"
    if "--write" in sys.argv[1:]:
        DOC.write_text(wanted)
        return 0
    if not DOC.exists() or DOC.read_text() != wanted:
        print(f"{DOC} is not what the docstrings say: run tools/api_doc.py --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
