"""Bounds on codecs: no token, weight, dtype, precision or input error gets past them, and each part is needed."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st

from lorc_fx import bounds
from lorc_fx import codec as codec_module
from lorc_fx.codec import Basis, Codec, identity_codec, make_codec, prior_basis, through
from lorc_fx.decoder import Decoder
from lorc_fx.factors import factorise
from lorc_fx.packing import BITS, MODEL, Segment
from lorc_fx.propagate.coded import read_back

SEEDS = st.integers(0, 10**6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Heads(torch.nn.Module):
    def forward(self, y, positions):
        return y


def decoder(heads: int, size: int, dtype: torch.dtype) -> Decoder:
    return Decoder(torch.fx.symbolic_trace(Heads()), heads * size, ("B", heads, "T", size), dtype, None, "none")


@st.composite
def segments(draw: st.DrawFn, n: int) -> tuple[Segment, ...]:
    """Of falling bits, at most ``n`` columns."""
    kinds = sorted(draw(st.sets(st.sampled_from((16, *BITS)), min_size=1, max_size=3)), reverse=True)
    left, found = draw(st.integers(1, n)), []
    for i, bits in enumerate(kinds):
        columns = left if i == len(kinds) - 1 else draw(st.integers(0, left))
        left -= columns
        if columns:
            found.append(Segment(columns, MODEL if bits == 16 else bits))
    return tuple(found) or (Segment(1, MODEL),)


@st.composite
def projections(draw: st.DrawFn) -> tuple[Codec, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """A codec (sometimes of several means), weight, bias, tokens, heads."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    heads, size, d, dtype = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(DTYPES)
    n = heads * size
    weight = torch.randn(n, d, generator=g).to(dtype)
    bias = torch.randn(n, generator=g).to(dtype)
    basis = prior_basis(factorise(weight, "w"), bias)
    for _ in range(draw(st.integers(0, 2))):
        further = draw(st.floats(0.1, 30)) * torch.randn(1, n, generator=g, dtype=torch.float64)
        basis = replace(basis, means=torch.cat([basis.means, further]))
    given = (weight, bias, basis, draw(segments(n)), decoder(heads, size, dtype), (), dtype)
    with mock.patch.object(codec_module, "reads_y", return_value=draw(st.booleans())):
        codec = make_codec(*given, from_y=True)
    x = draw(st.sampled_from([1e-3, 1.0, 100.0])) * torch.randn(6, d, generator=g, dtype=torch.float64)
    x[0, 0] *= 50  # a channel far larger than others
    return codec, weight, bias, x, heads


