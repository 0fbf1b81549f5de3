"""Products whose result is taken apart, and of which some parts are no longer asked for: only the columns that are.

Before (keys and values come from their own factors)      After
    qkv = linear(x, W [3 n, d]);  q = split(qkv, n)[0]        q = linear(x, W[:n])

Models that project queries, keys and values by one matrix would otherwise read all of it in each step for the queries
alone. What is left is one run of columns: a slice of the weight is a view.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lorc_fx.compat import is_fake

from .axes import arg, shape

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_SWAPS = (aten.numpy_T.default, aten.t.default)


@dataclass(frozen=True)
class _Part:
    """Of a value whose axis ``dim`` stands for all columns, ``unit`` of them each: what ``node`` takes, [first, last)
    of them."""

    node: Node
    first: int
    last: int
    dim: int
    unit: int

    @property
    def columns(self) -> tuple[int, int]:
        return self.first * self.unit, self.last * self.unit


class _Unknown(Exception):
    """A reader that is not understood: it may read every column."""


def narrow(graph: Graph, old: Mapping[Node, Node]) -> None:
    """Narrow the products of a rewritten graph. ``old``: the node of the canonical graph that a node is a copy of."""
    for node in list(graph.nodes):
        wide = _columns(node)
        if wide is None or node not in old:
            continue
        try:
            views, parts = _readers(node, old, wide)
        except _Unknown:
            continue
        first = min((p.columns[0] for p in parts), default=0)
        last = max((p.columns[1] for p in parts), default=0)
        units = [unit for _, unit in views.values()]
        if 0 < last - first < wide and all(first % u == 0 and last % u == 0 for u in units):
            _replace(graph, node, views, parts, first, last)


def _columns(node: Node) -> int | None:
    """Of a product with a weight that is an input: its columns; else None."""
    weight, dim = _weight(node)
    if weight is None:
        return None
    source = weight.args[0] if weight.target in _SWAPS else weight
    value = source.meta.get("val")
    if source.op != "placeholder" or not isinstance(value, torch.Tensor) or not is_fake(value) or value.dim() != 2:
        return None
    size = value.shape[1 - dim if weight.target in _SWAPS else dim]
    bias = _bias(node)
    if bias is not None:
        value = bias.meta.get("val") if bias.op == "placeholder" else None
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != (size,):
            return None
    return size if isinstance(size, int) else None


def _weight(node: Node) -> tuple[Node | None, int]:
    """The weight of a product [.., d] x [d, n], and its axis of n."""
    given: Any = node.args
    if node.target is aten.linear.default and not node.kwargs:
        return given[1], 0
    if node.target in (aten.mm.default, aten.matmul.default):
        return given[1], 1
    if node.target is aten.addmm.default and not node.kwargs:
        return given[2], 1
    return None, 0


def _bias(node: Node) -> Node | None:
    given: Any = node.args
    if node.target is aten.addmm.default:
        return given[0]
    found = arg(node, 2, "bias") if node.target is aten.linear.default else None
    return found if isinstance(found, Node) else None


# -- what is read ------------------------------------------------------------------------------------------------------


def _readers(product: Node, old: Mapping[Node, Node], wide: int) -> tuple[dict[Node, tuple[int, int]], list[_Part]]:
    """The views of a product in which one axis stands for its columns (which, and the columns of each of its places),
    and the parts that are taken."""
    views: dict[Node, tuple[int, int]] = {}
    parts: list[_Part] = []
    waiting = [(product, len(_sizes(product, old)) - 1, 1)]
    while waiting:
        node, dim, unit = waiting.pop()
        for user in node.users:
            if user.target in _VIEWS:
                found = _split_axis(_sizes(user, old), wide)
                if found is None:
                    raise _Unknown
                views[user] = found, math.prod(_sizes(user, old)[found + 1 :])
                waiting.append((user, *views[user]))
            else:
                parts += _taken(user, dim, unit, wide // unit, len(_sizes(node, old)))
    return views, parts


def _sizes(node: Node, old: Mapping[Node, Node]) -> list[Any]:
    """A value's sizes, ints where they are known."""
    if node not in old or not isinstance(old[node].meta.get("val"), torch.Tensor):
        raise _Unknown
    return [int(s) if s.is_number else s for s in shape(old[node])]


