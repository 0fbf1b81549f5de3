"""What each op does to the batch and token axes of its output, backward: the functions of the table in ``rules``.

"If the output has its tokens along this axis, where do the inputs have theirs?" None: the input does not depend on the
token. ``Mixes``: tokens mix, or the op cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from lorc_fx.compat import size_expr

aten = torch.ops.aten


class Axes(NamedTuple):
    """Where a value has its batch and its tokens; equal where both are merged in one axis, batch outermost."""

    batch: int | None
    token: int | None


class Mixes(Exception):
    """The op mixes tokens or batch rows (or cannot be followed); the text says how."""


Demand = list[tuple[Node, Axes]]
AxisRule = Callable[[Node, int], list[tuple[Node, "int | None"]]]


def is_end(end: Any) -> bool:
    """Whether a slice's ``end`` is that of whatever it takes from."""
    return end is None or (isinstance(end, int) and end >= 1 << 62)


# -- shapes ---------------------------------------------------------------------------------------------------


def shape(node: Node) -> list[sympy.Expr]:
    """The sizes of a node's value as SymPy expressions (of the first piece, where it is a list of tensors)."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (list, tuple)) else value
    return [size_expr(s) for s in value.shape]


def tensors(node: Node) -> list[Node]:
    """The inputs of a node that are tensors (or lists of tensors), in order, repeats kept."""
    flat = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    return [a for a in flat if isinstance(a, Node) and isinstance(a.meta.get("val"), (torch.Tensor, list, tuple))]


def per_axis(fn: AxisRule) -> Callable[[Node, Axes], Demand]:
    """Lift a rule for one axis to batch and token together."""

    def back(node: Node, axes: Axes) -> Demand:
        none = [(t, None) for t in tensors(node)]
        batch = none if axes.batch is None else fn(node, axes.batch)
        token = none if axes.token is None else fn(node, axes.token)
        return [(n, Axes(b, t)) for (n, t), (_, b) in zip(token, batch, strict=True)]

    return back


def dim_of(value: Any, rank: int) -> int:
    return int(value) % max(rank, 1)


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


# -- rules for one axis ---------------------------------------------------------------------------------------


def broadcast(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    """Broadcasting aligns from the right. A size-1 axis under a larger one does not depend on it (for batch it is
    kept by the caller's choice of axes: a broadcast batch row is still that row's value)."""
    out = shape(node)
    found: list[tuple[Node, int | None]] = []
    for source in tensors(node):
        size = shape(source)
        at = axis - (len(out) - len(size))
        lone = at >= 0 and size[at] == 1 and out[axis] != 1
        found.append((source, None if at < 0 or lone else at))
    return found


def pointwise(node: Node, axes: Axes) -> Demand:
    demand = per_axis(broadcast)(node, Axes(None, axes.token))
    out = len(shape(node))
    keep = []
    for source, found in demand:
        at = None if axes.batch is None else axes.batch - (out - len(shape(source)))
        keep.append((source, Axes(at if at is not None and at >= 0 else None, found.token)))
    return keep


def transpose(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    rank = len(shape(source))
    a, b = (0, 1) if node.target is aten.t.default else (dim_of(node.args[1], rank), dim_of(node.args[2], rank))
    return [(source, {a: b, b: a}.get(axis, axis))]


def swap_last(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    last = len(shape(node)) - 1
    return [(tensors(node)[0], {last: last - 1, last - 1: last}.get(axis, axis))]


def reverse_axes(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return [(tensors(node)[0], len(shape(node)) - 1 - axis)]


def permute(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    return [(source, dim_of(node.args[1][axis], len(shape(source))))]


def unsqueeze(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = dim_of(node.args[1], len(shape(node)))
    return [(tensors(node)[0], None if axis == at else axis - (axis > at))]


def squeeze(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    size = shape(source)
    dims = [node.args[1]] if isinstance(node.args[1], int) else node.args[1]
    gone = {dim_of(d, len(size)) for d in dims if size[dim_of(d, len(size))] == 1}
    kept = [i for i in range(len(size)) if i not in gone]
    return [(source, kept[axis])]


def slice_(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = dim_of(arg(node, 1, "dim", 0), len(shape(source)))
    if axis == at and shape(node)[axis] != shape(source)[axis]:
        raise Mixes("takes some tokens and drops others")
    return [(source, axis)]


def select(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = dim_of(node.args[1], len(shape(node)) + 1)
    return [(tensors(node)[0], axis + (axis >= at))]


def split(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    if axis == dim_of(arg(node, 2, "dim", 0), len(shape(source))):
        raise Mixes("splits along the tokens")
    return [(source, axis)]


def unbind(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = dim_of(arg(node, 1, "dim", 0), len(shape(source)))
    return [(source, axis + (axis >= at))]


def cat(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    sources = tensors(node)
    if len(sources) > 1 and axis == dim_of(arg(node, 1, "dim", 0), len(shape(node))):
        raise Mixes("concatenates along the tokens")
    return [(source, axis) for source in sources]


def slice_scatter(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    """And ``select_scatter``, whose second value lacks the axis."""
    base, part = tensors(node)[:2]
    dim = dim_of(arg(node, 2, "dim", 0), len(shape(base)))
    if axis == dim:
        raise Mixes("writes some of the tokens or batch rows")
    lacks = len(shape(part)) < len(shape(base))
    return [(base, axis), (part, axis - (axis > dim) * lacks)]


def stack(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = dim_of(arg(node, 1, "dim", 0), len(shape(node)))
    return [(source, None if axis == at else axis - (axis > at)) for source in tensors(node)]


def expand(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = axis - (len(shape(node)) - len(shape(source)))
    return [(source, None if at < 0 else at)]


def repeat(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    if node.args[1][axis] != 1:
        raise Mixes("repeats along the tokens or the batch")
    return expand(node, axis)


def repeat_interleave(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = arg(node, 2, "dim")
    if at is None or axis == dim_of(at, len(shape(node))):
        raise Mixes("repeats along the tokens or the batch")
    return [(tensors(node)[0], axis)]


def _feature_dims(node: Node, axis: int, dims: Any) -> list[tuple[Node, int | None]]:
    """An op over the feature dims ``dims`` that keeps the rank."""
    source = tensors(node)[0]
    rank = len(shape(source))
    if axis in {dim_of(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}:
        raise Mixes("reduces, normalises or moves along the tokens")
    return [(s, axis if i == 0 else None) for i, s in enumerate(tensors(node))]


def reduce(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    rank = len(shape(source))
    position = 2 if node.target is aten.linalg_vector_norm.default or node.target is aten.norm.ScalarOpt_dim else 1
    dims = arg(node, position, "dim")
    if dims is None or dims == []:
        raise Mixes("reduces over all tokens")
    gone = {dim_of(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    after = {aten.var.dim: 3, aten.var.correction: 99}.get(node.target, position + 1)
    keep = bool(arg(node, after, "keepdim", False))
    at = axis if keep else [i for i in range(rank) if i not in gone][axis]
    if at in gone:
        raise Mixes("reduces over the tokens")
    return [(source, at)]


def softmax(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, node.args[1])


def flip(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, node.args[1])


def roll(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    dims = arg(node, 2, "dims", ())
    if not dims:
        raise Mixes("rolls the flattened value")
    return _feature_dims(node, axis, dims)


def layer_norm(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    rank = len(shape(node))
    return _feature_dims(node, axis, list(range(rank - len(node.args[1]), rank)))


def linear(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, -1)


def addmm(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    bias, x, weight = tensors(node)
    if axis != 0:
        raise Mixes("multiplies a weight from the right by the tokens")
    return [(bias, None), (x, 0), (weight, None)]


def matmul(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    left, right = tensors(node)
    rank, a, b = len(shape(node)), len(shape(left)), len(shape(right))
    if a < 2 or b < 2:
        raise Mixes("is a product with a vector")
    if axis == rank - 2:
        return [(left, a - 2), (right, None)]
    if axis == rank - 1:
        return [(left, None), (right, b - 1)]
    found = []
    for source, size in ((left, a), (right, b)):
        at = axis - (rank - size)
        found.append((source, None if at < 0 else at))
    return found


def table(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    """A row of a table per index: ``embedding(table, i)`` and ``table[i]``."""
    table, index = tensors(node)[:2]
    if axis >= len(shape(index)):
        raise Mixes("indexes with the tokens among the features")
    return [(table, None), (index, axis)]


def index(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    """One index tensor at one dim: its axes take the place of that dim."""
    indices = node.args[1]
    at = [i for i, index in enumerate(indices) if index is not None]
    if len(at) != 1:
        raise Mixes("indexes along several dims")
    source, index = tensors(node)[:2]
    inside, extent = axis - at[0], len(shape(index))
    if inside < 0:
        return [(source, axis), (index, None)]
    if inside < extent:
        return [(source, None), (index, inside)]
    return [(source, axis - extent + 1), (index, None)]


def index_select(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    table, index = tensors(node)
    if dim_of(node.args[1], len(shape(table))) != 0:
        if axis == dim_of(node.args[1], len(shape(table))):
            raise Mixes("selects along the tokens")
        return [(table, axis), (index, None)]
    if axis != 0:
        raise Mixes("indexes with the tokens among the features")
    return [(table, None), (index, 0)]


def passes(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return [(tensors(node)[0], axis)]


def as_real(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    if axis == len(shape(node)) - 1:
        raise Mixes("has the real and imaginary parts there, not tokens")
    return [(tensors(node)[0], axis)]


# -- views regroup axes, so they need batch and token together ------------------------------------------------


def groups(before: Sequence[sympy.Expr], after: Sequence[sympy.Expr]) -> list[tuple[list[int], list[int]]]:
    """The finest split of both shapes, left to right, into runs of equal product."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        a, b = (before[i] if left else sympy.Integer(1)), (after[j] if right else sympy.Integer(1))
        if left and right and a != b and sympy.Integer(1) in (a, b):  # an axis of one comes or goes
            found.append((left, []) if a == 1 else ([], right))
            i, j = i + (a == 1), j + (a != 1)
            continue
        i, j = i + len(left), j + len(right)
        while a != b:
            grow_left = j >= len(after) or (i < len(before) and _divides(a, b))
            if grow_left and i < len(before):
                left.append(i)
                a, i = a * before[i], i + 1
            elif j < len(after):
                right.append(j)
                b, j = b * after[j], j + 1
            else:
                raise Mixes("regroups axes in a way that cannot be followed")
        found.append((left, right))
    return found


