"""Rounding: how far machine numbers are from what they stand for (Higham, Accuracy and Stability, 2002, ch. 2 and
3)."""

from __future__ import annotations

import torch

SLACK = 1e-9
"""By what share every bound is widened for the rounding of its own fp64 arithmetic: sums of a million terms lose
1e-10."""


def unit(dtype: torch.dtype) -> float:
    """u: |round(x) - x| <= u |x| for normal numbers. 2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32, 2^-53 for
    fp64."""
    return torch.finfo(dtype).eps / 2


def rounding_error(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|round(x) - x| at most for |x| <= ``size``, entry by entry: u |x|, half of the least number of ``dtype``
    below its normal range, inf beyond its largest."""
    info = torch.finfo(dtype)
    lost = unit(dtype) * size + info.tiny * info.eps / 2
    return torch.where(size > info.max, torch.inf, lost)


def gamma(terms: int, dtype: torch.dtype) -> float:
    """A sum of ``terms`` products, in any order, is off by at most gamma_n times the sum of their absolute values:
    gamma_n = n u / (1 - n u) (Higham, section 3.1); inf where n u >= 1."""
    lost = terms * unit(dtype)
    return lost / (1 - lost) if lost < 1 else float("inf")


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """In what products of ``dtype`` add up: 16-bit ones in fp32, as BLAS libraries and tensor cores do."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
