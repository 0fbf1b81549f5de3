"""What a machine adds to an op: sums in the accumulator's precision, then one rounding to the op's own dtype.

Stated assumptions (Higham, Accuracy and Stability, ch. 2 and 3; IEEE 754): products of 16-bit numbers add up in
fp32, in any order; an elementary function computed in fp32 is within ``ULPS`` units of its result and of its
argument; subnormal numbers are not flushed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from lorc_fx import bounds

from .known import ULPS, Known, Tag, known, size
from .rules import CASTS, COPIES, MOVES
from .tags import INVERSE_RMS, MEAN_SQUARE, RMS, SQUARE

aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default: ("input", "weight"), aten.addmm.default: ("mat1", "mat2"), aten.mm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"), aten.bmm.default: ("self", "mat2"),
}  # fmt: skip
ROOTS = {SQUARE, MEAN_SQUARE, RMS, INVERSE_RMS}
"""Tags that a machine's values keep, with the share that was rounded on the way; other ops round on their own."""

_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_WEIGHTS = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_SUMS = {aten.mean.dim, aten.sum.dim_IntList, aten.cumsum.default, aten.linalg_vector_norm.default}
_ONCE = {
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, *CASTS,
}  # fmt: skip
EXACT = {
    aten.neg.default, aten.abs.default, aten.relu.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.maximum.default, aten.minimum.default, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.cat.default, aten.stack.default,
    aten.embedding.default, aten.amax.default, aten.amin.default, aten.view_as_real.default,
    aten.view_as_complex.default, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default,
    aten.ones.default, aten.full.default, aten.new_ones.default, aten.new_zeros.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.empty.memory_format, *COPIES, *MOVES,
}  # fmt: skip
"""Ops that round nothing."""


def rounds(node: Node) -> bool:
    """Whether a machine may round the result of an op."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if node.target in CASTS:
        before = node.all_input_nodes[0].meta["val"]
        return not before.is_floating_point() or torch.finfo(before.dtype).eps < torch.finfo(value.dtype).eps
    return node.target not in EXACT


def rounded(target: Any, dtype: torch.dtype, given: dict[str, Any], made: Known) -> Known:
    """``made`` as a machine computes it in ``dtype``: without most tags, as the ops that they stand for round too,
    and weights do not sum to one any more."""
    each = torch.zeros_like(made.value, dtype=torch.float64) if made.each is None else made.each
    inner = _inner(target, dtype, given, made)
    reach = made.value.abs() + each + inner
    extra = inner + bounds.rounding_error(reach.nan_to_num(0.0), dtype)
    extra = torch.where(torch.isinf(made.value), 0.0, extra)
    norm = None if made.norm is None else made.norm + extra.norm(dim=made.axis, keepdim=True)
    roots = tuple(replace(t, lost=t.lost + _share(target, dtype, t)) for t in made.tags if t.kind in ROOTS)
    return known(made.value, each + extra, norm, made.axis, tags=roots)


def _share(target: Any, dtype: torch.dtype, tag: Tag) -> float:
    """By what share of itself an op on the way from x to 1 / rms(x) may round."""
    sums = bounds.accumulated(dtype)
    inner = bounds.gamma(tag.of.value.shape[-1], sums) if target is aten.mean.dim else ULPS * bounds.unit(sums)
    return inner + bounds.unit(dtype)


def _inner(target: Any, dtype: torch.dtype, given: dict[str, Any], made: Known) -> torch.Tensor:
    """What is lost before the result is rounded."""
    sums = bounds.accumulated(dtype)
    if target in _PRODUCTS:
        a, b = (size(given[name]) for name in _PRODUCTS[target])
        b = b.T if target is aten.linear.default else b
        added = given["self"] if target is aten.addmm.default else given.get("bias")
        return bounds.gamma(a.shape[-1] + 1, sums) * ((a @ b) + (0.0 if added is None else size(added)))
    tensors, reach = [v for v in given.values() if isinstance(v, Known)], size(made)
    if target in _ONCE or not tensors:
        lost = sum(t.lost for v in tensors for t in v.tags if t.kind in (RMS, INVERSE_RMS))
        return reach * (lost / (1 - lost) if lost < 1 else torch.inf)
    first = tensors[0]
    if target in _WEIGHTS or target in _NORMS:
        return (bounds.gamma(first.value.shape[-1], sums) + ULPS * bounds.unit(sums)) * 2 * reach
    if target in _SUMS:
        running = target is aten.cumsum.default  # each of its results is a sum, of up to all entries
        terms = first.value.shape[given["dim"]] if running else first.value.numel() // max(made.value.numel(), 1)
        return bounds.gamma(terms + 1, sums) * _total(target, given, first)
    return ULPS * bounds.unit(sums) * (reach + (size(first) if first.value.shape == made.value.shape else 0.0))


def _total(target: Any, given: dict[str, Any], x: Known) -> torch.Tensor:
    """The sum (or mean) of absolute values."""
    if target is aten.cumsum.default:
        return size(x).cumsum(given["dim"])
    if target is aten.mean.dim:
        return size(x).mean(given["dim"], given["keepdim"])
    return size(x).sum(given["dim"], given["keepdim"])