def _divides(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a is the smaller of two products, as far as that is known: a divides b."""
    quotient = sympy.cancel(b / a)
    return sympy.denom(quotient) == 1


def _slid(runs: list[tuple[list[int], list[int]]], axis: int, axes: Axes, after: Sequence[sympy.Expr]) -> int:
    """Where ones stand side by side, which of them is new cannot be seen: [1, 1, D] -> [1, 1, 1, D] may add heads
    before the token. So a token (or batch) axis that seems new takes the nearest one to its left that is neither."""
    at = runs.index(([], [axis]))
    for left, right in reversed(runs[:at]):
        if any(after[i] != 1 or i in axes for i in right) or len(left) > 1:
            break
        if left and right:
            return left[0]
    return -1


def view(node: Node, axes: Axes) -> Demand:
    source = tensors(node)[0]
    before, after = shape(source), shape(node)
    runs = groups(before, after)

    def run_of(axis: int) -> tuple[list[int], list[int]]:
        return next(r for r in runs if axis in r[1])

    if axes.token is None and axes.batch is None:
        return [(source, axes)]
    if axes.token is not None and axes.token == axes.batch:  # merged in the output
        left, right = run_of(axes.token)
        if len(right) != 1 or len(left) not in (1, 2):
            raise Mixes("merges tokens with features")
        if len(left) == 2:
            return [(source, Axes(left[0], left[1]))]
        follows = left[0] + 1
        lone = follows < len(before) and before[follows] == 1 and after[axes.token] == before[left[0]]
        return [(source, Axes(left[0], follows if lone and len(before) > len(after) else left[0]))]

    def single(axis: int | None) -> int | None:
        if axis is None:
            return None
        left, right = run_of(axis)
        if len(left) == 1 and len(right) == 1:
            return left[0]
        return -1 if left or len(right) > 1 else _slid(runs, axis, axes, after)

    batch, token = single(axes.batch), single(axes.token)
    if token != -1 and batch != -1:
        return [(source, Axes(batch, token))]
    if axes.token is not None and axes.batch is not None:
        left, right = run_of(axes.batch)
        if right == [axes.batch, axes.token] and len(left) == 1:  # [B*S, ...] -> [B, S, ...]
            return [(source, Axes(left[0], left[0]))]
        if token == -1 and batch != -1 and after[axes.token] == 1:  # a token axis of one, split off the features
            return [(source, Axes(batch, batch))]
        if batch == -1 and token != -1 and after[axes.batch] == 1:  # a batch axis of one that appears here
            return [(source, Axes(token, token))]
    ones = [a for a in (axes.batch, axes.token) if a is not None and after[a] == 1 and single(a) == -1]
    others = [a for a in (axes.batch, axes.token) if a is not None and a not in ones]
    if ones and all(single(a) != -1 for a in others):  # an axis of one that appears here
        return [
            (source, Axes(None if axes.batch in ones else batch, None if axes.token in ones else token)),
        ]
    raise Mixes("regroups tokens with features")
