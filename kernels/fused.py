"""A whole attention over stored rows in one call of ``attend.cpp``: where values are read as they are stored, keys too
or turned as they are decoded, and what scores pass through is a chain.

    q -> (S_k) -> scores of a chunk -> chain -> online softmax -> sums of rows -> (S_v, mean) -> out

A step calls it once for each layer, between products whose weights push all else out of the caches: what is the same
each time is laid out once (``Plan``), and a call fills in where tensors are.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorc_fx.packing import MODEL, Format

from . import native, turned
from .attend import Attend, Operand
from .chain import chain
from .stored import Stored, strides

WAY = "attend.cpp"
CHUNK = 64
"""Tokens whose scores are computed before their values are read: their rows stay in a core's second cache."""


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Column(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "place", "second"),
        *_fields(ctypes.c_float, "worth", "step", "half"),
        ("unused", ctypes.c_int32),
    ]


class _Part(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int64), ("worth", ctypes.c_float), ("unused", ctypes.c_int32)]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "tokens", "stride_t", "stride_b", "scale"),
        ("planes", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "n", "blocks", "width"),
        ("columns", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "count", "further"),
        *_fields(ctypes.c_void_p, "parts", "step", "half", "numbers"),
    ]


class _Lines(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "kind", "batch", "heads", "queries", "at_batch", "at_head", "at_query"),
    ]


class _Extra(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields(ctypes.c_int64, "flags", "batch", "head", "query", "token")]


class _Call(ctypes.Structure):
    _fields_ = [
        *_fields(_Rows, "keys", "values"),
        *_fields(native.Matrix, "key", "value"),
        ("turn", turned.Given),
        *_fields(_Lines, "query", "out"),
        ("steps", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "extras", "sink"),
        *_fields(ctypes.c_int64, "turns", "mask", "blind", "chunk", "threads"),
    ]


# -- rows --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _columns(form: Format, blocks: int) -> Any:
    """A block's columns for ``attend.cpp``."""
    about = native.layout(form, blocks)
    assert about is not None
    each = form.columns // blocks
    found = [_Column(-1, -1, 0.0, 1.0, 0.0) for _ in range(each)]
    for first, last, places, worth in about.pieces:
        for c, place in zip(range(first, last), places.tolist(), strict=True):
            if found[c].place < 0:
                found[c].place = place
            else:
                found[c].second, found[c].worth = place, worth
    if form.scaled:
        step, half = (x.tolist() for x in native.constants(form, blocks))
        exact = each - len(step)
        for c in range(exact, each):
            found[c].step, found[c].half = step[c - exact], half[c - exact]
    return (_Column * each)(*found)


@functools.lru_cache(maxsize=256)
def _levels(form: Format, blocks: int) -> tuple[Any, torch.Tensor]:
    """Of a block: where each plane's columns are, and [3, columns, padded] fp32: their steps, halves, and 1 for those
    that are numbers of the model's dtype."""
    about = native.layout(form, blocks)
    assert about is not None
    each = form.columns // blocks
    columns = torch.zeros(3, native.padded(each))
    exact = each if form.plain else sum(s.columns for s in form.segments if s.bits == MODEL) // blocks
    columns[0, :exact] = columns[2, :exact] = 1
    if form.scaled:
        columns[0, exact:each], columns[1, exact:each] = native.constants(form, blocks)
    return (_Part * about.count)(*(_Part(first, worth) for first, _, _, worth in about.pieces)), columns


# -- what is the same each time ----------------------------------------------------------------------------------------


def _rows(form: Format, blocks: int, kept: list[Any]) -> _Rows:
    about, columns = native.layout(form, blocks), _columns(form, blocks)
    assert about is not None
    parts, levels = _levels(form, blocks)
    kept += [about, columns, parts, levels]
    return _Rows(
        scale=about.scale,
        planes=ctypes.addressof(about.planes),
        n=about.count,
        blocks=blocks,
        width=about.width,
        columns=ctypes.addressof(columns),
        count=len(columns),
        further=int(form.choices > 1),
        parts=ctypes.addressof(parts),
        **{name: row.data_ptr() for name, row in zip(("step", "half", "numbers"), levels, strict=True)},
    )


def _matrix(operand: Operand, rows: int, kept: list[Any]) -> native.Matrix:
    """``rows`` of S: what a line has columns for, or none where nothing is decoded."""
    order = None if operand.columns is None else torch.tensor(operand.columns)
    kept.append(order)
    at = None if order is None else order.data_ptr()
    return native.Matrix(columns=at, heads=operand.heads, dim=operand.head_dim, rows=rows if operand.decodes else 0)


