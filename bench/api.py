"""What pages say of the code, from it: functions, options, commands; modules; costs of lowerings; formulas; markers.

    python -m bench.api --write [FILES]     default: those of ``PAGES``

What stands between ``<!-- code: api -->`` and ``<!-- /code: api -->`` there (``modules``, ...) is replaced.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from typer.models import OptionInfo

import lorc_fx
from bench.table import _replace, markdown
from lorc_fx import bounds, cli, errors, formulas, options, schedulers
from lorc_fx.passes import cost

ROOT = Path(__file__).parents[1]
FOLDERS = ("lorc_fx", "passes", "kernels")
NAMESPACES = (lorc_fx, bounds, schedulers)
FOR_USERS = {"LatentKV": ("codec", "dense", "length", "positions", "used_nbytes")}
"""Members that are shown of a class whose others are the protocol of tensors and of the passes."""


class _Bare(str):
    """An annotation that is printed as it was written."""

    __repr__ = str.__str__


def signature(value: Any, name: str) -> str:
    """``name`` with its parameters and annotations."""
    found = inspect.signature(value)
    given = [p for p in found.parameters.values() if p.name != "self"]
    given = [p if p.annotation is p.empty else p.replace(annotation=_Bare(_written(p.annotation))) for p in given]
    returns = found.return_annotation
    ends = "" if returns in (found.empty, None, "None") else f" -> {_written(returns)}"
    line = f"{name}{found.replace(parameters=given, return_annotation=found.empty)}{ends}"
    return textwrap.fill(line, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def prose(text: str | None) -> str:
    """A docstring as markdown: a paragraph a line, what is indented as it is."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text or ""))
    lines = [part if part.startswith("    ") else " ".join(part.split()) for part in parts]
    return "\n\n".join(lines).replace("``", "`")


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """The public functions and properties that a class has of its own, in order."""
    if issubclass(owner, BaseException):
        return
    for name, value in vars(owner).items():
        kinds = (staticmethod, classmethod, property, cached_property)
        public = name in FOR_USERS[owner.__name__] if owner.__name__ in FOR_USERS else not name.startswith("_")
        if public and (inspect.isfunction(value) or isinstance(value, kinds)):
            yield name, value


def public(module: ModuleType) -> Iterator[tuple[str, Any, Any]]:
    """The names that a module has in ``__all__`` and those of their members: dotted name, value, owner."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            continue
        yield f"{module.__name__}.{name}", value, module
        if inspect.isclass(value):
            yield from ((f"{module.__name__}.{name}.{own}", member, value) for own, member in members(value))


def _entry(name: str, value: Any, owner: Any) -> str:
    """A public name: signature and docstring."""
    short, title = name.rpartition(".")[2], f"{'####' if inspect.isclass(owner) else '###'} `{name}`"
    inner = getattr(value, "fget", None) or getattr(value, "func", None)
    if inner is not None:
        kind = inspect.signature(inner).return_annotation
        return _joined(title, _fenced(f"{short}: {_written(kind)}"), prose(inner.__doc__))
    if isinstance(value, (classmethod, staticmethod)):
        value = getattr(owner, short)
    if not callable(value):
        return _joined(title, _fenced(f"{short} = {_short(value)}"))
    shown = not inspect.isclass(value) or is_dataclass(value)
    return _joined(title, _fenced(signature(value, short)) if shown else "", prose(value.__doc__))


def _short(value: Any) -> str:
    """A constant; of a long table its keys."""
    return repr(value) if len(repr(value)) < 110 else "{" + ", ".join(f"{key!r}: ..." for key in value) + "}"


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def api() -> str:
    """All of docs/api.md behind its head."""
    parts: list[str] = []
    for module in NAMESPACES:
        parts += [f"## `{module.__name__}`", prose(module.__doc__), *(_entry(*found) for found in public(module))]
    return _joined(*parts, "## Options", option_table(), "## Errors and warnings", error_table(), commands())


def option_table() -> str:
    """The fields of ``Options``."""
    lines = []
    for field in fields(options.Options):
        now = _own_schedulers() if field.name == "scheduler" else options.CHOICES.get(field.name, ())
        values = ", ".join(f"`{value!r}`" for value in now)
        lines.append([f"`{field.name}`", f"`{field.type}`".replace("|", "\\|"), f"`{field.default!r}`", values])
    return _left(["option", "type", "default", "built-in names"], lines)


def _own_schedulers() -> tuple[str, ...]:
    """Those that lorc_fx brings, whatever this process has registered besides."""
    known = {name: schedulers.get_scheduler(name) for name in schedulers.registered_schedulers()}
    return tuple(name for name, made in known.items() if made.__module__.startswith("lorc_fx."))  # type: ignore[attr-defined]


def error_table() -> str:
    """The catalogue of ``lorc_fx.errors``: what each class is, and what of Python's it can be caught as."""
    lines = []
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, (errors.LorcError, errors.LorcWarning)):
            bases = ", ".join(f"`{base.__name__}`" for base in value.__bases__)
            lines.append([f"`{name}`", bases, prose(value.__doc__).replace("\n\n", " ")])
    return _left(["`lorc_fx.errors`", "is a", "when"], lines)


