"""Bounds on codecs: how far the y that is read back can be from y = W x + b, per token.

    y' - y  =  (S E - W) x + constants     dropped columns, for this x exactly
             + S (Q(c) - c)                rounding of what is stored, by its steps
             + S E (x' - x)                what the input has already lost

with E, S the codec's ``encode`` (P^T W where it takes y) and ``decode`` as they are stored (so their own rounding is in
the first line).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lorc_fx.codec import Codec
from lorc_fx.groups import expanded
from lorc_fx.packing import CLIPS, MODEL, SNAP, STEPS, TINY

from .matrices import spectral_norm
from .roundoff import SLACK, accumulated, gamma, rounding_error, unit

HALF_ULP = 2.0**-11
"""Unit roundoff of a row's scale, which is in fp16; ``SUBNORMAL`` where it is below the normal range."""
SUBNORMAL = 2.0**-25
FP32 = 2.0**-20
"""Rounding of the few fp32 operations between a column and its level, and back."""


@dataclass(frozen=True)
class CodecError:
    """Bounds of |y' - y| in parts that add up: [N, groups + 1] each, over the features of each group (heads, as a
    rule), then over all of them; and ``each`` [N, n], feature by feature. ``dropped``: by columns that are not
    stored. ``rounded``: by quantisation. ``stored``: by the model's dtype, in which columns are stored and read.
    ``carried``: by the error of x."""

    dropped: torch.Tensor
    rounded: torch.Tensor
    stored: torch.Tensor
    carried: torch.Tensor
    each: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """[N, groups + 1]"""
        return (self.dropped + self.rounded + self.stored + self.carried) * (1 + SLACK)

    @property
    def heads(self) -> torch.Tensor:
        """Of each group: [N, groups]"""
        return self.total[..., :-1]

    @property
    def whole(self) -> torch.Tensor:
        """Over all features: [N, 1]"""
        return self.total[..., -1:]


@dataclass(frozen=True)
class Rounding:
    """What quantised columns lose: ``each`` [N, q] column by column, and ``total`` [N, 1], the root of the sum of
    (error * weight)^2."""

    each: torch.Tensor
    total: torch.Tensor


def quantisation_error(
    code: torch.Tensor, moves: torch.Tensor, segments: Sequence[tuple[int, int]], weights: torch.Tensor
) -> Rounding:
    """What ``packing.quantise`` loses of columns that are within ``moves`` [N, q] of ``code`` [N, q], which weighs
    errors by ``weights`` [q].

    Statement. A row takes, of a ladder of scales, the one with the least weighted squares: so these sum to no more
    than what any of them loses, and one whose clipped excess alone sums to more is not taken. With a given scale a
    column loses no more than half of its step, or its excess; and no more than ``code`` is away from its own level at
    that scale, plus ``moves``, plus what that level moves by where the scale is only known to lie in an interval
    (it goes with the largest column, and is rounded to fp16). Proof. Levels are at odd multiples of half a step from
    -(2^b - 1) / 2 to (2^b - 1) / 2 steps: within that and half a step more, the nearest is half a step away at most.
    A column takes the nearest level, which is no farther than any other, that of ``code`` among them."""
    spec = [(columns, bits) for columns, bits in segments if bits != MODEL and columns]
    step = torch.cat([torch.full((n,), STEPS[bits], dtype=torch.float64) for n, bits in spec])
    half = torch.cat([torch.full((n,), 2.0 ** (bits - 1), dtype=torch.float64) for n, bits in spec])
    low, high = (code.abs() - moves).clamp_min(0), code.abs() + moves
    most, least = ((v / (step * half)).amax(-1, keepdim=True) for v in (high, low))
    rungs, best = [], None
    for clip in CLIPS:
        scale = (most * clip * (1 + HALF_ULP) + SUBNORMAL).clamp(TINY, 65504.0)
        smallest = (least * clip * (1 - HALF_ULP) - SUBNORMAL).clamp(TINY, 65504.0)
        lost = torch.maximum(step * scale / 2, high - step * (half - 0.5) * smallest) * (1 + FP32)
        if best is None:
            # Values are at most 2^(bits-1) steps of the unrounded scale: whatever ``low`` is, no more is clipped.
            rounding = most * HALF_ULP + SUBNORMAL + (most - 65504.0).clamp_min(0)
            lost = torch.minimum(lost, step * (scale / 2 + half * rounding) * (1 + FP32))
        middle, width = step * (scale + smallest) / 2, step * (scale - smallest) / 2
        level = (code / middle).floor().clamp(-half, half - 1) + 0.5
        near = (code - level * middle).abs() + level.abs() * width + moves + FP32 * high
        lost = torch.minimum(lost, near)
        clipped = ((low - step * half * scale).clamp_min(0) * weights).norm(dim=-1, keepdim=True)
        rungs.append((lost, clipped))
        size = (lost * weights).norm(dim=-1, keepdim=True)
        best = size if best is None else torch.minimum(best, size)
    assert best is not None
    best = best * (1 + FP32)  # errors are compared in fp32
    each = torch.zeros_like(high)
    for lost, clipped in rungs:
        each = torch.where(clipped <= best, torch.maximum(each, lost), each)
    each = torch.minimum(each, best / weights)
    return Rounding(each, torch.minimum(best, (each * weights).norm(dim=-1, keepdim=True)))