class Plan:
    """What of a reader's calls is the same each time."""

    def __init__(self, about: Attend) -> None:
        program = chain(about)
        assert program is not None, "scores pass through more than a chain"
        self.program, self.kept = program, list[Any]()
        left, right = (_rows(o.format, native.blocks(o), self.kept) for o in (about.keys, about.values))
        turn = about.keys.turn
        self.call = _Call(
            keys=left,
            values=right,
            key=_matrix(about.keys, left.count + left.further, self.kept),
            value=_matrix(about.values, right.count + right.further, self.kept),
            steps=ctypes.addressof(program.steps),
            n=program.count,
            turns=turn is not None and not about.keys.absorbed,
            mask=-1 if about.masks is None else about.masks,
            blind=about.blind,
        )
        if self.call.turns:
            self.call.turn = turned.given(about.keys, self.kept)


_PLANS: WeakKeyDictionary[Attend, Plan | None] = WeakKeyDictionary()


def _plan(about: Attend) -> Plan | None:
    """None where ``attend.cpp`` does not read such operands, whatever tensors they are in."""
    if about not in _PLANS:
        keys = native.reads(about.keys) if about.keys.direct else turned.reads(about.keys)
        fits = keys and about.values.direct and native.reads(about.values) and chain(about) is not None
        _PLANS[about] = Plan(about) if fits else None
    return _PLANS[about]


def reads(about: Attend, keys: Stored, values: Stored) -> bool:
    """Whether ``attend`` takes this call."""
    if keys.rows.device.type != "cpu" or keys.rows.stride(2) != 1 or values.rows.stride(2) != 1:
        return False
    return native.library() is not None and _plan(about) is not None


# -- the call ----------------------------------------------------------------------------------------------------------


def attend(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    chunk: int | None = None,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype. The caller has asked ``reads``. ``chunk``: tokens at a
    time."""
    plan = _plan(about)
    assert plan is not None
    batch, heads, queries, _ = query.shape
    total = keys.rows.shape[0]
    assert keys.rows.shape[:2] == values.rows.shape[:2] == (total, batch), "keys, values and queries of other sizes"
    call = _Call.from_buffer_copy(plan.call)
    held: list[Any] = []
    for rows, stored in ((call.keys, keys), (call.values, values)):
        size = stored.rows.element_size()
        rows.rows, rows.tokens = stored.rows.data_ptr(), total
        rows.stride_t, rows.stride_b = stored.rows.stride(0) * size, stored.rows.stride(1) * size
    _given(call.key, about.keys, keys, held)
    _given(call.value, about.values, values, held)
    if call.turns:
        turned.at(call.turn, about.keys, keys)
    q = query if query.dtype in native.KINDS and query.stride(3) == 1 else query.float().contiguous()
    out = q.new_empty((batch, heads, queries, about.values.head_dim))
    _lines(call.query, q)
    _lines(call.out, out)
    if extras:
        flags = plan.program.flags
        met = [e.to(torch.bool if i in flags else torch.float32) for i, e in enumerate(extras)]
        told = (_Extra * len(met))(*(_extra(e, (batch, heads, queries, total)) for e in met))
        call.extras = ctypes.addressof(told)
        call.sink = ctypes.addressof(told[len(met) - 1]) if about.sink else None
        held += [met, told]
    call.chunk, call.threads = chunk or CHUNK, torch.get_num_threads()
    native.loaded().lorc_attend(ctypes.byref(call))
    return out.to(query.dtype)


def _given(matrix: native.Matrix, operand: Operand, stored: Stored, held: list[Any]) -> None:
    """Where a codec's matrix and mean are."""
    decode, mean, _ = stored.parts(operand)
    if decode is not None:
        if decode.dtype not in native.KINDS or decode.stride(1) != 1:
            held.append(decode := decode.float().contiguous())
        matrix.data, matrix.kind, matrix.row = decode.data_ptr(), native.KINDS[decode.dtype], decode.stride(0)
    if mean is not None:
        if mean.dtype not in native.KINDS or mean.stride(0) != 1:
            held.append(mean := mean.float().contiguous())
        matrix.mean, matrix.mean_kind = mean.data_ptr(), native.KINDS[mean.dtype]


def _lines(lines: _Lines, tensor: torch.Tensor) -> None:
    lines.data, lines.kind = tensor.data_ptr(), native.KINDS[tensor.dtype]
    lines.batch, lines.heads, lines.queries, _ = tensor.shape
    lines.at_batch, lines.at_head, lines.at_query, _ = tensor.stride()


def _extra(tensor: torch.Tensor, sizes: tuple[int, ...]) -> _Extra:
    own = tensor.shape
    fits = all(n in (1, most) for n, most in zip(own, sizes[4 - len(own) :], strict=True))
    assert fits, f"{tuple(own)} is not broadcast to {sizes}"  # it would be read where it is not
    return _Extra(tensor.data_ptr(), tensor.dtype == torch.bool, *strides(tensor))
