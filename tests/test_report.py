"""``explain`` and ``make_plan``: what they say is what a compiled run does."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from families import FAMILIES
from hypothesis import strategies as st

import lorc_fx
from helpers import cache_name, compiled, latents, new_cache, prompt
from lorc_fx.errors import QualityWarning, StrictMiss
from lorc_fx.packing import MODEL, Segment
from lorc_fx.passes.cost import Device, seconds
from lorc_fx.records import Plan
from lorc_fx.report import Report, SiteReport

pytestmark = pytest.mark.usefixtures("clean")
HALF = {"ratio": 0.5, "inner": "eager", "calibration": "none"}


def build(name: str) -> Any:
    return FAMILIES[name].build(layers=FAMILIES[name].fewest)


def call(model: Any, tokens: int = 5) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (prompt(2, tokens)[0],), {cache_name(model): new_cache(model), "use_cache": True}


def ran(model: Any, **options: Any) -> Any:
    """The cache of one prefill of the compiled model."""
    compiled(model, **options)
    args, kwargs = call(model)
    with torch.no_grad():
        model(*args, **kwargs)
    return kwargs[cache_name(model)]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
def test_fields_and_bytes_are_those_of_a_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(name)
    args, kwargs = call(model)
    report = lorc_fx.explain(model, *args, options=HALF, **kwargs)
    assert not latents_in(kwargs[cache_name(model)]), "explain runs the model dense"
    cache = ran(model, ratio=0.5)
    sites = {(s.layer, s.kind): s for s in report.sites}
    found = {(i, k): x for i, pair in enumerate(latents(cache)) for k, x in zip(("key", "value"), pair, strict=True)}
    assert sites.keys() == found.keys() and not report.misses
    for at, latent in found.items():
        site, codec = sites[at], latent.codec
        assert (site.rank, site.width, site.codec_bytes) == (codec.rank, codec.width, codec.nbytes())
        assert site.bytes * 2 * latent.length == latent.used_nbytes()
        assert site.dense_bytes == codec.width * 4 and 0 < site.energy <= 1
        assert site.sigma_max >= site.sigma_min > 0 and site.cond == pytest.approx(site.sigma_max / site.sigma_min)
        assert ("rotary" in site.epilogue) == (latent.positions is not None)
        assert site.lowering == "decoding" or latent.positions is None
    assert report.codec_bytes == sum(s.codec_bytes for s in report.sites)
    assert report.bytes_per_token <= report.bytes_per_token_dense // 2
    used = lorc_fx.cache_nbytes([list(pair) for pair in latents(cache)], used=True)
    assert used == sum(s.bytes * 2 * found[s.layer, s.kind].length for s in report.sites)
    printed = capsys.readouterr().out
    assert f"{len(sites)} sites, 0 misses" in printed and f"{report.bytes_per_token} bytes per token" in printed


def latents_in(cache: Any) -> list[Any]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values) if isinstance(x, lorc_fx.LatentKV)]


class Cumulative(torch.nn.Module):
    """Values of one layer pass through something that mixes tokens: a miss."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        k, v = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in (self.k(x), self.v(x).cumsum(1)))
        return torch.nn.functional.scaled_dot_product_attention(k, k, v), torch.cat([k[:, :, :0], k], 2), v


def test_misses_are_listed_and_strict_refuses_them() -> None:
    model, x = Cumulative(), torch.randn(2, 5, 8)
    report = lorc_fx.explain(model, x, options=HALF)
    assert len(report.misses) == 1 and "cumsum" in report.misses[0].reason
    assert "".join(f"miss: {report.misses[0]}".split()) in "".join(str(report).split())  # lines are broken anywhere
    with pytest.raises(StrictMiss, match="cumsum"):
        lorc_fx.explain(model, x, options={**HALF, "strict": True})


def test_a_model_without_a_cache() -> None:
    report = lorc_fx.explain(torch.nn.Linear(4, 4), torch.randn(2, 4))
    assert report.sites == () and report.plan is None and "No cached key or value" in str(report)


def test_what_waits_for_a_prompt_says_so() -> None:
    model = build("llama-gqa")
    args, kwargs = call(model)
    for given, waits in (({}, True), ({"calibration": "none"}, False)):
        report = lorc_fx.explain(model, *args, options={"ratio": 0.5, **given}, **kwargs)
        assert report.waiting == waits == ("the first prompt of 256 tokens" in " ".join(str(report).split()))


def test_a_saved_plan_gives_the_same_ranks(tmp_path: Path) -> None:
    model = build("llama-gqa")
    args, kwargs = call(model)
    plan = lorc_fx.make_plan(model, *args, options=HALF, **kwargs)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.bytes_per_token <= plan.bytes_per_token_dense // 2
    for given in ({"ratio": 0.5}, {"plan": plan}, {"plan": str(tmp_path / "plan.json")}):
        cache = ran(copy.deepcopy(model), **given)
        both = enumerate(latents(cache))
        ranks = {(i, k): x.codec.rank for i, pair in both for k, x in zip(("key", "value"), pair, strict=True)}
        assert ranks == plan.ranks, given


