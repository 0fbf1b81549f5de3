"""The code of the documentation runs, block after block in one namespace, and does what the text says; commands, links
and tables in it are right."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.main import get_command
from typer.testing import CliRunner

import lorc_fx
from bench import pictures, plots, table
from helpers import assert_close
from lorc_fx import bases, cli, compat, errors
from lorc_fx.latent import LatentKV
from lorc_fx.passes.rules import RULES
from lorc_fx.schedulers import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
SHELL = re.compile(r"^```\n(.*?)^```", re.M | re.S)
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def run(path: Path, stop: int | None = None, **given: Any) -> dict[str, Any]:
    """Execute the first ``stop`` blocks of a page; lines of errors are those of the page. ``given``: what is there."""
    text, module = path.read_text(), types.ModuleType(path.stem)
    sys.modules[path.stem] = module  # Dynamo looks its functions' module up
    vars(module).update(given)
    for block in list(BLOCK.finditer(text))[:stop]:
        lines = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines + block.group(1), str(path), "exec"), vars(module))
    return vars(module)


# -- pages for users --------------------------------------------------------------------------------------------------


@pytest.fixture
def aside(quiet: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own, with variables and registries that are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORC_DISABLE", "")
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that inductor would compile run as they are."""
    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, inputs, mode: gm.forward)


@pytest.mark.usefixtures("aside", "at_once")
@pytest.mark.parametrize("page", ["quickstart", "budgets", "how_it_works", "troubleshooting"])
def test_pages_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their blocks assert what the text says."""
    space = run(DOCS / f"{page}.md")
    assert space["model"].get_parameter("model.embed_tokens.weight").shape == (128, 128)
    assert "Error" not in capsys.readouterr().out


@pytest.mark.usefixtures("aside", "at_once")
@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "options.md"], ids=lambda page: page.stem)
@torch.no_grad()
def test_excerpts_run(page: Path) -> None:
    """Pages whose code begins with a model that is there."""
    ids = torch.randint(1, 27, (1, 300))
    space = run(page, model=tiny.llama(), input_ids=ids, token_ids=ids[0])
    assert len(space["report"].sites) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("aside")
def test_quickstart_under_inductor() -> None:
    run(DOCS / "quickstart.md")


def test_the_code_of_every_page_is_run() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_docs*.py"))
    named = set(re.findall(r'"(\w+)(?:\.md)?"', tests))
    assert {page.stem for page in PAGES if BLOCK.search(page.read_text())} <= named


# -- pages for authors ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lorc_fx.errors.QualityWarning")
def test_new_architecture(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_REGISTRY", {})
    try:
        space = run(DOCS / "new_architecture.md")
    finally:
        RULES.pop(torch.ops.my_lib.fused_qkv.default, None)
    with torch.no_grad():
        assert_close("in columns of its own", space["turned"], space["model"](space["x"])[0], 1e-5)
    report = space["report"]
    assert not report.sites and len(report.misses) == 2
    miss = str(report.misses[0])
    for part in ("my_lib.fused_qkv.default", "new_architecture.md:", "= fused_qkv(x, self.qkv", "register_rule"):
        assert part in miss, miss
    keys, values = space["keys"], space["values"]
    assert isinstance(keys, LatentKV) and isinstance(values, LatentKV)
    assert lorc_fx.cache_nbytes((keys, values), used=True) <= 0.5 * 2 * 8 * 32 * 4


def test_a_rule_of_ones_own_is_exact(clean: None) -> None:
    space = run(DOCS / "new_architecture.md", 2)
    model, x = space["model"], torch.randn(2, 7, 32)
    step = torch.randn(2, 1, 32)
    try:
        call = torch.compile(model, backend="lorc", options={**lorc_fx.PAPER, "ratio": 1.0, "inner": "eager"})
        with torch.no_grad():
            (want, cache), (got, coded) = model(x), call(x)
            (then, _), (now, _) = model(step, cache), call(step, coded)
    finally:
        RULES.pop(torch.ops.my_lib.fused_qkv.default, None)
    assert_close("prompt", got, want, 1e-5)
    assert_close("step", now, then, 1e-5)


def test_theory(clean: None) -> None:
    """The certificate that the page shows is sound, and what the tables are made of can be made of it."""
    from bench import bounds

    certificate = run(DOCS / "theory.md")["certificate"]
    assert len(certificate.sites) == 4
    made = bounds.row(certificate)
    assert made["sound"] is True
    assert made["attention, errors known"]["median"] < made["attention"]["median"]
    text = table.certificates({"rows": [{"model": "m", "way": "w", **made}]})
    assert "m, w" in text
    assert f"of {made['logits']['positions']} |" in text


# -- commands ---------------------------------------------------------------------------------------------------------


def shell(page: Path, program: str) -> list[list[str]]:
    """The words of each command line of ``program`` on a page, in blocks and in text, without variables before it."""
    text = BLOCK.sub("", page.read_text())
    lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
    lines += re.findall(rf"`((?:[A-Z_]+=\S+ )*{program} [^`]+)`", SHELL.sub("", text))
    found = []
    for line in lines:
        bare = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.strip())
        if bare.startswith(f"{program} "):
            found.append(shlex.split(bare.replace("\n", " "), comments=True)[1:])
    return found


@by_name
def test_lorc_commands_parse(page: Path) -> None:
    for words in shell(page, "lorc"):
        command, rest = get_command(cli.app), list(words)
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"lorc {' '.join(words)}: there is no such command"
            command = command.commands[rest.pop(0)]
        if rest:  # else a command is only named
            try:
                command.make_context(command.name, rest)
            except Exception as error:
                pytest.fail(f"lorc {' '.join(words)}: {getattr(error, 'message', error)}")


@by_name
def test_bench_and_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for words in shell(page, "make"):
        assert words[0] in targets, f"make {' '.join(words)}"
    for words in shell(page, "python"):
        if words[0] == "-m" and words[1].startswith("bench."):
            source = (ROOT / f"{words[1].replace('.', '/')}.py").read_text()
            for option in words[2:]:
                assert not option.startswith("--") or f'"{option}"' in source, f"python {' '.join(words)}"


def test_commands_of_the_budgets_run(quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, on a tiny checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORC_DISABLE", "")
    tiny.letters().save_pretrained("model")
    tiny.llama(heads=8, kv_heads=8).save_pretrained("model")
    Path("text").write_text("the sea is salty and deep " * 12)
    known = "`lorc calibrate known.safetensors --model PATH --text FILE --gradients`"
    assert known in (DOCS / "budgets.md").read_text()
    commands = shell(DOCS / "budgets.md", "lorc")
    order = sorted(commands, key=lambda words: words[0] != "calibrate")
    runner = CliRunner(env={"COLUMNS": "200"})
    for words in order:
        given = [{"PATH": "model", "FILE": "text", "0.5,0.35,0.25,0.15": "0.5"}.get(word, word) for word in words]
        if "--model" in given:
            result = runner.invoke(cli.app, [*given, "--dtype", "fp32"])
            assert result.exit_code == 0, f"{words}: {result.output}"
    assert Path("plan.json").exists() and Path("loss.svg").exists()


# -- links, tables, names ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Figures of measurements (``bench.plots``) may wait for these."""
    waiting = {f"figures/decode-{name}.svg" for name in plots.FIGURES}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http") and target not in waiting:
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@by_name
def test_tables_are_those_of_the_results(page: Path) -> None:
    """``python -m bench.table --write README.md docs/*.md`` changes nothing. An empty place waits for its results."""
    for name, text in re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", page.read_text(), re.S):
        result = table.RESULTS / f"{name}.json"
        if name in table.TABLES and result.exists():
            assert text.strip() == table.rendered(name, json.loads(result.read_text())), f"{page.name}: {name}"
        else:
            assert not text.strip(), f"{page.name}: nothing makes the table {name}"


