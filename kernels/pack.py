"""``packing.pack`` and ``packing.unpack`` as ops, ``lorc::pack`` (of several latents at once) and ``lorc::unpack``: on
a CPU compiled code (``pack.cpp``) that does one row after the other.

A compiler can fuse their torch ops, but those are a hundred or more for each cached projection: traced, scheduled and
compiled for every layer of every graph, and then loops over a few numbers each.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lorc_fx import packing
from lorc_fx.groups import projected, split
from lorc_fx.packing import CLIPS, INDEX_BYTES, MODEL, SCALE_BYTES, SNAP, TINY, Format, form_of, planes, segment_bytes

from . import native
from .attend import LIBRARY

DEVICES = ("cpu",)
"""Types of devices on which graphs have the op. A GPU's compiler makes a few kernels of the ops of all layers."""

ALONE = 1 << 15
"""Columns of all rows, at most, that one thread packs or unpacks: more are worth waking the others."""

TOKENS = 16
"""At most so many latents are made of y by the same code: of more they are a large product, for libraries."""

MULTIPLE = 64
"""Graphs multiply latents in 16 bits of multiples of so many tokens: oneDNN compiles code for the sizes of such a
product and keeps it, and a cache that grows has another size at each step."""


class _Field(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("first", "columns", "shift", "bits", "offset")]


class _Projection(ctypes.Structure):
    _fields_ = [("matrix", native.Matrix), ("places", ctypes.c_void_p), ("shift", ctypes.c_void_p)]


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


class _Item(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("latent", "rows")),
        *((n, ctypes.c_int64) for n in ("kind", "tokens", "stride", "projects")),
        ("codec", _Codec),
        ("projection", _Projection),
    ]


@dataclass(frozen=True)
class _Layout:
    """A format for ``pack.cpp``; ``kept``: what ``about`` points to."""

    about: _Item
    kept: tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def _layout(form: Format, groups: int = 1) -> _Layout:
    """``groups`` of features, where latents are made of y."""
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
    codec = _Codec(
        exact, native.KINDS[form.dtype], first, form.choices, form.nbytes, scale, index, fields, len(found),
        *(t.data_ptr() for t in padded), None, None, clips.data_ptr(), len(CLIPS), TINY,
        SNAP * torch.finfo(form.dtype).eps,
    )  # fmt: skip
    fits = all(s.columns % groups == 0 for s in form.segments)
    places = split(torch.arange(form.columns), form.segments, groups).contiguous() if fits else torch.arange(0)
    projection = _Projection(native.Matrix(heads=groups), places.data_ptr(), None)
    return _Layout(_Item(codec=codec, projection=projection), (*padded, clips, fields, places))


class Given(NamedTuple):
    """What rows of one format are made of: latents [.., k], or y [.., n] and the ``project`` (and ``shift``) that makes
    latents of it (``groups.projected``); a codec's ``offsets`` and ``spread``."""

    latent: torch.Tensor
    offsets: torch.Tensor | None
    spread: torch.Tensor | None
    form: Format
    project: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    groups: int = 1


def pack(*given: Any) -> torch.Tensor:
    """``pack_all`` of one ``Given``."""
    return pack_all([Given(*given)])[0]


