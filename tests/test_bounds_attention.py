"""Bounds on attention: sound, attained by the worst case, and each of their terms needed."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from hypothesis import given, target
from hypothesis import strategies as st

from lorc_fx import bounds
from lorc_fx.bounds import symbolic

SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 9)
ERRORS = st.floats(1e-6, 8.0)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def within(generator: torch.Generator, shape: torch.Size) -> torch.Tensor:
    """Between -1 and 1, often at an end."""
    return (3 * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)).clamp(-1, 1)


def holds(true: torch.Tensor, limit: torch.Tensor, label: str = "ratio") -> None:
    """Hypothesis searches for the largest measured / bound."""
    target(float((true / (limit + 1e-12)).max()), label=label)
    assert bool((true <= limit + 1e-12).all())


@given(SEEDS, SIZES, SIZES, SIZES, ERRORS, ERRORS)
def test_scores_move_by_no_more_than_cauchy_and_schwarz_say(
    seed: int, queries: int, tokens: int, dim: int, size_k: float, size_q: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, dq, dk = (normal(g, n, dim) for n in (queries, tokens, queries, tokens))
    dq, dk = size_q * dq, size_k * dk
    moved = 0.3 * ((q + dq) @ (k + dk).T - q @ k.T)
    holds(moved.abs(), bounds.score_error(q, dk.norm(dim=-1), 0.3, dq.norm(dim=-1), k))
    holds((0.3 * (q @ dk.T)).abs(), bounds.score_error(q, dk.norm(dim=-1), 0.3), "keys alone")


@pytest.mark.parametrize("sizes", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_scores_need_each_of_their_terms(sizes: tuple[float, float]) -> None:
    """q and k in one direction: each term alone is attained, and so is the sum."""
    q, k = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    dq, dk = sizes[0] * q, sizes[1] * k
    limit = bounds.score_error(q, dk.norm(dim=-1), 1.0, dq.norm(dim=-1), k)
    assert float(((q + dq) @ (k + dk).T - q @ k.T) / limit) == pytest.approx(1.0)


@given(SEEDS, st.integers(1, 6), st.floats(0.1, 3.0))
def test_rotations_of_any_form_are_isometries(seed: int, half: int, scaled: float) -> None:
    angle = normal(torch.Generator().manual_seed(seed), half)
    eye = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    eye[range(half), range(half)] = eye[range(half, 2 * half), range(half, 2 * half)] = angle.cos()
    eye[range(half), range(half, 2 * half)], eye[range(half, 2 * half), range(half)] = -angle.sin(), angle.sin()
    gain = float(bounds.isometry(scaled * eye))
    assert scaled <= gain <= scaled * (1 + 1e-6)
    other = normal(torch.Generator().manual_seed(seed + 1), 5, 5)
    assert float(torch.linalg.matrix_norm(other, 2)) <= float(bounds.isometry(other))


@given(SEEDS, SIZES, ERRORS, st.floats(0.5, 60))
def test_a_soft_cap_only_helps(seed: int, tokens: int, size: float, cap: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores, error = 20 * normal(g, tokens), size * torch.rand(tokens, generator=g, dtype=torch.float64)
    moved = scores + error * within(g, error.shape)
    true = (cap * torch.tanh(moved / cap) - cap * torch.tanh(scores / cap)).abs()
    limit = bounds.softcap_error(scores, error, cap)
    holds(true, limit)
    assert bool((limit <= error * (1 + 1e-6)).all())


@given(SEEDS, st.integers(1, 12), ERRORS, st.floats(0.1, 10))
def test_weights_move_by_no_more_than_said_in_each_token_and_in_all(
    seed: int, tokens: int, size: float, peak: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = peak * normal(g, tokens)
    error = size * torch.rand(tokens, generator=g, dtype=torch.float64)
    moved = (scores + error * within(g, error.shape)).softmax(-1) - scores.softmax(-1)
    holds(moved.abs(), bounds.weight_error(scores, error))
    holds(moved.abs().sum()[None] / 2, bounds.total_variation(error)[None], "in all")


def test_what_total_variation_says_is_attained() -> None:
    """Half of the scores up, half down, at the worst weight of algebra; and the algebra itself."""
    e = 0.7
    worst = float(symbolic.worst_weight().subs(symbolic.e, e))
    scores = torch.tensor([worst, 1 - worst], dtype=torch.float64).log()
    moved = (scores + torch.tensor([e, -e])).softmax(-1) - scores.softmax(-1)
    assert float(moved.abs().sum() / 2) == pytest.approx(float(bounds.total_variation(torch.tensor([e]))), rel=1e-6)
    assert sp.simplify((symbolic.total_variation() - sp.tanh(symbolic.e / 2)).rewrite(sp.exp)) == 0
    slope = sp.diff(symbolic.gained(), symbolic.p).subs(symbolic.p, symbolic.worst_weight())
    assert sp.simplify(slope) == 0


def test_a_weight_attains_its_own_bound() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    error = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    moved = (scores + signs * error).softmax(-1)[0] - scores.softmax(-1)[0]
    assert float(moved) == pytest.approx(float(bounds.weight_error(scores, error)[0]), rel=1e-6)


def test_a_first_token_may_lose_all_to_scores_of_which_little_is_known() -> None:
    """Sums of exponentials of hundreds, in which the others' would be lost by a difference."""
    scores = torch.tensor([0.0, 1.5, -1e38], dtype=torch.float64)
    error = torch.tensor([200.0, 460.0, 400.0], dtype=torch.float64)
    limit = bounds.weight_error(scores, error)
    assert bool((limit[:2] >= torch.maximum(scores.softmax(-1), 1 - scores.softmax(-1))[:2] - 1e-9).all())


