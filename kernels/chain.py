"""What scores pass through before the softmax, as a program for ``attend.cpp``: a chain of ops on them and one other
thing each."""

from __future__ import annotations

import ctypes
import operator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node

from .attend import Attend

aten = torch.ops.aten


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "extra")),
        ("constant", ctypes.c_float),
        ("unused", ctypes.c_int32),
    ]


MULTIPLY, ADD, TANH, ADD_EXTRA, MULTIPLY_EXTRA, KEEP_WHERE, KEEP_UNLESS = range(7)


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
