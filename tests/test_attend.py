"""Attention over stored rows: every form of the op against the reference, which decodes all tokens in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import symbolic_trace

from bench.attention_cases import BF16, F16, F32, Case, build
from helpers import assert_close
from lorc_fx.kernels import fused, native, reference, tiled
from lorc_fx.kernels.attend import intern

TOLERANCE = {F32: 1e-5, BF16: 2e-2, F16: 3e-3}


def case(
    segments: tuple[tuple[int, int], ...] = ((16, 8),),
    form: str = "joint",
    heads: int = 2,
    each: int = 2,
    dim: int = 16,
    mean: bool = True,
    means: int = 1,
    **more: Any,
) -> Case:
    """Keys and values in ``segments`` of a joint basis, keys rotated where ``form`` is rotary; or (identity) all
    columns as they are, at the first one's bits. ``each``: query heads of a cached head."""
    if form == "identity":
        segments, mean, means = ((heads * dim, segments[0][1]),), False, 1
    rotary = "half" if form == "rotary" else None
    rows: dict[str, Any] = {"keys": segments, "values": segments, "matrix": form != "identity"}
    return Case(heads=heads * each, cached=heads, dim=dim, mean=mean, means=means, rotary=rotary, **rows, **more)


TABLE = {
    "one token": case(tokens=1),
    "seven tokens": case(tokens=7, queries=3),
    "many": case(tokens=2049, batch=1),
    "no groups": case(each=1, heads=4),
    "seven each": case(each=7, heads=1),
    "wide heads": case(dim=80, segments=((100, 8), (30, 4))),
    "plain": case(segments=((13, 0),)),
    "plain bf16": case(segments=((13, 0),), dtype=BF16),
    "plain fp16": case(segments=((13, 0),), dtype=F16),
    "8 4 2 1": case(segments=((9, 8), (7, 4), (5, 2), (4, 1))),
    "6 5 3": case(segments=((8, 6), (9, 5), (8, 3))),
    "6, no gaps": case(segments=((128, 6),)),
    "3, no gaps": case(segments=((128, 3),)),
    "exact and levels": case(segments=((3, 0), (20, 8))),
    "exact bf16 and levels": case(segments=((3, 0), (20, 8)), dtype=BF16),
    "two means": case(means=2),
    "two means, nothing quantised": case(means=2, segments=((12, 0),)),
    "four means": case(means=4),
    "no mean": case(mean=False),
    "flags": case(scores="bool"),
    "added": case(scores="add"),
    "capped": case(scores="cap", queries=4),
    "sink": case(scores="bool", sink=True),
    "identity": case(form="identity"),
    "identity 4": case(form="identity", segments=((16, 4),)),
    "identity 6": case(form="identity", segments=((16, 6),)),
    "identity 5, four heads": case(form="identity", heads=4, segments=((16, 5),)),
    "identity 2, two heads": case(form="identity", segments=((16, 2),)),
    "identity 3, eight heads": case(form="identity", heads=8, each=1, segments=((16, 3),)),
    "identity 4, three heads": case(form="identity", heads=3, segments=((16, 4),)),
    "long runs": case(form="identity", tokens=300, dim=100, segments=((16, 8),)),
    "identity plain": case(form="identity", segments=((16, 0),)),
    "identity bf16": case(form="identity", dtype=BF16, each=3),
    "rotary": case(form="rotary"),
    "rotary bf16": case(form="rotary", dtype=BF16),
    "grouped": case(groups=2, segments=((32, 8),)),
    "grouped, four of two heads": case(groups=4, heads=8, segments=((16, 8), (32, 4), (64, 2))),
    "grouped, exact and levels": case(groups=2, segments=((6, 0), (32, 6), (16, 3)), means=2),
    "grouped, part of a byte": case(groups=2, segments=((6, 8), (6, 4), (6, 5))),
    "grouped, one column each": case(groups=2, segments=((2, 8),), mean=False),
    "grouped, three means": case(groups=2, segments=((32, 4),), means=3),
    "grouped bf16": case(groups=2, segments=((16, 0), (16, 5)), dtype=BF16, each=3),
    "grouped rotary": case(groups=2, form="rotary", segments=((16, 8), (16, 4))),
    "grouped rotary, two means": case(groups=2, form="rotary", segments=((16, 0), (16, 4)), means=2),
}


