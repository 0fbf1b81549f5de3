"""``lorc plan``: plans that serve their model, predicted and measured losses, the plot, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from calibrating import quiet
from commands import run

import lorc_fx
from lorc_fx import models, plan_command, plan_plot
from lorc_fx.allocate import Columns, predicted
from lorc_fx.options import Options
from lorc_fx.packing import MODEL
from lorc_fx.records import Plan

pytestmark = pytest.mark.usefixtures("clean")
TEXT = "the sea takes the river and the river takes the rain " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, calibrations of it with and without gradients, and a text."""
    folder, model = tmp_path_factory.mktemp("tiny"), tiny.llama(heads=8, kv_heads=8)
    tiny.letters().save_pretrained(folder)
    model.save_pretrained(folder)
    rows = torch.randint(1, 27, (8, 64), generator=torch.Generator().manual_seed(0))
    for name, gradients in (("plain", False), ("gradients", True)):
        quiet(tiny.llama(heads=8, kv_heads=8), [rows], gradients=gradients).save(folder / f"{name}.calibration")
    (folder / "text.txt").write_text(TEXT)
    return folder


def plan(folder: Path, *arguments: str) -> tuple[int, str]:
    return run("plan", "--model", str(folder), "--dtype", "fp32", *arguments)


def test_a_plan_is_written_and_serves_its_model(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    code, text = plan(folder, str(target), "--ratio", "0.2", "--calibration", str(folder / "plain.calibration"))
    assert code == 0, text
    assert "p.json" in text and "p.safetensors" in text and "share of energy" in text
    model = tiny.llama(heads=8, kv_heads=8)
    known = lorc_fx.Calibration.load(folder / "plain.calibration")
    ids = torch.arange(1, 17)[None]
    want = lorc_fx.make_plan(model, ids, options={"ratio": 0.2, "calibration": known})
    assert Plan.load(target) == want and want.bytes_per_token <= 0.2 * want.bytes_per_token_dense
    model.compile(backend="lorc", options={"plan": target, "inner": "eager"})
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert lorc_fx.cache_nbytes(cache, used=True) == 16 * want.bytes_per_token


def test_a_sweep_is_a_table_a_plot_and_json(folder: Path, tmp_path: Path) -> None:
    """With gradients everything is in nats; measured is what the same codecs do to the text."""
    given = ["--calibration", str(folder / "gradients.calibration"), "--text", str(folder / "text.txt"), "--measure"]
    given += ["--sweep", "0.12,0.3", "--plot", str(tmp_path / "loss.png"), "--json", str(tmp_path / "f.json")]
    code, text = plan(folder, *given)
    assert code == 0, text
    found = json.loads((tmp_path / "f.json").read_text())
    many, few = found["points"]
    assert found["nats"] and many["bytes_per_token"] > few["bytes_per_token"] and many["predicted"] < few["predicted"]
    assert abs(many["nats"] - found["dense_nats"]) < abs(few["nats"] - found["dense_nats"])
    assert found["tokens"] == len(TEXT) - 1
    assert "nats per token" in text and f"{few['bytes_per_token']:,}" in text
    png, svg = tmp_path / "loss.png", tmp_path / "loss.svg"
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "loss.png", "loss.svg"]


def test_a_sweep_predicts_what_each_plan_says() -> None:
    """One factorisation for all budgets, and the same plans as one by one."""
    model, ratios = tiny.llama(heads=8, kv_heads=8), (0.5, 0.25)
    many = [Options.parse({"ratio": r}) for r in ratios]
    plans = plan_command.planned(model, many)
    for found, ratio in zip(plans, ratios, strict=True):
        assert found == lorc_fx.make_plan(model, torch.arange(1, 17)[None], options={"ratio": ratio})
        assert found.predicted is not None and 0 < found.predicted < len(found.sites)
    assert not plans[0].nats


def test_budgets_of_a_sweep_keep_each_what_they_would_alone(folder: Path) -> None:
    """Where there are bytes some sites are cached as they are, at few none is: in one sweep too."""
    model, ratios = tiny.llama(heads=8, kv_heads=8), (0.3, 0.15)
    known = lorc_fx.Calibration.load(folder / "plain.calibration")
    plans = plan_command.planned(model, [Options.parse({"ratio": r, "calibration": known}) for r in ratios])
    assert [any(not s.projected for s in plan.sites) for plan in plans] == [True, False]
    for found, ratio in zip(plans, ratios, strict=True):
        options = {"ratio": ratio, "calibration": known}
        assert found == lorc_fx.make_plan(model, torch.arange(1, 17)[None], options=options)


def test_predicted_nats_are_half_the_energy() -> None:
    """Second order: dropping a column of energy L in the metric of the gradients costs L / 2 nats per token."""
    site = Columns((3.0, 2.0, 1.0), (MODEL,), 4, 1, 1)
    assert predicted(site, ()) == 6.0
    rows = torch.randint(1, 27, (8, 64), generator=torch.Generator().manual_seed(0))
    model = tiny.llama(heads=8, kv_heads=8)
    known = quiet(tiny.llama(heads=8, kv_heads=8), [rows], gradients=True)
    options = {"ratio": 0.25, "calibration": known, "precision": "model", "scheduler": "uniform"}
    found = lorc_fx.make_plan(model, rows[:1], options=options)
    for line, basis in zip(found.sites, found.bases, strict=True):
        dropped = float(basis.basis.energy[line.rank : line.width].sum()) / 2
        assert line.nats and line.predicted == pytest.approx(dropped, rel=1e-2)


REFUSED = {
    "nothing to do": ([], "nothing to do"),
    "a plot of one plan": (["p.json", "--plot", "x"], "nothing to draw"),
    "a text that is not used": (["p.json", "--text", "t.txt"], "each needs the other"),
    "nothing to measure on": (["p.json", "--measure"], "each needs the other"),
    "two budgets": (["p.json", "--ratio", "0.5", "--bytes-per-token", "64"], "conflict"),
    "a bad ratio": (["--sweep", "0.5,2"], "ratio=2.0"),
    "no ratios": (["--sweep", "half"], "sweep='half'"),
    "a folder that is not there": (["/no/such/folder/p.json"], "a file in a folder that exists"),
    "a scheduler that is not there": (["p.json", "--scheduler", "los"], "Did you mean 'loss'?"),
    "a calibration that is not there": (["p.json", "--calibration", "/no/such"], "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_model_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model was loaded"))
    arguments, words = REFUSED[name]
    code, text = run("plan", *arguments)
    assert code == 2 and words in text and "Traceback" not in text, text


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_plot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model was loaded"))
    code, text = run("plan", "--sweep", "0.5", "--plot", "x")
    assert code == 1 and "pip install 'lorc-fx[plot]'" in text


@pytest.mark.parametrize("name", ["a", "a.png", "a.svg"])
def test_equal_figures_give_equal_files(name: str, tmp_path: Path) -> None:
    """And a loss below the dense model's is drawn too."""
    points = [{"bytes_per_token": b, "predicted": p, "nats": n} for b, p, n in ((64, 0.1, 2.9), (32, 0.5, 3.2))]
    result = {"points": points, "dense_bytes": 128, "dense_nats": 3.0, "tokens": 9, "nats": False}
    first = [p.read_bytes() for p in plan_plot.draw(result, tmp_path / name, "share")]
    assert first == [p.read_bytes() for p in plan_plot.draw(result, tmp_path / name, "share")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]
