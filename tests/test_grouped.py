"""Bases by groups of heads (basis "grouped"): each has columns of its own, and is read from these alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import coded_cache, coded_oracle, groups_of, oracle, ranks_of

import lorc_fx
from helpers import (
    assert_close,
    assert_tokens,
    cache_name,
    compiled,
    error,
    generate,
    latents,
    new_cache,
    piecewise,
    prompt,
    some,
)
from lorc_fx import errors
from lorc_fx.codec import Basis, make_codec, through
from lorc_fx.groups import by_place, head_groups, in_rows, own_bases, split
from lorc_fx.kernels import attend, reference, tiled
from lorc_fx.options import Options
from lorc_fx.packing import Segment
from lorc_fx.passes import attention, cost
from lorc_fx.report import examined

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")

TOKENS = 12
GROUPED = {"basis": "grouped", "calibration": "none", "scheduler": "uniform"}
MIXED = {**GROUPED, "precision": "auto", "scheduler": "energy"}
#: rotary and not, biases, fused projections, grouped queries
FEW = ("llama-bias", "llama-gqa", "gpt2", "gpt-neox", "falcon-gqa", "bloom", "qwen3")


@pytest.mark.parametrize(
    ("name", "kind"),
    some(
        [(name, kind) for name in FEW for kind in ("dynamic", "static")],
        [("llama-gqa", "dynamic"), ("gpt2", "static"), ("falcon-gqa", "dynamic"), ("bloom", "dynamic")],
    ),
)
def test_each_group_keeps_its_own_singular_vectors(name, kind):
    family = FAMILIES[name]
    model = family.build()
    plain, truth = copy.deepcopy(model), copy.deepcopy(model)
    ids, cache = prompt(2, TOKENS)[0], new_cache(model, kind, TOKENS)
    got = piecewise(compiled(model, **GROUPED, ratio=0.5), ids, cache, [7, 8, TOKENS])
    groups = groups_of(cache)
    assert any(count > 1 for pair in groups for count in pair), "no site has several heads: this test shows nothing"
    alone = oracle(family, truth, ranks_of(cache), groups)
    want = piecewise(alone, ids, new_cache(model, kind, TOKENS), [TOKENS])
    assert_close(f"{name}, logits", got, want, 1e-4)
    dense = piecewise(plain, ids, new_cache(model, kind, TOKENS), [TOKENS])
    assert error(want, dense) > 1e-2, "the ranks take nothing away: this test shows nothing"


@pytest.mark.parametrize("name", some(["llama-gqa", "gpt2", "gpt-neox", "gemma3"], ["llama-gqa", "gpt2"]))
def test_rounded_it_is_the_oracle(name):
    family = FAMILIES[name]
    model = family.build(layers=2)
    truth = copy.deepcopy(model)
    ids, cache = prompt(2, TOKENS)[0], new_cache(model)
    got = piecewise(compiled(model, **MIXED, ratio=0.3), ids, cache, [5, 11, TOKENS])
    pairs = latents(cache)
    want = piecewise(coded_oracle(family, truth, pairs), ids, coded_cache(truth, pairs), [TOKENS])
    assert_close("logits", got, want, 2e-3)  # a rounding at 1e-7 may turn one level over


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_with_statistics(name):
    """The first prompt gives each group the eigenvectors of its own covariance; then the model is one function."""
    family = FAMILIES[name]
    model = family.build(layers=2)
    truth = copy.deepcopy(model)
    compiled(model, basis="grouped", ratio=0.13, calibration="first-prompt")
    ids = prompt(2, 160)[0]
    piecewise(model, ids, new_cache(model), [160])
    cache = new_cache(model)
    got = piecewise(model, ids, cache, [100, 159, 160])
    pairs = latents(cache)
    codecs = [x.codec for pair in pairs for x in pair]
    assert {c.groups for c in codecs} == {2 if name == "llama-gqa" else 4}
    assert any(len(c.format.segments) > 1 for c in codecs), "one segment: its order shows nothing"
    want = piecewise(coded_oracle(family, truth, pairs), ids, coded_cache(truth, pairs), [160])
    assert_close("logits", got, want, 5e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-gqa"])
def test_lossless_at_full_rank(name):
    model = FAMILIES[name].build(layers=2)
    truth = copy.deepcopy(model)
    got = generate(compiled(model, **GROUPED, ratio=1.0, precision="model"), *prompt())
    want = generate(truth, *prompt())
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert_tokens("tokens", got.sequences, want.sequences)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_a_group_of_all_heads_is_joint(size):
    """gpt2: four heads."""
    model = FAMILIES["gpt2"].build(layers=2)
    other, ids = copy.deepcopy(model), prompt(2, TOKENS)[0]
    cache = new_cache(model)
    got = piecewise(compiled(model, **GROUPED, group_size=size, ratio=0.5), ids, cache, [7, TOKENS])
    joint = {**GROUPED, "basis": "joint"}
    want = piecewise(compiled(other, **joint, ratio=0.5), ids, new_cache(other), [7, TOKENS])
    groups = {x.codec.groups for pair in latents(cache) for x in pair}
    assert groups == {2 if size == 2 else 1}
    assert (error(got, want) < 1e-5) == (size > 2)


@pytest.mark.parametrize(
    ("name", "kind"), some([("llama-gqa", "dynamic"), ("gpt2", "static")], [("llama-gqa", "dynamic")])
)
def test_under_inductor(name, kind):
    """Keys decoded by groups and values read as latents in the graph, and both by the op."""
    model = FAMILIES[name].build(layers=1)
    other, new = copy.deepcopy(model), 3
    ids, mask = prompt(2, 9, 3)
    got = generate(
        compiled(model, **MIXED, ratio=0.2, inner="inductor"), ids, mask, new_cache(model, kind, 12), new=new
    )
    want = generate(compiled(other, **MIXED, ratio=0.2), ids, mask, new_cache(other, kind, 12), new=new)
    assert {x.codec.groups for pair in latents(got.cache) for x in pair} == {2 if name == "llama-gqa" else 4}
    assert_tokens("tokens", got.sequences, want.sequences)
    assert_close("logits", got.logits, want.logits, 1e-4)


# -- readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "values"), [("llama-gqa", (False, 2), (True, 2)), ("gpt2", (True, 4), (True, 4))]
)
def test_heads_read_their_own_columns(name, keys, values, monkeypatch):
    """Rotated keys are decoded group by group (here by the op, as on a GPU), all else is read as latents of the head's
    own group."""
    seen: list[Any] = []
    monkeypatch.setattr(attention, "ANGLES", True)
    model = compiled(FAMILIES[name].build(layers=1), **MIXED, ratio=0.4)
    with attend.watching(lambda *given: seen.append(given)):
        generate(model, *prompt(2, 40))
    assert seen, "no step was read by the op"
    for about, query, key, value, extras in seen[-2:]:
        assert (about.keys.absorbed, about.keys.groups) == keys
        assert (about.values.absorbed, about.values.groups) == values
        got, want = tiled.attend(about, query, key, value, extras), reference.attend(about, query, key, value, extras)
        assert_close("by groups", got.double(), want, 1e-5)


def test_reading_is_predicted_to_be_faster():
    """gpt2's four heads meet a quarter of the products each."""
    model = FAMILIES["gpt2"].build(layers=1)
    flops = {}
    for basis in ("joint", "grouped"):
        given = {"attention_mask": prompt(2)[1], cache_name(model): new_cache(model), "use_cache": True}
        report = examined(model, prompt(2)[:1], given, Options(**{**MIXED, "basis": basis}, ratio=0.4))
        flops[basis] = [cost.counted("latent", **s.sizes(1 << 16, 1))[1] for s in report.sites]
    for joint, grouped in zip(flops["joint"], flops["grouped"], strict=True):
        assert 3 < joint / grouped < 5


