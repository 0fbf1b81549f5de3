"""Functions of single entries, sums of two values, and norms."""

from __future__ import annotations

import torch

from lorc_fx import bounds
from lorc_fx.bounds.pointwise import Activation

from .known import Known, known, summed


def activation(x: Known, function: Activation, value: torch.Tensor) -> Known:
    """A known function of one number, by its values at the ends of each entry's interval and by its slope in it."""
    assert x.each is not None
    each = function.entries(x.value, x.each)
    if x.norm is None or value.dim() == 0:
        return known(value, each)
    steepest = function.lipschitz(x.value, x.each).amax(x.axis, keepdim=True)
    return known(value, each, steepest * x.norm, x.axis)


def rising(x: Known, function: object, value: torch.Tensor) -> Known:
    """A function that rises everywhere (or falls everywhere) where it is defined."""
    assert x.each is not None and callable(function)
    ends = [function(x.value + sign * x.each) for sign in (-1, 1)]
    return known(value, torch.maximum((ends[0] - value).abs(), (ends[1] - value).abs()))


def plus(a: Known, b: Known, factor: float, value: torch.Tensor) -> Known:
    """a + factor b."""
    each = summed(a.each, None if b.each is None else abs(factor) * b.each)
    assert each is not None
    axis = a.axis if a.each is not None else b.axis
    same = a.value.dim() == b.value.dim() or a.exact or b.exact
    norm = None
    if same and value.dim():
        parts = [
            scale * x.along(axis) for x, scale in ((a, 1.0), (b, abs(factor))) if not x.exact and _whole(x, axis, value)
        ]
        if len(parts) == sum(not x.exact for x in (a, b)):
            norm = summed(*parts)
    return known(value, each.expand(value.shape), norm, axis)


def _whole(x: Known, axis: int, value: torch.Tensor) -> bool:
    """Whether x has all entries of ``value`` along that axis: what is spread over it has another norm."""
    return x.value.dim() >= -axis and x.value.shape[axis] == value.shape[axis]


def times(a: Known, b: Known, value: torch.Tensor) -> Known:
    """a b, entry by entry: da b + a db + da db."""
    each = summed(
        None if a.each is None else a.each * b.value.abs(),
        None if b.each is None else a.value.abs() * b.each,
        None if a.each is None or b.each is None else a.each * b.each,
    )
    assert each is not None
    axis = a.axis if not a.exact else b.axis
    norm = None
    if value.dim() and all(x.exact or _whole(x, axis, value) for x in (a, b)):
        norm = summed(_scaled(a, b, axis), _scaled(b, a, axis), None if a.exact else _both(a, b, axis))
    return known(value, each.expand(value.shape), norm, axis)


def _scaled(x: Known, other: Known, axis: int) -> torch.Tensor | None:
    """The norm of dx times the largest entry that it meets."""
    if x.exact:
        return None
    size = other.value.abs()
    return x.along(axis) * (size.amax(axis, keepdim=True) if size.dim() >= -axis else size)


def _both(a: Known, b: Known, axis: int) -> torch.Tensor | None:
    if b.each is None:
        return None
    return a.along(axis) * b.each.amax(axis, keepdim=True)


def quotient(a: Known, b: Known, value: torch.Tensor) -> Known:
    """a / b: where |b'| >= |b| - db > 0, |a'/b' - a/b| <= (da + |a/b| db) / (|b| - db)."""
    above = b.value.abs() - (0.0 if b.each is None else b.each)
    moved = summed(a.each, None if b.each is None else value.abs() * b.each)
    assert moved is not None
    return known(value, torch.where(above > 0, moved / above.clamp_min(1e-300), torch.inf))


def normed(x: Known, eps: float, gain: torch.Tensor | None, value: torch.Tensor, centred: bool) -> Known:
    """x / rms(x) (of x less its mean where ``centred``) times ``gain`` [n], along the last axis."""
    assert x.each is not None
    size, each, here, n = x.along(-1), x.each, x.value, x.value.shape[-1]
    if centred:
        here = here - here.mean(-1, keepdim=True)
        each = torch.minimum(each + each.mean(-1, keepdim=True), size)
    square = here.square().sum(-1, keepdim=True) + n * eps
    norm = bounds.unit_vectors(square, size, n)
    each = torch.minimum(bounds.unit_vector_entries(here, each, square, size), norm)
    if gain is None:
        return known(value, each, norm)
    factor = gain.double().abs()
    return known(value, each * factor, norm * factor.max())


def power(x: Known, exponent: float, value: torch.Tensor) -> Known:
    """x^exponent: whole exponents by |x'^m - x^m| <= (|x| + dx)^m - |x|^m; others where x stays positive."""
    assert x.each is not None
    if float(exponent).is_integer() and exponent > 0:
        return known(value, (x.value.abs() + x.each).pow(exponent) - x.value.abs().pow(exponent))
    positive = x.value - x.each > 0
    made = rising(x, lambda t: t.clamp_min(1e-300).pow(exponent), value)
    assert made.each is not None
    return known(value, torch.where(positive, made.each, torch.inf))