def codec_error(
    codec: Codec,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    radius: torch.Tensor | None = None,
    groups: int = 1,
    unsure: torch.Tensor | None = None,
) -> CodecError:
    """Bounds for a projected site. ``weight`` [n, d] and ``bias`` [n]: the effective ones; ``x`` [N, d]: tokens as
    the dense model has them; ``radius`` [N, 1]: |x' - x| at most (None: none); ``groups``: heads of n; ``unsure`` [N,
    k]: what a machine's codes may be off by before they are quantised (``code_rounding``; that they are is counted in
    ``computed``).

    Proof. As above, per group of features (rows of S E and of S). Where there are several means, a token may take any
    whose nearness, with the error of x, can be the largest: the worst of these counts.
    """
    form, n = codec.format, weight.shape[0]
    x = x.double()
    tables = _Tables(codec, weight.double(), bias, groups)
    radius = x.new_zeros((len(x), 1)) if radius is None else radius.double()
    away = x @ tables.miss.T - (0.0 if bias is None else bias.double()) + tables.constant
    carried = radius * tables.gains
    carried_each = radius * tables.through.norm(dim=-1)
    each, sums = None, None
    unsure = x.new_zeros((len(x), codec.latent_width)) if unsure is None else unsure
    for choice, possible in _choices(codec, x, radius, tables, unsure[:, form.columns :]):
        gap = tables.gaps[choice]
        code = tables.coded(x, choice)
        quantised, held = _rounding(codec, code, radius, tables, choice, unsure[:, : form.columns])
        dropped = _norms(away + gap, groups)
        parts = [dropped, tables.norms(quantised), tables.norms(held)]
        entry = (away + gap).abs() + tables.entries(quantised) + tables.entries(held)
        masked = [torch.where(possible, p, 0.0) for p in parts]
        entry = torch.where(possible, entry, 0.0)
        each = entry if each is None else torch.maximum(each, entry)
        sums = masked if sums is None else [torch.maximum(a, b) for a, b in zip(sums, masked, strict=True)]
    assert each is not None and sums is not None
    assert form.columns <= n
    return CodecError(sums[0], sums[1], sums[2], carried, (each + carried_each) * (1 + SLACK) + 1e-13)


