"""Singular values and left singular vectors of a weight W [n, d], from its Gram matrix W W^T in fp64.

Only U and sigma are needed (V folds into the encoder), so n x n is enough, and n is several times smaller than d in a
model with grouped heads. A whole model's U would be much more than its keys and values (8 n^2 bytes for each site), so
planning takes singular values alone (``spectrum``), and U is made with the codec.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import BadWeight

CONDITION_FLOOR = 1e-7
"""sigma_min is floored at this fraction of sigma_max, about the epsilon of fp32 weights: what is below it is noise."""

RANK_FLOOR = 1e-6
"""Singular values below this fraction of sigma_max count as zero for the rank: lossless to fp32 accuracy."""

STRIPE = 1024
"""Columns of a weight that are in fp64 at a time."""

BAND = 128
"""Rows of the Gram matrix that are computed at a time, left of the diagonal only."""


@dataclass(frozen=True)
class Factors:
    """What one effective weight [n, d] gives: ``left`` U [n, n] fp64 (columns by falling singular value), or [n, 0]
    where nobody needs it, and ``singular`` values [n] fp64, descending."""

    left: torch.Tensor
    singular: torch.Tensor

    @property
    def condition(self) -> float:
        return condition_number(self.singular)

    @property
    def rank(self) -> int:
        """The numerical rank, at least 1: more columns would store nothing (repeated heads, narrow projections)."""
        return rank_of(self.singular)


def rank_of(singular: torch.Tensor) -> int:
    """How many of these values count as more than zero, 1 at least."""
    return max(1, int((singular > RANK_FLOOR * singular.max()).sum()))


def stripes(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """``weight`` [n, d] in fp64, a few columns at a time, and where they begin: the whole of it is several times what
    the model has in 16 bits."""
    for start in range(0, weight.shape[1], STRIPE):
        yield start, weight[:, start : start + STRIPE].detach().to(torch.float64)


def gram(weight: torch.Tensor, name: str) -> torch.Tensor:
    """W W^T [n, n] fp64, symmetric to the bit. Raises BadWeight on NaN or inf: such a site cannot be ordered and must
    not be compressed silently."""
    n = weight.shape[0]
    found = torch.zeros((n, n), dtype=torch.float64, device=weight.device)
    for _, part in stripes(weight):
        for start in range(0, n, BAND):
            stop = min(start + BAND, n)
            found[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)
    if not bool(torch.isfinite(found.diagonal()).all()):  # sums of squares of rows: whatever is not finite reaches them
        raise BadWeight(name)
    lower = found.tril_()
    return lower + lower.tril(-1).T


def spectrum(gram: torch.Tensor) -> Factors:
    """The singular values of W alone, of its ``gram`` [n, n]: half the time that the vectors take. Small ones are
    accurate to about 1e-8 * sigma_max, far below what ranks and codecs can tell apart."""
    values = torch.linalg.eigvalsh(gram)
    return Factors(gram.new_empty((len(gram), 0)), values.clamp_min_(0).sqrt_().flip(0))


def factorise(weight: torch.Tensor, name: str) -> Factors:
    """Singular values and all left singular vectors of ``weight`` [n, d]. Raises what ``gram`` raises."""
    values, vectors = torch.linalg.eigh(gram(weight, name))
    return Factors(vectors.flip(1), values.clamp_min_(0).sqrt_().flip(0))


def condition_number(singular: torch.Tensor) -> float:
    """sigma_max / sigma_min with sigma_min floored at CONDITION_FLOOR * sigma_max; 1.0 for an all-zero weight."""
    top = float(singular.max()) if singular.numel() else 0.0
    if top == 0.0:
        return 1.0
    return top / max(float(singular.min()), CONDITION_FLOOR * top)
