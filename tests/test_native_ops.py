"""``lorc::attend`` and ``lorc::pack`` in C++: a call of a kind that was there runs no Python, and is what Python would
have computed; every other call asks it."""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.attention_cases import Case, build
from helpers import assert_close, compiled, generate, prompt
from lorc_fx import packing
from lorc_fx.kernels import attend, fused, native, reference, tiled, tuned
from lorc_fx.kernels import pack as by_op
from lorc_fx.kernels.config import Tile
from lorc_fx.packing import Format, Segment

F32, BF16 = torch.float32, torch.bfloat16
MIXED = {
    "basis": "grouped",
    "calibration": "none",
    "precision": "auto",
    "scheduler": "energy",
}
TOLERANCE = {F32: 2e-5, BF16: 0.02}


def op(about, query, keys, values, extras):
    sides = (keys.rows, keys.side, list(keys.codec)), (values.rows, values.side, list(values.codec))
    return torch.ops.lorc.attend(query, *sides[0], *sides[1], list(extras), attend.intern(about).digest)


def turned(call):
    """The same call with rows that hold heads times an orthonormal matrix, of keys and of values."""
    about, query, keys, values, extras = call
    sides = []
    for operand, stored, seed in ((about.keys, keys, 1), (about.values, values, 2)):
        dim = operand.head_dim
        matrix = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]
        sides.append((replace(operand, turned=True), replace(stored, codec=(*stored.codec, matrix))))
    (key, keys), (value, values) = sides
    return replace(about, keys=key, values=value), query, keys, values, extras


def wanted(about, query, keys, values, extras):
    """Of queries as the model has them: fp64."""
    if about.keys.turned:
        query = query.double() @ keys.codec[-1].double()
    out = reference.attend(about, query, keys, values, extras)
    return out @ values.codec[-1].double().T if about.values.turned else out


@pytest.fixture
def python(monkeypatch):
    """How often Python was asked to attend."""
    calls = []
    inner = tiled.op
    monkeypatch.setattr(tiled, "op", lambda *given: calls.append(given) or inner(*given))
    return calls


CASES = {
    "latents": Case(keys=((32, 8),), values=((24, 4),)),
    "segments, two means": Case(keys=((16, 0), (16, 4)), values=((24, 5), (8, 2)), means=2, mean=True),
    "16 bits": Case(keys=((32, 8),), values=((24, 4),), dtype=BF16, mean=True, heads=4, cached=2),
    "flags and a sink": Case(keys=((32, 8),), values=((24, 4),), scores="bool", sink=True, queries=3),
    "a bias": Case(keys=((32, 8),), values=((24, 4),), scores="add"),
    "turned keys": Case(keys=((32, 8),), values=((24, 4),), rotary="half", turned=True, mean=True),
    "turned keys, a norm": Case(keys=((32, 8),), values=((24, 4),), rotary="half", norm="rms", turned=True),
    "as they are": Case(keys=((64, 8),), values=((64, 4),), matrix=False),
    "turned heads": Case(keys=((64, 8),), values=((64, 6),), matrix=False, heads=6, queries=2),
    "turned heads, 16 bits": Case(keys=((64, 8),), values=((64, 0),), matrix=False, dtype=BF16, batch=3),
}


def made(name):
    call = build(CASES[name])
    return turned(call) if name.startswith("turned heads") else call


@pytest.mark.parametrize("name", CASES)
def test_the_second_call_asks_nobody(name, python):
    call = made(name)
    assert fused.reads(call[0], call[2], call[3]), "this table is of calls that C++ takes"
    got = [op(*call) for _ in range(3)]
    assert len(python) == 1
    assert torch.equal(got[0], got[1]) and torch.equal(got[1], got[2])
    assert got[0].dtype == call[1].dtype
    assert_close(name, got[0].double(), wanted(*call), TOLERANCE[call[1].dtype])


@pytest.mark.parametrize("name", ["turned heads", "turned heads, 16 bits"])
def test_turned_heads_without_a_compiler(name, monkeypatch):
    call = made(name)
    monkeypatch.setattr(native, "library", lambda: None)
    assert_close(name, op(*call).double(), wanted(*call), TOLERANCE[call[1].dtype])


