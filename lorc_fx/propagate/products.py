"""Linear maps, products of two values, and attention."""

from __future__ import annotations

from typing import Any

import torch

from lorc_fx import bounds

from .known import ULPS, Known, known, size, summed

ROWS = 1 << 14
"""Rows of a weight whose absolute values are in memory at a time."""


def linear(x: Known, weight: torch.Tensor, value: torch.Tensor) -> Known:
    """``value`` = x W^T + b, for W [out, in] fp64. |W dx| entry by entry is at most |W| |dx|, and each row's
    norm times that of dx; its norm is at most |W|_2 that of dx."""
    assert x.each is not None
    size, flat = x.along(-1), x.each.reshape(-1, x.each.shape[-1])
    lines, lengths = [], []
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS]
        lines.append(flat @ rows.abs().T)
        lengths.append(rows.norm(dim=1))
    each = torch.cat(lines, -1).reshape(value.shape)
    each = torch.minimum(each, size * torch.cat(lengths))
    wide = len(weight) > 8 * weight.shape[1]  # a vocabulary: nobody asks for the norm of all logits
    return known(value, each, None if wide else bounds.spectral_norm(weight) * size)


def matmul(a: Known, b: Known, value: torch.Tensor) -> Known:
    """``value`` = a b, [.., S, K] and [.., K, T]: a' b' - a b = da b + a db + da db."""
    if a.varied is not None and b.value.dim() >= 2:
        return weighted(a, b, value)
    left, right = a.value.abs(), b.value.abs()
    each = summed(
        None if a.each is None else a.each @ right,
        None if b.each is None else left @ b.each,
        None if a.each is None or b.each is None else a.each @ b.each,
    )
    assert each is not None
    size_a, size_b = a.along(-1), b.along(-2) if b.value.dim() > 1 else b.along(-1)
    long_a = a.value.norm(dim=-1, keepdim=True)
    long_b = b.value.norm(dim=-2 if b.value.dim() > 1 else -1, keepdim=True)
    schwarz = bounds.product_error(long_a, size_a, long_b, size_b)
    if a.value.dim() == 1 and b.value.dim() > 1:
        schwarz = schwarz.squeeze(-2)
    if b.value.dim() == 1:
        schwarz = schwarz.squeeze(-1)
    return known(value, torch.minimum(each, schwarz.expand(each.shape)))


def weighted(p: Known, v: Known, value: torch.Tensor) -> Known:
    """``value`` = p v, where p are weights that sum to one in both models: ``bounds.output_error``; entry by entry
    the same, around the mean of all values."""
    moved = p.each if p.each is not None else torch.zeros_like(p.value)
    size = v.along(-1)[..., 0]
    assert p.varied is not None
    norm = bounds.output_error(p.value, v.value, moved, size, p.varied[..., 0])
    each = (p.value + moved).clamp_max(1.0) @ v.each if v.each is not None else torch.zeros_like(value)
    if p.each is not None:
        centre = v.value.mean(-2, keepdim=True)
        spread = moved @ (v.value - centre).abs()
        each = each + torch.minimum(spread, moved @ v.value.abs())
    return known(value, each, norm[..., None])


def softmax(x: Known, dim: int, value: torch.Tensor) -> Known:
    """Weights: ``bounds.weight_error``; in the 2-norm at most half that of the scores, and the root of two times the
    total variation."""
    assert x.each is not None
    dim = dim - x.value.dim() if dim >= 0 else dim
    scores, errors = x.value.movedim(dim, -1), x.each.movedim(dim, -1)
    each = bounds.weight_error(scores, errors).movedim(-1, dim)
    varied = bounds.total_variation(errors)[..., None].movedim(-1, dim)
    norm = torch.minimum(x.along(dim) / 2, 2**0.5 * varied)
    return known(value, each, norm, dim, varied=varied if dim == -1 else None)


def certain(weights: torch.Tensor) -> Known:
    """Softmax weights that are the same in both models."""
    return Known(weights, varied=torch.zeros_like(weights[..., :1]))


