"""``einsum`` of two values -> the permutations and the one product that it stands for, so that no rule, no reader and
no lowering needs to know it.

    "bsd,dnh->bsnh"     x W, heads apart        unflatten(matmul(x, flatten(W)))
    "bsnh,nhd->bsd"     heads joined by W       matmul(flatten(x), flatten(W))
    "bhqd,bhkd->bhqk"   scores                  matmul(q, k^T)
    "bhqk,bhkd->bhqd"   weights of values       matmul(w, v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .axes import shape

aten = torch.ops.aten

Emit = Callable[[Node, Any, tuple[Any, ...], Any], Node]


def expand_einsum(node: Node, emit: Emit) -> None:
    """Replace ``node`` where it is one product: letters of both operands that the result lacks are summed over, those
    that it has are batches. ``emit(before, op, args, value)`` inserts an op."""
    equation, operands = str(node.args[0]), list[Node](node.args[1])
    found = _parsed(equation, operands)
    if found is None:
        return
    a, b, out = found
    left, right = operands
    batch = [c for c in out if c in a and c in b]
    summed = [c for c in a if c in b and c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if not summed or not set(out) == {*batch, *rows, *columns}:
        return
    if batch and not len(rows) == len(columns) == len(summed) == 1:
        return
    if not batch and not all(size.is_number for size in shape(right)):
        return  # no weight: a product of two activations' features
    left = _ordered(node, left, a, [*batch, *rows, *summed], emit)
    right = _ordered(node, right, b, [*batch, *summed, *columns], emit)
    if not batch:
        left = _joined(node, left, len(rows), len(summed), emit)
        right = _joined(node, _joined(node, right, len(summed), len(columns), emit), 0, len(summed), emit)
    sizes = [*left.meta["val"].shape[:-1], right.meta["val"].shape[-1]]
    product = emit(node, aten.matmul.default, (left, right), node.meta["val"].new_empty(sizes))
    if not batch:
        parts = [int(shape(operands[1])[b.index(c)]) for c in columns]
        value = product.meta["val"]
        if not parts:
            product = emit(node, aten.squeeze.dims, (product, [value.dim() - 1]), value.squeeze(-1))
        elif len(parts) > 1:
            product = emit(node, aten.unflatten.int, (product, value.dim() - 1, parts), value.unflatten(-1, parts))
    product = _ordered(node, product, "".join([*batch, *rows, *columns]), list(out), emit)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _parsed(equation: str, operands: Any) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, None where there are other forms."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2 or len(operands) != 2 or "." in equation:
        return None
    for names, operand in zip(letters, operands, strict=True):
        if len(set(names)) != len(names) or len(names) != len(shape(operand)):
            return None
    sizes: dict[str, Any] = {}
    for names, operand in zip(letters, operands, strict=True):
        for name, size in zip(names, shape(operand), strict=True):
            if sizes.setdefault(name, size) != size:
                return None  # it broadcasts
    return letters[0], letters[1], out


def _ordered(node: Node, source: Node, names: str, wanted: list[str], emit: Emit) -> Node:
    order = [names.index(name) for name in wanted]
    value, last = source.meta["val"], len(order) - 1
    if order == sorted(order):
        return source
    if order == [*range(last - 1), last, last - 1]:
        return emit(node, aten.transpose.int, (source, last - 1, last), value.transpose(last - 1, last))
    return emit(node, aten.permute.default, (source, order), value.permute(order))


def _joined(node: Node, source: Node, begin: int, count: int, emit: Emit) -> Node:
    """Axes [begin, begin + count) as one; an axis of one where there are none."""
    value = source.meta["val"]
    if count == 0:
        return emit(node, aten.unsqueeze.default, (source, begin), value.unsqueeze(begin))
    if count == 1:
        return source
    end = begin + count - 1
    return emit(node, aten.flatten.using_ints, (source, begin, end), value.flatten(begin, end))
