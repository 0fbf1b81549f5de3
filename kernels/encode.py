"""New rows of a cache as one op: the projection, and ``packing.pack`` of what it gives.

On a GPU two generated kernels (``encode_source``) do both, and what Triton raises is raised; elsewhere it is a linear
layer and ``pack``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F

from lorc_fx.packing import Format, form_of, pack

from . import encode_source, launch
from .attend import LIBRARY

WIRED: tuple[str, ...] = ()
"""Types of devices on which compiled graphs use the op for steps of few tokens. None: it was never timed on a GPU
(``bench.gpu`` does that), and of the same ops an inner compiler makes a few kernels, too. ``("cuda",)`` turns it on."""

FEW = 64
"""Rows of a step, at most, where graphs use the op: more are a large product, which libraries do better."""

ROWS, COLUMNS, DEPTH = 16, 32, 64
"""Of a tile of the projection."""

SPLITS = 16
"""Stretches of d, at most: each is written and read again, 4 bytes a column."""

FEWEST = 4
"""Tiles of ``DEPTH`` in a stretch, at least."""


def encode(
    x: torch.Tensor,
    matrix: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    form: Format,
    out: torch.Tensor | None = None,
    at: int = 0,
) -> torch.Tensor:
    """x [S, B, d] -> rows [S, B, form.width], written into rows ``at`` .. of ``out`` [T, B, width] where it is given
    (any strides, but rows are contiguous). ``matrix`` [k, d] and the others are a codec's ``encode``, ``shift``,
    ``offsets`` and ``spread``; x is taken in the matrix's dtype.

    Equal to ``reference`` but for what the order of sums decides: a number within a rounding of the border of two
    levels may get either, and of two scales whose squared errors are equal up to rounding either may be chosen. What is
    read back is as near to the projection as ``reference``'s. Raises ValueError where several means come without
    ``offsets``, or where ``out`` does not have the format's dtype, width and contiguous rows.
    """
    if form.choices > 1 and offsets is None:
        raise ValueError(f"a format of {form.choices} means needs offsets")
    tokens, batch, depth = x.shape
    if out is None:
        out, at = x.new_empty((tokens, batch, form.width), dtype=form.storage), 0
    if out.dtype != form.storage or out.shape[2] != form.width or out.stride(2) != 1:
        raise ValueError(f"rows of {out.dtype} {tuple(out.shape)} are no contiguous ones of {form.storage}")
    rows, width = tokens * batch, matrix.shape[0]
    if not rows:
        return out[at : at + tokens]
    made = module(form, matrix.dtype, width, shift is not None, spread is not None)
    splits, each = stretches(depth)
    parts = x.new_empty((splits, rows, width), dtype=torch.float32)
    grid = (-(-width // COLUMNS), splits, -(-rows // ROWS))
    sizes = (rows, batch, each, width, depth, ROWS, COLUMNS, DEPTH)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        made.project[grid](x, matrix, parts, *x.stride(), *matrix.stride(), *sizes)
        made.pack[(rows,)](*packing(parts, shift, offsets, spread, form, out), rows, batch, splits, at)
    return out[at : at + tokens]


def stretches(depth: int) -> tuple[int, int]:
    """Into how many stretches of how many features d is split."""
    tiles = -(-depth // DEPTH)
    splits = max(1, min(SPLITS, tiles // FEWEST))
    each = -(-tiles // splits) * DEPTH
    return -(-depth // each), each


def packing(
    parts: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    form: Format,
    out: torch.Tensor,
) -> list[torch.Tensor | int]:
    """The kernel ``pack``'s arguments up to its late ones; what is not there is ``parts``, and not read."""
    small = [parts if t is None else t.contiguous() for t in (shift, offsets, spread)]
    exact = not form.plain and any(s.columns and not s.bits for s in form.segments)
    views = [out.view(form.dtype) if exact else out, out.view(torch.float16) if form.scaled else out]
    return [parts, *small, out, *views, out.stride(0), out.stride(1)]


@functools.cache
def module(form: Format, exact: torch.dtype, width: int, shifted: bool, spread: bool) -> ModuleType:
    """The kernels ``project`` and ``pack`` for a format. ``exact``: the matrix's dtype; ``width``: its rows."""
    product = torch.float32 if launch.interpreted() and exact == torch.bfloat16 else exact  # as in ``launch.given_of``
    name = str(product).removeprefix("torch.")
    source = encode_source.generate(form, exact, width, shifted, spread, name)
    return launch.load(source, hashlib.sha256(source.encode()).hexdigest(), "encode")


def reference(
    x: torch.Tensor,
    matrix: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    form: Format,
) -> torch.Tensor:
    """The truth: x [.., d] -> rows [.., width] in plain torch, what compiled graphs hold."""
    codes = F.linear(x.to(matrix.dtype), matrix, shift)
    return codes if form.plain else pack(codes, offsets, spread, form.spec, form.choices, form.dtype)


# -- the op -----------------------------------------------------------------------------------------------------------


def _op(
    x: torch.Tensor,
    matrix: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor | None,
    spread: torch.Tensor | None,
    columns: Sequence[int],
    bits: Sequence[int],
    choices: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [.., d] -> rows [.., width]; the format in parts, as a schema can have them."""
    form = form_of(columns, bits, choices, dtype)
    if x.device.type != "cuda":
        return reference(x, matrix, shift, offsets, spread, form)
    leading = x.shape[:-1]
    flat = x[(None,) * (2 - len(leading))] if len(leading) < 3 else x.flatten(0, -3)
    return encode(flat, matrix, shift, offsets, spread, form).view(*leading, form.width)


def _fake(x, matrix, shift, offsets, spread, columns, bits, choices, dtype):  # type: ignore[no-untyped-def]
    form = form_of(columns, bits, choices, dtype)
    return x.new_empty((*x.shape[:-1], form.width), dtype=form.storage)


LIBRARY.define(
    "encode(Tensor x, Tensor matrix, Tensor? shift, Tensor? offsets, Tensor? spread, int[] columns, int[] bits, "
    "int choices, ScalarType dtype) -> Tensor"
)
LIBRARY.impl("encode", _op, "CompositeExplicitAutograd")
torch.library.register_fake("lorc::encode", _fake, lib=LIBRARY)
