"""A whole attention over stored rows in one call of ``attend.cpp``: where values are read as they are stored, keys too
or turned as they are decoded, and what scores pass through is a chain.

    q -> (S_k) -> scores of a chunk -> chain -> online softmax -> sums of rows -> (S_v, mean) -> out
"""

from __future__ import annotations

import ctypes
import functools
import operator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node

from lorc_fx.packing import MODEL, Format

from . import native, turned
from .attend import Attend, Operand
from .stored import Stored, by_head, strides, times

aten = torch.ops.aten

WAY = "attend.cpp"
CHUNK = 64
"""Tokens whose scores are computed before their values are read: their rows stay in a core's second cache."""


class _Column(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("place", "second")),
        *((name, ctypes.c_float) for name in ("worth", "step", "half")),
        ("unused", ctypes.c_int32),
    ]


class _Part(ctypes.Structure):
    _fields_ = [("first", ctypes.c_int64), ("worth", ctypes.c_float), ("unused", ctypes.c_int32)]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "stride_t", "stride_b", "scale")),
        ("planes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "blocks", "width")),
        ("columns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "further")),
        *((name, ctypes.c_void_p) for name in ("parts", "step", "half", "numbers")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "extra")),
        ("constant", ctypes.c_float),
        ("unused", ctypes.c_int32),
    ]


class _Extra(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("flags", "batch", "head", "query", "token")),
    ]


MULTIPLY, ADD, TANH, ADD_EXTRA, MULTIPLY_EXTRA, KEEP_WHERE, KEEP_UNLESS = range(7)


# -- what scores pass through ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A program as ``attend.cpp`` takes it. steps: an array of ``count``. flags: the extras that steps take as flags;
    they take the others as fp32."""

    steps: Any
    count: int
    flags: frozenset[int]


_CHAINS: WeakKeyDictionary[Attend, Chain | None] = WeakKeyDictionary()


def chain(about: Attend) -> Chain | None:
    """The program of scores, or None where it is more than a chain, or one extra is taken both as flags and as
    numbers."""
    if about not in _CHAINS:
        steps = _chain(about.scores, len(about.extras))
        _CHAINS[about] = None if steps is None else _laid_out(steps)
    return _CHAINS[about]


def _laid_out(steps: list[_Step]) -> Chain | None:
    flags = frozenset(s.extra for s in steps if s.kind in (KEEP_WHERE, KEEP_UNLESS))
    if any(s.kind in (ADD_EXTRA, MULTIPLY_EXTRA) and s.extra in flags for s in steps):
        return None
    return Chain((_Step * max(len(steps), 1))(*steps), len(steps), flags)


def _chain(program: GraphModule, extras: int) -> list[_Step] | None:
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    at = {n: i for i, n in enumerate(holders[1 : 1 + extras])}
    now = holders[0]
    found: list[_Step] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return found if node.args[0] is now else None
        step = _step(node, now, at) if node.op == "call_function" else None
        if step is None:
            return None
        found.append(step)
        now = node
    return None


def _step(node: Node, now: Node, extras: dict[Node, int]) -> _Step | None:
    """One op on the scores and either a number or an extra."""
    target: Any = node.target
    args: list[Any] = list(node.args)
    if node.kwargs or now not in args or args.count(now) > 1:
        return None
    if target in (torch.tanh, aten.tanh.default):
        return _Step(TANH)
    if target in (torch.where, aten.where.self, aten.where.ScalarOther) and len(args) == 3 and args[1] is now:
        return _Step(KEEP_WHERE, extras[args[0]], args[2]) if args[0] in extras and _number(args[2]) else None
    if target in (aten.masked_fill.Scalar,) and args[0] is now:
        return _Step(KEEP_UNLESS, extras[args[1]], args[2]) if args[1] in extras and _number(args[2]) else None
    if len(args) != 2:
        return None
    other = args[1] if args[0] is now else args[0]
    if target in (operator.mul, torch.mul, aten.mul.Tensor, aten.mul.Scalar):
        return _Step(MULTIPLY, 0, other) if _number(other) else _with(MULTIPLY_EXTRA, other, extras)
    if target in (operator.add, torch.add, aten.add.Tensor, aten.add.Scalar):
        return _Step(ADD, 0, other) if _number(other) else _with(ADD_EXTRA, other, extras)
    if args[0] is not now or not _number(other):
        return None
    if target in (operator.truediv, torch.div, aten.div.Tensor, aten.div.Scalar):
        return _Step(MULTIPLY, 0, 1 / other) if other else None
    if target in (operator.sub, torch.sub, aten.sub.Tensor, aten.sub.Scalar):
        return _Step(ADD, 0, -other)
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with(kind: int, value: Any, extras: dict[Node, int]) -> _Step | None:
    return _Step(kind, extras[value]) if value in extras else None


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


def _rows(stored: Stored, form: Format, blocks: int) -> _Rows:
    rows, about, columns = stored.rows, native.layout(form, blocks), _columns(form, blocks)
    assert about is not None
    parts, levels = _levels(form, blocks)
    size = rows.element_size()
    return _Rows(
        rows.data_ptr(),
        rows.shape[0],
        rows.stride(0) * size,
        rows.stride(1) * size,
        about.scale,
        ctypes.addressof(about.planes),
        about.count,
        blocks,
        about.width,
        ctypes.addressof(columns),
        len(columns),
        int(form.choices > 1),
        ctypes.addressof(parts),
        *(row.data_ptr() for row in levels),
    )


# -- the call ----------------------------------------------------------------------------------------------------------


def attend(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    chunk: int | None = None,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype. The caller has seen that the scores' program is a ``chain``
    and that ``native`` reads both operands' rows (``turned`` keys that have a turn). ``chunk``: tokens at a time."""
    program = chain(about)
    assert program is not None
    batch, heads, queries, _ = query.shape
    total = keys.rows.shape[0]
    assert keys.rows.shape[:2] == values.rows.shape[:2] == (total, batch), "keys, values and queries of other sizes"
    turn, _held = (None, None) if about.keys.turn is None else turned.given(about.keys, keys)
    q, offset = _asked(about.keys, keys, query) if turn is None else (query.float().contiguous(), None)
    held = [e.to(torch.bool if i in program.flags else torch.float32) for i, e in enumerate(extras)]
    met = (_Extra * max(len(held), 1))(*(_extra(e, (batch, heads, queries, total)) for e in held))
    sink = ctypes.byref(met, (len(held) - 1) * ctypes.sizeof(_Extra)) if about.sink else None
    left = _rows(keys, about.keys.format, native.blocks(about.keys))
    right = _rows(values, about.values.format, native.blocks(about.values))
    out = q.new_empty((batch, heads * queries, right.count + right.further))
    share = q.new_empty((batch, heads * queries))
    native.loaded().lorc_attend(
        ctypes.byref(left),
        None if turn is None else ctypes.byref(turn),
        ctypes.byref(right),
        batch,
        heads,
        queries,
        q.data_ptr(),
        None if offset is None else offset.data_ptr(),
        program.steps,
        program.count,
        met,
        -1 if about.masks is None else about.masks,
        sink,
        about.blind,
        chunk or CHUNK,
        out.data_ptr(),
        share.data_ptr(),
        torch.get_num_threads(),
    )
    return _answered(about.values, values, out, share, (batch, heads, queries)).to(query.dtype)


