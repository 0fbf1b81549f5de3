"""``bench.premise`` with its scores and correlations: what is coded, what is measured, how it is compared."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from calibrating import quiet

import lorc_fx
from bench import premise, table
from bench.ablation import Bench
from bench.correlation import ranks, spearman
from bench.quality import Text
from bench.scoring import Reference, compared, known
from lorc_fx.calibration import SiteStatistics
from lorc_fx.codec import model_segments, prior_basis
from lorc_fx.evaluate import compressed
from lorc_fx.factors import factorise

pytestmark = pytest.mark.usefixtures("clean")
ROW = torch.randint(1, 27, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def layers() -> premise.Layers:
    model = tiny.llama(heads=8, kv_heads=4)
    for weight in model.parameters():  # as they are drawn, attention hardly depends on the keys
        weight.data.mul_(8 if weight.ndim == 2 else 1)
    rows = torch.randint(1, 27, (4, 64), generator=torch.Generator().manual_seed(0))
    return premise.Layers(Bench(model, Text([ROW], list(rows))), quiet(model, rows, gradients=True))


def test_spearman_is_that_of_ranks() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), without ties
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="no pairs"):
        spearman([1, 2], [1])


def test_divergence_and_losses_are_torchs() -> None:
    exact, coded = torch.randn(2, 700, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(700) % 5
    before, after, divergence = compared(exact, coded, targets)
    wanted = torch.nn.functional.kl_div(coded.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence.float(), wanted.sum(-1), rtol=1e-4, atol=1e-5)
    for found, logits in ((before, exact), (after, coded)):
        want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(found.float(), want)


def test_a_model_is_no_distance_from_itself(layers: premise.Layers) -> None:
    model = layers.bench.model
    reference = Reference(model, [ROW, ROW[:20]])
    scores = reference.scores(model)
    assert reference.tokens == 58 and scores.nats == pytest.approx(reference.nats)
    assert scores.added == scores.divergence == scores.divergence_error == 0
    assert layers.bench.loss({}) == (pytest.approx(Reference(model, [ROW]).nats), 0)


@pytest.mark.parametrize("part", premise.PARTS)
def test_coding_a_part_is_truncating_its_weights(layers: premise.Layers, part: str) -> None:
    """... to LoRC's rank, and nothing else in the model."""
    model = layers.bench.model
    found = premise.measure(layers, Reference(model, [ROW]), 1, part)
    other = copy.deepcopy(model)
    for kind in premise.PARTS[part]:
        module = getattr(other.model.layers[1].self_attn, f"{kind[0]}_proj")
        u, sigma, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        module.weight.data = (u[:, :16] * sigma[:16]) @ v[:16]
    wanted = Reference(model, [ROW]).scores(other)
    assert found["ranks"] == [16] * len(premise.PARTS[part]) and wanted.divergence > 1e-6
    assert found["divergence"] == pytest.approx(wanted.divergence, rel=1e-2)
    assert found["added"] == pytest.approx(wanted.added, rel=1e-2, abs=1e-6)
    assert Reference(model, [ROW]).scores(model).divergence == 0  # the hooks are gone


def test_the_compiled_cache_of_such_a_plan_is_as_far(layers: premise.Layers) -> None:
    model, options = layers.bench.model, dict(lorc_fx.PAPER)
    whole = lorc_fx.make_plan(model, ROW[None], options={**options, "ratio": 1.0}, use_cache=True)
    chosen = [replace(s, segments=model_segments(16)) if s.layer == 0 else s for s in whole.sites]
    reference = Reference(model, [ROW])
    with compressed(model, {**options, "plan": replace(whole, sites=tuple(chosen)), "inner": "eager"}):
        wanted = reference.scores(model)
    found = premise.measure(layers, reference, 0, "both")
    assert found["divergence"] == pytest.approx(wanted.divergence, rel=1e-2)


def test_predictors_are_what_they_are_called(layers: premise.Layers) -> None:
    below, above = (layers.predictors(n, ("key", "value")) for n in range(2))
    assert set(below) == set(premise.PREDICTORS) and (below["depth"], above["depth"]) == (1, 0)
    for n, row in enumerate((below, above)):
        key, value = (torch.linalg.svdvals(layers.bench.weight((n, kind))) for kind in ("key", "value"))
        assert row["kappa"] == pytest.approx(float(key[0] / key[-1] * value[0] / value[-1]))
        assert row["next_singular"] == pytest.approx(float(key[16] + value[16]))
        shares = [float((s[16:] ** 2).sum() / (s**2).sum()) for s in (key, value)]
        assert row["dropped_energy"] == pytest.approx(sum(shares))
    logs = torch.tensor([below["kappa"], above["kappa"]], dtype=torch.float64).log()
    assert [below["cumulative"], above["cumulative"]] == pytest.approx([float(logs.sum()), float(logs[1])])


def test_second_order_loss_is_the_mean_over_tokens() -> None:
    """tr(G E[e e^T]) / 2, e by hand."""
    y, g = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = prior_basis(factorise(torch.randn(6, 9, generator=torch.Generator().manual_seed(1)), "w"), torch.ones(6))
    zero = torch.zeros(6, dtype=torch.float64)
    site = SiteStatistics(0, "key", zero, 50, y.sum(0), (y.T @ y)[None], 0, zero, 0.0, 50, (g.T @ g)[None])
    columns = basis.analysis[:, :4]
    e = (y - 1) - (y - 1) @ columns @ columns.T
    wanted = ((e @ g.T) ** 2).mean() / 2
    assert premise.second_order(site, basis, 4) == pytest.approx(float(wanted))
    assert premise.second_order(site, basis, 6) == pytest.approx(0, abs=1e-9)


def test_a_study_has_a_row_for_each_part_and_a_table(layers: premise.Layers, tmp_path) -> None:
    bench = layers.bench
    calibration = known(bench.model, bench.text.calibration, tmp_path, "tiny")
    assert known(bench.model, bench.text.calibration, tmp_path, "tiny") == calibration  # read, not sampled anew
    found = premise.study(bench.model, bench.text, calibration)
    assert [(r["layer"], r["part"]) for r in found["rows"]] == [(n, p) for n in range(2) for p in premise.PARTS]
    rho = {(c["part"], c["measure"], c["predictor"]): c["spearman"] for c in found["correlations"]}
    for part in premise.PARTS:  # no condition number is below 1, so the cumulative one always falls
        assert rho[part, "divergence", "cumulative"] == rho[part, "divergence", "depth"]
    text = table.premise({"models": {"tiny": found}})
    assert "tiny, 2 layers: both" in text and premise.PREDICTORS["kappa"] in text