class _Tables:
    """What does not depend on the token."""

    def __init__(self, codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> None:
        n, r = weight.shape[0], codec.format.columns
        encode, shift = codec.folded(weight, bias)
        matrix = codec.matrix
        decode = torch.eye(n, dtype=torch.float64) if matrix is None else matrix.double()
        self.encode, self.shift, self.decode = encode, shift, decode
        self.offsets = encode.new_zeros((1, r)) if codec.offsets is None else codec.offsets.double()
        self.spread = encode.new_ones(r) if codec.spread is None else codec.spread.double()
        self.through = decode[:r].T @ encode[:r]  # S E [n, d]
        self.miss = self.through - weight
        self.constant = decode[:r].T @ shift[:r] + (0.0 if codec.mean is None else codec.mean.double())
        # A token of mean j has offsets_j taken off its columns and mu_j - mu_0 put on, in the model's dtype.
        gaps = torch.cat([decode.new_zeros((1, n)), decode[r:]])
        self.gaps = gaps - self.offsets @ decode[:r]
        self.gains = _group_norms(self.through, groups)
        weighted = decode[:r] / self.spread[:, None]
        self.read, self.read_each = _group_norms(weighted.T, groups), weighted.norm(dim=0)
        self.rows = _norms(decode[:r], groups)  # of each column in each group: [r, groups + 1]
        parts = [*decode[:r].unflatten(1, (groups, -1)).unbind(1), decode[:r]]
        unit_rows = [part / size[:, None].clamp_min(1e-300) for part, size in zip(parts, self.rows.T, strict=True)]
        self.overlap = torch.tensor([spectral_norm(part) for part in unit_rows], dtype=torch.float64)

    def norms(self, lost: Rounding) -> torch.Tensor:
        """|S e| at most of each group, [N, groups + 1], for errors e of columns: their weighted norm times that of
        S in these weights; or, where columns of S are of very different lengths, the root of the sum of (e_m
        |s_m|)^2 times the norm of S with all of them of length 1. Both are submultiplicativity, for a diagonal put
        between S and e."""
        apart = (lost.each.square() @ self.rows.square()).sqrt() * self.overlap
        return torch.minimum(lost.total * self.read, apart)

    def entries(self, lost: Rounding) -> torch.Tensor:
        """The same entry by entry, [N, n]."""
        return torch.minimum(lost.total * self.read_each, lost.each @ self.decode[: len(self.rows)].abs())

    def coded(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        """Columns [N, r] before they are rounded."""
        r = len(self.spread)
        return x @ self.encode[:r].T + self.shift[:r] - self.offsets[choice]


def _norms(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Norms of the features [N, n] of each group, then of all: [N, groups + 1]."""
    return torch.cat([rows.unflatten(-1, (groups, -1)).norm(dim=-1), rows.norm(dim=-1, keepdim=True)], -1)


def _group_norms(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """Spectral norms of the rows [n, .] of each group, then of all: [groups + 1]."""
    parts = [*matrix.unflatten(0, (groups, -1)), matrix]
    return torch.tensor([spectral_norm(part) for part in parts], dtype=torch.float64)


def _choices(
    codec: Codec, x: torch.Tensor, radius: torch.Tensor, t: _Tables, unsure: torch.Tensor
) -> list[tuple[int, torch.Tensor]]:
    """(mean, [N, 1] whether a token may take it). ``unsure`` [N, m - 1]: as above."""
    r = codec.format.columns
    if codec.format.choices == 1:
        return [(0, torch.ones((len(x), 1), dtype=torch.bool))]
    rows = t.encode[r:]
    near = torch.cat([x.new_zeros((len(x), 1)), x @ rows.T + t.shift[r:]], -1)
    moves = radius * torch.cat([x.new_zeros(1), rows.norm(dim=1)])
    size = torch.cat([x.new_zeros((len(x), 1)), x.abs() @ rows.abs().T + t.shift[r:].abs()], -1)
    moves = moves + (FP32 + gamma(x.shape[-1] + 1, torch.float32)) * size  # nearness is computed in fp32
    moves[:, 1:] += unsure
    possible = near + moves >= (near - moves).amax(-1, keepdim=True)
    return [(j, possible[:, j : j + 1]) for j in range(codec.format.choices)]


def _rounding(
    codec: Codec, code: torch.Tensor, radius: torch.Tensor, t: _Tables, choice: int, unsure: torch.Tensor
) -> tuple[Rounding, Rounding]:
    """What quantised columns and those in the model's dtype lose, weighted by ``spread``."""
    form = codec.format
    exact = sum(s.columns for s in form.segments if s.bits == MODEL)
    moves = radius * t.encode[: code.shape[-1]].norm(dim=1) + unsure
    size, coarse = code.abs(), Rounding(torch.zeros_like(code), code.new_zeros((len(code), 1)))
    if form.scaled:
        found = quantisation_error(code[:, exact:], moves[:, exact:], form.spec, t.spread[exact:])
        coarse = Rounding(torch.cat([torch.zeros_like(code[:, :exact]), found.each], -1), found.total)
    # A token that may be this near to its mean may be put on it.
    near = SNAP * torch.finfo(form.dtype).eps * float((t.offsets[choice] * t.spread).norm())
    least = ((size - moves).clamp_min(0) * t.spread).norm(dim=-1, keepdim=True)
    noise = torch.where(least <= near * (1 + FP32), near, 0.0)
    held = rounding_error(size + moves, form.dtype) + (0.0 if form.plain else FP32) * (size + moves)
    cast = unit(form.dtype)  # what is read is cast, and not what was written
    total = (1 + cast) * noise + cast * coarse.total + (held * t.spread).norm(dim=-1, keepdim=True)
    return coarse, Rounding(held + cast * coarse.each + (1 + cast) * noise / t.spread, total)


def unprojected_error(
    codec: Codec, value: torch.Tensor, radius: torch.Tensor | None = None, groups: int = 1
) -> CodecError:
    """The same for a site that is cached as it is: ``value`` [N, n], |value' - value| at most ``radius`` [N, 1]
    (of which nothing is ``carried``: it is the caller's own). Each head is turned (orthonormally), rounded and
    turned back."""
    form = codec.format
    turn = codec.consts[0].double() if codec.consts else value.new_ones((1, 1), dtype=torch.float64)
    heads = value.double().unflatten(-1, (-1, len(turn)))
    radius = heads.new_zeros((len(heads), 1)) if radius is None else radius.double()
    code = (heads @ turn).flatten(-2)
    size, coarse = code.abs(), torch.zeros_like(code)
    if form.scaled:
        coarse = quantisation_error(code, radius, form.spec, torch.ones(size.shape[-1], dtype=torch.float64)).each
    stored = rounding_error(size + radius + coarse, form.dtype) + (0.0 if form.plain else 2 * FP32) * (size + radius)
    lost = (coarse + stored).unflatten(-1, (-1, len(turn)))
    each = torch.minimum(lost @ turn.abs().T, lost.norm(dim=-1, keepdim=True)).flatten(-2) * (1 + SLACK)
    rounded, held = (_norms(part, groups) for part in (coarse, stored))
    nothing = torch.zeros_like(rounded)
    return CodecError(nothing, rounded, held, nothing, each)


def code_rounding(
    codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, radius: torch.Tensor | None
) -> torch.Tensor:
    """What a machine's codes are off by, [N, k]; ``x`` [N, d] and ``radius`` as above.

    Statement. A code is a sum of d products in the dtype of ``encode``: gamma_d |E| |x|, then a rounding (Higham,
    section 3.1). Where it is made of y, y is such a sum in the model's dtype, with W for E and rounded twice at most
    (the bias may come after); that is carried by P^T, whose n products are a sum as well."""
    sums, own = _sums(codec, weight, bias, x, radius), codec.encode.dtype
    if not codec.from_y:
        return sums * (gamma(x.shape[-1] + 1, accumulated(own)) + unit(own))
    made = gamma(x.shape[-1] + 1, accumulated(codec.dtype)) + 2 * unit(codec.dtype) * (1 + unit(codec.dtype))
    return sums * (made + (1 + made) * (gamma(len(weight) + 2, own) + unit(own)))


def _sums(
    codec: Codec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, radius: torch.Tensor | None
) -> torch.Tensor:
    """|E| |x| and the shift's size, of a code of y |P^T| (|W| |x| + |b|) and that of its own: [N, k]."""
    reach = x.double().abs() + (0.0 if radius is None else radius)
    encode = codec.encode.double().abs()
    if codec.from_y:
        reach = reach @ weight.double().abs().T + (0.0 if bias is None else bias.double().abs())
        encode = expanded(encode, codec.format.segments, codec.groups)
    return reach @ encode.T + (0.0 if codec.shift is None else codec.shift.double().abs())


def computed(
    error: CodecError,
    codec: Codec,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    radius: torch.Tensor | None,
    size: torch.Tensor,
) -> CodecError:
    """``error`` with the rounding of a machine that computes codes and reads them back: ``each`` and ``stored`` grow.
    ``weight``, ``bias``, ``x`` [N, d] and ``radius`` as above; ``size`` [N, n]: |y| at most.

    Statement. Codes are off by ``code_rounding``; what is read is a sum of as many products as there are columns, in
    the model's dtype: gamma_k |S| |c|, then a rounding of each."""
    form, r = codec.format, codec.format.columns
    given = codec, weight, bias, x, radius
    sums, lost = _sums(*given), code_rounding(*given)
    matrix = codec.matrix
    if matrix is None:
        entries = lost
    else:
        read = matrix.double().abs()
        columns = sums if codec.offsets is None else sums + _padded(codec.offsets.double().abs().amax(0), sums)
        entries = lost[..., :r] @ read[:r] + gamma(len(read) + 1, accumulated(form.dtype)) * (columns @ read)
    entries = entries + 2 * unit(form.dtype) * (size + error.each + entries)
    parts = _norms(entries, error.total.shape[-1] - 1)
    return replace(error, stored=error.stored + parts, each=error.each + entries)


def _padded(row: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[r] as [k]: nothing for what follows the columns, but that the mean's own gap may be read: 1."""
    return torch.cat([row, row.new_ones(like.shape[-1] - len(row))])
