"""The command line: exit codes, messages, and the demo on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from lorc_fx import cli, demo, models
from lorc_fx.errors import BadOption

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 8 kv heads of 8 and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.letters().save_pretrained(folder)
    tiny.llama(heads=8, kv_heads=8).save_pretrained(folder)
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["explain", "--help"]], ids=" ".join)
def test_help(arguments: list[str]) -> None:
    code, text = run(*arguments)
    assert code == 0
    assert "--help" in text


def test_help_lists_what_the_demo_takes() -> None:
    _, text = run("demo", "--help")
    for option in ("--model", "--ratio", "--bytes-per-token", "--scheduler", "--d-min", "--d-max", "--protect-first"):
        assert option in text
    for option in ("--protect-last", "--inner", "--dtype", "--tokens", "--prompt", "--sweep", "--json"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo", "--no-such-option"], "No such option"),
        (["demo", "--dtype", "int4"], "int4"),
        (["demo", "--ratio", "1.5"], "ratio=1.5 is not allowed"),
        (["demo", "--ratio", "0.5", "--bytes-per-token", "64"], "conflict"),
        (["demo", "--scheduler", "progresive"], "Did you mean 'progressive'?"),
        (["demo", "--inner", "nothing"], "inner='nothing'"),
        (["explain", "--ratio", "0"], "ratio=0.0"),
        (["demo", "--sweep", "half"], "sweep='half'"),
        (["demo", "--sweep", "0.5,2"], "ratio=2.0"),
        (["no-such-command"], "No such command"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_refused_options_exit_2_before_anything_is_loaded(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(demo, "load_model", load)
    monkeypatch.setattr(models, "load_model", load)
    code, text = run(*arguments)
    assert code == 2
    assert word in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_missing_model_exits_1(command: str) -> None:
    code, text = run(command, "--model", "/nowhere")
    assert code == 1
    assert "Error: Model '/nowhere' cannot be used" in text
    assert "Traceback" not in text


def test_bench_device(tmp_path: Path) -> None:
    code, text = run("bench", "device", "--json", str(tmp_path / "device.json"))
    assert code == 0 and "GB/s" in text
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["source"] == "measured" and found["bandwidth"] > 1e8 and found["flops"] > 1e8
    code, text = run("bench", "device", "--device", "abacus")
    assert code == 2 and "abacus" in text


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_model", load)
    code, text = run("demo")
    assert code == 130
    assert "Interrupted." in text


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "load_model", load)
    with pytest.raises(ZeroDivisionError):
        run("demo")


def test_write_json_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    cli.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        cli.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(BadOption):
        cli.write_json(tmp_path / "no" / "folder.json", {})


def test_explain(checkpoint: Path) -> None:
    code, text = run("explain", "--model", str(checkpoint), "--ratio", "0.5", "--dtype", "fp32")
    assert code == 0 and "the first prompt of 256 tokens" in " ".join(text.split()), text
    half = ("--ratio", "0.5", "--dtype", "fp32", "--calibration", "none")
    code, text = run("explain", "--model", str(checkpoint), *half)
    assert code == 0, text
    assert text.count("key") >= 2
    assert "512 bytes per token instead of 1024" in " ".join(text.split()), text


def test_demo_on_a_local_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    small = ["--inner", "eager", "--dtype", "fp32", "--tokens", "6", "--loss-tokens", "97", "--prompt", "the sea"]
    code, text = run("demo", "--model", str(checkpoint), *small, "--ratio", "0.5", "--sweep", "1.0", "--json", str(out))
    assert code == 0, text
    result = json.loads(out.read_text())
    dense, lorc = result["dense"], result["lorc"]
    assert dense["loss"]["per_token"] == 2 * 2 * 64 * 4
    assert lorc["loss"]["per_token"] <= 0.5 * dense["loss"]["per_token"]
    assert 0.3 < lorc["loss"]["used"] / dense["loss"]["used"] <= 0.51
    assert lorc["loss"]["used"] <= lorc["loss"]["held"]
    assert result["sweep"][0]["nats"] == pytest.approx(dense["loss"]["nats"], rel=1e-4)  # full rank is exact
    assert [len(side["texts"]) for side in (dense, lorc)] == [1, 1]
    for word in ("dense", "lorc", "tokens/s", "bytes per token", "added loss", "the sea"):
        assert word in text
