"""How latents become rows of bytes and come back: segments of columns, each at its own precision.

A row is one token of one batch row. It holds, in this order: the columns kept in the model's dtype; one fp16 scale for
all quantised columns; these columns, bit-packed; and, where a codec has several means, which one: of two means the sign
of the scale says it, else one byte.

Columns come in units of their own spread (``Codec.spread``), so one scale per token serves all of them. A column of
``b`` bits has 2^b levels at odd multiples of half a step: value = (q + 1/2) step, -2^(b-1) <= q < 2^(b-1), and
step = scale * STEPS[b]. Of a ladder of clipped candidates the scale is the one with the least squared error.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

MODEL = 0
"""The ``bits`` of a segment that is kept in the model's dtype."""

BITS = (8, 6, 5, 4, 3, 2, 1)
"""Bits that a quantised column can have."""

STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""Steps of the best uniform quantisers of a Gaussian of spread 1 (Max, 1960): so columns of different bits share a
scale."""

CLIPS = (1.0, 0.8, 0.65, 0.53, 0.43, 0.35)
"""Candidate scales of a token, as fractions of the one that clips nothing. A longer ladder gains 1 % (Gemma 3 270M)."""

SNAP = 4
"""A token this near to a further mean (in roundings of the mean's own size) lies on it: what is left is the rounding of
a product far larger than other tokens', and would be stored as if it meant something. So a constant sink is exact."""

SCALE_BYTES = 2
INDEX_BYTES = 1
TINY = 2.0**-24
"""The least scale: fp16's smallest number. No written row is all zero bytes, so rows without a token stand out."""


class Segment(NamedTuple):
    """``columns`` consecutive columns at ``bits`` bits (``MODEL``: in the model's dtype)."""

    columns: int
    bits: int


def planes(bits: int) -> tuple[int, ...]:
    """A column's bits as planes of 8, 4, 2 or 1 bits: 3 is 2 + 1, 5 is 4 + 1, 6 is 4 + 2."""
    return {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(bits, (bits,))


def segment_bytes(columns: int, bits: int, element: int) -> int:
    """Bytes of a segment in one row. ``element``: bytes of one number in the model's dtype."""
    if bits == MODEL:
        return columns * element
    return sum(-(-columns * plane // 8) for plane in planes(bits))


def index_bytes(choices: int, scaled: bool) -> int:
    """Bytes that say which of ``choices`` means a token has; ``scaled``: the row has a scale, whose sign is free."""
    return 0 if choices == 1 or (choices == 2 and scaled) else INDEX_BYTES


@dataclass(frozen=True)
class Format:
    """The layout of a row. ``choices``: how many means a token can have (1: no index is stored).

    segments: by falling bits, the model's dtype first. dtype: the model's.
    """

    segments: tuple[Segment, ...]
    choices: int
    dtype: torch.dtype

    @cached_property
    def columns(self) -> int:
        return sum(s.columns for s in self.segments)

    @property
    def spec(self) -> tuple[tuple[int, int], ...]:
        """The segments as plain tuples, for graphs."""
        return tuple((s.columns, s.bits) for s in self.segments)

    @property
    def parts(self) -> tuple[list[int], list[int], int, torch.dtype]:
        """Columns, bits, choices and dtype, as the schema of an op has them; ``form_of`` makes a format of them."""
        return [s.columns for s in self.segments], [s.bits for s in self.segments], self.choices, self.dtype

    @cached_property
    def plain(self) -> bool:
        """Whether a row is simply its columns in the model's dtype."""
        return self.choices == 1 and all(s.bits == MODEL for s in self.segments)

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored rows: the model's where they are plain, else bytes."""
        return self.dtype if self.plain else torch.uint8

    @property
    def width(self) -> int:
        """Elements of ``storage`` per row."""
        return self.columns if self.plain else self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes per row: all segments and the index, padded so that every row begins aligned for what it holds."""
        element = self.dtype.itemsize
        total = sum(segment_bytes(s.columns, s.bits, element) for s in self.segments)
        total += SCALE_BYTES * self.scaled + index_bytes(self.choices, self.scaled)
        return -(-total // self.alignment) * self.alignment

    @cached_property
    def scaled(self) -> bool:
        """Whether a row has a scale."""
        return any(s.bits != MODEL and s.columns for s in self.segments)

    @property
    def alignment(self) -> int:
        has_model = any(s.bits == MODEL and s.columns for s in self.segments)
        return max(self.dtype.itemsize if has_model else 1, SCALE_BYTES if self.scaled else 1)


def form_of(columns: Sequence[int], bits: Sequence[int], choices: int, dtype: torch.dtype) -> Format:
    """The format of ``Format.parts``."""
    return Format(tuple(map(Segment, columns, bits)), choices, dtype)


def quantise(
    values: torch.Tensor, segments: Sequence[tuple[int, int]], spread: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [.., k] fp32 (quantised columns only, as ``segments`` (columns, bits) say) -> levels q in 0 .. 2^bits - 1
    [.., k] int32, and scale [.., 1] fp16.

    |value - dequantised| <= step / 2 where |value| <= 2^(bits-1) step, else the excess over the outermost level; step =
    scale * STEPS[bits]. Errors count as ``spread`` [k] times as large (None: all alike).
    """
    step, half = per_column(segments, values.device)
    largest = (values.abs() / (step * half)).amax(-1, keepdim=True)
    best = largest.clamp(TINY, 65504.0).to(torch.float16)
    least = torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = (largest * clip).clamp(TINY, 65504.0).to(torch.float16)
        error = dequantise(_levels(values, scale.float() * step, half), scale.float() * step, half) - values
        error = (error if spread is None else error * spread).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return _levels(values, best.float() * step, half).to(torch.int32), best


def per_column(segments: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each quantised column: its step at scale 1, and 2^(bits-1); [k] fp32."""
    quantised = [(n, b) for n, b in segments if b != MODEL]
    steps = [torch.full((n,), STEPS[b], device=device) for n, b in quantised]
    halves = [torch.full((n,), float(1 << (b - 1)), device=device) for n, b in quantised]
    return torch.cat(steps), torch.cat(halves)


def _levels(values: torch.Tensor, step: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.maximum((values / step).floor(), -half), half - 1) + half


def dequantise(levels: torch.Tensor, step: torch.Tensor, half: torch.Tensor | float) -> torch.Tensor:
    """levels q' in 0 .. 2^bits - 1, step fp32 -> (q' - 2^(bits-1) + 1/2) step, fp32. ``half``: 2^(bits-1)."""
    return (levels.float() - (half - 0.5)) * step


def _pack_bits(levels: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """[.., k] int32 -> byte tensors, one per plane. Column i*m + j of a plane of m bytes is in byte j at bit i*w."""
    parts, shift = [], 0
    for plane in planes(bits):
        part = (levels >> shift) & ((1 << plane) - 1)
        shift += plane
        per_byte = 8 // plane
        count = -(-levels.shape[-1] // per_byte)
        part = F.pad(part, (0, count * per_byte - levels.shape[-1]))
        packed = part[..., :count]
        for i in range(1, per_byte):
            packed = packed | (part[..., i * count : (i + 1) * count] << (i * plane))
        parts.append(packed.to(torch.uint8))
    return parts


def _unpack_bits(data: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Inverse of ``_pack_bits`` on the concatenated planes: [.., bytes] uint8 -> levels [.., columns] int32."""
    levels, shift, at = None, 0, 0
    for plane in planes(bits):
        per_byte = 8 // plane
        count = -(-columns // per_byte)
        part = data[..., at : at + count].to(torch.int32)
        at += count
        if per_byte > 1:
            mask = (1 << plane) - 1
            part = torch.cat([(part >> (i * plane)) & mask for i in range(per_byte)], -1)[..., :columns]
        levels = part if levels is None else levels | (part << shift)
        shift += plane
    assert levels is not None
    return levels


def pack(
    latent: torch.Tensor,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    segments: tuple[tuple[int, int], ...],
    choices: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """latent [.., r + choices - 1] fp32 -> rows [.., nbytes] uint8 of a model in ``dtype``.

    The last ``choices - 1`` entries say how near the token is to each further mean (2 t_j - |mu_j - mu_0|^2, against 0
    for mu_0); ``offsets`` [choices, r] is what the nearest mean takes off the columns (None where there is one mean);
    ``spread`` [r] the units of the columns (None: all the same).
    """
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    values = latent[..., : form.columns].float()
    spread = None if spread is None else spread.float()
    index = None
    if choices > 1 and offsets is not None:
        near = F.pad(latent[..., form.columns :].float(), (1, 0))
        index = near.argmax(-1)
        gap = offsets.float()[index]
        values = values - gap
        away, size = (values, gap) if spread is None else (values * spread, gap * spread)
        noise = SNAP * torch.finfo(dtype).eps * size.norm(dim=-1, keepdim=True)
        values = torch.where(away.norm(dim=-1, keepdim=True) <= noise, 0.0, values)
    exact = sum(s.columns for s in form.segments if s.bits == MODEL)
    parts: list[torch.Tensor] = []
    if exact:
        parts.append(values[..., :exact].to(dtype).contiguous().view(torch.uint8))
    if form.scaled:
        levels, scale = quantise(values[..., exact:], form.segments, None if spread is None else spread[exact:])
        if choices == 2 and index is not None:
            scale = torch.where(index.unsqueeze(-1) == 1, -scale, scale)
            index = None
        parts.append(scale.contiguous().view(torch.uint8))
        at = 0
        for columns, bits in form.segments:
            if bits != MODEL:
                parts += _pack_bits(levels[..., at : at + columns], bits)
                at += columns
    if index is not None:
        parts.append((index + 1).to(torch.uint8).unsqueeze(-1))
    row = torch.cat(parts, -1)
    return F.pad(row, (0, form.nbytes - row.shape[-1]))


class Parts(NamedTuple):
    """What rows [.., nbytes] hold, quantised columns still as levels: ``exact`` [.., e] and ``levels`` [.., q] fp32,
    ``scale`` [.., 1] fp32 >= 0, ``further`` [.., m - 1] fp32: 1 for the token's mean. None where there is nothing.

    A quantised column is scale * (level - half) * step, with ``step`` and ``half`` of ``level_constants``.
    """

    exact: torch.Tensor | None
    levels: torch.Tensor | None
    scale: torch.Tensor | None
    further: torch.Tensor | None


def parts_of(rows: torch.Tensor, form: Format) -> Parts:
    """rows [.., width] as stored -> what they hold."""
    if form.plain:
        return Parts(rows.float(), None, None, None)
    at = sum(s.columns for s in form.segments if s.bits == MODEL) * form.dtype.itemsize
    exact = rows[..., :at].view(form.dtype).float() if at else None
    levels = scale = further = None
    if form.scaled:
        scale = rows[..., at : at + SCALE_BYTES].view(torch.float16).float()
        at += SCALE_BYTES
        if form.choices == 2:
            further, scale = (scale < 0).float(), scale.abs()
        quantised = [s for s in form.segments if s.bits != MODEL and s.columns]
        levels = rows.new_empty((*rows.shape[:-1], sum(s.columns for s in quantised)), dtype=torch.float32)
        done = 0
        for columns, bits in quantised:
            size = segment_bytes(columns, bits, 0)
            _levels_into(levels[..., done : done + columns], rows[..., at : at + size], bits)
            at, done = at + size, done + columns
    if further is None and form.choices > 1:
        index = rows[..., at : at + INDEX_BYTES]
        further = torch.cat([(index == j + 1).float() for j in range(1, form.choices)], -1)
    return Parts(exact, levels, scale, further)


def _levels_into(out: torch.Tensor, data: torch.Tensor, bits: int) -> None:
    """``_unpack_bits`` into fp32, without numbers wider than a byte on the way where a column is in one plane."""
    if len(planes(bits)) > 1:
        out.copy_(_unpack_bits(data, out.shape[-1], bits))
        return
    count, mask = data.shape[-1], (1 << bits) - 1
    for i in range(8 // bits):
        piece = out[..., i * count : (i + 1) * count]
        held = data[..., : piece.shape[-1]]
        piece.copy_(held if bits == 8 else (held >> (i * bits)) & mask)


@functools.lru_cache(maxsize=256)
def level_constants(form: Format, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each quantised column: its step at scale 1, and 2^(bits-1) - 1/2; [q] fp32."""
    step, half = per_column(form.spec, device)
    return step, half - 0.5


def unpack(rows: torch.Tensor, segments: tuple[tuple[int, int], ...], choices: int, dtype: torch.dtype) -> torch.Tensor:
    """rows [.., nbytes] uint8 -> [.., r + choices - 1] in the model's dtype: the columns, then for each further mean
    1 where it is this token's and 0 where not."""
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    at = sum(s.columns for s in form.segments if s.bits == MODEL) * dtype.itemsize
    parts = [rows[..., :at].view(dtype)] if at else []
    further = None
    if form.scaled:
        scale = rows[..., at : at + SCALE_BYTES].view(torch.float16).float()
        at += SCALE_BYTES
        if choices == 2:
            further = scale < 0
            scale = scale.abs()
        for columns, bits in form.segments:
            if bits == MODEL or not columns:
                continue
            size = segment_bytes(columns, bits, 0)
            levels = _unpack_bits(rows[..., at : at + size], columns, bits)
            at += size
            parts.append(dequantise(levels, scale * STEPS[bits], 1 << (bits - 1)).to(dtype))
    if further is not None:
        parts.append(further.to(dtype))
    elif choices > 1:
        index = rows[..., at : at + INDEX_BYTES]
        parts += [(index == j + 1).to(dtype) for j in range(1, choices)]
    return torch.cat(parts, -1)