def test_two_far_values_take_all_of_the_total_variation() -> None:
    """Twice it: what one gains the other loses."""
    scores, change = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.4, -0.4]], dtype=torch.float64)
    p, size = scores.softmax(-1), change.abs()
    true = ((scores + change).softmax(-1) @ PAIR - p @ PAIR).norm(dim=-1)
    still = torch.zeros(2, dtype=torch.float64)
    limit = bounds.output_error(p, PAIR, bounds.weight_error(scores, size), still, bounds.total_variation(size))
    assert float(true) <= float(limit)
    assert float(true) == pytest.approx(float(limit), rel=0.05)


def test_masked_tokens_stay_masked_and_hopeless_ones_may_win() -> None:
    scores = torch.tensor([0.0, -torch.inf, -900.0], dtype=torch.float64)
    error = torch.tensor([1.0, 1.0, 2000.0], dtype=torch.float64)
    limit = bounds.weight_error(scores, error)
    assert float(limit[1]) == 0.0
    assert float(limit[2]) == pytest.approx(1.0)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """Scores, their errors, the change; values, their change."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    queries, tokens, dim = draw(SIZES), draw(st.integers(1, 12)), draw(SIZES)
    scores = draw(st.floats(0.1, 6)) * normal(g, queries, tokens)
    error = draw(ERRORS) * torch.rand(scores.shape, generator=g, dtype=torch.float64)
    values = normal(g, tokens, dim) + draw(st.floats(-5, 5))
    return scores, error, error * within(g, error.shape), values, draw(ERRORS) * normal(g, tokens, dim)


@given(attentions())
def test_what_attention_gives_moves_by_no_more_than_said(case: tuple[torch.Tensor, ...]) -> None:
    scores, error, change, values, moved = case
    p, p_ = scores.softmax(-1), (scores + change).softmax(-1)
    true = (p_ @ (values + moved) - p @ values).norm(dim=-1)
    given = bounds.weight_error(scores, error), moved.norm(dim=-1)
    limit = bounds.output_error(p, values, *given, bounds.total_variation(error))
    holds(true, limit)
    assert bool((limit <= bounds.output_error(p, values, *given) * (1 + 1e-9)).all())
    holds(true, bounds.linearised_output_error(p, values, change, moved), "linearised")


@pytest.mark.parametrize("without", ["values", "weights"])
def test_the_output_needs_each_of_its_terms(without: str) -> None:
    scores = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    change = torch.tensor([[0.5, -0.5]]) * (without == "weights")
    moved = torch.ones(2, 1, dtype=torch.float64) * (without == "values")
    p, error = scores.softmax(-1), bounds.weight_error(scores, change.abs().double())
    true = ((scores + change).softmax(-1) @ (values + moved) - p @ values).norm(dim=-1)
    kept = (error, moved.norm(dim=-1) * 0) if without == "values" else (error * 0, moved.norm(dim=-1))
    assert bool((true > bounds.output_error(p, values, *kept) + 1e-3).all())


PAIR = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
LINEAR: dict[int, tuple[list[float], list[float], torch.Tensor, torch.Tensor]] = {
    # weights before, change of scores, values, change of values: for each term a case that the others do not hold
    0: ([0.5, 0.5], [1e-3, -1e-3], PAIR, torch.zeros(2, 1, dtype=torch.float64)),
    1: ([0.5, 0.5], [3.0, -3.0], PAIR, torch.full((2, 1), -3.0, dtype=torch.float64)),
    2: ([0.99, 0.01], [0.0, 4.0], PAIR, torch.zeros(2, 1, dtype=torch.float64)),
    3: ([0.5, 0.5], [3.0, -3.0], torch.zeros(2, 1, dtype=torch.float64), PAIR),
}


@pytest.mark.parametrize("term", sorted(LINEAR))
def test_the_linearised_output_needs_each_of_its_terms(term: int) -> None:
    start, moved, values, value_change = LINEAR[term]
    p = torch.tensor([start], dtype=torch.float64)
    change = torch.tensor([moved], dtype=torch.float64)
    true = ((p.log() + change).softmax(-1) @ (values + value_change) - p @ values).norm(dim=-1)
    terms = bounds.linearised_terms(p, values, change, value_change)
    assert float(true) <= float(bounds.linearised_output_error(p, values, change, value_change))
    assert float(true) > float(sum(t for i, t in enumerate(terms) if i != term)) + 1e-9


def test_for_small_errors_the_linearised_output_is_sharp() -> None:
    g = torch.Generator().manual_seed(0)
    scores, values = normal(g, 8, 30), normal(g, 30, 16)
    change, moved = 1e-4 * normal(g, 8, 30), 1e-4 * normal(g, 30, 16)
    p = scores.softmax(-1)
    true = ((scores + change).softmax(-1) @ (values + moved) - p @ values).norm(dim=-1)
    assert bool((bounds.linearised_output_error(p, values, change, moved) < true * 1.01).all())


def test_gradient_ascent_does_not_get_past_the_output_bound() -> None:
    """An adversary moves scores within their intervals and values within their balls, by the gradient of the error."""
    g = torch.Generator().manual_seed(1)
    scores, values = normal(g, 1, 8), normal(g, 8, 4)
    p = scores.softmax(-1)
    interval, ball = torch.full_like(scores, 0.3), torch.full((8,), 0.2, dtype=torch.float64)
    given = bounds.weight_error(scores, interval), ball, bounds.total_variation(interval)
    limit = float(bounds.output_error(p, values, *given))
    best = 0.0
    for start in range(4):
        g = torch.Generator().manual_seed(start)
        up, away = normal(g, 1, 8).requires_grad_(), normal(g, 8, 4).requires_grad_()
        climb = torch.optim.Adam([up, away], lr=0.1)
        for _ in range(150):
            moved = 0.2 * away / away.norm(dim=-1, keepdim=True).clamp_min(1.0)
            error = ((scores + 0.3 * torch.tanh(up)).softmax(-1) @ (values + moved) - p @ values).norm()
            best = max(best, float(error))
            climb.zero_grad()
            (-error).backward()
            climb.step()
    assert best <= limit
    assert best > 0.4 * limit  # the search is an adversary that gets somewhere
