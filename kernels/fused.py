"""A whole attention over stored rows in one call of ``attend.cpp``: where values are read as they are stored, keys too
or turned as they are decoded, and what scores pass through is a chain.

    q -> (S_k) -> scores of a chunk -> chain -> online softmax -> sums of rows -> (S_v, mean) -> out

What is the same each time is laid out here, once (``Plan``); ``attend_op.cpp`` fills in where a call's tensors are.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lorc_fx.packing import MODEL, Format

from . import native, tuned, turned
from .attend import LIBRARY, Attend, Operand
from .chain import Chain, chain
from .stored import Stored

WAY = "attend.cpp"
CHUNK = 64
"""Tokens whose scores are computed before their values are read: their rows stay in a core's second cache."""

MOST_EXTRAS = 32
"""Which of them are flags is one number."""

LIBRARY.define(
    "_attend_by_plan(Tensor query, Tensor keys, Tensor[] key_codec, Tensor values, Tensor[] value_codec, "
    "Tensor[] extras, int plan, int chunk, bool turns) -> Tensor"
)
_by_plan = torch.ops.lorc._attend_by_plan.default


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


class _Side(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "decodes", "mean", "turned")

    @classmethod
    def of(cls, operand: Operand) -> _Side:
        return cls(operand.decodes, operand.has_mean, operand.turned)


class _Plan(ctypes.Structure):
    _fields_ = [
        ("call", _Call),
        *_fields(_Side, "key", "value"),
        *_fields(ctypes.c_int64, "normed", "dim", "extras", "flags", "sink"),
    ]


class _Choice(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "tokens", "batch", "heads", "queries", "threads", "chunk")


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
    dim, rows = operand.head_dim, rows if operand.decodes else 0
    return native.Matrix(columns=at, heads=operand.heads, dim=dim, rows=rows, apart=dim)


class Plan:
    """What of a reader's calls is the same each time: ``about`` for C++, which points into ``kept``."""

    def __init__(self, about: Attend, program: Chain) -> None:
        self.kept: list[Any] = [program]
        left, right = (_rows(o.format, native.blocks(o), self.kept) for o in (about.keys, about.values))
        turn = about.keys.turn
        call = _Call(
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
        if call.turns:
            call.turn = turned.given(about.keys, self.kept)
        self.about = _Plan(
            call=call,
            key=_Side.of(about.keys),
            value=_Side.of(about.values),
            normed=turn is not None and turn.eps is not None,
            dim=about.values.head_dim,
            extras=len(about.extras),
            flags=sum(1 << i for i in program.flags),
            sink=about.sink,
        )
        self.address = ctypes.addressof(self.about)


_PLANS: WeakKeyDictionary[Attend, Plan | None] = WeakKeyDictionary()
_REMEMBERED: WeakKeyDictionary[Attend, Any] = WeakKeyDictionary()


def _plan(about: Attend) -> Plan | None:
    """None where ``attend.cpp`` does not read such operands, whatever tensors they are in."""
    if about not in _PLANS:
        keys = native.reads(about.keys) if about.keys.direct else turned.reads(about.keys)
        program = chain(about) if keys and about.values.direct and native.reads(about.values) else None
        fits = program is not None and len(about.extras) <= MOST_EXTRAS
        made = Plan(about, program) if program is not None and fits else None
        return _PLANS.setdefault(about, made)  # of two threads that come first, both get one's: C++ points to it
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
    turns: bool = False,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype. (Of ``turned`` operands queries come as keys are stored, and
    results as values are.) The caller has asked ``reads``. ``chunk``: tokens at a
    time. ``turns``: queries are as the model has them, else as rows are turned (and so are results). Raises
    RuntimeError for tensors that do not fit each other."""
    plan = _plan(about)
    assert plan is not None
    stored = (keys.rows, keys.codec, values.rows, values.codec)
    found: torch.Tensor = _by_plan(query, *stored, extras, plan.address, chunk or CHUNK, turns)
    return found


def _forget(library: Any, digest: bytes, plan: Plan) -> None:
    """It lives until C++ has forgotten it."""
    library.lorc_forget(digest, plan.address)


def remember(about: Attend, query: torch.Tensor, tokens: int, chunk: int | None) -> None:
    """From now on calls of the op with such sizes read ``chunk`` tokens at a time and do without Python
    (attend_op.cpp), until ``about`` dies or ``native.ask_again``."""
    plan, library, digest = _plan(about), native.loaded(), about.digest.encode()
    assert plan is not None
    library.lorc_know(digest, plan.address)
    if about not in _REMEMBERED:
        _REMEMBERED[about] = weakref.finalize(about, _forget, library, digest, plan)
        _REMEMBERED[about].atexit = False
    batch, heads, queries, _ = query.shape
    sizes = (tuned.bucket(tokens), tuned.bucket(batch), heads, queries, torch.get_num_threads())
    library.lorc_choose(digest, plan.address, ctypes.byref(_Choice(*sizes, chunk or CHUNK)))
