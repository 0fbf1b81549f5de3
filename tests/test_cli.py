"""The command line: exit codes, messages, and the demo on a tiny checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import run

from lorc_fx import autotune, cli, demo, make_plan, models
from lorc_fx.errors import BadOption


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 8 kv heads of 8 and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.letters().save_pretrained(folder)
    tiny.llama(heads=8, kv_heads=8).save_pretrained(folder)
    return folder


COMMANDS = (
    "demo",
    "explain",
    "certify",
    "calibrate",
    "eval",
    "plan",
    "autotune",
    "doctor",
    "bench device",
    "bench decode",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_json(command: str) -> None:
    code, text = run(*command.split(), "--help")
    assert code == 0
    assert "--help" in text and "--json" in text
    assert text.count(f"lorc {command}") >= 2, "no examples"


def test_help_lists_the_commands() -> None:
    code, text = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command.partition(' ')[0]} " in text


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
        (["explain", "--basis", "groupd"], "'grouped'"),
        (["plan", "plan.json", "--group-size", "2"], "only grouped bases have groups"),
        (["certify", "--objective", "speed"], "'balanced'"),
        (["demo", "--sweep", "half"], "sweep='half'"),
        (["demo", "--sweep", "0.5,2"], "ratio=2.0"),
        (["no-such-command"], "No such command"),
        (["autotune", "--again", "--tokns", "9"], "--tokens"),
        (["autotune", "--tokens", "many"], "tokens='many'"),
        (["autotune", "--tokens", "0"], "tokens='0' is not allowed"),
        (["autotune", "--batch", ""], "batch=''"),
        (["autotune", "--device", "abacus"], "device='abacus'"),
        (["autotune", "--plan", "/nowhere.json"], "/nowhere.json"),
        (["autotune", "--basis", "jiont"], "jiont"),
        (["bench", "decode", "--tokens", "0"], "tokens='0'"),
        (["bench", "decode", "--ratio", "2"], "ratio=2.0"),
        (["bench", "decode", "--inner", "inductr"], "Did you mean 'inductor'?"),
        (["certify", "--prompt", "a", "--text", "b"], "--prompt and --text conflict"),
        (["certify", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["certify", "--ratio", "7"], "ratio=7.0"),
        (["calibrate", "/no/such/folder/known.safetensors"], "output='/no/such/folder/known.safetensors'"),
        (["calibrate", "/"], "output='/'"),
        (["certify", "--plot", "/no/such/folder/bounds"], "plot='/no/such/folder/bounds.png'"),
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


@pytest.mark.parametrize("command", ["demo", "explain", "autotune"])
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


def test_json_has_no_infinity(tmp_path: Path) -> None:
    """Readers that are not Python's refuse it: a bound that says nothing is null."""
    path = tmp_path / "out.json"
    cli.write_json(path, {"slack": [1.5, float("inf"), (float("nan"), 2)], "layers": 3})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"slack": [1.5, None, [None, 2]], "layers": 3}


def test_write_json_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    cli.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        cli.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    with pytest.raises(BadOption):
        cli.write_json(tmp_path / "no" / "folder.json", {})


def test_explain(checkpoint: Path, tmp_path: Path) -> None:
    code, text = run("explain", "--model", str(checkpoint), "--ratio", "0.5", "--dtype", "fp32")
    assert code == 0 and "the first prompt of 256 tokens" in " ".join(text.split()), text
    half = ("--ratio", "0.5", "--dtype", "fp32", "--calibration", "none")
    code, text = run("explain", "--model", str(checkpoint), *half)
    assert code == 0, text
    assert text.count("key") >= 2
    assert "512 bytes per token instead of 1024" in " ".join(text.split()), text
    found = tmp_path / "found.json"
    assert run("explain", "--model", str(checkpoint), *half, "--json", str(found))[0] == 0
    result = json.loads(found.read_text())
    assert (result["bytes_per_token"], result["bytes_per_token_dense"]) == (512, 1024)
    assert len(result["sites"]) == 4 and result["misses"] == [] and result["step"]["dense_seconds"] > 0


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


QUICK = ("--dtype", "fp32", "--calibration", "none", "--precision", "int8", "--tokens", "256")


def test_autotune_goes_on_where_it_was_interrupted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    asked = ("autotune", "--model", str(checkpoint), "--basis", "identity", *QUICK)
    rounds: list[int] = []

    def clock(device: Any, calls: Any, repeats: int) -> list[float]:
        rounds.append(len(calls))
        if len(rounds) == 2:
            raise KeyboardInterrupt
        for call in calls:
            call()
        return [1.0 + i for i in range(len(calls))]  # the default comes first

    monkeypatch.setattr(autotune, "run", partial(autotune.run, timer=clock))
    found: list[Any] = []
    looked = autotune.readers

    def readers(*given: Any) -> Any:  # the model is compiled once: the same readers in all runs
        if not found:
            found.append(looked(*given))
        return found[0]

    monkeypatch.setattr(autotune, "readers", readers)
    code, text = run(*asked, "--batch", "1,3")
    assert code == 130 and "Interrupted." in text
    (file,) = (tmp_path / "tuned").iterdir()
    assert [e["done"] for e in json.loads(file.read_text())["entries"]] == [False]
    code, text = run(*asked, "--batch", "1,3", "--json", str(tmp_path / "out.json"))
    assert code == 0, text
    entries = json.loads(file.read_text())["entries"]
    assert [e["done"] for e in entries] == [True] * 4, "with a mask and without, one row and three"
    assert all("8 query heads, 1 queries; keys 8 x 8 of 64 columns packed" in e["reader"] for e in entries)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["file"] == str(file) and len(result["entries"]) == 4
    assert file.name in text and "the default" in text
    done, before = len(rounds), file.read_text()
    both = ("--batch", "1,3")
    assert run(*asked, *both)[0] == 0 and len(rounds) == done and file.read_text() == before, "nothing is timed twice"
    assert run(*asked, *both, "--again")[0] == 0 and len(rounds) > done


