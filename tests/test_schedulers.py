"""Schedulers: the published ranks, and what holds for every budget."""

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorc_fx import errors, formulas
from lorc_fx.schedulers import progressive_ranks
from scheduling import NAMES, model, run, site

DATA = Path(__file__).parent / "data"


def least(sites):
    return sum(s.fixed_bytes + s.column_bytes for s in sites)


def most(sites):
    return sum(s.fixed_bytes + s.column_bytes * s.width for s in sites)


conds = st.floats(1.0, 1e9) | st.just(math.inf)


@st.composite
def any_sites(draw):
    sites = []
    for layer in range(draw(st.integers(1, 6))):
        for kind in draw(st.sampled_from([("key", "value"), ("key", "value"), ("key",), ("value",)])):
            width = draw(st.sampled_from([1, 2, 7, 16, 63]))
            spectrum = draw(st.lists(st.floats(0, 1e6), min_size=width, max_size=width))
            one = (draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([0, 0, 4, 5])), draw(conds))
            sites.append(site(layer, kind, width, *one, spectrum=sorted(spectrum, reverse=True)))
    return sites


@st.composite
def equal_widths(draw):
    width = draw(st.sampled_from([7, 16, 64]))
    return model(
        width=width, layers=(n := draw(st.integers(1, 7))), conds=draw(st.lists(conds, min_size=n, max_size=n))
    )


# ------------------------------------------------------------------------------------------- the published figures


def test_published_ranks_of_llama3_8b():
    with open(DATA / "llama3_8b_condition_numbers.csv") as file:
        rows = list(csv.DictReader(file))
    want = [int(word) for word in (DATA / "llama3_8b_ranks_min128.txt").read_text().split()]
    cond_k, cond_v = ([float(row[name]) for row in rows] for name in ("cond_k", "cond_v"))
    got = progressive_ranks(cond_k, cond_v, d_min=128, d_max=1024)
    assert len(got) == len(want) == 32
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1
    assert got[0] == 1024 and got[-1] == 128

    sites = [site(i, k, 1024, cond=c) for i in range(32) for k, c in (("key", cond_k[i]), ("value", cond_v[i]))]
    assert run("progressive", sites, most(sites), d_min=128, d_max=1024) == [d for d in got for _ in range(2)]


# ---------------------------------------------------------------------------------------------------- every budget


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(sites=any_sites(), part=st.integers(0, 1000))
def test_exact_bounded_and_within_one_column(name, sites, part):
    budget = least(sites) + (most(sites) - least(sites)) * part // 1000
    ranks = run(name, sites, budget)
    used = sum(s.fixed_bytes + s.column_bytes * k for s, k in zip(sites, ranks, strict=True))
    assert used <= budget
    assert all(1 <= k <= s.width for s, k in zip(sites, ranks, strict=True))
    open_columns = [s.column_bytes for s, k in zip(sites, ranks, strict=True) if k < s.width]
    assert budget - used < min(open_columns, default=math.inf)
    assert ranks == run(name, sites, budget), "the same again"
    if part == 1000:
        assert ranks == [s.width for s in sites]


@settings(max_examples=150)
@given(sites=equal_widths(), part=st.integers(0, 1000))
def test_progressive_falls_with_depth_and_pairs_share(sites, part):
    budget = least(sites) + (most(sites) - least(sites)) * part // 1000
    ranks = run("progressive", sites, budget)
    keys, values = ranks[::2], ranks[1::2]
    assert keys == sorted(keys, reverse=True) and values == sorted(values, reverse=True)
    assert sum(abs(k - v) for k, v in zip(keys, values, strict=True)) <= 1, "only the last column may stand alone"