@pytest.fixture(params=["attend.cpp", "rows.cpp", "torch"])
def way(request, monkeypatch):
    """All in one compiled call where that can be, products with rows by the compiled library, or all by torch ops as
    where nothing compiles it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None, "inductor needs a C++ compiler on a CPU, and so does this test"
    if request.param == "rows.cpp":
        monkeypatch.setattr(fused, "chain", lambda about: None)
    return request.param


@pytest.mark.parametrize("name", TABLE)
def test_tiles_are_the_reference(name, way):
    about, query, keys, values, extras = build(TABLE[name])
    want = reference.attend(about, query, keys, values, extras)
    for tile in (None, 16, 1000):
        got = tiled.attend(about, query, keys, values, extras, tile)
        assert got.dtype == query.dtype
        assert_close(f"tiles of {tile}", got.double(), want, TOLERANCE[query.dtype])


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("name", TABLE)
def test_the_op_is_laid_out_without_gaps(name, batch, queries, way):
    about, query, keys, values, extras = build(replace(TABLE[name], batch=batch, queries=queries, tokens=40))
    about = intern(about)
    got = torch.ops.lorc.attend(*operands(about, query, keys, values, extras))
    assert got.shape == (*query.shape[:3], about.values.head_dim)
    assert got.is_contiguous(), got.stride()


@pytest.mark.parametrize("name", TABLE)
def test_the_op_is_laid_out_as_its_fake_says(name):
    """Compiled code takes strides from the fake, and refuses others."""
    about, *tensors = build(replace(TABLE[name], batch=2, queries=3, tokens=40))
    about = intern(about)  # it is looked up while something holds it
    given = operands(about, *tensors)
    torch.library.opcheck(torch.ops.lorc.attend.default, given, test_utils=("test_faketensor",))


def operands(about, query, keys, values, extras):
    """What the op is called with."""
    sides = (keys.rows, keys.side, list(keys.codec)), (values.rows, values.side, list(values.codec))
    return query, *sides[0], *sides[1], list(extras), about.digest


@settings(max_examples=40)
@given(
    made=st.builds(
        case,
        tokens=st.integers(1, 70),
        batch=st.integers(1, 3),
        queries=st.integers(1, 5),
        heads=st.integers(1, 4),
        each=st.integers(1, 5),
        dim=st.sampled_from([2, 8, 10, 16]),
        segments=st.lists(st.sampled_from([0, 8, 6, 5, 4, 3, 2, 1]), min_size=1, max_size=4, unique=True).flatmap(
            lambda bits: st.tuples(
                *[st.tuples(st.integers(1, 40), st.just(b)) for b in sorted(bits, key=lambda b: -b or -99)]
            )
        ),
        means=st.integers(1, 3),
        form=st.sampled_from(["joint", "identity", "rotary"]),
        scores=st.sampled_from(["none", "bool", "add", "cap"]),
        sink=st.booleans(),
        mean=st.booleans(),
        seed=st.integers(0, 1000),
    )
)
def test_any_shape(made):
    about, query, keys, values, extras = build(made)
    got = tiled.attend(about, query, keys, values, extras, 16)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_tokens(threads):
    about, query, keys, values, extras = build(case(tokens=333, scores="bool", sink=True, form="identity"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = fused.attend(about, query, keys, values, extras, 16)
    finally:
        torch.set_num_threads(before)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 1e-5)


@settings(max_examples=30)
@given(
    sharp=st.sampled_from([1e-3, 1.0, 10.0, 100.0, 1e4]),
    scores=st.sampled_from(["none", "cap"]),
    seed=st.integers(0, 99),
)
def test_scores_of_any_size(sharp, scores, seed):
    """The library has exponentials and hyperbolic tangents of its own."""
    about, query, keys, values, extras = build(case(tokens=90, scores=scores, form="identity", seed=seed))
    got = fused.attend(about, query * sharp, keys, values, extras)
    want = reference.attend(about, query * sharp, keys, values, extras)
    rounding = 3e-7 * sharp * 16 if scores == "none" else 2e-5  # of a score, in fp32
    assert_close("out", got.double(), want, 1e-5 + rounding)


def test_numbers_that_are_none():
    """NaN in a query gives NaN there and nowhere else."""
    about, query, keys, values, extras = build(case(form="identity"))
    query[0, 0, 0, 0] = math.nan
    got = fused.attend(about, query, keys, values, extras)
    assert bool(got[0, 0].isnan().all()) and not bool(got[:, 1:].isnan().any())


CHAINS = {
    "scaled": (lambda s, e: s * 0.5, True),
    "from the left": (lambda s, e: 0.5 * s + e, True),
    "less": (lambda s, e: (s - 1.5) / 3 + e, True),
    "capped": (lambda s, e: torch.tanh(s / 20) * 20, True),
    "a number less": (lambda s, e: 1.5 - s, False),
    "a number over": (lambda s, e: 1.5 / s, False),
    "twice": (lambda s, e: s * s, False),
    "an extra changed": (lambda s, e: s + torch.exp(e), False),
    "less an extra": (lambda s, e: s - e, False),
    "another function": (lambda s, e: torch.sigmoid(s), False),
    "a choice of two": (lambda s, e: torch.where(e > 0, s, s * 2), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_a_chain(name):
    """What is no chain takes the way of tiles, and is right as well."""
    function, simple = CHAINS[name]

    def program(scores, extra0):
        return function(scores, extra0)

    about, query, keys, values, extras = build(case(form="identity", scores="add"))
    about = replace(about, scores=symbolic_trace(program))
    extras = (torch.randn(extras[0].shape, generator=torch.Generator().manual_seed(5)),)
    assert (fused.chain(about) is not None) == simple
    want = reference.attend(about, query, keys, values, extras)
    assert_close("out", tiled.attend(about, query, keys, values, extras).double(), want, 1e-5)


def test_a_quotient_by_zero_is_no_chain():
    about, *_ = build(case(form="identity", scores="add"))
    assert fused.chain(replace(about, scores=symbolic_trace(lambda scores, extra0: scores / 0 + extra0))) is None


TAKEN = {
    "flags as a number": (lambda s, e: s + e, torch.bool, True),
    "flags as a factor": (lambda s, e: s * e, torch.bool, True),
    "whole numbers": (lambda s, e: s * 0.5 + e, torch.int64, True),
    "bytes as flags": (lambda s, e: torch.where(e, s, -50.0), torch.uint8, True),
    "as both": (lambda s, e: torch.where(e, s, -50.0) + e, torch.bool, False),
}


@pytest.mark.filterwarnings("ignore:where received a uint8 condition")
@pytest.mark.parametrize("name", TAKEN)
def test_extras_are_taken_as_the_program_takes_them(name):
    """Whatever dtype they come in: read as another one they would be other numbers, or memory that is not theirs."""
    function, dtype, simple = TAKEN[name]

    def program(scores, extra0):
        return function(scores, extra0)

    about, query, keys, values, extras = build(case(form="identity", scores="add"))
    about = replace(about, scores=symbolic_trace(program))
    extras = (torch.randint(0, 2, extras[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype),)
    assert (fused.chain(about) is not None) == simple
    want = reference.attend(about, query, keys, values, extras)
    assert_close("out", tiled.attend(about, query, keys, values, extras).double(), want, 1e-5)


def test_what_does_not_fit_is_not_read():
    about, query, keys, values, extras = build(case(form="identity", scores="bool"))
    with pytest.raises(RuntimeError, match="is not broadcast to"):
        fused.attend(about, query, keys, values, (extras[0][..., :-1],))
    with pytest.raises(RuntimeError, match="of other sizes"):
        fused.attend(about, query, keys, replace(values, rows=values.rows[:-1]), extras)


def test_a_query_that_sees_nothing(way):
    """SDPA gives zeros, a softmax of nothing but -inf NaN."""
    about, query, keys, values, extras = build(case(scores="bool", batch=2))
    mask = extras[0].clone()
    mask[1] = False
    got = tiled.attend(about, query, keys, values, (mask,), 16)
    assert not bool(got[1].any()) and bool(got[0].any())
    got = tiled.attend(replace(about, blind=False), query, keys, values, (mask,), 16)
    assert bool(got[1].isnan().all()) and not bool(got[0].isnan().any())


def test_tiles_that_a_mask_leaves_out_are_not_read(way):
    """The free end of a static cache costs nothing, and what it holds does not matter."""
    about, query, keys, values, extras = build(case(scores="bool", tokens=64, form="identity", segments=((16, 0),)))
    mask = extras[0].clone()
    mask[..., 20:] = False
    want = reference.attend(about, query, keys, values, (mask,))
    spoiled = keys.rows.clone()
    spoiled[32:] = math.nan
    got = tiled.attend(about, query, replace(keys, rows=spoiled), values, (mask,), 16)
    assert_close("out", got.double(), want, 1e-5)