# -- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("informed", [False, True])
def test_a_plan_says_it(informed, tmp_path):
    model = FAMILIES["gpt2"].build(layers=2)
    ids = prompt(2, TOKENS)[0]
    about: dict[str, Any] = {"basis": "grouped", "group_size": 2, "ratio": 0.4}
    text = torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(0))
    about["calibration"] = lorc_fx.calibrate(model, list(text.split(1)), progress=False) if informed else "none"
    given = {cache_name(model): new_cache(model), "use_cache": True}
    plan = lorc_fx.make_plan(model, ids, options=about, **given)
    assert {s.groups for s in plan.sites} == {2} and bool(plan.bases) == informed
    plan.save(tmp_path / "plan.json")
    again = lorc_fx.Plan.load(tmp_path / "plan.json")
    assert again == plan
    want = piecewise(compiled(copy.deepcopy(model), **about), ids, new_cache(model), [7, TOKENS])
    cache = new_cache(model)
    got = piecewise(compiled(model, plan=again), ids, cache, [7, TOKENS])
    assert {x.codec.groups for pair in latents(cache) for x in pair} == {2}
    assert torch.equal(got, want)
    lorc_fx.save_cache(cache, tmp_path / "cache.safetensors")
    loaded = lorc_fx.load_cache(tmp_path / "cache.safetensors", model)
    for one, other in zip(latents(cache), latents(loaded), strict=True):
        assert torch.equal(one[0].dense(), other[0].dense()) and torch.equal(one[1].dense(), other[1].dense())


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    model = FAMILIES["gpt2"].build(layers=1)
    ids, given = prompt(2, TOKENS)[0], {cache_name(model): new_cache(model), "use_cache": True}
    plan = lorc_fx.make_plan(model, ids, options={**GROUPED, "ratio": 0.5}, **given)
    for groups in (3, 5):
        wrong = replace(plan, sites=tuple(replace(s, groups=groups) for s in plan.sites))
        with pytest.raises(errors.BadPlan, match=f"{groups}"):
            piecewise(compiled(model, plan=wrong), ids, new_cache(model), [TOKENS])
    for groups in (0, True, "two"):
        line = {**plan.sites[0].line(), "groups": groups}
        with pytest.raises(ValueError, match="groups"):
            type(plan.sites[0]).of_line(line)