@settings(max_examples=40)
@given(
    dim=st.sampled_from([2, 8, 10, 16, 24, 33]),
    heads=st.integers(1, 3),
    each=st.integers(1, 3),
    queries=st.integers(1, 3),
    batch=st.integers(1, 3),
    bits=st.sampled_from([8, 6, 4]),
    dtype=st.sampled_from([F32, BF16]),
)
def test_turned_heads_of_any_size(dim, heads, each, queries, batch, bits, dtype):
    columns = ((heads * dim, bits),)
    given = Case(9, heads * each, heads, dim, queries, batch, columns, columns, dtype=dtype, matrix=False)
    call = turned(build(given))
    want = wanted(*call)
    for _ in range(2):
        assert_close("turned heads", op(*call).double(), want, TOLERANCE[dtype])


def test_threads_that_come_first_together_have_one_plan():
    """What C++ points to is what lives: of several plans for one reader it could be one that is gone."""
    before, kept = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)
    try:
        for n in range(40):
            about, query, keys, values, extras = build(Case(keys=((32, 4), (16 * (n + 1), 8)), tokens=40))
            kept.append(attend.intern(about))
            barrier = threading.Barrier(4)

            def call(barrier=barrier, given=(query, keys, values, extras), digest=about.digest):
                query, keys, values, extras = given
                barrier.wait()
                left, right = (keys.rows, None, list(keys.codec)), (values.rows, None, list(values.codec))
                torch.ops.lorc.attend(query, *left, *right, list(extras), digest)

            threads = [threading.Thread(target=call) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (_, _, given, _) = fused._REMEMBERED[about].peek()
            assert given[2] is fused._PLANS[about]
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("chunk", [1 << 40, 1 << 62])
def test_a_tile_is_no_longer_than_the_cache(chunk):
    """Whatever a tuner's file says."""
    call = build(Case(keys=((32, 4),), values=((32, 8),), tokens=70))
    got = fused.attend(*call, chunk=chunk)
    assert_close("result", got.double(), wanted(*call), TOLERANCE[call[1].dtype])


def test_calls_of_other_sizes_ask(python):
    """Each kind once: what a tuner found depends on them."""
    threads = torch.get_num_threads()
    about, *rest = build(CASES["latents"])
    for tokens in (63, 60, 65, 100, 128, 129):
        op(about, *build(replace(CASES["latents"], tokens=tokens))[1:])
    assert len(python) == 3, "up to 64, 128 and 256 tokens"
    op(about, *build(replace(CASES["latents"], batch=3))[1:])
    op(about, *build(replace(CASES["latents"], queries=2))[1:])
    assert len(python) == 5
    torch.set_num_threads(threads + 1)
    try:
        op(about, *rest)
    finally:
        torch.set_num_threads(threads)
    op(about, *rest)
    assert len(python) == 6


def test_what_a_tuner_finds_counts_at_once(python, monkeypatch):
    call, chunks = made("latents"), []
    monkeypatch.setattr(tuned, "chosen", lambda *given: Tile(32))
    inner = fused.remember
    monkeypatch.setattr(fused, "remember", lambda *given: chunks.append(given[-1]) or inner(*given))
    op(*call)
    monkeypatch.setattr(tuned, "chosen", lambda *given: None)
    op(*call)
    assert len(python) == 1
    tuned.forget()
    op(*call)
    op(*call)
    assert len(python) == 2 and chunks == [32, None]


def test_who_watches_sees_every_call(python):
    call, seen = made("turned heads"), []
    op(*call)
    with attend.watching(lambda *given: seen.append(given)):
        first, second = op(*call), op(*call)
    assert len(seen) == 2 and len(python) == 3
    about, query, keys, values, extras = seen[0]
    assert_close("as its lowering gets it", query, call[1] @ call[2].codec[-1], 1e-5)
    assert torch.equal(first, second)
    again = tiled.attend(about, query, keys, values, extras) @ values.codec[-1].T
    assert_close("which is what the op computes with", again, first, 1e-5)


def test_a_reader_that_is_gone_is_forgotten(python):
    """And another one with its digest is a new one."""
    call = made("latents")
    about = attend.intern(call[0])
    op(*call)
    digest = about.digest
    given = (call[1], call[2].rows, None, list(call[2].codec), call[3].rows, None, list(call[3].codec), [], digest)
    torch.ops.lorc.attend(*given)
    assert len(python) == 1
    rest = call[1:]
    del call, about
    gc.collect()
    python.clear()
    with pytest.raises(KeyError):
        torch.ops.lorc.attend(*given)
    again = build(CASES["latents"])[0]
    for _ in range(2):
        got = op(again, *rest)
    assert len(python) == 1
    assert_close("again", got.double(), wanted(again, *rest), 2e-5)


def test_a_copy_with_the_digest_of_one_that_lives(python):
    """It is the one that lives that calls are for, also when the copy dies, whoever came first."""
    call = made("latents")
    about = attend.intern(call[0])
    for again in (True, False):
        copy = replace(about)
        fused.remember(copy, call[1], 63, None)
        if again:
            native.ask_again()
            op(*call)
        del copy
        gc.collect()
        python.clear()
        for _ in range(2):
            assert_close("the one that lives", op(*call).double(), wanted(*call), 2e-5)
        assert len(python) == (0 if again else 1)


def broken():
    about, query, keys, values, extras = build(CASES["flags and a sink"])
    yield "of other sizes", (about, query, keys, replace(values, rows=values.rows[:-1]), extras)
    yield "of other sizes", (about, query[:1], keys, values, extras)
    yield "is not broadcast to", (about, query, keys, values, (extras[0][..., :-1], extras[1]))
    about, query, keys, values, extras = build(CASES["turned keys"])
    short = replace(keys, codec=(*keys.codec[:-1], keys.codec[-1][..., :-1]))
    yield "a table", (about, query, short, values, extras)
    about, query, keys, values, extras = build(CASES["turned keys, a norm"])
    half = replace(keys, codec=(*keys.codec[:-2], keys.codec[-2].half(), keys.codec[-1]))
    yield "weights of a norm", (about, query, half, values, extras)


@pytest.mark.parametrize("at", range(5))
def test_what_does_not_fit_is_refused(at):
    """By calls that ask Python and by those that do not."""
    message, call = list(broken())[at]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            op(*call)


def test_queries_and_matrices_in_fp64():
    about, query, keys, values, extras = made("segments, two means")
    call = about, query.double(), replace(keys, codec=tuple(t.double() for t in keys.codec)), values, extras
    for _ in range(2):
        got = op(*call)
    assert got.dtype == torch.float64
    assert_close("fp64", got, wanted(*call), 2e-5)


def test_a_model_decodes_without_python(python, clean):
    """All layers, all steps but the first of each kind."""
    model = compiled(FAMILIES["gpt2"].build(layers=2), **MIXED, ratio=0.4)
    with mock.patch.object(by_op, "_pack", side_effect=AssertionError("asked")):
        generate(model, *prompt(2, 40), new=12)
    assert 0 < len(python) <= 4


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packs(monkeypatch):
    """How often Python was asked to pack."""
    calls = []
    inner = by_op.pack_all
    monkeypatch.setattr(by_op, "pack_all", lambda items: calls.append(items) or inner(items))
    return calls


def draw(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(3))


def test_packing_asks_once(packs):
    forms = Format((Segment(21, 8), Segment(9, 3)), 2, BF16), Format((Segment(5, 0), Segment(11, 4)), 1, F32)
    latents, offsets = [draw(2, 3, 31).bfloat16(), draw(2, 3, 16)], [draw(2, 30), None]
    about = ",".join(by_op.spelled(form) for form in forms)
    for i in range(3):
        rows = torch.ops.lorc.pack(latents, offsets, [None, draw(16).abs()], [None] * 2, [None] * 2, about)
        assert len(packs) == 1, i
    for got, latent, off, spread, form in zip(rows, latents, offsets, (None, draw(16).abs()), forms, strict=True):
        assert torch.equal(got, packing.pack(latent, off, spread, form.spec, form.choices, form.dtype))


@pytest.mark.parametrize("name", ["fp64", "no offsets", "no token", "whole numbers"])
def test_what_packing_does_not_take_asks_each_time(name, packs):
    form = Format((Segment(21, 8), Segment(9, 3)), 2, F32)
    latent, offsets = draw(2, 3, 31), draw(2, 30)
    latent = {"fp64": latent.double(), "no token": latent[:0], "whole numbers": latent.long()}.get(name, latent)
    offsets = None if name == "no offsets" else offsets
    for _ in range(2):
        (got,) = torch.ops.lorc.pack([latent], [offsets], [None], [None], [None], by_op.spelled(form))
    assert len(packs) == 2
    assert torch.equal(got, packing.pack(latent, offsets, None, form.spec, 2, F32))


@pytest.mark.parametrize(
    ("columns", "offsets", "spread", "message"),
    [(30, (2, 30), 30, "latents"), (31, (1, 30), 30, "offsets"), (31, (2, 30), 29, "a spread")],
)
def test_what_packing_would_read_beyond_is_refused(columns, offsets, spread, message):
    """By the first call and by those that ask nobody."""
    form = Format((Segment(21, 8), Segment(9, 3)), 2, F32)
    given = ([draw(2, 1, columns)], [draw(*offsets)], [draw(spread)], [None], [None], by_op.spelled(form))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lorc.pack(*given)


@pytest.mark.parametrize("tokens", [1, by_op.TOKENS, by_op.TOKENS + 1])
def test_latents_of_y(tokens, packs):
    """Of many tokens they are a product of torch's."""
    form, y, project = Format((Segment(8, 8),), 1, F32), draw(tokens, 1, 12), draw(8, 12)
    given = ([y], [None], [None], [project], [draw(8)], by_op.spelled(form))
    (first,), (second,) = (torch.ops.lorc.pack(*given) for _ in range(2))
    assert torch.equal(first, second)
    assert len(packs) <= 1 if tokens <= by_op.TOKENS else len(packs) == 2
    want = packing.pack(y @ project.T + draw(8), None, None, form.spec, 1, F32)
    read = [packing.unpack(rows, form.spec, 1, F32) for rows in (first, want)]
    assert_close("rows of y", *read, 0.01)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 7), (3, 80), (12, 64), (5, 129)])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, by_op.TOKENS + 1])
