"""Bounds on matrices: sound for every matrix that hypothesis finds, attained where the statement says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import find, given, settings, target
from hypothesis import strategies as st

from lorc_fx import bounds
from lorc_fx.factors import condition_number, factorise


def matrix(seed: int, rows: int, columns: int, decay: float = 0.0) -> torch.Tensor:
    """Random, with singular values that fall by exp(-decay) each."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(made, full_matrices=False)
    return (u * (s * torch.exp(-decay * torch.arange(len(s))))) @ v


SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 10**6)


@given(SEEDS, SIZES, SIZES, st.floats(0, 3))
def test_the_spectral_norm_is_bounded_and_sharp(seed: int, rows: int, columns: int, decay: float) -> None:
    made = matrix(seed, rows, columns, decay)
    true = float(torch.linalg.matrix_norm(made, 2))
    assert true <= bounds.spectral_norm(made) <= true * (1 + 1e-6) + 1e-300
    assert bounds.spectral_norm(made[:0]) == 0.0


@given(SEEDS, SIZES, SIZES, st.integers(0, 12), st.sampled_from(["spectral", "frobenius"]), st.floats(0.0, 1.0))
def test_no_matrix_of_a_rank_is_nearer_than_the_leading_part(
    seed: int, rows: int, columns: int, rank: int, norm: str, step: float
) -> None:
    """Eckart and Young: also not one that is close to the best."""
    weight = matrix(seed, rows, columns)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = min(rank, len(s))
    kind = 2 if norm == "spectral" else "fro"
    least = bounds.best_error(s, rank, norm)
    left = u[:, :rank] * s[:rank]
    best = weight - left @ v[:rank]
    assert float(torch.linalg.matrix_norm(best, kind)) == pytest.approx(least, abs=1e-9)
    generator = torch.Generator().manual_seed(seed + 1)
    other = left + step * torch.randn(left.shape, generator=generator, dtype=torch.float64)
    right = v[:rank] + step * torch.randn(v[:rank].shape, generator=generator, dtype=torch.float64)
    away = float(torch.linalg.matrix_norm(weight - other @ right, kind))
    target(least / (away + 1e-12))
    assert away >= least * (1 - 1e-9) - 1e-12


def test_a_norm_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm='nuclear' is not allowed.*'frobenius'"):
        bounds.best_error(torch.ones(3), 1, "nuclear")


