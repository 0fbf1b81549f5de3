"""How latents become rows of bytes and come back: segments of columns, each at its own precision.

A row is one token of one batch row. It holds, in this order: the columns kept in the model's dtype; one fp16 scale per
quantised segment; the quantised columns, bit-packed; and, where a codec has several means, which one: of two means the
sign of the first scale says it, else one byte.

A column of ``b`` bits has 2^b levels at odd multiples of half a step s: value = (q + 1/2) s, -2^(b-1) <= q < 2^(b-1).
s is the segment's scale for this token: of a few clipped candidates the one with the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

MODEL = 0
"""The ``bits`` of a segment that is kept in the model's dtype."""

BITS = (8, 4, 3, 2)
"""Bits that a quantised column can have."""

CLIPS: dict[int, tuple[float, ...]] = {
    8: (1.0,),
    4: (1.0, 0.85, 0.7),
    3: (1.0, 0.8, 0.65, 0.5),
    2: (0.9, 0.7, 0.55, 0.4),
}
"""Candidate scales of a token, as fractions of the one that clips nothing."""

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
    """A column's bits as planes of 8, 4, 2 or 1 bits: 3 is 2 + 1."""
    return (2, 1) if bits == 3 else (bits,)


def segment_bytes(columns: int, bits: int, element: int) -> int:
    """Bytes of a segment in one row, its scale included. ``element``: bytes of one number in the model's dtype."""
    if not columns:
        return 0
    if bits == MODEL:
        return columns * element
    return SCALE_BYTES + sum(-(-columns * plane // 8) for plane in planes(bits))


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

    @property
    def columns(self) -> int:
        return sum(s.columns for s in self.segments)

    @property
    def spec(self) -> tuple[tuple[int, int], ...]:
        """The segments as plain tuples, for graphs."""
        return tuple((s.columns, s.bits) for s in self.segments)

    @property
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
        total += index_bytes(self.choices, self.scales > 0)
        return -(-total // self.alignment) * self.alignment

    @property
    def scales(self) -> int:
        return sum(1 for s in self.segments if s.bits != MODEL and s.columns)

    @property
    def alignment(self) -> int:
        has_model = any(s.bits == MODEL and s.columns for s in self.segments)
        return max(self.dtype.itemsize if has_model else 1, SCALE_BYTES if self.scales else 1)


def quantise(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values [.., k] fp32 -> levels q [.., k] in 0 .. 2^bits - 1 (int32) and scale [.., 1] fp16.

    |value - dequantised| <= scale / 2 where |value| <= 2^(bits-1) scale, else the excess over the outermost level.
    """
    half = 1 << (bits - 1)
    largest = values.abs().amax(-1, keepdim=True)
    scales = [(largest * (clip / half)).clamp(TINY, 65504.0).to(torch.float16) for clip in CLIPS[bits]]
    best = scales[0]
    least: torch.Tensor | None = None
    for scale in scales if len(scales) > 1 else ():
        step = scale.float()
        error = (dequantise(_levels(values, step, half), step, bits) - values).square().sum(-1, keepdim=True)
        best = best if least is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    return _levels(values, best.float(), half), best


def _levels(values: torch.Tensor, step: torch.Tensor, half: int) -> torch.Tensor:
    return ((values / step).floor().clamp(-half, half - 1) + half).to(torch.int32)


def dequantise(levels: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """levels q' in 0 .. 2^bits - 1, step fp32 -> (q' - 2^(bits-1) + 1/2) step, fp32."""
    return (levels.float() - ((1 << (bits - 1)) - 0.5)) * step


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
    segments: tuple[tuple[int, int], ...],
    choices: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """latent [.., r + choices - 1] fp32 -> rows [.., nbytes] uint8 of a model in ``dtype``.

    The last ``choices - 1`` entries say how near the token is to each further mean (2 t_j - |mu_j - mu_0|^2, against 0
    for mu_0); ``offsets`` [choices, r] is what the nearest mean takes off the columns (None where there is one mean).
    """
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    values = latent[..., : form.columns].float()
    index = None
    if choices > 1 and offsets is not None:
        near = F.pad(latent[..., form.columns :].float(), (1, 0))
        index = near.argmax(-1)
        gap = offsets.float()[index]
        values = values - gap
        noise = SNAP * torch.finfo(dtype).eps * gap.norm(dim=-1, keepdim=True)
        values = torch.where(values.norm(dim=-1, keepdim=True) <= noise, 0.0, values)
    signed = choices == 2 and form.scales > 0
    exact: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    levels: list[torch.Tensor] = []
    at = 0
    for columns, bits in form.segments:
        part = values[..., at : at + columns]
        at += columns
        if bits == MODEL:
            exact.append(part.to(dtype).contiguous().view(torch.uint8))
        elif columns:
            packed, scale = quantise(part, bits)
            if signed and not scales:
                assert index is not None
                scale = torch.where(index.unsqueeze(-1) == 1, -scale, scale)
            scales.append(scale.contiguous().view(torch.uint8))
            levels += _pack_bits(packed, bits)
    parts = [*exact, *scales, *levels]
    if index is not None and not signed:
        parts.append((index + 1).to(torch.uint8).unsqueeze(-1))
    row = torch.cat(parts, -1)
    return F.pad(row, (0, form.nbytes - row.shape[-1]))


def unpack(rows: torch.Tensor, segments: tuple[tuple[int, int], ...], choices: int, dtype: torch.dtype) -> torch.Tensor:
    """rows [.., nbytes] uint8 -> [.., r + choices - 1] in the model's dtype: the columns, then for each further mean
    1 where it is this token's and 0 where not."""
    form = Format(tuple(Segment(*s) for s in segments), choices, dtype)
    parts: list[torch.Tensor] = []
    scale_at = sum(s.columns for s in form.segments if s.bits == MODEL) * dtype.itemsize
    at = scale_at + SCALE_BYTES * form.scales
    exact_at, further = 0, None
    for columns, bits in form.segments:
        if not columns:
            continue
        if bits == MODEL:
            end = exact_at + columns * dtype.itemsize
            parts.append(rows[..., exact_at:end].view(dtype))
            exact_at = end
            continue
        step = rows[..., scale_at : scale_at + SCALE_BYTES].view(torch.float16).float()
        if choices == 2 and further is None:
            further = step < 0
            step = step.abs()
        scale_at += SCALE_BYTES
        size = segment_bytes(columns, bits, 0) - SCALE_BYTES
        levels = _unpack_bits(rows[..., at : at + size], columns, bits)
        at += size
        parts.append(dequantise(levels, step, bits).to(dtype))
    if further is not None:
        parts.append(further.to(dtype))
    elif choices > 1:
        index = rows[..., at : at + 1]
        parts += [(index == j + 1).to(dtype) for j in range(1, choices)]
    return torch.cat(parts, -1)
