"""``bench.predicted``: plans of all sorts, and their measured loss beside the predicted one."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from calibrating import quiet

from bench import predicted, table
from bench.predicted import Setting
from bench.scoring import Reference

pytestmark = pytest.mark.usefixtures("clean")


def test_plans_for_16_bits_are_measured_in_fp32() -> None:
    """More bytes, less of both losses; with all of them, none. A squeezed site gets less than its neighbour."""
    model = tiny.llama(heads=8, kv_heads=8)
    for weight in model.parameters():  # as they are drawn, next tokens hardly depend on the cache
        weight.data.mul_(8 if weight.ndim == 2 else 1)
    text = torch.randint(1, 27, (8, 64), generator=torch.Generator().manual_seed(0))
    settings = [Setting(1.0), Setting(0.1), Setting(0.3, "deep squeezed"), Setting(0.5, basis="identity")]
    made = predicted.plans(copy.deepcopy(model).bfloat16(), settings, quiet(model, text, gradients=True))
    reference = Reference(model, list(text[:2]))
    whole, tenth = (predicted.measure(model, reference, s, p) for s, p in zip(settings[:2], made[:2], strict=True))
    assert whole["predicted"] < 1e-3 * tenth["predicted"]
    assert abs(whole["divergence"]) < 1e-4 * tenth["divergence"] and tenth["divergence"] > 1e-3
    assert tenth["bytes"] <= 0.1 * 2 * 4 * 64 and tenth["of_dense"] <= 0.1  # 2 bytes per number
    assert [{s.projected for s in plan.sites} for plan in made[2:]] == [{True}, {False}]
    low, high = ([s.bytes / s.dense_bytes for s in made[2].sites if s.layer == n] for n in range(2))
    assert max(high) < 0.6 * min(low)


def rows() -> list[dict]:
    """What ``measure`` might give for eight plans, one of them out of order."""
    made = []
    for i in range(8):
        error = {"added_error": 0.001, "divergence_error": 0.0005, "nats": 3.0}
        size = {"ratio": 0.25 if i < 6 else 0.5, "bytes": 100 + i, "of_dense": 0.25}
        about = {"scheduler": "uniform", "precision": "auto", "basis": ["identity", "joint"] if i else "joint"}
        loss = 0.01 * 2**i
        made.append({**size, **about, **error, "predicted": loss, "divergence": loss, "added": loss * (-1) ** (i == 0)})
    made[0]["predicted"], made[1]["predicted"] = made[1]["predicted"], made[0]["predicted"]
    return made


def test_correlations_are_over_all_and_over_single_ratios() -> None:
    everything, quarter = predicted.correlations(rows())
    assert (everything["plans"], everything["count"]) == ("all", 8)
    assert (quarter["plans"], quarter["count"]) == ("0.25", 6)  # two plans at 0.5 are not enough
    assert quarter["divergence"] == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert everything["divergence"] == pytest.approx(1 - 6 * 2 / (8 * 63))
    assert everything["bytes_divergence"] == pytest.approx(-1)


def test_every_plan_is_in_the_tables_and_the_figure(tmp_path) -> None:
    result = {"rows": rows(), "correlations": predicted.correlations(rows())}
    assert "| ratio 0.25 | 6 |" in table.predicted(result)
    assert table.calibration_curve(result).count("\n") == 1 + 8
    predicted.draw(result, tmp_path / "predicted.svg")
    text = (tmp_path / "predicted.svg").read_text()
    assert "<svg" in text and "measured KL divergence" in text


def test_settings_differ_and_two_ratios_have_enough() -> None:
    assert len(set(predicted.SETTINGS)) == len(predicted.SETTINGS) >= 30
    counts = [sum(s.ratio == ratio for s in predicted.SETTINGS) for ratio in (0.25, 0.15)]
    assert min(counts) >= predicted.ENOUGH
