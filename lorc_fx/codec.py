"""The codec of one site: how a per-token vector y becomes a latent and is read back (DESIGN section 2).

    c = (y - mu) P      stored, model dtype          y_hat = mu + c S

``y = W x + b`` has width n. LoRC (arXiv 2410.03111) takes P = U_r, S = U_r^T with U_r the r leading left singular
vectors of W. The mean mu is the bias b: it is the same for every token and known without data, so keeping it exact
costs nothing and makes the latent a projection of W x alone. ``P^T W`` replaces W, so y is never formed.
At full rank (r = n) every orthonormal basis is lossless, so the identity is taken: no decode, no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .decoder import Decoder
from .errors import BadWeight

CONDITION_FLOOR = 1e-7
"""sigma_min is floored at this fraction of sigma_max, about the epsilon of fp32 weights: what is below it is noise."""

RANK_FLOOR = 1e-6
"""Singular values below this fraction of sigma_max count as zero for the rank: lossless to fp32 accuracy."""


@dataclass(frozen=True)
class Factors:
    """What one effective weight [n, d] gives: ``left`` U [n, n] fp64 (columns by falling singular value) and
    ``singular`` values [n] fp64, descending."""

    left: torch.Tensor
    singular: torch.Tensor

    @property
    def condition(self) -> float:
        return condition_number(self.singular)

    @property
    def rank(self) -> int:
        """The numerical rank, at least 1: more columns would store nothing (repeated heads, narrow projections)."""
        return max(1, int((self.singular > RANK_FLOOR * self.singular.max()).sum()))


def factorise(weight: torch.Tensor, name: str) -> Factors:
    """Left singular vectors and singular values of ``weight`` [n, d], by eigh of W W^T in fp64.

    Only U and sigma are needed (V folds into the encoder), so the n x n Gram matrix is enough. Small singular values
    are accurate to about 1e-8 * sigma_max, far below what ranks and codecs can tell apart. Raises BadWeight on NaN or
    inf: such a site cannot be ordered and must not be compressed silently.
    """
    if not bool(torch.isfinite(weight).all()):
        raise BadWeight(name)
    w = weight.detach().to(torch.float64)
    values, vectors = torch.linalg.eigh(w @ w.T)
    singular = values.clamp_min(0).sqrt().flip(0)
    return Factors(vectors.flip(1), singular)


def condition_number(singular: torch.Tensor) -> float:
    """sigma_max / sigma_min with sigma_min floored at CONDITION_FLOOR * sigma_max; 1.0 for an all-zero weight."""
    top = float(singular.max()) if singular.numel() else 0.0
    if top == 0.0:
        return 1.0
    return top / max(float(singular.min()), CONDITION_FLOOR * top)


@dataclass(frozen=True, eq=False)
class Codec:
    """One site's codec. Compared by identity: a latent is only ever read by the codec that wrote it.

    encode [r, d] model dtype: P^T W.   decode [r, n] model dtype: S, or None at full rank (identity).
    mean [n] model dtype: mu, or None where it is zero.   consts: the tensors that the decoder's epilogue reads.
    """

    decoder: Decoder
    encode: torch.Tensor
    decode: torch.Tensor | None
    mean: torch.Tensor | None
    consts: tuple[torch.Tensor, ...]

    @property
    def rank(self) -> int:
        return self.encode.shape[0]

    @property
    def width(self) -> int:
        return self.decoder.width

    @property
    def dtype(self) -> torch.dtype:
        return self.encode.dtype

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled graph depends on: two codecs of equal signature can be swapped as plain inputs."""
        return (self.rank, self.decode is None, self.mean is None, self.dtype, self.decoder.digest)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The codec's tensors by field name, as inputs for a graph that decodes."""
        named = {"decode": self.decode, "mean": self.mean}
        named.update({f"const{i}": c for i, c in enumerate(self.consts)})
        return {k: v for k, v in named.items() if v is not None}

    def nbytes(self) -> int:
        """Bytes of the codec's own matrices (consts belong to the model)."""
        own = (self.encode, self.decode, self.mean)
        return sum(t.untyped_storage().nbytes() for t in own if t is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        return self  # guards deep-copy metadata; identity must survive


def make_codec(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors | None,
    rank: int,
    decoder: Decoder,
    consts: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
) -> Codec:
    """The LoRC codec of rank ``rank`` for the effective ``weight`` [n, d] and ``bias`` [n].

    The basis keeps the columns of U of largest singular value (Eckart-Young: no rank-r codec of W x has a smaller
    worst-case or mean-square error over isotropic x). ``factors`` may be None at full rank.
    """
    mean = None if bias is None else bias.detach().to(dtype).contiguous()
    if rank >= weight.shape[0]:
        return Codec(decoder, weight.detach().to(dtype).contiguous(), None, mean, consts)
    assert factors is not None
    basis = factors.left[:, :rank]
    encode = (basis.T @ weight.detach().to(torch.float64)).to(dtype).contiguous()
    return Codec(decoder, encode, basis.T.to(dtype, copy=True).contiguous(), mean, consts)