def command_functions(app: Any = cli.app, name: str = "lorc") -> Iterator[tuple[str, Any, str]]:
    """The commands: full name, function and epilog. From what typer was told, as its own classes change."""
    for info in app.registered_commands:
        yield f"{name} {info.name or info.callback.__name__.replace('_', '-')}", info.callback, info.epilog or ""
    for group in app.registered_groups:
        own = getattr(group.name, "value", group.name)
        yield from command_functions(group.typer_instance, f"{name} {own}" if own else name)


def parameters(function: Any) -> list[list[str]]:
    """Of a command: names as they are typed, type, default, help."""
    hints, found = get_type_hints(function, include_extras=True), []
    for name, given in inspect.signature(function).parameters.items():
        if get_origin(hints[name]) is not Annotated:
            continue  # typer's own context
        kind, info = get_args(hints[name])[:2]
        option = isinstance(info, OptionInfo)
        names = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]  # Option's first is one
        words = "--" + name.replace("_", "-")
        names = names or ([words, f"--no-{words[2:]}"] if kind is bool else [words] if option else [name.upper()])
        needed, default = given.default is given.empty, getattr(given.default, "value", given.default)
        usual = "required" if needed else f"`{default}`" if default not in (None, False, "") else ""
        found.append([", ".join(f"`{n}`" for n in names), _kind(kind), usual, info.help or ""])
    return found


def _kind(kind: Any) -> str:
    inner = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is list:
        return f"{_kind(inner[0])}, may be repeated"
    if inner:
        return _kind(inner[0])
    if issubclass(kind, Enum):
        return " or ".join(member.value for member in kind)
    return {str: "text", Path: "path", bool: "flag"}.get(kind, kind.__name__)


def commands() -> str:
    """The command line, from the commands' own definitions."""
    found = []
    for name, function, epilog in command_functions():
        table = parameters(function)
        shown = _left(["option", "type", "default", "meaning"], table) if table else ""
        examples = "\n".join(epilog.split("\n\n")[1:])
        found.append(_joined(f"### `{name}`", prose(function.__doc__), shown, _fenced(examples) if examples else ""))
    return _joined("## Command line", prose(cli.__doc__).split("\n\n")[1], *found)


def _left(header: Sequence[str], rows: Any) -> str:
    """A table of words."""
    return markdown(header, list(rows)).replace("---:", "---")


def modules() -> str:
    """Every module with the first sentence of its docstring."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            said = ast.get_docstring(ast.parse(path.read_text()))
            if said is not None and inside.parts[1] not in FOLDERS:  # installed inside of lorc_fx, by links
                lines.append([f"`{inside.as_posix()}`", _sentence(said)])
        for path in sorted((ROOT / folder).glob("*.cpp")):
            head = path.read_text().split("\n\n")[0].split("\n//\n")[0]
            lines.append([f"`{folder}/{path.name}`", _sentence(head.replace("// ", ""))])
    return _left(["module", "what it is"], lines)


def _sentence(text: str) -> str:
    """The first sentence of a docstring, without what introduces an indented block."""
    first = " ".join(inspect.cleandoc(text).split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
    return re.split(r"(?<=[a-z)`]\.) (?=[A-Z`])|: *$", first)[0].rstrip(".")


def costs() -> str:
    """What each lowering moves, multiplies and unpacks in a decode step (``passes/cost.py``)."""
    rows = []
    for name, found in cost.LOWERINGS.items():
        parts = [f"`{expression}`" for expression in (found.bytes, found.flops, found.numbers)]
        rows.append([f"`{name}`", *parts, "one after the other" if found.apart else "at once"])
    return _left(["lowering", "bytes", "FLOPs", "numbers unpacked", "memory and products"], rows)


def markers() -> str:
    """The markers of the tests, none of which runs by default."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    found = [line.partition(": ") for line in config["markers"]]
    return _left(["marker", "what"], [[f"`{name}`", said] for name, _, said in found])


PARTS = {"api": api, "modules": modules, "costs": costs, "formulas": formulas.markdown, "markers": markers}
PAGES = ("docs/api.md", "docs/architecture.md", "docs/kernels.md", "docs/budgets.md", "CONTRIBUTING.md")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", type=Path, nargs="*", help="Markdown files with markers; none: all that have some")
    given = parser.parse_args(argv)
    files = [ROOT / page for page in PAGES] if given.write == [] else given.write or []
    for name, part in PARTS.items():
        text = part()
        if not files:
            print(text, end="\n\n")
        for file in files:
            _replace(file, f"code: {name}", text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