def pack_all(items: Sequence[Given]) -> list[torch.Tensor]:
    """``packing.pack`` of each, by compiled code where the tensors are a CPU's and something compiles it. Rows are the
    same but for what the order of sums decides: of two scales whose squared errors are equal up to rounding either may
    be chosen, and a token that is within a rounding of the border may lie on its mean or beside it."""
    library = native.library() if all(i.latent.device.type == "cpu" for i in items) else None
    rows: list[torch.Tensor | None] = [None] * len(items)
    told, held, work = (_Item * len(items))(), list[Any](), 0
    count = 0
    for at, item in enumerate(items):
        latent, offsets, spread, form, project, shift, groups = item
        few = latent.numel() <= TOKENS * latent.shape[-1] and latent.dtype in native.KINDS
        if project is not None and (library is None or not few or project.dtype != torch.float32):
            latent, project = projected(latent, project, shift, form.spec, groups), None
        known = library is not None and latent.dtype in native.KINDS and form.dtype in native.KINDS
        if not known or (form.choices > 1 and offsets is None):
            latent = latent if project is None else projected(latent, project, shift, form.spec, groups)
            rows[at] = packing.pack(latent, offsets, spread, form.spec, form.choices, form.dtype)
            continue
        layout = _layout(form, groups)  # held while C++ reads what it points to: others may push it out of the cache
        flat = latent.reshape(-1, latent.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        small = [None if t is None else t.float().contiguous() for t in (offsets, spread)]
        rows[at] = made = latent.new_empty((*latent.shape[:-1], form.nbytes), dtype=torch.uint8)
        told[count] = layout.about
        one = told[count]
        one.latent, one.rows, one.kind = flat.data_ptr(), made.data_ptr(), native.KINDS[latent.dtype]
        one.tokens, one.stride = flat.shape[0], flat.stride(0) * flat.element_size()
        one.codec.offsets, one.codec.spread = [None if t is None else t.data_ptr() for t in small]
        if project is not None:
            own = project.contiguous(), None if shift is None else shift.contiguous()
            _projects(one, *own)
            held.append(own)
        held.append((layout, flat, small))
        work += flat.numel() if project is None else project.numel() * len(flat)
        count += 1
    if count:
        assert library is not None
        library.lorc_pack(told, count, _threads(work))
    return [row for row in rows if row is not None]


def _projects(item: _Item, project: torch.Tensor, shift: torch.Tensor | None) -> None:
    """Say how latents are made of y. Both are contiguous."""
    matrix = item.projection.matrix
    matrix.data, (matrix.rows, matrix.row) = project.data_ptr(), project.shape
    matrix.dim = matrix.row // matrix.heads
    item.projection.shift = None if shift is None else shift.data_ptr()
    item.projects = 1


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
    given = (ctypes.byref(layout.about.codec), latent.data_ptr(), _threads(latent.numel()))
    made.lorc_unpack(*native.where(flat), *given)
    return latent


def multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Of how many tokens a factor of a product is that graphs make of a cache."""
    return MULTIPLE if device.type in DEVICES and dtype.itemsize == 2 else 1


def _threads(columns: int) -> int:
    return 1 if columns <= ALONE else torch.get_num_threads()


# -- the ops ----------------------------------------------------------------------------------------------------------


def spelled(form: Format, groups: int = 1) -> str:
    """A format, and the groups that latents are made of y in, as the op takes them: ``bfloat16 2 16 128x5 640x4``."""
    segments = " ".join(f"{s.columns}x{s.bits}" for s in form.segments)
    return f"{str(form.dtype).removeprefix('torch.')} {form.choices} {groups} {segments}"


@functools.lru_cache(maxsize=1024)
def _read(about: str) -> tuple[tuple[Format, int], ...]:
    """Inverse of ``spelled``, of several with commas between."""
    found = []
    for one in about.split(","):
        dtype, choices, groups, *segments = one.split()
        columns, bits = zip(*(map(int, s.split("x")) for s in segments), strict=True)
        found.append((form_of(columns, bits, int(choices), getattr(torch, dtype)), int(groups)))
    return tuple(found)


Optional = Sequence[torch.Tensor | None]


def _pack(
    latents: Sequence[torch.Tensor], offsets: Optional, spread: Optional, project: Optional, shift: Optional, about: str
) -> list[torch.Tensor]:
    given = zip(latents, offsets, spread, _read(about), project, shift, strict=True)
    return pack_all([Given(y, o, s, form, p, b, groups) for y, o, s, (form, groups), p, b in given])


def _fake_pack(latents, offsets, spread, project, shift, about):  # type: ignore[no-untyped-def]
    forms = [form for form, _ in _read(about)]
    each = zip(latents, forms, strict=True)
    return [y.new_empty((*y.shape[:-1], form.nbytes), dtype=torch.uint8) for y, form in each]


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
    "pack(Tensor[] latents, Tensor?[] offsets, Tensor?[] spread, Tensor?[] project, Tensor?[] shift, str about) "
    "-> Tensor[]"
)
LIBRARY.define(
    "unpack(Tensor rows, int[] columns, int[] bits, int choices, ScalarType dtype, int multiple=1) -> Tensor"
)
for name, run, fake in (("pack", _pack, _fake_pack), ("unpack", _unpack, _fake_unpack)):
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorc::{name}", fake, lib=LIBRARY)