@pytest.mark.parametrize("ratio", [0.21, 0.3, 0.5])
def test_bytes_are_those_of_the_budget(ratio):
    model = FAMILIES["llama-gqa"].build(layers=2)
    given = {"attention_mask": prompt(2)[1], cache_name(model): new_cache(model), "use_cache": True}
    report = examined(model, prompt(2)[:1], given, Options(**MIXED, ratio=ratio))
    assert report.bytes_per_token <= ratio * report.bytes_per_token_dense
    run = generate(compiled(model, **MIXED, ratio=ratio), *prompt(2))
    tokens = run.sequences.shape[1] - 1
    assert lorc_fx.cache_nbytes(run.cache, used=True) == 2 * tokens * report.bytes_per_token


def test_heads_that_do_not_fill_groups_are_refused():
    model = compiled(FAMILIES["gpt2"].build(layers=1), **GROUPED, group_size=3)
    with pytest.raises(errors.BadOption, match="a divisor of the 4 cached heads of layer 0 key"):
        generate(model, *prompt())
    weight = torch.randn(64, 8)
    assert [head_groups(weight, 16, size, "x") for size in (1, 2, 4, 5)] == [4, 2, 1, 1]
    assert head_groups(weight, 1, 1, "x") == 1, "heads that nobody can tell apart are one"
    twice = weight.view(4, 16, 8).repeat_interleave(2, 0).flatten(0, 1)
    assert head_groups(twice, 16, 1, "x") == 4, "a head that is there twice counts once"