def _split_axis(sizes: list[Any], wide: int) -> int | None:
    """The outermost axis of those that a product's columns were taken apart into, or None."""
    total = 1
    for dim in range(len(sizes) - 1, -1, -1):
        if not isinstance(sizes[dim], int):
            return None
        total *= sizes[dim]
        if total == wide:
            return dim
    return None


def _taken(user: Node, dim: int, unit: int, extent: int, rank: int) -> list[_Part]:
    """What a reader takes along an axis of ``extent``."""
    if user.op != "call_function":
        raise _Unknown
    along = arg(user, 2, "dim", 0) if user.target in _SPLITS else arg(user, 1, "dim", 0)
    if user.target not in (*_SPLITS, aten.slice.Tensor, aten.select.int) or along % rank != dim:
        raise _Unknown
    if user.target is aten.slice.Tensor:
        bounds = arg(user, 2, "start"), arg(user, 3, "end"), arg(user, 4, "step", 1)
        if any(isinstance(b, Node) for b in bounds) or bounds[2] != 1:
            raise _Unknown
        start, stop, _ = slice(*bounds).indices(extent)
        return [_Part(user, start, max(stop, start), dim, unit)]
    if user.target is aten.select.int:
        index = user.args[2]
        if not isinstance(index, int):
            raise _Unknown
        return [_Part(user, index % extent, index % extent + 1, dim, unit)]
    if any(piece.target is not operator.getitem or piece.args[1] < 0 for piece in user.users):
        raise _Unknown
    sizes = _pieces(user, extent)
    starts = list(itertools.accumulate(sizes, initial=0))
    return [_Part(p, starts[p.args[1]], starts[p.args[1] + 1], dim, unit) for p in user.users]


_SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)


def _pieces(split: Node, extent: int) -> list[int]:
    """The sizes of what an op takes an axis apart into."""
    given: Any = split.args[1]
    if not all(isinstance(s, int) for s in (given if isinstance(given, (list, tuple)) else [given])):
        raise _Unknown
    if isinstance(given, (list, tuple)):
        return list(given)
    each = -(-extent // given) if split.target is aten.chunk.default else given
    return [min(each, extent - start) for start in range(0, extent, each)]


# -- the narrower product ----------------------------------------------------------------------------------------------


def _replace(
    graph: Graph, product: Node, views: Mapping[Node, tuple[int, int]], parts: list[_Part], first: int, last: int
) -> None:
    weight, dim = _weight(product)
    bias = _bias(product)
    held = product.target is aten.addmm.default
    with graph.inserting_before(product):  # by their places: what they meet may be the same value
        product.update_arg(2 if held else 1, graph.call_function(aten.slice.Tensor, (weight, dim, first, last)))
        if bias is not None:
            product.update_arg(0 if held else 2, graph.call_function(aten.slice.Tensor, (bias, 0, first, last)))
    for view, (axis, unit) in views.items():
        sizes = list(view.args[1])
        sizes[axis] = (last - first) // unit
        view.update_arg(1, sizes)
    for part in parts:
        _shifted(graph, part, first // part.unit, (last - first) // part.unit)


def _shifted(graph: Graph, part: _Part, by: int, extent: int) -> None:
    """The same part, of a value of ``extent`` that begins ``by`` later."""
    node = part.node
    if node.target is aten.select.int:
        node.update_arg(2, part.first - by)
        return
    source = node.args[0] if node.target is aten.slice.Tensor else node.args[0].args[0]
    made = source
    if part.last - part.first < extent:
        with graph.inserting_before(node):
            made = graph.call_function(aten.slice.Tensor, (source, part.dim, part.first - by, part.last - by))
    node.replace_all_uses_with(made)
    graph.erase_node(node)
