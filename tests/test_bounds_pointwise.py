"""Norms and activations: no point of a ball or an interval gets past the bound, and constants are those of algebra."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, target
from hypothesis import strategies as st

from lorc_fx import bounds
from lorc_fx.bounds import ACTIVATIONS, symbolic

SEEDS = st.integers(0, 10**6)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@given(SEEDS, st.integers(1, 9), st.floats(1e-4, 3.0), st.sampled_from([0.0, 1e-6, 0.1]), st.booleans())
def test_a_norm_moves_by_no_more_than_a_chord(seed: int, n: int, size: float, eps: float, centred: bool) -> None:
    x, moved = normal(seed, n), size * normal(seed + 1, n)
    if centred:
        x = x - x.mean()
        moved_in = moved - moved.mean()
    else:
        moved_in = moved
    if eps == 0.0 and float((x + moved_in).norm()) < 1e-6:
        return
    true = rms(x + moved_in, eps) - rms(x, eps)
    if not bool(torch.isfinite(true).all()):
        return
    square = x.square().sum(-1, keepdim=True) + n * eps
    error = moved.norm()[None]
    limit = bounds.unit_vectors(square, error, n)
    target(float(true.norm() / (limit + 1e-12)))
    assert float(true.norm()) <= float(limit) + 1e-9
    each = bounds.unit_vector_entries(x, moved_in.abs(), square, error)
    assert bool((true.abs() <= each + 1e-9).all())


def test_the_chord_is_attained_and_is_that_of_algebra() -> None:
    x = torch.tensor([3.0, 0.0], dtype=torch.float64)
    angle = np.arcsin(1.0 / 3.0)
    moved = torch.tensor([-np.sin(angle), np.cos(angle)]) * 1.0  # the tangent to a circle of radius 1 around x
    true = rms(x + moved, 0.0) - rms(x, 0.0)
    limit = float(bounds.unit_vectors(x.square().sum()[None], torch.ones(1, dtype=torch.float64), 2))
    assert float(true.norm()) == pytest.approx(limit, rel=1e-6)
    assert float(symbolic.chord().subs({symbolic.n: 2, symbolic.error: 1, symbolic.length: 3})) == pytest.approx(limit)


def test_a_norm_of_nearly_nothing_may_turn_round() -> None:
    x = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    limit = bounds.unit_vectors(x.square().sum()[None], torch.tensor([0.1], dtype=torch.float64), 2)
    assert float(limit) == pytest.approx(2 * 2**0.5)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@given(st.floats(-12, 12), st.floats(0, 12), st.floats(-1, 1))
def test_activations_move_by_no_more_than_said(name: str, at: float, each: float, where: float) -> None:
    f = ACTIVATIONS[name]
    x, size = (torch.tensor([v], dtype=torch.float64) for v in (at, each))
    true = (f.function(x + where * size) - f.function(x)).abs()
    limit = f.entries(x, size)
    target(float(true / (limit + 1e-12)))
    assert bool((true <= limit + 1e-14).all())
    assert bool((true <= f.lipschitz(x, size) * abs(where) * size + 1e-14).all())
    assert float(f.lipschitz(x, size)) <= f.slope * (1 + 1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_an_interval_over_the_least_point_needs_it(name: str) -> None:
    """Ends alone would miss how far the function falls between them."""
    f = ACTIVATIONS[name]
    assert f.least is not None
    x, size = (torch.tensor([v], dtype=torch.float64) for v in (f.least - 1.7, 2.0))
    ends = torch.maximum((f.function(x + size) - f.function(x)).abs(), (f.function(x - size) - f.function(x)).abs())
    low = (f.function(torch.tensor([f.least], dtype=torch.float64)) - f.function(x)).abs()
    assert float(low) > float(ends)
    assert float(f.entries(x, size)) >= float(low)


@pytest.mark.parametrize("name", sorted(symbolic.functions()))
def test_constants_of_activations_are_those_of_their_derivatives(name: str) -> None:
    f = ACTIVATIONS[name]
    modules = [{"erf": torch.erf, "exp": torch.exp, "tanh": torch.tanh, "sqrt": np.sqrt, "pi": np.pi}, "numpy"]
    grid = torch.linspace(-9, 9, 90001, dtype=torch.float64)
    value = sp.lambdify(symbolic.x, symbolic.functions()[name], modules)(grid)
    first, second = (sp.lambdify(symbolic.x, symbolic.derivative(name, k), modules)(grid).abs().max() for k in (1, 2))
    assert torch.allclose(value, f.function(grid), atol=1e-12)
    assert 0.999 * f.slope <= float(first) <= f.slope
    assert 0.999 * f.bend <= float(second) <= f.bend * (1 + 1e-9)
    if f.least is not None:
        assert float(sp.nsolve(symbolic.derivative(name, 1), symbolic.x, f.least)) == pytest.approx(f.least, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(st.floats(1e-3, 1e3), st.integers(1, 50), SEEDS)
def test_rounding_units(dtype: torch.dtype, size: float, terms: int, seed: int) -> None:
    x = torch.tensor(size, dtype=torch.float64)
    assert abs(float(x.to(dtype).double() - x)) <= bounds.unit(dtype) * size
    a, b = normal(seed, terms).to(dtype), normal(seed + 1, terms).to(dtype)
    total = torch.zeros((), dtype=dtype)
    for i in range(terms):
        total = total + a[i] * b[i]
    exact, sizes = (a.double() * b.double()).sum(), (a.double() * b.double()).abs().sum()
    assert abs(float(total.double() - exact)) <= bounds.gamma(terms, dtype) * float(sizes) + 1e-4 * (
        dtype == torch.float16
    )


def test_more_terms_than_a_dtype_can_add_have_no_bound() -> None:
    assert bounds.gamma(1000, torch.bfloat16) == float("inf")
    assert bounds.accumulated(torch.bfloat16) == torch.float32
    assert bounds.accumulated(torch.float64) == torch.float64