# -- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 9),
    depth=st.integers(1, 40),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
)
def test_no_basis_of_a_group_does_better(groups, width, depth, share, seed):
    """Eckart and Young for each group: what is lost are its least singular values, and none of another group's."""
    weight = torch.randn(groups * width, depth, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, energy = own_bases(weight @ weight.T, groups, vectors=True)
    assert_close("orthonormal", u.T @ u, torch.eye(len(u), dtype=torch.float64), 1e-9)
    basis = Basis(u, u.T, energy, torch.zeros(1, len(u), dtype=torch.float64), groups=groups)
    each = max(1, round(share * width))
    segments = (Segment(groups * each, 0),)
    rows = in_rows(basis, segments)
    kept = rows.analysis[:, : groups * each] @ (rows.synthesis[: groups * each] @ weight)
    values = torch.cat([torch.linalg.svdvals(w)[each:] for w in weight.view(groups, width, depth)])
    lost = float((weight - kept).square().sum())
    assert abs(lost - float(values.square().sum())) <= 1e-9 * float(weight.square().sum())
    foreign = _row_groups(segments, groups) != _features(len(u), groups)
    assert not rows.analysis[:, : groups * each][foreign].any(), "a column has something of another group"


def _row_groups(segments: tuple[Segment, ...], groups: int) -> torch.Tensor:
    """Of each stored column in a row, its group: [1, r]."""
    found = [torch.arange(columns) * groups // columns for columns, _ in segments]
    return torch.cat(found)[None]


def _features(n: int, groups: int) -> torch.Tensor:
    return (torch.arange(n) * groups // n)[:, None]


@settings(max_examples=40)
@given(groups=st.integers(1, 4), counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_row_has_each_segment_group_by_group(groups, counts, seed):
    segments = tuple(Segment(groups * c, bits) for c, bits in zip(counts, (8, 4, 2, 1), strict=False))
    n = groups * (sum(counts) + 1)
    g = torch.Generator().manual_seed(seed)
    energy = torch.rand(groups, n // groups, generator=g).double().sort(-1)[0]
    eye = torch.eye(n, dtype=torch.float64)
    order = by_place(energy)
    basis = Basis(eye[:, order], eye[order], energy.flatten()[order], eye[:1] * 0, groups=groups)
    r, rows = sum(s.columns for s in segments), in_rows(basis, segments)
    assert torch.equal(rows.analysis, rows.synthesis.T)
    assert torch.equal(rows.energy.sort()[0], basis.energy.sort()[0])
    parts = split(rows.energy[:r], segments, groups)
    assert torch.equal(parts, energy.flip(1)[:, : r // groups]), "each group by falling energy"
    weight = torch.randn(n, 7, generator=g)
    codec = make_codec(weight, None, basis, segments, None, (), torch.float32)  # type: ignore[arg-type]
    assert codec.decode is not None and codec.matrix is not None and len(codec.decode) == r // groups
    assert not codec.matrix.T[_row_groups(segments, groups) != _features(n, groups)].any()
    spread = 1.0 if codec.spread is None else codec.spread[:, None]
    assert torch.equal(codec.matrix, (rows.synthesis[:r] * spread).float())
    y = torch.randn(5, n, generator=g, dtype=torch.float64)
    other = torch.where(_features(n, groups)[:, 0] == groups - 1, -y, y)  # of the same size: the scale is for a row
    moved, still = through(codec, basis, other), through(codec, basis, y)
    assert torch.equal(moved[:, : n - n // groups], still[:, : n - n // groups]), "groups do not mix"


# -- what "auto" does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "objective", "groups"),
    [
        ("llama-gqa", "balanced", (2, 1)),  # keys would be decoded; four heads of 16 read 32 columns fast enough
        ("llama-gqa", "bytes", (1, 1)),
        ("falcon-mqa", "balanced", (1, 1)),  # one head
        ("wide gpt2", "balanced", (16, 16)),
        ("wide gpt2", "bytes", (1, 1)),
    ],
)
def test_auto_has_groups_where_joint_latents_are_slow_and_bits_few(name, objective, groups):
    if name == "wide gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(n_embd=256, n_head=16, n_layer=1, n_inner=64, vocab_size=101, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
    else:
        model = FAMILIES[name].build(layers=1)
    given = {"calibration": "none", "precision": "auto", "scheduler": "uniform", "objective": objective}
    ids, cache = prompt(2, TOKENS)[0], new_cache(model)
    for ratio, few in ((0.19, True), (1.0, False)):
        cache = new_cache(model)
        piecewise(compiled(model, **given, ratio=ratio), ids, cache, [7, TOKENS])
        ((keys, values),) = latents(cache)
        found = keys.codec.groups, values.codec.groups
        assert found == (groups if few else (1, 1))
        assert not few or not (keys.codec.unprojected or values.codec.unprojected)