def test_every_error_is_on_the_page() -> None:
    """In a row with symptom, cause and next step, but for the base class."""
    text = (DOCS / "troubleshooting.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    listed = {row[0].strip("`") for row in rows if len(row) == 4 and all(row)}
    public = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert listed == public - {"LorcError"} and "`LorcError`" in text


def test_the_readme_names_every_marker() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    text = (ROOT / "README.md").read_text()
    for line in config["markers"]:
        assert f"`{line.partition(':')[0]}`" in text, line
    assert "make demo " in text and "make test " in text


def test_pictures(quiet: None, tmp_path: Path) -> None:
    """Drawn from real graphs: what is replaced is there before, what replaces it after."""
    drawn = {path.name: path.read_text() for path in pictures.pictures(tmp_path)}
    assert set(drawn) == {path.name for path in (DOCS / "figures").glob("graph-*.svg")}
    words = {"graph-before": ("linear, key weight", "cached keys", "cat", "scaled_dot_product_attention")}
    words |= {"graph-after-paper": ("linear, key encode", "key codes", "copy_", "matmul, key decode")}
    words |= {"graph-after": ("linear, value encode", "value codes", "copy_", "pack", "attend")}
    for name, wanted in words.items():
        for word in wanted:
            assert f"<!-- {word}" in drawn[f"{name}.svg"], (name, word)
    assert "key weight" not in drawn["graph-after-paper.svg"], "it is no input any more"
