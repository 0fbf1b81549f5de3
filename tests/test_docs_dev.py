"""Pages for authors: their code runs, what is made of the code is up to date, and what they name is there."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import sys
import textwrap
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import run

import lorc_fx
from bench import api
from lorc_fx import bases, cache_file, calibration, plan_file
from lorc_fx.errors import BadCalibration, BadPlan
from lorc_fx.kernels import tuned
from lorc_fx.passes import rewrite
from lorc_fx.schedulers import registry

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{n}.md" for n in ("kernels", "api", "architecture", "stability"))]
GENERATED = dict(zip(api.PARTS, api.PAGES, strict=True))


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def executed(page: str, folder: Path) -> dict[str, Any]:
    """Run a page under a name that no package has: ``kernels`` is one that transformers looks for."""
    copy = folder / f"page_{Path(page).name}"
    shutil.copy(ROOT / page, copy)
    try:
        return run(copy)
    finally:
        sys.modules.pop(copy.stem, None)


# -- what runs --------------------------------------------------------------------------------------------------------


def test_kernels(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(rewrite, "absorb", rewrite.absorb)  # the page sets its own
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    tuned.forget()
    space = executed("docs/kernels.md", tmp_path)
    tuned.forget()
    assert "# layer 1 value: rows ((32, 8),)" in space["decode"], "the dump says what sites store"
    compile(space["kernel"].source, "kernel", "exec")
    assert "def attend(" in space["kernel"].source and space["words"].startswith("tiled: 4 query heads, 1 queries")
    assert float(space["difference"]) < 1e-5
    assert {(s.kind, s.lowering) for s in space["report"].sites} == {("key", "rows"), ("value", "rows")}
    assert space["coded"] < space["dense"], "half the bytes or less, predicted to be read faster"
    assert space["moved"] > 4 and space["multiplied"] > 100


def test_contributing(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(bases, "_REGISTRY", {})
    plan = executed("CONTRIBUTING.md", tmp_path)["plan"]
    assert plan.ranks[0, "key"] > plan.ranks[1, "key"] and plan.ranks[0, "value"] > plan.ranks[1, "value"]


# -- what is generated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_made_of_the_code_is_up_to_date(name):
    page = text_of(GENERATED[name])
    (held,) = re.findall(rf"<!-- code: {name} -->\n(.*?)\n<!-- /code: {name} -->", page, re.S)
    assert held == api.PARTS[name](), "run: python -m bench.api --write"


def test_every_module_is_on_the_page():
    page = text_of("docs/architecture.md")
    for folder in api.FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            if inside.parts[1] not in api.FOLDERS:
                assert f"| `{inside.as_posix()}` |" in page, f"{inside} has no docstring, or the page is old"


def test_options_and_commands_are_on_the_page():
    page = text_of("docs/api.md")
    for name in (
        "`ratio`",
        "### `lorc bench decode`",
        "`--no-gradients`",
        "`--json`",
        "`BadCacheFile`",
        "`'balanced'`",
    ):
        assert name in page, name


# -- docstrings -------------------------------------------------------------------------------------------------------

PUBLIC = {name: (value, owner) for module in api.NAMESPACES for name, value, owner in api.public(module)}


def function_of(value: Any) -> Any:
    """What is behind a property, a classmethod, ..."""
    for inside in ("fget", "func", "__func__"):
        value = getattr(value, inside, None) or value
    return value


def raised(value: Any, seen: set[Any], owner: Any = None) -> Iterator[str]:
    """What a function raises itself, or a private helper of its module, or a method that it calls of its own object
    (of the class ``owner``); of a class, what making one does."""
    value = function_of(value)
    if inspect.isclass(value):
        value, owner = vars(value).get("__post_init__"), value
    if not inspect.isfunction(value) or value in seen or not value.__module__.startswith("lorc_fx"):
        return
    seen.add(value)
    scope = vars(inspect.getmodule(value))
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(value)))):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            name = node.exc.func.id
            if name.startswith("_"):  # a helper that makes the error
                yield from re.findall(r"return (\w+)\(", inspect.getsource(scope[name]))
            else:
                yield name
        elif isinstance(called, ast.Name) and called.id.startswith("_"):
            yield from raised(scope.get(called.id), seen)
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            yield from raised(inspect.getattr_static(owner, called.attr, None), seen, owner)


def told(value: Any, owner: Any) -> set[str]:
    """The words of a docstring, and of those to which it refers: "what ``explain`` raises"."""
    said = function_of(value).__doc__ or ""
    found = set(re.findall(r"\w+", said))
    for name in re.findall(r"(?:what|that) ``(?:\w+\.)*(\w+)`` raises", said):
        module = inspect.getmodule(function_of(value))
        other = getattr(module, name, None) or getattr(owner, name, None) or getattr(lorc_fx, name)
        found |= told(other, owner)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings_that_name_what_they_raise(name):
    value, owner = PUBLIC[name]
    inner = function_of(value)
    if not callable(inner):
        return
    said = inner.__doc__ or ""
    written = not inspect.isclass(inner) or not said.startswith(f"{inner.__name__}(")  # else a dataclass's own
    fields = isinstance(value, property) and owner.__doc__ and name.rpartition(".")[2] in owner.__doc__
    plain = isinstance(value, property) and len(inspect.getsource(inner).splitlines()) <= 3  # a sum, a name
    assert (said and written) or fields or plain, f"{name} has no docstring"
    missing = set(raised(value, set(), owner)) - told(value, owner)
    assert not missing, f"{name} raises {missing}, which its docstring does not say"


def silent(helper: bool) -> None:
    """Says nothing; ``_helper`` raises too."""
    if helper:
        _helper()
    raise BadPlan(1, "x")


def _helper() -> None:
    raise BadCalibration("x", "y")


def test_what_raises_is_seen(monkeypatch):
    """The check above is not blind: it finds what is raised, in helpers too, and follows what docstrings refer to."""
    records = sys.modules["lorc_fx.records"]
    for function in (silent, _helper):
        monkeypatch.setattr(function, "__module__", "lorc_fx.records")
        monkeypatch.setattr(records, function.__name__, function, raising=False)
    assert set(raised(silent, set())) == {"BadPlan", "BadCalibration"}
    assert set(raised(lorc_fx.Plan, set())) == set() and "BadOption" in set(raised(lorc_fx.Options, set()))
    assert "BadPlan" not in told(silent, lorc_fx) and "StrictMiss" in told(lorc_fx.make_plan, lorc_fx)


# -- what pages name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    names = re.findall(r"`((?:lorc_fx|passes|kernels|bench|tests|docs)/[\w/]*(?:\.\w+)?)`", text_of(page))
    for name in set(names) - {"bench/results/gpu.json"}:
        assert (ROOT / name).exists(), name


def command_lines() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.M | re.S):
            if kind != "python" and page != "docs/api.md":
                yield from ((page, line) for line in block.splitlines() if line.strip())
        spans = re.findall(r"`((?:lorc|make|python -m)\s[^`]+)`", text_of(page))
        yield from ((page, " ".join(line.split())) for line in spans)


def test_commands_that_are_named_are_there():
    options = {
        name: {option.strip("`") for parameter in api.parameters(function) for option in parameter[0].split(", ")}
        for name, function, _ in api.command_functions()
    }
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.M))
    seen = 0
    for page, line in command_lines():
        words = line.partition("#")[0].split()
        for target in words[words.index("make") + 1 :] if words[0] == "make" else []:
            assert target in targets, f"{page}: {line}"
        for module in [words[i + 1] for i, word in enumerate(words) if word == "-m" and "pytest" not in line]:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page}: {line}"
        if words[0] == "lorc":
            name = max((n for n in options if line.startswith(n)), key=len, default="")
            assert name, f"{page}: there is no such command: {line}"
            assert {w for w in words if w.startswith("--")} <= options[name], f"{page}: {line}"
        seen += 1
    assert seen > 20


def test_the_picture_names_what_is_there_and_fits():
    """Every file in it exists in the folder of its box's colour, or in lorc_fx; every text fits into its box."""
    image = ElementTree.parse(ROOT / "docs" / "figures" / "architecture.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    boxes = [dict(r.attrib) for r in image.iter(f"{space}rect") if r.get("height") == "84"]
    width = float(image.attrib["viewBox"].split()[2])
    assert len(boxes) == 16
    seen = 0
    for text in image.iter(f"{space}text"):
        x, y, said = float(text.attrib["x"]), float(text.attrib["y"]), text.text or ""
        (inside,) = [
            b
            for b in boxes
            if float(b["x"]) < x < float(b["x"]) + float(b["width"]) and float(b["y"]) < y < float(b["y"]) + 84
        ] or [None]
        room = float(inside["width"]) if inside else width
        assert len(said) * (7.9 if text.get("class") == "title" else 6.8) <= room, said
        for name in re.findall(r"[\w/]+(?:\.py|\.cpp|/)", said):
            folders = [inside["class"], "lorc_fx"] if inside else ["lorc_fx", "."]
            assert any((ROOT / folder / name).exists() for folder in folders), name
            seen += 1
    assert seen > 25


def test_stability_says_what_is_true():
    page = text_of("docs/stability.md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    files = {row[2]: (row[3], row[4], row[5]) for row in rows if len(row) == 6}
    readable = ", ".join(map(str, plan_file.READABLE))
    assert files["`lorc_fx_plan`"] == (str(plan_file.VERSION), readable, "`BadPlan`")
    about = {
        "`lorc_fx_calibration` in the header": (calibration.VERSION, "`BadCalibration`"),
        "`lorc_fx_cache` in the header": (cache_file.VERSION, "`BadCacheFile`"),
        "`version`": (tuned.VERSION, "skipped, one `KernelWarning`"),
    }
    for name, (version, refusal) in about.items():
        assert files[name] == (str(version), str(version), refusal), name
    sources = [p.read_text() for folder in api.FOLDERS for p in (ROOT / folder).rglob("*.py")]
    known = {name for text in sources for name in re.findall(r"LORC_[A-Z_]*[A-Z]", text)}
    assert known == {row[0].strip("`") for row in rows if row[0].startswith("`LORC_")}


def test_the_changelog_is_of_this_version():
    heads = re.findall(r"^## \[(.*?)\]", text_of("CHANGELOG.md"), re.M)
    assert heads[0] == "Unreleased" and lorc_fx.__version__ in heads


def test_hooks_run_what_is_there():
    config = tomllib.loads(text_of("pyproject.toml"))
    (local,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert [hook["entry"].split()[:2] for hook in local["hooks"]] == [
        [".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"], ["make", "types"],
    ]  # fmt: skip
    assert any(line.startswith("pre-commit") for line in config["project"]["optional-dependencies"]["dev"])


def test_the_makefile_runs_programs_as_modules():
    """As files they would not find ``bench``."""
    assert not re.findall(r"\$\(BIN\)/python \S+\.py", text_of("Makefile"))


def test_the_quick_files_are_there():
    (names,) = re.findall(r"^QUICK := (.*?[^\\])\n\n", text_of("Makefile"), re.M | re.S)
    for name in names.replace("\\", " ").split():
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name
