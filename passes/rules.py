"""op -> what it does to a per-token value: where each input has its batch and token axis, and whether it is linear.

A value is *token-wise* if each of its tokens depends on that token alone. Going backward from a cache write, a rule
answers: "if the output has its tokens along this axis, where do the inputs have theirs?" (None: the input does not
depend on the token), or raises ``Mixes``. ``role`` says how the op acts on the inputs that do depend on it:

    layout      linear in its one input: moves, selects, repeats, sums or negates features
    sum         linear in all its inputs together (other operands are a constant shift)
    scale       linear where one operand depends on the token and the others do not
    contract    a matrix product with a weight: linear where one operand depends on the token
    pointwise   any function of that token's features

Library authors add a row for an op of their own with ``register_rule``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from lorc_fx.compat import size_expr
from lorc_fx.errors import AlreadyRegistered

aten = torch.ops.aten


class Axes(NamedTuple):
    """Where a value has its batch and its tokens; equal where both are merged in one axis, batch outermost."""

    batch: int | None
    token: int | None


class Mixes(Exception):
    """The op mixes tokens or batch rows (or cannot be followed); the text says how."""


Demand = list[tuple[Node, Axes]]
AxisRule = Callable[[Node, int], list[tuple[Node, "int | None"]]]


@dataclass(frozen=True)
class Rule:
    """``back(node, axes)`` gives the axes of each tensor input; ``sized`` marks ops whose second argument is a size."""

    back: Callable[[Node, Axes], Demand]
    role: str
    words: str
    sized: bool = False


RULES: dict[Any, Rule] = {}


def register_rule(op: Any, *, role: str = "pointwise", words: str = "") -> Callable[[AxisRule], AxisRule]:
    """Teach the matcher an op: the decorated ``fn(node, axis) -> [(input node, its axis or None), ...]`` is called
    once for the token axis and once for the batch axis of the op's output, and raises ``Mixes`` where tokens mix.

    ``op`` is an OpOverload (``torch.ops.my_lib.fused_qkv.default``); a second rule for one op is refused.
    """

    def add(fn: AxisRule) -> AxisRule:
        if op in RULES:
            raise AlreadyRegistered("rule", str(op), RULES[op].words)
        RULES[op] = Rule(per_axis(fn), role, words or str(op))
        return fn

    return add


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


def _dim(value: Any, rank: int) -> int:
    return int(value) % max(rank, 1)


def _arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


# -- rules for one axis ---------------------------------------------------------------------------------------


def _broadcast(node: Node, axis: int) -> list[tuple[Node, int | None]]:
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


def _pointwise(node: Node, axes: Axes) -> Demand:
    demand = per_axis(_broadcast)(node, Axes(None, axes.token))
    out = len(shape(node))
    keep = []
    for source, found in demand:
        at = None if axes.batch is None else axes.batch - (out - len(shape(source)))
        keep.append((source, Axes(at if at is not None and at >= 0 else None, found.token)))
    return keep


def _unary(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return [(source, axis if i == 0 else None) for i, source in enumerate(tensors(node))]


def _transpose(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    rank = len(shape(source))
    a, b = (0, 1) if node.target is aten.t.default else (_dim(node.args[1], rank), _dim(node.args[2], rank))
    return [(source, {a: b, b: a}.get(axis, axis))]


def _permute(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    return [(source, _dim(node.args[1][axis], len(shape(source))))]


def _unsqueeze(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = _dim(node.args[1], len(shape(node)))
    return [(tensors(node)[0], None if axis == at else axis - (axis > at))]


def _squeeze(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    size = shape(source)
    dims = _arg(node, 1, "dim")
    dims = range(len(size)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {_dim(d, len(size)) for d in dims if size[_dim(d, len(size))] == 1}
    kept = [i for i in range(len(size)) if i not in gone]
    return [(source, kept[axis])]


def _slice(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = _dim(_arg(node, 1, "dim", 0), len(shape(source)))
    if axis == at and shape(node)[axis] != shape(source)[axis]:
        raise Mixes("takes some tokens and drops others")
    return [(source, axis)]


def _select(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = _dim(node.args[1], len(shape(node)) + 1)
    return [(tensors(node)[0], axis + (axis >= at))]


def _split(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    if axis == _dim(_arg(node, 2, "dim", 0), len(shape(source))):
        raise Mixes("splits along the tokens")
    return [(source, axis)]


def _unbind(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = _dim(_arg(node, 1, "dim", 0), len(shape(source)))
    return [(source, axis + (axis >= at))]


def _cat(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    if axis == _dim(_arg(node, 1, "dim", 0), len(shape(node))):
        raise Mixes("concatenates along the tokens")
    return [(source, axis) for source in tensors(node)]


def _stack(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = _dim(_arg(node, 1, "dim", 0), len(shape(node)))
    return [(source, None if axis == at else axis - (axis > at)) for source in tensors(node)]


def _expand(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    at = axis - (len(shape(node)) - len(shape(source)))
    return [(source, None if at < 0 else at)]


def _repeat(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    if node.args[1][axis] != 1:
        raise Mixes("repeats along the tokens or the batch")
    return _expand(node, axis)


def _repeat_interleave(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    at = _arg(node, 2, "dim")
    if at is None or axis == _dim(at, len(shape(node))):
        raise Mixes("repeats along the tokens or the batch")
    return [(tensors(node)[0], axis)]


def _feature_dims(node: Node, axis: int, dims: Any) -> list[tuple[Node, int | None]]:
    """An op over the feature dims ``dims`` that keeps the rank."""
    source = tensors(node)[0]
    rank = len(shape(source))
    if axis in {_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}:
        raise Mixes("reduces, normalises or moves along the tokens")
    return [(s, axis if i == 0 else None) for i, s in enumerate(tensors(node))]


def _reduce(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    source = tensors(node)[0]
    rank = len(shape(source))
    position = 2 if node.target is aten.linalg_vector_norm.default or node.target is aten.norm.ScalarOpt_dim else 1
    dims = _arg(node, position, "dim")
    if dims is None or dims == []:
        raise Mixes("reduces over all tokens")
    gone = {_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    after = {aten.var.dim: 3, aten.var.correction: 99}.get(node.target, position + 1)
    keep = bool(_arg(node, after, "keepdim", False))
    at = axis if keep else [i for i in range(rank) if i not in gone][axis]
    if at in gone:
        raise Mixes("reduces over the tokens")
    return [(source, at)]


def _softmax(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, node.args[1])


def _flip(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, node.args[1])


def _roll(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    dims = _arg(node, 2, "dims", ())
    if not dims:
        raise Mixes("rolls the flattened value")
    return _feature_dims(node, axis, dims)


def _layer_norm(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    rank = len(shape(node))
    return _feature_dims(node, axis, list(range(rank - len(node.args[1]), rank)))


def _linear(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    return _feature_dims(node, axis, -1)


def _addmm(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    bias, x, weight = tensors(node)
    if axis != 0:
        raise Mixes("multiplies a weight from the right by the tokens")
    return [(bias, None), (x, 0), (weight, None)]


def _matmul(node: Node, axis: int) -> list[tuple[Node, int | None]]:
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


def _table(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    """A row of a table per index: ``embedding(table, i)`` and ``table[i]``."""
    table, index = tensors(node)[:2]
    if axis >= len(shape(index)):
        raise Mixes("indexes with the tokens among the features")
    return [(table, None), (index, axis)]


def _index(node: Node, axis: int) -> list[tuple[Node, int | None]]:
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


def _index_select(node: Node, axis: int) -> list[tuple[Node, int | None]]:
    table, index = tensors(node)
    if _dim(node.args[1], len(shape(table))) != 0:
        if axis == _dim(node.args[1], len(shape(table))):
            raise Mixes("selects along the tokens")
        return [(table, axis), (index, None)]
    if axis != 0:
        raise Mixes("indexes with the tokens among the features")
    return [(table, None), (index, 0)]


def _passes(node: Node, axis: int) -> list[tuple[Node, int | None]]:
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


def _view(node: Node, axes: Axes) -> Demand:
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
        return -1

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


# -- the table ------------------------------------------------------------------------------------------------


def _rows(role: str, words: str, fn: AxisRule, *ops: Any) -> None:
    for op in ops:
        RULES[op] = Rule(per_axis(fn), role, words)


_rows("layout", "swaps two axes", _transpose, aten.transpose.int, aten.t.default)
_rows("layout", "reorders the axes", _permute, aten.permute.default)
_rows("layout", "adds an axis of one", _unsqueeze, aten.unsqueeze.default)
_rows("layout", "drops axes of one", _squeeze, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
_rows("layout", "takes a range of features", _slice, aten.slice.Tensor)
_rows("layout", "takes one feature", _select, aten.select.int)
_rows("layout", "cuts the features into pieces", _split, aten.split.Tensor, aten.split_with_sizes.default)
_rows("layout", "cuts the features into pieces", _split, aten.chunk.default, aten.split.sizes)
_rows("layout", "takes every feature apart", _unbind, aten.unbind.int)
_rows("layout", "takes one of several pieces", _passes, operator.getitem)
_rows("layout", "repeats features", _repeat, aten.repeat.default)
_rows("layout", "repeats features", _repeat_interleave, aten.repeat_interleave.self_int)
_rows("layout", "reverses features", _flip, aten.flip.default)
_rows("layout", "rotates features", _roll, aten.roll.default)
_rows("layout", "copies", _passes, aten.clone.default, aten.contiguous.default)
_rows("layout", "changes the sign", _passes, aten.neg.default)
_rows("layout", "sums features", _reduce, aten.sum.dim_IntList, aten.mean.dim)
_rows("sum", "joins features", _cat, aten.cat.default)
_rows("sum", "joins features", _stack, aten.stack.default)
_rows("contract", "multiplies by a weight", _linear, aten.linear.default)
_rows("contract", "multiplies by a weight and adds a bias", _addmm, aten.addmm.default)
_rows("contract", "multiplies matrices", _matmul, aten.mm.default, aten.bmm.default, aten.matmul.default)
_rows("pointwise", "reduces features", _reduce, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default)
_rows("pointwise", "reduces features", _reduce, aten.var.dim, aten.var.correction, aten.norm.ScalarOpt_dim)
_rows("pointwise", "is a softmax over features", _softmax, aten.softmax.int, aten._softmax.default)
_rows("pointwise", "normalises the features", _layer_norm, aten.layer_norm.default, aten.rms_norm.default)
_rows("pointwise", "looks a row up in a table", _table, aten.embedding.default)
_rows("layout", "picks features, or looks a row up in a table", _index, aten.index.Tensor)
_rows("pointwise", "looks a row up in a table", _index_select, aten.index_select.default)
_rows("pointwise", "casts", _passes, *[getattr(aten.to, o) for o in ("dtype", "device", "dtype_layout")])
_rows("pointwise", "casts", _passes, aten._to_copy.default)

for _op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
    RULES[_op] = Rule(_view, "layout", "regroups the axes", sized=True)
for _op in (aten.flatten.using_ints, aten.unflatten.int):
    RULES[_op] = Rule(_view, "layout", "regroups the axes", sized=True)
for _op in (aten.expand.default, aten.broadcast_to.default):
    RULES[_op] = Rule(_pointwise, "layout", "broadcasts", sized=True)

for _op in (aten.add.Tensor, aten.sub.Tensor):
    RULES[_op] = Rule(_pointwise, "sum", "adds")
for _op in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
    RULES[_op] = Rule(_pointwise, "scale", "scales")


def rule_of(node: Node) -> Rule | None:
    """The rule for a node: its row, or the pointwise rule for any functional op that torch tags as pointwise."""
    found = RULES.get(node.target)
    if found is not None or node.op != "call_function":
        return found
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags and not node.target._schema.is_mutable:
        return _POINTWISE
    return None


_POINTWISE = Rule(_pointwise, "pointwise", "computes feature by feature")
