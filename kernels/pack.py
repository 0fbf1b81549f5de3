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

TOKENS = 16
"""At most so many latents are made of y by the same code: of more they are a large product, for libraries."""

BLOCK = 1024
"""Of more tokens than these, latents are made of y block by block: in fp32, all of a long prompt's take more memory
than its cache."""

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
        *((n, ctypes.c_int64) for n in ("kind", "tokens", "stride", "projects", "few", "divided")),
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
    item = _Item(few=TOKENS, divided=fits, codec=codec, projection=projection)
    return _Layout(item, (*padded, clips, fields, places))


class Given(NamedTuple):
    """What rows of one format are made of: latents [.., k], or y [.., n] and the ``project`` (and ``shift``) that makes
    latents of it (``groups.projected``: a part for each of ``groups``, or one for all); a codec's ``offsets`` and
    ``spread``."""

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
    compiled = []
    for at, item in enumerate(items):
        if item.project is not None and max(item.latent.shape[:-1], default=0) > BLOCK:
            long = max(range(item.latent.dim() - 1), key=item.latent.size)
            blocks = item.latent.split(BLOCK, long)
            rows[at] = torch.cat([pack_all([item._replace(latent=y)])[0] for y in blocks], long)
            continue
        latent, offsets, spread, form, project, shift, groups = item
        known = library is not None and latent.dtype in native.KINDS and form.dtype in native.KINDS
        known &= form.choices == 1 or offsets is not None
        whole = project is not None and project.shape[1] < latent.shape[-1]  # one matrix for all groups
        few = latent.numel() <= TOKENS * latent.shape[-1]
        few &= whole or all(s.columns % groups == 0 for s in form.segments)
        if project is not None and not (known and few and project.dtype == torch.float32):
            latent, project, shift = projected(latent, project, shift, form.spec, groups), None, None
        if known:
            compiled.append((at, Given(latent, offsets, spread, form, project, shift, groups)))
        else:
            rows[at] = packing.pack(latent, offsets, spread, form.spec, form.choices, form.dtype)
    if compiled:
        held = [_layout(item.form, item.groups) for _, item in compiled]  # others may push it out of the cache
        layouts = [ctypes.addressof(layout.about) for layout in held]
        tensors = ([getattr(item, n) for _, item in compiled] for n in ("latent", *_OPTIONAL))
        for (at, _), made in zip(compiled, _by_layout(*tensors, layouts), strict=True):
            rows[at] = made
    return [row for row in rows if row is not None]


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
    given = (ctypes.byref(layout.about.codec), latent.data_ptr(), torch.get_num_threads())
    made.lorc_unpack(*native.where(flat), *given)
    return latent


def multiple(dtype: torch.dtype, device: torch.device) -> int:
    """Of how many tokens a factor of a product is that graphs make of a cache."""
    return MULTIPLE if device.type in DEVICES and dtype.itemsize == 2 else 1


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
    if latents[0].device.type == "cpu" and native.library() is not None:
        _tell(about)
    given = zip(latents, offsets, spread, _read(about), project, shift, strict=True)
    return pack_all([Given(y, o, s, form, p, b, groups) for y, o, s, (form, groups), p, b in given])


_TOLD: list[_Layout] = []
"""What C++ points to, for good."""


@functools.cache
def _tell(about: str) -> None:
    """From now on the op packs such rows without Python (pack_op.cpp), but for tensors that it does not take."""
    if any(form.dtype not in native.KINDS for form, _ in _read(about)):
        return
    held = [_layout(form, groups) for form, groups in _read(about)]
    _TOLD.extend(held)
    items = (ctypes.c_void_p * len(held))(*(ctypes.addressof(layout.about) for layout in held))
    native.loaded().lorc_know_formats(about.encode(), ctypes.addressof(items), len(held))


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


_OPTIONAL = ("offsets", "spread", "project", "shift")
_TENSORS = "(Tensor[] latents, " + ", ".join(f"Tensor?[] {name}" for name in _OPTIONAL)
LIBRARY.define(f"_pack_by_layout{_TENSORS}, int[] layouts) -> Tensor[]")
_by_layout = torch.ops.lorc._pack_by_layout.default
for name in ("pack", "_pack_by_python"):  # the second one is where ``pack_op.cpp`` asks
    LIBRARY.define(f"{name}{_TENSORS}, str about) -> Tensor[]")
    LIBRARY.impl(name, _pack, "CompositeExplicitAutograd")
LIBRARY.define(
    "unpack(Tensor rows, int[] columns, int[] bits, int choices, ScalarType dtype, int multiple=1) -> Tensor"
)
LIBRARY.impl("unpack", _unpack, "CompositeExplicitAutograd")
for name, fake in (("pack", _fake_pack), ("unpack", _fake_unpack)):
    torch.library.register_fake(f"lorc::{name}", fake, lib=LIBRARY)