def test_a_plan_that_loses_much_is_said() -> None:
    """Below 99 % of a projection's energy, as any random model is at half the bytes; at full rank nothing is said."""
    with pytest.warns(QualityWarning, match="energy.*raise `ratio`") as caught:
        ran(build("gpt2"), ratio=0.5)
    assert len([w for w in caught if w.category is QualityWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", QualityWarning)
        ran(build("gpt2"), ratio=1.0)


def line(saved: int, window: int | None, codec: int) -> SiteReport:
    """A site that saves so many of its 100 bytes per token."""
    segments = (Segment(8, MODEL),)
    known = ("", 1.0, 1.0, 1.0, 1.0, 100 - saved, 100, window, "decoding", codec)
    return SiteReport(0, "key", 8, 8, segments, *known, 100 - saved, 8, 1, 8, 4)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    st.lists(
        st.builds(line, st.integers(-20, 99), st.sampled_from([None, None, 3, 8, 20]), st.integers(0, 700)), max_size=4
    )
)
def test_the_length_at_which_codecs_are_paid_for(sites: list[SiteReport]) -> None:
    """Against counting: the first length that saves what the codecs hold, windows and losses included."""

    def saved(length: int) -> int:
        return sum((s.dense_bytes - s.bytes) * min(length, s.window or length) for s in sites)

    report = Report(tuple(sites), (), None)
    first = next((t for t in range(6000) if saved(t) >= report.codec_bytes), None)
    assert report.break_even == first


def test_the_length_is_printed() -> None:
    assert "codecs hold 701 bytes, paid for after 11 tokens" in str(Report((line(70, None, 701),), (), None))
    never = str(Report((line(70, 4, 701), line(-1, None, 0)), (), None))
    assert "codecs hold 701 bytes, paid for at no length" in " ".join(never.split())


ALL = ("joint", "grouped", "identity")


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"ratio": 0.45}, {"key": "identity", "value": "joint"}),
        ({"ratio": 0.19}, {"key": "grouped", "value": "joint"}),
        ({"ratio": 0.19, "objective": "bytes"}, {"key": "joint", "value": "joint"}),
        ({"ratio": 0.45, "basis": "grouped"}, {"key": "grouped", "value": "grouped"}),
    ],
)
def test_what_other_bases_would_cost(given: dict[str, Any], chosen: dict[str, str], capsys: Any) -> None:
    """Of each site at its own bytes: the chosen one costs what the plan says, in loss and in time."""
    model = build("llama-gqa")
    args, kwargs = call(model)
    options = {"calibration": "none", "precision": "auto", "scheduler": "uniform", **given}
    report = lorc_fx.explain(model, *args, options=options, **kwargs)
    assert "at the same bytes: loss (share of energy), us a step at least" in capsys.readouterr().out
    device = Device("a device", 1.0, 1.0, "made up", fused=False)
    for site in report.sites:
        assert site.basis == chosen[site.kind]
        assert tuple(o.basis for o in site.others) == ALL
        (own,) = (o for o in site.others if o.basis == site.basis)
        assert own.loss == pytest.approx(site.predicted)
        assert own.lowering == site.lowering
        assert seconds(own.lowering, device, **site.sizes(100, 3, own)) == seconds(
            site.lowering, device, **site.sizes(100, 3)
        )
        assert all(o.row_bytes <= site.row_bytes + (4 if site.kind == "key" else 0) for o in site.others)
        joint, grouped, _ = site.others
        assert joint.loss <= grouped.loss * 1.0001, "no basis of groups holds more than a joint one"
    costs = report.json()["sites"][0]["others"]
    assert [c["basis"] for c in costs] == list(ALL) and all(c["seconds"] > 0 for c in costs)


def test_a_basis_that_cannot_have_so_few_bytes_is_said() -> None:
    """Without statistics no column has less than 4 bits, and identity cannot drop any. A plan has no alternatives."""
    model = build("llama-gqa")
    args, kwargs = call(model)
    paper = {**lorc_fx.PAPER, "ratio": 0.5}
    report = lorc_fx.explain(model, *args, options=paper, **kwargs)
    assert all({o.basis for o in s.others} == {"joint", "grouped"} for s in report.sites)
    assert str(report).count("too few bytes") == len(report.sites)
    args, kwargs = call(model)
    again = lorc_fx.explain(model, *args, options={"plan": report.plan}, **kwargs)
    assert not any(s.others for s in again.sites)
