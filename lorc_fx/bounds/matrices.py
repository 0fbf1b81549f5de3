"""Bounds on matrices: what the best rank-r factor of a weight drops, how its spectrum moves when the weight is
rounded, LoRC's two theorems, and what a (cumulative) condition number bounds.

All in fp64. W is [n, d] and maps a token x [d] to W x [n]; ``singular`` are its singular values, descending.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .roundoff import SLACK, unit


def spectral_norm(matrix: torch.Tensor) -> float:
    """An upper bound of |W|_2, sharp to about ``SLACK``: the root of the largest eigenvalue of the smaller Gram matrix.

    Proof. |W|_2^2 = lambda_max(W W^T) = lambda_max(W^T W); eigvalsh is backward stable, so its error is below
    p(n) 2^-53 lambda_max, which ``SLACK`` covers.
    """
    if not matrix.numel():
        return 0.0
    work = matrix.double()
    work = work if work.shape[0] <= work.shape[1] else work.T
    top = torch.linalg.eigvalsh(work @ work.T)[-1]
    return float(top.clamp_min(0).sqrt()) * (1 + SLACK)


def best_error(singular: torch.Tensor, rank: int, norm: str = "spectral") -> float:
    """What every matrix of rank <= ``rank`` is away from W at least, and W's leading part exactly.

    ``norm`` "spectral": sigma_{r+1}; "frobenius": the root of the sum of sigma_i^2 over i > r (Eckart and Young 1936,
    Mirsky 1960). Proof of the former: the kernel of a rank-r matrix meets the span of the r + 1 leading right vectors
    in some unit v, and |(W - A) v| = |W v| >= sigma_{r+1}. Raises ValueError for another norm.
    """
    if norm not in ("spectral", "frobenius"):
        raise ValueError(f"norm={norm!r} is not allowed: it is 'spectral' or 'frobenius'")
    rest = singular.double()[rank:]
    if not rest.numel():
        return 0.0
    return float(rest[0]) if norm == "spectral" else float(rest.square().sum().sqrt())


def rounded_by(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """|E|_2 at most, where W + E is W [n, d] rounded to ``dtype``: u |W|_F, with u the unit roundoff.

    Proof. Each entry moves by at most u times itself (numbers below the normal range aside), and |E|_2 <= |E|_F.
    """
    return unit(dtype) * float(weight.double().norm()) * (1 + SLACK)


def weyl(perturbation: float) -> float:
    """Every singular value of W + E is within |E|_2 of W's own (Weyl 1912; Mirsky 1960). ``perturbation``: |E|_2.

    Proof. sigma_i(W) = min over A of rank < i of |W - A|_2 (``best_error``), and |W + E - A| <= |W - A| + |E|.
    """
    return perturbation


def wedin(singular: torch.Tensor, rank: int, perturbation: float) -> float:
    """sin of the largest angle between the spans of the ``rank`` leading left singular vectors of W and of W + E,
    at most; 1 where nothing is known. ``perturbation``: |E|_2 (Wedin 1972: Davis and Kahan's theorem for singular
    vectors).

    Statement. sin <= |E| / (sigma_r - sigma_{r+1} - |E|) where that is positive. Proof sketch. With U_1, V_1 of W
    + E and U_2, V_2 the rest of W: U_2^T (E V_1) = U_2^T U_1 S_1 - S_2 V_2^T V_1, and the same for the right side.
    Norms of both: (sigma_r(W + E) - sigma_{r+1}(W)) max(|U_2^T U_1|, |V_2^T V_1|) <= |E|, and sigma_r(W + E) >=
    sigma_r - |E|."""
    n = len(singular)
    if rank <= 0 or rank >= n or perturbation == 0:
        return 0.0
    gap = float(singular[rank - 1]) - float(singular[rank]) - perturbation
    return min(1.0, perturbation / gap) if gap > 0 else 1.0


def lorc_layer(singular: torch.Tensor, rank: int, token_norm: torch.Tensor) -> torch.Tensor:
    """LoRC's first theorem (arXiv 2410.03111): |W x - W_r x| <= sigma_{r+1} |x| per token. ``token_norm`` [..]: |x|.

    Attained by the (r + 1)-th right singular vector. It says nothing of the input: ``codec_error`` knows x, and is
    what that token really loses."""
    return best_error(singular, rank) * token_norm.double()


def lorc_network(dropped: Sequence[float], gains: Sequence[float], token_norms: Sequence[float]) -> float:
    """LoRC's second theorem: the error at the output is at most the sum over layers l of
    sigma_{r_l + 1} |x_l| prod_{j > l} gain_j, where layer j changes by at most gain_j times what its input changes.

    ``dropped``: sigma_{r_l + 1}; ``gains``: Lipschitz constants of the layers; ``token_norms``: |x_l| as the
    compressed network meets them. Proof. Exchange one layer after the other and add up (triangle inequality). Its
    gains are those of whole layers, softmax and norms included, which the paper leaves open: ``lorc_fx.certify``
    computes them where the activations are."""
    total, gain = 0.0, 1.0
    for sigma, own, size in zip(reversed(dropped), reversed(gains), reversed(token_norms), strict=True):
        total += sigma * size * gain
        gain *= own
    return total


def relative_gain(conditions: Sequence[float]) -> float:
    """What the cumulative condition number does bound: how much larger a *relative* error can get in a chain of
    linear maps, |A e| / |A h| <= kappa(A_1) .. kappa(A_m) |e| / |h| for A = A_m .. A_1 of full column rank.

    Proof. |A_j e| <= sigma_max |e| and |A_j h| >= sigma_min |h|. It does not bound what a layer of a transformer
    loses: key and value projections of several layers are no chain (each reads the residual stream), kappa does
    not change when W is scaled while all its errors do, and it knows neither the rank nor the input. Two layers
    can have any order of kappa and any order of losses; ``tests/test_bounds_matrices.py`` has hypothesis find such
    a pair."""
    gain = 1.0
    for condition in conditions:
        gain *= condition
    return gain