@given(SEEDS, SIZES, SIZES, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_rounding_a_weight_moves_its_spectrum_by_no_more_than_weyl_says(
    seed: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = matrix(seed, rows, columns)
    rounded = weight.to(dtype).double()
    moved = (torch.linalg.svdvals(rounded) - torch.linalg.svdvals(weight)).abs().max()
    limit = bounds.weyl(bounds.rounded_by(weight, dtype))
    assert float(torch.linalg.matrix_norm(rounded - weight, 2)) <= limit
    assert float(moved) <= limit


@given(SEEDS, st.integers(2, 10), st.integers(2, 14), st.integers(1, 9), st.floats(1e-9, 1.0))
def test_leading_vectors_turn_by_no_more_than_wedin_says(
    seed: int, rows: int, columns: int, rank: int, size: float
) -> None:
    weight = matrix(seed, rows, columns, 0.3)
    error = size * matrix(seed + 1, rows, columns)
    u, s, _ = torch.linalg.svd(weight)
    rank = min(rank, rows)
    turned = torch.linalg.svd(weight + error)[0]
    full = torch.cat([s, s.new_zeros(rows - len(s))])
    limit = bounds.wedin(full, rank, bounds.spectral_norm(error))
    sine = float(torch.linalg.matrix_norm(u[:, rank:].T @ turned[:, :rank], 2)) if rank < rows else 0.0
    target(sine / (limit + 1e-12))
    assert sine <= limit * (1 + 1e-6) + 1e-9


def test_without_the_perturbation_in_the_gap_wedin_would_be_wrong() -> None:
    """|E| / (sigma_r - sigma_{r+1}) alone is not a bound."""

    def broken(seed: int) -> bool:
        weight, error = matrix(seed, 3, 3, 0.3), 0.5 * matrix(seed + 1, 3, 3)
        u, s, _ = torch.linalg.svd(weight)
        sine = float(torch.linalg.matrix_norm(u[:, 1:].T @ torch.linalg.svd(weight + error)[0][:, :1], 2))
        return sine > min(1.0, float(torch.linalg.matrix_norm(error, 2)) / float(s[0] - s[1])) + 1e-6

    find(SEEDS, broken, settings=settings(max_examples=2000))


@given(SEEDS, st.integers(1, 10), st.integers(1, 10), st.integers(0, 10))
def test_lorcs_first_theorem_holds_and_is_attained(seed: int, rows: int, columns: int, rank: int) -> None:
    weight = matrix(seed, rows, columns)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = min(rank, len(s))
    rest = weight - (u[:, :rank] * s[:rank]) @ v[:rank]
    tokens = torch.randn(7, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = torch.cat([tokens, v[rank : rank + 1]])
    lost, limit = (tokens @ rest.T).norm(dim=1), bounds.lorc_layer(s, rank, tokens.norm(dim=1))
    assert bool((lost <= limit * (1 + 1e-9) + 1e-12).all())
    assert float(lost[-1]) == pytest.approx(float(limit[-1]), abs=1e-9)


def network(seed: int, layers: int, width: int) -> list[torch.Tensor]:
    return [matrix(seed + i, width, width) / math.sqrt(width) for i in range(layers)]


@given(SEEDS, st.integers(1, 4), st.integers(2, 8), st.integers(0, 7), st.sampled_from([torch.tanh, torch.relu]))
def test_lorcs_second_theorem_holds_for_whole_layers(
    seed: int, layers: int, width: int, rank: int, function: object
) -> None:
    """x -> x + f(W x) with f of slope at most 1: a gain of 1 + sigma_1 each."""
    assert callable(function)
    dropped, gains, sizes = [], [], []
    dense = coded = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for weight in network(seed, layers, width):
        u, s, v = torch.linalg.svd(weight)
        cut = min(rank, width)
        dropped.append(bounds.best_error(s, cut))
        gains.append(1 + float(s[0]))
        sizes.append(float(coded.norm()))
        dense = dense + function(weight @ dense)
        coded = coded + function((u[:, :cut] * s[:cut]) @ (v[:cut] @ coded))
    limit = bounds.lorc_network(dropped, gains, sizes)
    target(float((dense - coded).norm()) / (limit + 1e-12))
    assert float((dense - coded).norm()) <= limit * (1 + 1e-9) + 1e-12


def test_gains_belong_to_the_second_theorem() -> None:
    """Without the gains of the layers above, some network breaks it."""

    def broken(seed: int) -> bool:
        weights = [3 * w for w in network(seed, 2, 4)]
        x = torch.ones(4, dtype=torch.float64)
        u, s, v = torch.linalg.svd(weights[0])
        lost = weights[0] @ x - (u[:, :2] * s[:2]) @ (v[:2] @ x)
        return float((weights[1] @ lost).norm()) > bounds.best_error(s, 2) * float(x.norm()) * (1 + 1e-9)

    find(SEEDS, broken, settings=settings(max_examples=2000))


@given(SEEDS, st.integers(1, 4), st.integers(2, 6), st.floats(0, 2))
def test_a_cumulative_condition_number_bounds_relative_errors_in_a_chain(
    seed: int, layers: int, width: int, decay: float
) -> None:
    chain = [matrix(seed + i, width, width, decay) for i in range(layers)]
    generator = torch.Generator().manual_seed(seed)
    signal, noise = (torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(2))
    limit = bounds.relative_gain([condition_number(torch.linalg.svdvals(w)) for w in chain])
    before = float(noise.norm() / signal.norm())
    for weight in chain:
        signal, noise = weight @ signal, weight @ noise
    assert float(noise.norm() / signal.norm()) <= limit * before * (1 + 1e-6)


def test_a_condition_number_does_not_order_what_layers_lose() -> None:
    """Hypothesis finds two layers of which the one with the larger condition number loses less at the same rank, for
    every token: scaled, or with its spread where it is dropped anyway."""

    def other_way_round(seed: int) -> bool:
        a, b = matrix(seed, 4, 4, 0.1), matrix(seed + 1, 4, 4, 1.5)
        kappa = [condition_number(factorise(w, "w").singular) for w in (a, b)]
        lost = [bounds.best_error(torch.linalg.svdvals(w), 2) for w in (a, b)]
        return kappa[0] < kappa[1] and lost[0] > lost[1]

    find(SEEDS, other_way_round, settings=settings(max_examples=500))
    weight = matrix(0, 6, 6, 0.5)
    scaled = 100 * weight
    singular, larger = torch.linalg.svdvals(weight), torch.linalg.svdvals(scaled)
    assert condition_number(singular) == pytest.approx(condition_number(larger))
    assert bounds.best_error(larger, 3) == pytest.approx(100 * bounds.best_error(singular, 3))