@pytest.mark.parametrize("shifted", [False, True])
def test_rows_of_turned_heads(heads, dim, dtype, tokens, shifted, packs):
    """One matrix turns all heads, however it lies in memory; a row has one after the other, in whatever segments."""
    form = Format((Segment(heads * dim - 5, 8), Segment(5, 3)), 1, F32)
    matrix = torch.linalg.qr(draw(dim, dim))[0]
    y = draw(tokens, 2, 3 * heads * dim).to(dtype)[..., heads * dim : 2 * heads * dim]  # of q, k and v side by side
    shift = draw(heads * dim) if shifted else None
    want = (y.double().unflatten(-1, (heads, dim)) @ matrix.T.double()).flatten(-2) + (shift if shifted else 0)
    for project in (matrix, matrix.T.contiguous().T, torch.stack([matrix, matrix], -1)[..., 0]):
        packs.clear()
        given = ([y], [None], [None], [project], [shift], by_op.spelled(form, heads))
        rows = [torch.ops.lorc.pack(*given)[0] for _ in range(2)]
        assert torch.equal(*rows) and (len(packs) <= 1 if 2 * tokens <= by_op.TOKENS else len(packs) == 2)
        exact = packing.unpack(packing.pack(want.float(), None, None, form.spec, 1, F32), form.spec, 1, F32)
        assert_close("rows of turned heads", packing.unpack(rows[0], form.spec, 1, F32), exact, 0.01)


@pytest.mark.parametrize("matrix", [(6, 6), (5, 7), (7, 5), (8, 7)])
def test_a_matrix_that_does_not_turn_heads_is_refused(matrix):
    """Of 3 heads of 7."""
    form = Format((Segment(21, 8),), 1, F32)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            torch.ops.lorc.pack([draw(1, 1, 21)], [None], [None], [draw(*matrix)], [None], by_op.spelled(form, 3))


def test_a_square_matrix_of_groups_is_the_same_however_it_lies():
    """Two columns of each of two groups, and two further means: a part for each group, and no one's for all."""
    form, y, offsets = Format((Segment(4, 8),), 3, F32), draw(3, 1, 4), draw(3, 4)
    rows = [
        torch.ops.lorc.pack([y], [offsets], [None], [project], [None], by_op.spelled(form, 2))[0]
        for project in (draw(4, 4), draw(4, 4).T.contiguous().T)
    ]
    assert torch.equal(*rows)