def test_autotune_without_a_reader_or_a_place_to_write(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "run", partial(autotune.run, timer=lambda device, calls, repeats: [1.0] * len(calls)))
    asked = ("autotune", "--model", str(checkpoint), *QUICK)
    code, text = run(*asked, "--basis", "joint", "--precision", "model")
    assert code == 0 and "Nothing to tune" in text, "rows in the model's dtype are read by torch's own products"
    code, text = run(*asked, "--basis", "joint", "--output", str(tmp_path / "turned.json"))
    assert code == 0 and "rotary" in (tmp_path / "turned.json").read_text()
    code, text = run(*asked, "--basis", "identity", "--output", "/proc/none/tuned.json")
    assert code == 2 and "output='/proc/none/tuned.json' is not allowed" in text
    own = tmp_path / "own.json"
    code, text = run(*asked, "--basis", "identity", "--output", str(own))
    assert code == 0 and json.loads(own.read_text())["entries"] and str(own) in text


def test_autotune_reads_a_plan(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "run", partial(autotune.run, timer=lambda device, calls, repeats: [1.0] * len(calls)))
    plan = tmp_path / "plan.json"
    model, _ = models.load_model(checkpoint, torch.float32)
    known = {"basis": "identity", "calibration": "none", "precision": "int8"}
    make_plan(model, torch.arange(16)[None], options=known).save(plan)
    asked = ("autotune", "--model", str(checkpoint), "--plan", str(plan), "--dtype", "fp32", "--tokens", "256")
    code, text = run(*asked, "--calibration", "none")
    assert code == 0 and "64 columns packed" in " ".join(text.split()), text


def test_certify(quiet: None, checkpoint: Path, tmp_path: Path) -> None:
    small = ("--model", str(checkpoint), "--dtype", "fp32", "--ratio", "0.5", "--calibration", "none")
    out = tmp_path / "bounds.json"
    code, text = run("certify", *small, "--prompt", "the sea", "--json", str(out), "--plot", str(tmp_path / "bounds"))
    assert code == 0, text
    result = json.loads(out.read_text())
    assert result["sound"] and len(result["sites"]) == 4 and result["logits"]["positions"] == 7
    assert "proven unchanged at" in text and "bounds.svg" in text
    assert (tmp_path / "bounds.png").stat().st_size > 0
    code, text = run("certify", *small, "--prompt", "the sea", "--json", str(out), "--rounding")
    assert code == 0, text
    rounded = json.loads(out.read_text())
    assert rounded["sound"] and rounded["logits"] != result["logits"]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_bench_decode(quiet: None, checkpoint: Path, tmp_path: Path, static: bool) -> None:
    out = tmp_path / "decode.json"
    asked = ("bench", "decode", "--model", str(checkpoint), "--dtype", "fp32", "--inner", "eager", "--repeats", "2")
    more = (
        "--tokens",
        "300,40",
        "--ratio",
        "0.5",
        "--batch",
        "2",
        "--json",
        str(out),
        *(["--static"] if static else []),
    )
    code, text = run(*asked, *more)
    assert code == 0, text
    rows = json.loads(out.read_text())["rows"]
    assert [(r["tokens"], r["way"]) for r in rows] == [(n, w) for n in (300, 40) for w in ("dense", "lorc, ratio 0.5")]
    assert all(len(r["seconds"]) == 2 for r in rows)
    assert rows[1]["held_bytes"] < 0.75 * rows[0]["held_bytes"], "the cache is not compressed"
    assert "times faster" in text


def test_calibrate_leaves_nothing_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    text, out = tmp_path / "text.txt", tmp_path / "known.safetensors"
    text.write_text("the sea " * 40)
    asked = ("calibrate", str(out), "--model", str(checkpoint), "--text", str(text), "--json", str(tmp_path / "k.json"))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", interrupted)
        code, said = run(*asked)
        assert code == 130 and "Interrupted." in said
    assert list(tmp_path.iterdir()) == [text]
    code, said = run(*asked)
    assert code == 0 and out.exists(), said
    assert json.loads((tmp_path / "k.json").read_text())["sites"] == 4


def test_a_text_without_tokens_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """And not replaced by the sample text, which nobody asked for."""
    text = tmp_path / "empty.txt"
    text.write_text("")
    small = ("--model", str(checkpoint), "--dtype", "fp32")
    code, said = run("certify", *small, "--prompt", "")
    assert code == 2 and "prompt='' is not allowed" in said
    code, said = run("calibrate", str(tmp_path / "known"), *small, "--text", str(text))
    assert code == 2 and "at least two tokens" in said
