"""Attention over stored rows: every form of the op against the reference, which decodes all tokens in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import symbolic_trace

from helpers import assert_close
from lorc_fx.decoder import POSITION, Decoder
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import fused, native, reference, tiled
from lorc_fx.kernels.attend import Attend, Extra, Operand
from lorc_fx.kernels.stored import Stored
from lorc_fx.packing import Format, Segment, pack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """``segments`` of a joint basis, or (``blocks``) of all columns as they are."""

    tokens: int = 63
    batch: int = 2
    queries: int = 1
    heads: int = 2
    each: int = 2
    dim: int = 16
    segments: tuple[tuple[int, int], ...] = ((16, 8),)
    choices: int = 1
    dtype: torch.dtype = F32
    form: str = "joint"
    mask: str = "none"
    sink: bool = False
    mean: bool = True


def decoder(case: Case) -> Decoder:
    h, d = case.heads, case.dim

    class Plain(torch.nn.Module):
        def forward(self, y, positions):
            return y.unflatten(2, (h, d)).transpose(1, 2)

    class Rotary(torch.nn.Module):
        def forward(self, y, positions):
            y = y.unflatten(2, (h, d)).transpose(1, 2)
            frequency = 1e4 ** (-torch.arange(0, d // 2, dtype=torch.float32) * 2 / d)
            angle = (positions[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
            turned = torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1)
            return y * angle.cos() + turned * angle.sin()

    rotary = case.form == "rotary"
    module = Rotary() if rotary else Plain()
    if not rotary:
        module = symbolic_trace(module)
    side = POSITION if rotary else None
    return Decoder(
        module, h * d, ("B", h, "T", d), case.dtype, side, "rotary" if rotary else "none", digest=str((rotary, h, d))
    )


def operand(case: Case, seed: int) -> tuple[Operand, Stored]:
    draw = torch.Generator().manual_seed(seed)
    n = case.heads * case.dim
    identity = case.form == "identity"
    segments = ((n, case.segments[0][1]),) if identity else case.segments
    choices = 1 if identity else case.choices
    form = Format(tuple(Segment(*s) for s in segments), choices, case.dtype)
    k = form.columns + choices - 1
    latent = torch.randn(case.tokens, case.batch, k, generator=draw)
    offsets = torch.randn(choices, form.columns, generator=draw) if choices > 1 else None
    rows = latent.to(case.dtype) if form.plain else pack(latent, offsets, None, form.spec, choices, case.dtype)
    side = torch.randint(0, 500, (case.tokens, case.batch), generator=draw).int() if case.form == "rotary" else None
    tensors = [] if identity else [(torch.randn(k, n, generator=draw) / math.sqrt(k)).to(case.dtype)]
    mean = case.mean and not identity
    tensors += [torch.randn(n, generator=draw).to(case.dtype)] if mean else []
    made = Operand(form, k, decoder(case), case.heads, case.dim, None, case.form != "rotary", not identity, mean)
    return made, Stored(rows, side, tuple(tensors))


def scores(case: Case) -> torch.nn.Module:
    scale = 1 / math.sqrt(case.dim)

    def plain(scores):
        return scores * scale

    def flags(scores, extra0):
        return torch.where(extra0, scores * scale, -math.inf)

    def added(scores, extra0):
        return scores * scale + extra0

    def capped(scores, extra0):
        return 30 * torch.tanh(scores * scale / 30) + extra0

    return symbolic_trace({"none": plain, "flags": flags, "added": added, "capped": capped}[case.mask])


def problem(case: Case, seed: int = 0) -> tuple[Attend, torch.Tensor, Stored, Stored, tuple[torch.Tensor, ...]]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (
        operand(case, seed + 1),
        operand(replace(case, form="joint" if case.form == "rotary" else case.form), seed + 2),
    )
    extras: list[torch.Tensor] = []
    if case.mask != "none":  # some tokens are out, for all queries of a row; the last is always seen
        seen = torch.rand(case.batch, 1, 1, case.tokens, generator=draw) < 0.6
        seen[..., -1] = True
        extras.append(seen if case.mask == "flags" else torch.zeros(seen.shape).masked_fill(~seen, -1e4))
    kinds = tuple(Extra(True) for _ in extras)
    if case.sink:
        extras.append(torch.randn(1, case.heads * case.each, 1, 1, generator=draw))
    about = Attend(keys[0], values[0], scores(case), kinds, case.sink, masks=0 if case.mask == "flags" else None)
    query = torch.randn(case.batch, case.heads * case.each, case.queries, case.dim, generator=draw).to(case.dtype)
    return about, query, keys[1], values[1], tuple(extras)


TABLE = {
    "one token": Case(tokens=1),
    "seven tokens": Case(tokens=7, queries=3),
    "many": Case(tokens=2049, batch=1),
    "no groups": Case(each=1, heads=4),
    "seven each": Case(each=7, heads=1),
    "wide heads": Case(dim=80, segments=((100, 8), (30, 4))),
    "plain": Case(segments=((13, 0),)),
    "plain bf16": Case(segments=((13, 0),), dtype=BF16),
    "plain fp16": Case(segments=((13, 0),), dtype=F16),
    "8 4 2 1": Case(segments=((9, 8), (7, 4), (5, 2), (4, 1))),
    "6 5 3": Case(segments=((8, 6), (9, 5), (8, 3))),
    "6, no gaps": Case(segments=((128, 6),)),
    "3, no gaps": Case(segments=((128, 3),)),
    "exact and levels": Case(segments=((3, 0), (20, 8))),
    "exact bf16 and levels": Case(segments=((3, 0), (20, 8)), dtype=BF16),
    "two means": Case(choices=2),
    "two means, nothing quantised": Case(choices=2, segments=((12, 0),)),
    "four means": Case(choices=4),
    "no mean": Case(mean=False),
    "flags": Case(mask="flags"),
    "added": Case(mask="added"),
    "capped": Case(mask="capped", queries=4),
    "sink": Case(mask="flags", sink=True),
    "identity": Case(form="identity"),
    "identity 4": Case(form="identity", segments=((16, 4),)),
    "identity 6": Case(form="identity", segments=((16, 6),)),
    "identity 5, four heads": Case(form="identity", heads=4, segments=((16, 5),)),
    "identity 2, two heads": Case(form="identity", segments=((16, 2),)),
    "identity 3, eight heads": Case(form="identity", heads=8, each=1, segments=((16, 3),)),
    "identity 4, three heads": Case(form="identity", heads=3, segments=((16, 4),)),
    "long runs": Case(form="identity", tokens=300, dim=100, segments=((16, 8),)),
    "identity plain": Case(form="identity", segments=((16, 0),)),
    "identity bf16": Case(form="identity", dtype=BF16, each=3),
    "rotary": Case(form="rotary"),
    "rotary bf16": Case(form="rotary", dtype=BF16),
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


def tolerance(case: Case) -> float:
    return {F32: 1e-5, BF16: 2e-2, F16: 3e-3}[case.dtype]


@pytest.mark.parametrize("name", TABLE)
def test_tiles_are_the_reference(name, way):
    case = TABLE[name]
    about, query, keys, values, extras = problem(case)
    want = reference.attend(about, query, keys, values, extras)
    for tile in (None, 16, 1000):
        got = tiled.attend(about, query, keys, values, extras, tile)
        assert got.dtype == case.dtype
        assert_close(f"tiles of {tile}", got.double(), want, tolerance(case))


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
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
        choices=st.integers(1, 3),
        form=st.sampled_from(["joint", "identity", "rotary"]),
        mask=st.sampled_from(["none", "flags", "added", "capped"]),
        sink=st.booleans(),
        mean=st.booleans(),
    ),
    seed=st.integers(0, 1000),
)
def test_any_shape(case, seed):
    about, query, keys, values, extras = problem(case, seed)
    got = tiled.attend(about, query, keys, values, extras, 16)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 2e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_tokens(threads):
    about, query, keys, values, extras = problem(Case(tokens=333, mask="flags", sink=True, form="identity"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = fused.attend(about, query, keys, values, extras, 16)
    finally:
        torch.set_num_threads(before)
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    sharp=st.sampled_from([1e-3, 1.0, 10.0, 100.0, 1e4]),
    mask=st.sampled_from(["none", "capped"]),
    seed=st.integers(0, 99),
)
def test_scores_of_any_size(sharp, mask, seed):
    """The library has exponentials and hyperbolic tangents of its own."""
    about, query, keys, values, extras = problem(Case(tokens=90, mask=mask, form="identity", mean=False), seed)
    got = fused.attend(about, query * sharp, keys, values, extras)
    want = reference.attend(about, query * sharp, keys, values, extras)
    rounding = 3e-7 * sharp * 16 if mask == "none" else 2e-5  # of a score, in fp32
    assert_close("out", got.double(), want, 1e-5 + rounding)


def test_numbers_that_are_none():
    """NaN in a query gives NaN there and nowhere else."""
    about, query, keys, values, extras = problem(Case(form="identity"))
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

    about, query, keys, values, extras = problem(Case(form="identity", mask="added"))
    about = replace(about, scores=symbolic_trace(program))
    extras = (torch.randn(extras[0].shape, generator=torch.Generator().manual_seed(5)),)
    assert (fused.chain(about) is not None) == simple
    want = reference.attend(about, query, keys, values, extras)
    assert_close("out", tiled.attend(about, query, keys, values, extras).double(), want, 1e-5)


def test_a_query_that_sees_nothing(way):
    """SDPA gives zeros, a softmax of nothing but -inf NaN."""
    about, query, keys, values, extras = problem(Case(mask="flags", batch=2))
    mask = extras[0].clone()
    mask[1] = False
    got = tiled.attend(about, query, keys, values, (mask,), 16)
    assert not bool(got[1].any()) and bool(got[0].any())
    got = tiled.attend(replace(about, blind=False), query, keys, values, (mask,), 16)
    assert bool(got[1].isnan().all()) and not bool(got[0].isnan().any())


def test_tiles_that_a_mask_leaves_out_are_not_read(way):
    """The free end of a static cache costs nothing, and what it holds does not matter."""
    about, query, keys, values, extras = problem(Case(mask="flags", tokens=64, form="identity", segments=((16, 0),)))
    mask = extras[0].clone()
    mask[..., 20:] = False
    want = reference.attend(about, query, keys, values, (mask,))
    spoiled = keys.rows.clone()
    spoiled[32:] = math.nan
    got = tiled.attend(about, query, replace(keys, rows=spoiled), values, (mask,), 16)
    assert_close("out", got.double(), want, 1e-5)


def test_no_compiler(monkeypatch):
    """Then it is said once, and torch ops do it."""
    native.library.cache_clear()

    def fails(source):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(native, "compile_cpp", fails)
    about, query, keys, values, extras = problem(Case())
    try:
        with pytest.warns(KernelWarning, match="no compiler"):
            got = tiled.attend(about, query, keys, values, extras)
        tiled.attend(about, query, keys, values, extras)
    finally:
        native.library.cache_clear()
    assert_close("out", got.double(), reference.attend(about, query, keys, values, extras), 1e-5)
