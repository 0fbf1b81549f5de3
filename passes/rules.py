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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lorc_fx.errors import AlreadyRegistered, BadOption, did_you_mean

from . import axes
from .axes import Axes, AxisRule, Demand, per_axis

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """``back(node, axes)`` gives the axes of each tensor input; ``sized`` marks ops whose second argument is a size."""

    back: Callable[[Node, Axes], Demand]
    role: str
    words: str
    sized: bool = False


RULES: dict[Any, Rule] = {}

ALIKE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)
"""They depend on no token, but need as many as their input has."""


ROLES = ("layout", "sum", "scale", "contract", "pointwise")


def register_rule(op: Any, *, role: str = "pointwise", words: str = "") -> Callable[[AxisRule], AxisRule]:
    """Teach the matcher an op: the decorated ``fn(node, axis) -> [(input node, its axis or None), ...]`` is called
    once for the token axis and once for the batch axis of the op's output, and raises ``Mixes`` where tokens mix.

    ``op`` is an OpOverload (``torch.ops.my_lib.fused_qkv.default``). ``role``: how its output depends on the inputs
    that have tokens ("layout", "sum", "scale", "contract" or "pointwise": docs/new_architecture.md); ``words``: what it
    does, for messages. Raises BadOption for any other role, AlreadyRegistered for a second rule of one.
    """
    if role not in ROLES:  # it would be taken for a linear one
        raise BadOption("role", role, f"one of {', '.join(ROLES)}", "pointwise", did_you_mean(role, ROLES))

    def add(fn: AxisRule) -> AxisRule:
        if op in RULES:
            raise AlreadyRegistered("rule", str(op), RULES[op].words)
        RULES[op] = Rule(per_axis(fn), role, words or str(op))
        return fn

    return add


# -- the table ------------------------------------------------------------------------------------------------


def _rows(role: str, words: str, fn: AxisRule, *ops: Any) -> None:
    for op in ops:
        RULES[op] = Rule(per_axis(fn), role, words)


_rows("layout", "swaps two axes", axes.transpose, aten.transpose.int, aten.t.default)
_rows("layout", "swaps two axes", axes.transpose, aten.swapaxes.default, aten.swapdims.default)
_rows("layout", "swaps the last two axes", axes.swap_last, aten.mT.default)
_rows("layout", "reverses the axes", axes.reverse_axes, aten.numpy_T.default)
_rows("layout", "reorders the axes", axes.permute, aten.permute.default)
_rows("layout", "adds an axis of one", axes.unsqueeze, aten.unsqueeze.default)
_rows("layout", "drops axes of one", axes.squeeze, aten.squeeze.dim, aten.squeeze.dims)
_rows("layout", "takes a range of features", axes.slice_, aten.slice.Tensor)
_rows("layout", "takes one feature", axes.select, aten.select.int)
_rows("layout", "cuts the features into pieces", axes.split, aten.split.Tensor, aten.split_with_sizes.default)
_rows("layout", "cuts the features into pieces", axes.split, aten.chunk.default, aten.split.sizes)
_rows("layout", "takes every feature apart", axes.unbind, aten.unbind.int)
_rows("layout", "takes one of several pieces", axes.passes, operator.getitem)
_rows("layout", "repeats features", axes.repeat, aten.repeat.default)
_rows("layout", "repeats features", axes.repeat_interleave, aten.repeat_interleave.self_int)
_rows("layout", "reverses features", axes.flip, aten.flip.default)
_rows("layout", "rotates features", axes.roll, aten.roll.default)
_rows("layout", "copies", axes.passes, aten.clone.default, aten.contiguous.default)
_rows("layout", "changes the sign", axes.passes, aten.neg.default)
_rows("layout", "sums features", axes.reduce, aten.sum.dim_IntList, aten.mean.dim)
_rows("sum", "joins features", axes.cat, aten.cat.default)
_rows("sum", "writes features", axes.slice_scatter, aten.slice_scatter.default, aten.select_scatter.default)
_rows("sum", "joins features", axes.stack, aten.stack.default)
_rows("contract", "multiplies by a weight", axes.linear, aten.linear.default)
_rows("contract", "multiplies by a weight and adds a bias", axes.addmm, aten.addmm.default)
_rows("contract", "multiplies matrices", axes.matmul, aten.mm.default, aten.bmm.default, aten.matmul.default)
_rows(
    "pointwise",
    "reduces features",
    axes.reduce,
    aten.amax.default,
    aten.amin.default,
    aten.linalg_vector_norm.default,
)
_rows("pointwise", "reduces features", axes.reduce, aten.var.dim, aten.var.correction, aten.norm.ScalarOpt_dim)
_rows("pointwise", "is a softmax over features", axes.softmax, aten.softmax.int, aten._softmax.default)
_rows("pointwise", "normalises the features", axes.layer_norm, aten.layer_norm.default, aten.rms_norm.default)
_rows("pointwise", "looks a row up in a table", axes.table, aten.embedding.default)
_rows("layout", "picks features, or looks a row up in a table", axes.index, aten.index.Tensor)
_rows("pointwise", "looks a row up in a table", axes.index_select, aten.index_select.default)
_rows("pointwise", "joins pairs of features to complex numbers", axes.passes, aten.view_as_complex.default)
_rows("pointwise", "takes complex numbers apart", axes.as_real, aten.view_as_real.default)
_rows("pointwise", "is a constant of the same shape", axes.passes, *ALIKE)
_rows("pointwise", "casts", axes.passes, *[getattr(aten.to, o) for o in ("dtype", "device", "dtype_layout")])
_rows("pointwise", "casts", axes.passes, aten._to_copy.default)

for _op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
    RULES[_op] = Rule(axes.view, "layout", "regroups the axes", sized=True)
for _op in (aten.flatten.using_ints, aten.unflatten.int):
    RULES[_op] = Rule(axes.view, "layout", "regroups the axes", sized=True)
for _op in (aten.expand.default, aten.broadcast_to.default):
    RULES[_op] = Rule(axes.pointwise, "layout", "broadcasts", sized=True)

for _op in (aten.add.Tensor, aten.sub.Tensor):
    RULES[_op] = Rule(axes.pointwise, "sum", "adds")
for _op in (aten.polar.default, aten.complex.default):
    RULES[_op] = Rule(axes.pointwise, "pointwise", "makes complex numbers of two features")
for _op in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
    RULES[_op] = Rule(axes.pointwise, "scale", "scales")


def rule_of(node: Node) -> Rule | None:
    """The rule for a node: its row, or the pointwise rule for any functional op that torch tags as pointwise."""
    found = RULES.get(node.target)
    if found is not None or node.op != "call_function":
        return found
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags and not node.target._schema.is_mutable:
        return _POINTWISE
    return None


_POINTWISE = Rule(axes.pointwise, "pointwise", "computes feature by feature")