def attention(given: dict[str, Any], value: torch.Tensor, dtype: torch.dtype | None = None) -> Known:
    """SDPA, as its parts. ``given``: its arguments by name, tensors as Known; ``dtype``: in which a machine
    computes it."""
    q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    k, v = (repeated(x, _groups(given, q.value, x.value)) for x in (k, v))
    turned = Known(k.value.transpose(-1, -2), *_transposed(k))
    raw, scale = q.value @ turned.value, abs(_scale(given, q.value))
    scores = Known(raw) if q.exact and k.exact else matmul(q, turned, raw)
    each = None if scores.each is None else scores.each * scale
    shown = masked(given, q.value, scores.value)
    if mask is not None and mask.each is not None:
        each = summed(each, mask.each)
    if dtype is not None:
        each = summed(each, score_rounding(q, turned, scale, dtype))
    weights = certain(shown.softmax(-1))
    if each is not None:
        each = torch.where(torch.isneginf(shown), 0.0, each.expand(shown.shape))
        weights = softmax(known(shown, each), -1, weights.value)
    made = weighted(weights, v, value)
    if dtype is None:
        return made
    assert made.each is not None
    return known(value, made.each + weight_rounding(weights, v, dtype))


def score_rounding(q: Known, k: Known, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """What a machine adds to scaled scores, from q [.., S, D] and k [.., D, T]: a sum of D products, rounded a few
    times (with the mask, and with a running maximum)."""
    a, b = size(q), size(k)
    sums = bounds.accumulated(dtype)
    return (bounds.gamma(a.shape[-1], sums) + 4 * bounds.unit(sums) + 2 * bounds.unit(dtype)) * scale * (a @ b)


def weight_rounding(p: Known, v: Known, dtype: torch.dtype) -> torch.Tensor:
    """What a machine adds to the result: weights that are off by a share of themselves, and a sum over T."""
    sums = bounds.accumulated(dtype)
    share = 3 * bounds.gamma(p.value.shape[-1], sums) + 2 * ULPS * bounds.unit(sums) + 2 * bounds.unit(dtype)
    return share * (size(p) @ size(v))


def attention_weights(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax weights [.., S, T] of SDPA, and the values [.., T, D] that they meet. ``given``: plain tensors."""
    q, k, v = given["query"], given["key"], given["value"]
    k, v = (x.repeat_interleave(_groups(given, q, x), -3) for x in (k, v))
    mask = given["attn_mask"]
    about = {**given, "attn_mask": None if mask is None else Known(mask)}
    return masked(about, q, q @ k.transpose(-1, -2)).softmax(-1), v


def masked(given: dict[str, Any], query: torch.Tensor, dots: torch.Tensor) -> torch.Tensor:
    """Scores of SDPA from q k^T."""
    shown, mask = dots * _scale(given, query), given["attn_mask"]
    if given["is_causal"]:
        shown = shown.masked_fill(~torch.ones_like(shown, dtype=torch.bool).tril(), -torch.inf)
    if mask is None:
        return shown
    if mask.value.dtype == torch.bool:
        return shown.masked_fill(~mask.value, -torch.inf)
    return shown + mask.value


def _scale(given: dict[str, Any], query: torch.Tensor) -> float:
    return float(given["scale"]) if given["scale"] is not None else query.shape[-1] ** -0.5


def _groups(given: dict[str, Any], query: torch.Tensor, cached: torch.Tensor) -> int:
    return query.shape[-3] // cached.shape[-3] if given["enable_gqa"] else 1


def _transposed(k: Known) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    each = None if k.each is None else k.each.transpose(-1, -2)
    norm = None if k.norm is None or k.axis != -1 else k.norm.transpose(-1, -2)
    return each, norm, -2


def repeated(x: Known, groups: int) -> Known:
    """Heads [.., H, T, D] each ``groups`` times."""
    if groups == 1:
        return x
    several = [None if t is None else t.repeat_interleave(groups, -3) for t in (x.value, x.each, x.norm)]
    assert several[0] is not None
    return Known(several[0], several[1], several[2], x.axis)
