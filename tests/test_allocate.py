"""Bytes to bits: exact costs, the budget used and never passed, and no block before a better one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_fx import allocate as planner
from lorc_fx.allocate import DROPPED, Columns, allocate, distortion, least, predicted, row_bytes
from lorc_fx.packing import BITS, MODEL, Format, Segment

LEVELS = {
    "auto": (MODEL, *BITS, DROPPED),
    "no drop": (MODEL, *BITS),
    "int4": (4, DROPPED),
    "model": (MODEL, DROPPED),
}


@st.composite
def sites(draw):
    n = draw(st.integers(1, 80))
    fall = draw(st.floats(0.5, 1.0))
    weight = draw(st.floats(1e-3, 1e3))
    loss = tuple(weight * fall**i for i in range(n))
    levels = LEVELS[draw(st.sampled_from(sorted(LEVELS)))]
    element, choices = draw(st.sampled_from([2, 4])), draw(st.integers(1, 3))
    return Columns(loss, levels, element, choices, draw(st.sampled_from([1, 16])))


def floor_of(group):
    return sum(row_bytes(least(s), s) for s in group)


def cost_of(chosen, site):
    return row_bytes({s.bits: s.columns for s in chosen}, site)


@settings(max_examples=60)
@given(group=st.lists(sites(), min_size=1, max_size=5), extra=st.integers(0, 600))
def test_the_budget_holds_and_costs_are_those_of_the_format(group, extra):
    budget = floor_of(group) + extra
    chosen = allocate(group, budget)
    total = 0
    for segments, site in zip(chosen, group, strict=True):
        dtype = torch.bfloat16 if site.element == 2 else torch.float32
        form = Format(segments, site.choices, dtype)
        stored = form.nbytes
        assert stored == cost_of(segments, site)
        assert 1 <= form.columns <= len(site.loss)
        assert [s.bits for s in segments] == [b for b in (MODEL, *BITS) if b in {s.bits for s in segments}]
        assert DROPPED in site.levels or form.columns == len(site.loss), "a column was dropped that may not be"
        total += stored
    assert total <= budget


@settings(max_examples=40)
@given(site=sites(), extra=st.integers(0, 300), more=st.integers(1, 200))
def test_more_bytes_never_predict_more_loss(site, extra, more):
    base = row_bytes(least(site), site) + extra
    (few,), (many,) = allocate([site], base), allocate([site], base + more)
    assert predicted(site, many) <= predicted(site, few) * (1 + 1e-9)


@settings(max_examples=40)
@given(n=st.integers(1, 200), element=st.sampled_from([2, 4]), budget=st.integers(4, 900))
def test_plain_columns_are_as_many_as_the_bytes_hold(n, element, budget):
    site = Columns(tuple(1.0 / (i + 1) for i in range(n)), LEVELS["model"], element, 1, 1)
    assert allocate([site], budget)[0] == (Segment(min(n, budget // element), MODEL),)


def test_bytes_go_where_they_remove_most_loss():
    loud, quiet = (Columns(tuple(w * 0.9**i for i in range(64)), LEVELS["auto"], 2) for w in (100.0, 1.0))
    first, second = allocate([loud, quiet], 80)
    assert cost_of(first, loud) > cost_of(second, quiet)
    even = [allocate([s], 40)[0] for s in (loud, quiet)]
    together = predicted(loud, first) + predicted(quiet, second)
    assert together < predicted(loud, even[0]) + predicted(quiet, even[1])


def test_no_block_gets_bits_before_a_better_one():
    site = Columns(tuple(0.95**i for i in range(128)), LEVELS["auto"], 2)
    for budget in range(40, 260, 7):
        bits = [b for n, b in allocate([site], budget)[0] for _ in range(n)]
        assert bits == sorted(bits, key=lambda b: -(99 if b == MODEL else b))


@pytest.mark.parametrize("bits", BITS)
def test_distortions_are_measured(bits):
    """The quantiser loses no more than twice what the best scalar quantiser of a Gaussian would (Max, 1960)."""
    best = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006642, 8: 4.6e-5}[bits]
    assert 0.5 * best < distortion(bits) < 2 * best


@pytest.mark.parametrize("name", ["auto", "model"])
def test_the_work_for_a_70b_model_is_bounded(name, monkeypatch):
    """80 layers of keys and values, 1024 columns each. Counted, not timed: no step is priced twice, so the work is that
    of one sorted list, whatever the budget. bench.planner says how long it takes."""
    loss = tuple(0.99**i for i in range(1024))
    block = 16 if name == "auto" else 1
    group = [Columns(loss, LEVELS[name], 2, 2, block) for _ in range(160)]
    rungs = {"auto": len(LEVELS["auto"]) - 1, "model": 1}[name]
    priced = []
    whole = planner.row_bytes
    monkeypatch.setattr(planner, "row_bytes", lambda counts, site: priced.append(1) or whole(counts, site))
    for budget in (160 * 512, 160 * 1024):
        priced.clear()
        chosen = allocate(group, budget)
        assert len(priced) <= 160 * (1024 // block * rungs + 1)
        used = sum(cost_of(c, s) for c, s in zip(chosen, group, strict=True))
        assert budget - 8 < used <= budget
