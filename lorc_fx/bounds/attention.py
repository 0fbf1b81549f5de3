"""Bounds on attention: from errors of keys to errors of scores, of weights, and of what is summed.

Letters: H heads, S queries, T cached tokens, D head dim. All in fp64 and vectorised over leading dims.
"""

from __future__ import annotations

import torch

from .roundoff import SLACK


def product_error(
    left: torch.Tensor, left_error: torch.Tensor, right: torch.Tensor, right_error: torch.Tensor
) -> torch.Tensor:
    """|a' b' - a b| at most, from norms |a|, |a' - a|, |b|, |b' - b| (any shapes that broadcast).

    Proof. a' b' - a b = a db + da b + da db; Cauchy and Schwarz for each."""
    return left * right_error + left_error * right + left_error * right_error


def score_error(
    query: torch.Tensor, key_error: torch.Tensor, scale: float, query_error: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """|s' - s| for s = scale q k^T: [.., S, T] from ``query`` [.., S, D] and |k' - k| ``key_error`` [.., T].

    Statement. |s' - s| <= scale (|q| |dk| + |dq| |k| + |dq| |dk|); the last two where ``query_error`` [.., S] (|q'
    - q|) and ``key`` [.., T, D] are given. Proof. ``product_error``. Rotary embedding multiplies q and k by
    orthogonal matrices (one per position): norms, so this bound, are the same before and after it (``isometry``)."""
    size = query.double().norm(dim=-1)
    moved = torch.zeros_like(size) if query_error is None else query_error
    length = torch.zeros_like(key_error) if key is None else key.double().norm(dim=-1)
    assert query_error is None or key is not None
    bound = product_error(size[..., :, None], moved[..., :, None], length[..., None, :], key_error[..., None, :])
    return bound * abs(scale) * (1 + SLACK)


def isometry(matrices: torch.Tensor) -> torch.Tensor:
    """|M|_2 of each of ``matrices`` [.., D, D], at most: 1 where M is a rotation. [..]

    Proof. |M|_2^2 = |M^T M|_2 <= the largest sum of absolute values in a row of M^T M (Gershgorin), which is sharp
    where M^T M is diagonal, as for rotations of any form, partial or scaled."""
    gram = matrices.transpose(-1, -2) @ matrices
    return gram.abs().sum(-1).amax(-1).sqrt() * (1 + SLACK)


def softcap_error(scores: torch.Tensor, error: torch.Tensor, cap: float) -> torch.Tensor:
    """|cap tanh(s'/cap) - cap tanh(s/cap)| for |s' - s| <= ``error``, both [..]. Never more than ``error``.

    Proof. tanh rises, so the ends of the interval are the extremes; its slope is at most 1.
    """
    here = cap * torch.tanh(scores / cap)
    low, high = (cap * torch.tanh((scores + sign * error) / cap) for sign in (-1, 1))
    return torch.maximum(high - here, here - low) * (1 + SLACK)


def total_variation(error: torch.Tensor) -> torch.Tensor:
    """Half the sum of |p' - p| of softmax weights whose scores [.., T] move by at most ``error`` [.., T]: [..].

    Statement. TV <= tanh(max |ds| / 2). Proof. Let A be the tokens that gain, e = max |ds|, p = p(A). Then
    p'(A) / (1 - p'(A)) <= exp(2 e) p / (1 - p), and p'(A) - p is largest at p = 1 / (1 + exp(e)), where it is
    (exp(e) - 1) / (exp(e) + 1). What is the same in all scores of a query (a bias) does not count.
    """
    return torch.tanh(error.amax(-1) / 2) * (1 + SLACK)


def weight_error(scores: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """|p'_j - p_j| of each softmax weight, [.., T], for ``scores`` [.., T] that move by at most ``error`` [.., T]
    each.

    Statement. p'_j is between p_j e^-d_j / (p_j e^-d_j + sum_{i != j} p_i e^d_i) and the same with signs turned, d
    the errors. Proof. p'_j rises with s'_j and falls with every other score, so it is extreme at a corner.
    Attained for each j on its own, and never more than ``total_variation``."""
    logs = torch.log_softmax(scores.double(), -1)
    up, down = logs + error, logs - error
    bounds = []
    for own, others in ((up, down), (down, up)):
        bounds.append(torch.exp(own - torch.logaddexp(own, _all_but_one(others))))
    here = logs.exp()
    worst = torch.maximum(bounds[0] - here, here - bounds[1])
    worst = torch.where(torch.isnan(worst), 1.0, worst).clamp(0, 1) + 1e-13
    worst = torch.where(torch.isneginf(logs), 0.0, worst)
    return torch.minimum(worst, total_variation(error)[..., None] + 1e-13) * (1 + SLACK)


def _all_but_one(logs: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over all others, [.., T]: of those before and those behind, as differences would
    cancel."""
    edge = torch.full_like(logs[..., :1], -torch.inf)
    before = torch.logcumsumexp(logs, -1)[..., :-1]
    behind = torch.logcumsumexp(logs.flip(-1), -1)[..., :-1].flip(-1)
    return torch.logaddexp(torch.cat([edge, before], -1), torch.cat([behind, edge], -1))


def output_error(
    weights: torch.Tensor,
    values: torch.Tensor,
    weight_errors: torch.Tensor,
    value_error: torch.Tensor,
    varied: torch.Tensor | None = None,
) -> torch.Tensor:
    """|o' - o| of o = p V: [.., S] from ``weights`` p [.., S, T], ``values`` V [.., T, D], ``weight_errors`` w
    [.., S, T] (|p'_j - p_j| at most), ``value_error`` [.., T] (|v'_j - v_j|) and, where it is known, ``varied``
    [.., S] (the total variation at most).

    Statement. |o' - o| <= sum_j min(1, p_j + w_j) |dv_j| + max sum_j u_j |v_j - o| over u_j <= w_j that sum to no
    more than 2 ``varied``: values move, and weights move among values that are spread around o. Proof. o' - o =
    sum p'_j dv_j + sum (p'_j - p_j) v_j; as the differences of weights sum to zero, any vector may be taken off
    all v_j in the second sum, and o is the one that makes it small. The maximum is that of a knapsack: the
    farthest values first."""
    moved = ((weights + weight_errors).clamp_max(1.0) @ value_error[..., None])[..., 0]
    away = distances(values, weights @ values)
    if varied is None:
        return (moved + (weight_errors * away).sum(-1)) * (1 + SLACK)
    away, order = away.sort(-1, descending=True)
    most = weight_errors.expand(away.shape).gather(-1, order)
    left = (2 * varied[..., None] - (most.cumsum(-1) - most)).clamp_min(0)
    return (moved + (torch.minimum(most, left) * away).sum(-1)) * (1 + SLACK)


def linearised_output_error(
    weights: torch.Tensor, values: torch.Tensor, change: torch.Tensor, value_change: torch.Tensor
) -> torch.Tensor:
    """|o' - o| where the errors themselves are known and not only their sizes: [.., S] from ``weights`` p [.., S, T],
    ``values`` V [.., T, D], ``change`` [.., S, T] (s' - s, up to a constant per query) and ``value_change`` [.., T,
    D]. The sum of ``linearised_terms``, which has statement and proof.
    """
    terms = linearised_terms(weights, values, change, value_change)
    return (terms[0] + terms[1] + terms[2] + terms[3]) * (1 + SLACK)


def linearised_terms(
    weights: torch.Tensor, values: torch.Tensor, change: torch.Tensor, value_change: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of ``linearised_output_error``, [.., S] each.

    Statement. With a = ds - sum p ds, Z = sum p e^a (>= 1, Jensen) and m = sum p dv: |o' - o| <= |sum p (dv + a (v
    - o))|  +  (1 - 1/Z) |sum p a (v - o)|  +  sum p |e^a - 1 - a| |v - o| / Z +  sum p |e^a / Z - 1| |dv - m|. The
    first is linear in the errors, all others are of second order. Proof. p' = p e^a / Z, and sum p (v - o) = 0, so
    sum (p' - p) v = (1/Z) sum p (a + (e^a - 1 - a)) (v - o); and sum p' dv = m + sum (p' - p) (dv - m). Add up,
    and take (1 - 1/Z) sum p a (v - o) off the first."""
    out = weights @ values
    here = weights > 0
    a = torch.where(here, change, 0.0)
    a = torch.where(here, a - (weights * a).sum(-1, keepdim=True), 0.0)
    grown = torch.where(here, a.exp(), 0.0)
    z = (weights * grown).sum(-1, keepdim=True)
    bent = torch.where(here, torch.expm1(a) - a, 0.0).abs()
    slope = (weights * a) @ values - (weights * a).sum(-1, keepdim=True) * out
    mean = weights @ value_change
    spread, apart = distances(values, out), distances(value_change, mean)
    return (
        (mean + slope).norm(dim=-1),
        (1 - 1 / z)[..., 0] * slope.norm(dim=-1),
        (weights * bent * spread).sum(-1) / z[..., 0],
        (weights * (grown / z - 1).abs() * apart).sum(-1),
    )


def distances(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """|v_j - o_s| for ``values`` [.., T, D] and ``centres`` [.., S, D]: [.., S, T]."""
    return torch.cdist(centres, values, compute_mode="donot_use_mm_for_euclid_dist")