def _extra(tensor: torch.Tensor, sizes: tuple[int, ...]) -> _Extra:
    own = tensor.shape
    fits = all(n in (1, most) for n, most in zip(own, sizes[4 - len(own) :], strict=True))
    assert fits, f"{tuple(own)} is not broadcast to {sizes}"  # it would be read where it is not
    return _Extra(tensor.data_ptr(), tensor.dtype == torch.bool, *strides(tensor))


def _asked(operand: Operand, stored: Stored, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries as columns of rows are, fp32 and contiguous, and what the mean adds to each one's scores."""
    decode, mean, _ = stored.parts(operand)
    if decode is None and mean is None:
        return query.float().contiguous(), None
    batch, _, _, dim = query.shape
    grouped, offset = query.reshape(batch, operand.heads, -1, dim), None
    if mean is not None:
        offset = times(grouped.float(), by_head(operand, mean.float()[None]).transpose(1, 2)).contiguous()
    if decode is not None:
        matrix = _fast(decode)
        grouped = times(grouped.to(matrix.dtype), by_head(operand, matrix).transpose(1, 2))
    return grouped.float().contiguous(), offset


def _fast(matrix: torch.Tensor) -> torch.Tensor:
    """A codec's matrix in a dtype that CPUs multiply: bf16 as it is, as a copy in fp32 would be made at each step."""
    return matrix if matrix.dtype == torch.bfloat16 else matrix.float()


def _answered(
    operand: Operand, stored: Stored, out: torch.Tensor, share: torch.Tensor, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """Means of columns [B, H S, ..] -> of values [B, H, S, D]."""
    decode, mean, _ = stored.parts(operand)
    if decode is None and mean is None:
        return out.view(*sizes, -1)
    out = out.view(sizes[0], operand.heads, -1, out.shape[-1])
    if decode is not None:
        matrix = _fast(decode)
        out = times(out.to(matrix.dtype), by_head(operand, matrix)).float()
    if mean is not None:
        out = out + share.view(sizes[0], operand.heads, -1, 1) * by_head(operand, mean.float()[None])
    return out.reshape(*sizes, -1)