@settings(max_examples=100)
@given(sites=equal_widths(), part=st.integers(0, 1000), knobs=st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_knobs_given_win_or_are_refused(sites, part, knobs):
    budget = least(sites) + (most(sites) - least(sites)) * part // 1000
    width, (low, high) = sites[0].width, sorted(knobs)
    for given_knobs in ({"d_min": low}, {"d_max": high}, {"d_min": low, "d_max": high}):
        try:
            ranks = run("progressive", sites, budget, **given_knobs)
        except errors.KnobsDoNotFit as error:
            assert error.needed > budget and error.knobs == given_knobs
            continue
        assert min(ranks) >= min(given_knobs.get("d_min", 1), width)
        assert max(ranks) <= min(given_knobs.get("d_max", width), width)


@settings(max_examples=100)
@given(st.lists(st.tuples(conds, conds), max_size=40), st.integers(1, 128), st.integers(0, 1024))
def test_progressive_ranks_monotone_and_bounded(pairs, d_min, more):
    ranks = progressive_ranks([k for k, _ in pairs], [v for _, v in pairs], d_min=d_min, d_max=d_min + more)
    assert len(ranks) == len(pairs) and ranks == sorted(ranks, reverse=True)
    assert all(d_min <= rank <= d_min + more for rank in ranks)
    if ranks:
        assert ranks[0] == d_min + more


# --------------------------------------------------------------------------------------------------- progressive


def test_solving_lowers_d_min_first_then_d_max():
    sites = model(layers=5, width=65)
    assert run("progressive", sites, most(sites)) == [65] * 10
    assert run("progressive", sites, 2 * 2 * (65 + 57 + 49 + 41 + 33))[::2] == [65, 57, 49, 41, 33]
    assert run("progressive", sites, 2 * 2 * (65 + 49 + 33 + 17 + 1))[::2] == [65, 49, 33, 17, 1]
    assert run("progressive", sites, 2 * 2 * (33 + 25 + 17 + 9 + 1))[::2] == [33, 25, 17, 9, 1]
    assert run("progressive", sites, least(sites)) == [1] * 10


def test_both_knobs_leave_the_rest_unspent():
    sites = model(layers=3, width=16)
    assert run("progressive", sites, most(sites), d_min=2, d_max=6) == [6, 6, 4, 4, 2, 2]


def test_d_max_alone_caps_and_d_min_alone_floors():
    sites = model(layers=3, width=16)
    assert run("progressive", sites, most(sites), d_max=5) == [5] * 6
    assert run("progressive", sites, 2 * 6 * 4, d_min=4) == [4] * 6
    assert run("progressive", sites, 2 * 2 * (8 + 6 + 4), d_min=4) == [8, 8, 6, 6, 4, 4]


def test_protected_layers_are_full():
    sites = model(layers=4, width=8)
    ranks = run("progressive", sites, 2 * 2 * (8 + 3 + 3 + 8), protect_first=1, protect_last=1)
    assert ranks[:2] == [8, 8] and ranks[-2:] == [8, 8] and sum(ranks) == 44
    assert run("progressive", sites, most(sites), protect_first=9) == [8] * 8


@pytest.mark.parametrize(
    ("knobs", "budget", "needed", "words"),
    [
        ({"d_min": 4}, 40, 48, "d_min=3"),
        ({"d_max": 9}, 40, 60, "d_max=6"),
        ({"d_min": 2, "d_max": 9}, 60, 64, "d_min=2 with d_max=8 or d_min=1 with d_max=9"),
        ({"protect_first": 2}, 40, 132, "fewer protected layers"),
    ],
    ids=str,
)
def test_knobs_that_do_not_fit(knobs, budget, needed, words):
    sites = model(layers=3, width=16)
    with pytest.raises(errors.KnobsDoNotFit, match=words) as caught:
        run("progressive", sites, budget, **knobs)
    assert caught.value.needed == needed and caught.value.budget == budget


@pytest.mark.parametrize(
    ("cond_k", "cond_v", "knobs", "words"),
    [
        ([2.0], [2.0, 2.0], {}, "one per layer"),
        ([math.nan], [2.0], {}, "cond_k"),
        ([2.0], [0.5], {}, "cond_v"),
        ([2.0], [2.0], {"d_min": 9}, "at most d_max"),
        ([2.0], [2.0], {"d_min": 0}, "d_min"),
        ([2.0], [2.0], {"d_max": 8.0}, "d_max"),
    ],
    ids=str,
)
def test_progressive_ranks_refuses(cond_k, cond_v, knobs, words):
    with pytest.raises(errors.BadOption, match=words):
        progressive_ranks(cond_k, cond_v, **{"d_min": 1, "d_max": 8} | knobs)


def test_the_ends_are_exact():
    pair = progressive_ranks([71.0, math.inf], [73.25, math.inf], d_min=1, d_max=492)
    assert pair == [492, 1], "found by hypothesis: 491 * a / a is not 491 in floats"


def test_equal_and_infinite_condition_numbers():
    assert progressive_ranks([1.0] * 3, [1.0] * 3, d_min=2, d_max=9) == [9, 9, 9]
    assert progressive_ranks([5.0], [7.0], d_min=2, d_max=9) == [9]
    assert progressive_ranks([], [], d_min=2, d_max=9) == []
    assert progressive_ranks([math.inf] * 3, [1.0] * 3, d_min=1, d_max=5) == [5, 3, 1]
    assert progressive_ranks([1e30] * 3, [1.0] * 3, d_min=1, d_max=5) == [5, 3, 1]
    with pytest.raises(errors.BadOption, match="cond"):
        run("progressive", model(layers=2, conds=[2.0, math.nan]), 32)


def test_layers_without_a_partner_and_in_any_order():
    sites = [site(3, "value", 8), site(0, "key", 8), site(3, "key", 4), site(7, "key", 8)]
    ranks = run("progressive", sites, 2 * 20)
    assert sum(ranks) == 20 and ranks[1] == 8 and ranks[3] <= ranks[0] and ranks[2] <= 4


# ---------------------------------------------------------------------------------------------- uniform and energy


def test_uniform_gives_every_site_the_same_fraction():
    sites = [site(0, width=64), site(0, "value", width=32), site(1, width=16, column=4)]
    assert run("uniform", sites, (128 + 64 + 64) // 2) == [32, 16, 8]
    ranks = run("uniform", [site(i, width=7) for i in range(3)], 2 * 8)
    assert ranks == [3, 3, 2], "the remainder goes to the first of equals"


def test_uniform_counts_positions():
    sites = [site(0, width=8, fixed=4), site(0, "value", width=8, fixed=0)]
    assert run("uniform", sites, 16) == [2, 4]


def test_energy_takes_the_largest_shares_first():
    flat, steep = site(0, width=4, spectrum=[1, 1, 1, 1]), site(1, width=4, spectrum=[100, 1, 1, 0])
    assert run("energy", [flat, steep], 2 * 5) == [4, 1]
    scaled = site(0, width=4, spectrum=[1e-9] * 4)
    assert run("energy", [scaled, steep], 2 * 5) == [4, 1], "energies are relative to the site"
    zero = site(2, width=4, spectrum=[0] * 4)
    assert run("energy", [zero, flat], 2 * 5) == [1, 4]
    assert run("energy", [zero, zero], 2 * 5) == [3, 2]


@pytest.mark.parametrize("spectrum", [[1, 1, 1], [1, math.nan], [1, math.inf], [1, -1]], ids=str)
def test_energy_refuses_a_bad_spectrum(spectrum):
    with pytest.raises(errors.BadOption, match="spectrum"):
        run("energy", [site(0, width=2, spectrum=spectrum)], 2)


def test_the_knobs_of_a_70b_model_are_solved_by_bisection(monkeypatch):
    """80 layers, 1024 columns: the formula runs some twenty times per layer, not once per knob (counted, not timed)."""
    sites = model(layers=80, width=1024, conds=[1.5 + i % 7 for i in range(80)])
    asked, whole = [], formulas.rank
    monkeypatch.setattr(formulas, "rank", lambda *given: asked.append(1) or whole(*given))
    ranks = run("progressive", sites, budget := 160 * 700)
    assert sum(2 * r for r in ranks) > budget - 2 and len(set(ranks)) > 20
    assert len(asked) <= 80 * (2 * math.ceil(math.log2(1024)) + 4)
