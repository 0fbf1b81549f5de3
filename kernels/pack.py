"""``packing.pack`` and ``packing.unpack`` as ops, ``lorc::pack`` and ``lorc::unpack``: on a CPU compiled code
(``pack.cpp``) that does one row after the other.

A compiler can fuse their torch ops, but those are a hundred or more for each cached projection: traced, scheduled and
compiled for every layer of every graph, and then loops over a few numbers each.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorc_fx import packing
from lorc_fx.packing import CLIPS, INDEX_BYTES, MODEL, SCALE_BYTES, SNAP, TINY, Format, form_of, planes, segment_bytes

from . import native
from .attend import LIBRARY

DEVICES = ("cpu",)
"""Types of devices on which graphs have the op. A GPU's compiler makes a few kernels of the ops of all layers."""

ALONE = 1 << 15
"""Columns of all rows, at most, that one thread packs or unpacks: more are worth waking the others."""

MULTIPLE = 64
"""Graphs multiply latents in 16 bits of multiples of so many tokens: oneDNN compiles code for the sizes of such a
product and keeps it, and a cache that grows has another size at each step."""


class _Field(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("first", "columns", "shift", "bits", "offset")]


class _Codec(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("exact", "kind", "quantised", "choices", "width", "scale", "index")),
        ("fields", ctypes.POINTER(_Field)),
        ("n", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("step", "half", "offsets", "spread", "clips")),
        ("candidates", ctypes.c_int64),
        ("least", ctypes.c_float),
        ("snap", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Layout:
    """A format for ``pack.cpp``; ``kept``: what ``about`` points to."""

    about: _Codec
    kept: tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def _layout(form: Format) -> _Layout:
    exact = sum(s.columns for s in form.segments if s.bits == MODEL)
    offset, first, found = exact * form.dtype.itemsize, 0, []
    scale = offset if form.scaled else -1
    offset += SCALE_BYTES * form.scaled
    for columns, bits in form.segments:
        shift = 0
        for plane in planes(bits) if bits != MODEL else ():
            found.append(_Field(first, columns, shift, plane, offset))
            offset, shift = offset + segment_bytes(columns, plane, 0), shift + plane
        first += columns if bits != MODEL else 0
    index = offset if packing.index_bytes(form.choices, form.scaled) == INDEX_BYTES else -1
    step, half = packing.per_column(form.spec, torch.device("cpu")) if form.scaled else (torch.ones(0),) * 2
    padded = [torch.cat([t, torch.ones(native.PAD)]) for t in (step, half)]
    clips, fields = torch.tensor(CLIPS), (_Field * len(found))(*found)
    about = _Codec(
        exact, native.KINDS[form.dtype], first, form.choices, form.nbytes, scale, index, fields, len(found),
        *(t.data_ptr() for t in padded), None, None, clips.data_ptr(), len(CLIPS), TINY,
        SNAP * torch.finfo(form.dtype).eps,
    )  # fmt: skip
    return _Layout(about, (*padded, clips, fields))


def pack(latent: torch.Tensor, offsets: torch.Tensor | None, spread: torch.Tensor | None, form: Format) -> torch.Tensor:
    """``packing.pack``, by compiled code where the tensors are a CPU's and something compiles it. Rows are the same but
    for what the order of sums decides: of two scales whose squared errors are equal up to rounding either may be
    chosen, and a token that is within a rounding of the border may lie on its mean or beside it."""
    made = native.library() if latent.device.type == "cpu" and latent.dtype in native.KINDS else None
    if made is None or form.dtype not in native.KINDS or (form.choices > 1 and offsets is None):
        return packing.pack(latent, offsets, spread, form.spec, form.choices, form.dtype)
    width = latent.shape[-1]
    flat = latent.reshape(-1, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    small = [None if t is None else t.float().contiguous() for t in (offsets, spread)]
    layout = _layout(form)  # held while C++ reads what it points to: other threads may push it out of the cache
    about = _Codec.from_buffer_copy(layout.about)
    about.offsets, about.spread = [None if t is None else t.data_ptr() for t in small]
    rows = latent.new_empty((*latent.shape[:-1], form.nbytes), dtype=torch.uint8)
    step = flat.stride(0) * flat.element_size()
    threads = _threads(flat.numel())
    kind = native.KINDS[latent.dtype]
    made.lorc_pack(flat.data_ptr(), kind, flat.shape[0], step, ctypes.byref(about), rows.data_ptr(), threads)
    return rows


def unpack(rows: torch.Tensor, form: Format, multiple: int = 1) -> torch.Tensor:
    """``packing.unpack``, by compiled code where the rows are a CPU's and something compiles it: the same numbers.
    rows [T, .., nbytes] -> [T', .., k], with zeros behind T tokens up to a ``multiple``."""
    more = -rows.shape[0] % multiple
    made = native.library() if rows.device.type == "cpu" else None
    if made is None or form.dtype not in native.KINDS:
        latent = packing.unpack(rows, form.spec, form.choices, form.dtype)
        return torch.cat([latent, latent.new_zeros((more, *latent.shape[1:]))]) if more else latent
    flat = rows if rows.dim() == 3 else rows.reshape(-1, 1, rows.shape[-1])
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    leading = (rows.shape[0] + more, *rows.shape[1:-1]) if more else rows.shape[:-1]
    latent = rows.new_empty((*leading, form.columns + form.choices - 1), dtype=form.dtype)
    if more:
        latent[-more:].zero_()
    layout = _layout(form)  # held, as above
    given = (ctypes.byref(layout.about), latent.data_ptr(), _threads(latent.numel()))
    made.lorc_unpack(*native.where(flat), *given)
    return latent


def multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Of how many tokens a factor of a product is that graphs make of a cache."""
    return MULTIPLE if device.type in DEVICES and dtype.itemsize == 2 else 1


def _threads(columns: int) -> int:
    return 1 if columns <= ALONE else torch.get_num_threads()


# -- the ops ----------------------------------------------------------------------------------------------------------


def _pack(
    latent: torch.Tensor,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    columns: Sequence[int],
    bits: Sequence[int],
    choices: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return pack(latent, offsets, spread, form_of(columns, bits, choices, dtype))


def _fake_pack(latent, offsets, spread, columns, bits, choices, dtype):  # type: ignore[no-untyped-def]
    form = form_of(columns, bits, choices, dtype)
    return latent.new_empty((*latent.shape[:-1], form.nbytes), dtype=torch.uint8)


def _unpack(
    rows: torch.Tensor, columns: Sequence[int], bits: Sequence[int], choices: int, dtype: torch.dtype, multiple: int = 1
) -> torch.Tensor:
    return unpack(rows, form_of(columns, bits, choices, dtype), multiple)


def _fake_unpack(rows, columns, bits, choices, dtype, multiple=1):  # type: ignore[no-untyped-def]
    leading = rows.shape[:-1]
    if multiple > 1:
        leading = ((rows.shape[0] + multiple - 1) // multiple * multiple, *leading[1:])
    return rows.new_empty((*leading, sum(columns) + choices - 1), dtype=dtype)


LIBRARY.define(
    "pack(Tensor latent, Tensor? offsets, Tensor? spread, int[] columns, int[] bits, int choices, ScalarType dtype) "
    "-> Tensor"
)
LIBRARY.define(
    "unpack(Tensor rows, int[] columns, int[] bits, int choices, ScalarType dtype, int multiple=1) -> Tensor"
)
for name, run, fake in (("pack", _pack, _fake_pack), ("unpack", _unpack, _fake_unpack)):
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorc::{name}", fake, lib=LIBRARY)