def dense(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.double().T + bias.double()


def groups(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.unflatten(-1, (heads, -1)).norm(dim=-1)


@settings(max_examples=300)
@given(projections())
def test_what_is_read_back_is_as_near_as_said(case: tuple) -> None:
    codec, weight, bias, x, heads = case
    error = bounds.codec_error(codec, weight, bias, x, None, heads)
    lost = read_back(codec, weight, bias, x) - dense(weight, bias, x)
    tiny = 1e-9 * (1 + x.abs().max())
    target(float((lost.norm(dim=-1, keepdim=True) / (error.whole + tiny)).max()))
    assert bool((groups(lost, heads) <= error.heads + tiny).all())
    assert bool((lost.norm(dim=-1, keepdim=True) <= error.whole + tiny).all())
    assert bool((lost.abs() <= error.each + tiny).all())


@settings(max_examples=300)
@given(projections(), st.floats(1e-4, 2.0), SEEDS)
def test_and_so_where_the_input_has_an_error_of_its_own(case: tuple, size: float, seed: int) -> None:
    codec, weight, bias, x, heads = case
    g = torch.Generator().manual_seed(seed)
    moved = torch.randn(x.shape, generator=g, dtype=torch.float64)
    moved = size * moved / moved.norm(dim=-1, keepdim=True) * torch.rand(len(x), 1, generator=g, dtype=torch.float64)
    radius = moved.norm(dim=-1, keepdim=True)
    error = bounds.codec_error(codec, weight, bias, x, radius, heads)
    lost = read_back(codec, weight, bias, x + moved) - dense(weight, bias, x)
    tiny = 1e-9 * (1 + x.abs().max())
    target(float((lost.norm(dim=-1, keepdim=True) / (error.whole + tiny)).max()))
    assert bool((groups(lost, heads) <= error.heads + tiny).all())
    assert bool((lost.abs() <= error.each + tiny).all())


@settings(max_examples=300)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4, 6, 8]), st.sampled_from((16, *BITS)), DTYPES, SEEDS)
def test_what_is_cached_as_it_is_reads_back_as_near_as_said(
    heads: int, size: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    n = heads * size
    form = (Segment(n, MODEL if bits == 16 else bits),)
    codec = identity_codec(torch.eye(n, dtype=dtype), "origin", form, decoder(heads, size, dtype), dtype)
    value = 10 * torch.randn(5, n, generator=g, dtype=torch.float64)
    moved = torch.randn(5, n, generator=g, dtype=torch.float64)
    for shift in (None, moved):
        here = value if shift is None else value + shift
        if codec.format.plain:
            lost = here.to(dtype).double() - here
        else:
            lost = through(codec, Basis(*[torch.zeros(0)] * 4), here) - here
        radius = None if shift is None else shift.norm(dim=-1, keepdim=True)
        error = bounds.unprojected_error(codec, value, radius, heads)
        assert bool((groups(lost, heads) <= error.heads + 1e-6).all())
        assert bool((lost.abs() <= error.each + 1e-6).all())


def one(bits: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Codec, torch.Tensor, torch.Tensor]:
    weight, bias = torch.eye(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    basis = Basis(*[torch.eye(4, dtype=torch.float64)] * 2, torch.ones(4).double(), torch.zeros(1, 4).double())
    return make_codec(weight, bias, basis, (Segment(rank, bits),), decoder(2, 2, dtype), (), dtype), weight, bias


@pytest.mark.parametrize("part", ["dropped", "rounded", "stored", "carried"])
def test_each_part_is_needed(part: str) -> None:
    """A case for each in which the others alone would be too little."""
    x = torch.tensor([[1.0, 0.37, -0.21, 0.11]], dtype=torch.float64)
    radius = None
    if part == "dropped":
        codec, weight, bias = one(MODEL, 2)
    elif part == "rounded":
        codec, weight, bias = one(2)
    elif part == "stored":
        codec, weight, bias = one(MODEL, 3, torch.bfloat16)
        x[0, 3] = 0.0
    else:
        codec, weight, bias = one(MODEL, 3)
        x[0, 3] = 0.0
        radius = torch.tensor([[0.5]], dtype=torch.float64)
    moved = x + (0.5 * torch.tensor([1.0, 0, 0, 0]) if part == "carried" else 0.0)
    lost = (read_back(codec, weight, bias, moved) - dense(weight, bias, x)).norm(dim=-1)
    error = bounds.codec_error(codec, weight, bias, x, radius, 2)
    less = replace(error, **{part: torch.zeros_like(error.dropped)})
    assert float(lost) <= float(error.whole)
    assert float(lost) > float(less.whole)


def test_half_a_step_is_attained() -> None:
    """The quantiser's own worst case is within 15 % of what is said of a feature."""
    codec, weight, bias = one(8)
    x = torch.tensor([[1.0, 0.5, 0.5, 0.5]], dtype=torch.float64)
    worst = 0.0
    for shift in torch.linspace(0, 0.01, 400, dtype=torch.float64):
        moved = x + shift * torch.tensor([0.0, 1.0, 1.0, 1.0])
        lost = (read_back(codec, weight, bias, moved) - dense(weight, bias, moved)).abs()
        error = bounds.codec_error(codec, weight, bias, moved, None, 2)
        worst = max(worst, float((lost / error.each).max()))
    assert 0.85 < worst <= 1.0 + 1e-9


def test_a_token_between_two_means_may_take_either() -> None:
    """Nearness that the error of x can turn round: the worse of both counts."""
    weight, bias = torch.eye(4), torch.zeros(4)
    means = torch.tensor([[0.0, 0, 0, 0], [4.0, 0, 0, 0]], dtype=torch.float64)
    basis = Basis(torch.eye(4).double()[:, 1:], torch.eye(4).double()[1:], torch.ones(3).double(), means)
    codec = make_codec(weight, bias, basis, (Segment(3, MODEL),), decoder(2, 2, torch.float32), (), torch.float32)
    x = torch.tensor([[1.9, 0, 0, 0]], dtype=torch.float64)
    still = bounds.codec_error(codec, weight, bias, x, None, 2).whole
    moved = bounds.codec_error(codec, weight, bias, x, torch.tensor([[0.3]]).double(), 2)
    lost = (read_back(codec, weight, bias, x + torch.tensor([[0.3, 0, 0, 0]]).double()) - x).norm()
    assert float(still) == pytest.approx(1.9, rel=1e-4)
    assert 2.0 < float(lost) <= float(moved.whole)


def test_gradient_ascent_on_the_input_does_not_get_past_the_bound() -> None:
    """By the straight-through gradient of the error, in a ball around x."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 6, generator=g), torch.randn(8, generator=g)
    basis = prior_basis(factorise(weight, "w"), bias)
    form = (Segment(3, 8), Segment(2, 3))
    codec = make_codec(weight, bias, basis, form, decoder(2, 4, torch.float32), (), torch.float32)
    x = torch.randn(5, 6, generator=g, dtype=torch.float64)
    radius = torch.full((5, 1), 0.4, dtype=torch.float64)
    limit = bounds.codec_error(codec, weight, bias, x, radius, 2).whole
    away = torch.randn(x.shape, generator=g, dtype=torch.float64)
    assert codec.decode is not None
    through_all = codec.decode.double().T @ codec.encode.double()
    worst = 0.0
    for _ in range(200):
        away = radius * away / away.norm(dim=-1, keepdim=True)
        lost = read_back(codec, weight, bias, x + away) - dense(weight, bias, x)
        worst = max(worst, float((lost.norm(dim=-1, keepdim=True) / limit).max()))
        away = away + 0.2 * lost @ through_all
    assert 0.5 < worst <= 1.0
