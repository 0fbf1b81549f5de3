"""Which attention reads a cached value, as keys or as values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from lorc_fx.compat import written_nodes

from .axes import Axes, Mixes, arg, shape
from .rules import rule_of

aten = torch.ops.aten

CACHE_OPS = frozenset(
    {
        aten.cat.default,
        aten.slice.Tensor,
        aten.roll.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.index_copy_.default,
        aten.index_put_.default,
        aten.copy_.default,
    }
)
"""What moves cached tokens about: the ops that ``caches.PROGRAMS`` has a program for."""

ALLOCATIONS = {
    aten.zeros.default, aten.empty.memory_format, aten.full.default, aten.new_zeros.default, aten.new_empty.default,
    aten.new_full.default, aten.zeros_like.default, aten.empty_like.default,
}  # fmt: skip
"""Buffers that caches begin with."""


@dataclass(frozen=True)
class Reader:
    """The attention that reads a cache: ``kind`` is "key" or "value", ``node`` the product (or SDPA) that reads it,
    ``token`` the token axis of the cached value, ``path`` the ops between."""

    node: Node
    kind: str
    token: int
    path: tuple[Node, ...]


def query_heads(reader: Reader | None) -> int | None:
    """H of queries [B, H, S, D] (or of their weights), where the reader says it."""
    if reader is None or reader.node.target not in (aten.matmul.default, aten.scaled_dot_product_attention.default):
        return None
    queries = reader.node.args[0]
    assert isinstance(queries, Node)
    size = shape(queries)
    return int(size[-3]) if len(size) == 4 and size[-3].is_number else None


LIMIT = 256
"""Nodes that are looked at behind a value, in search of what reads it."""

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.convolution.default, aten.unfold.default
}  # fmt: skip


def find_reader(node: Node, limit: int = LIMIT) -> Reader | None:
    """The first attention product that reads ``node`` through token-wise ops, breadth first. None where there is none
    among the first ``limit`` nodes."""
    queue: list[tuple[Node, tuple[Node, ...], Node]] = [(node, (), node)]
    seen = {node}
    while queue and limit:
        limit -= 1
        current, path, since = queue.pop(0)
        for user in current.users:
            if user < since:  # it read the buffer before this was written
                continue
            found = _reads(user, current)
            if found is not None:
                kind, axis = found
                token = _axis_before(axis, path, node)
                if token is not None:
                    return Reader(user, kind, token, path)
            for buffer, way in _filled(current, path, user):
                if buffer not in seen:
                    seen.add(buffer)
                    queue.append((buffer, way, user))
            if user in seen or not _carries(user):
                continue
            seen.add(user)
            queue.append((user, (*path, user), since))
    return None


def _filled(value: Node, path: tuple[Node, ...], user: Node) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """The buffers that ``user`` writes ``value`` into, each with the path that leads to a value of its axes: ``value``
    is some tokens of them (slices), or one batch row of a value that is."""
    into = written(user)
    if into is None or into is value or not isinstance(value.meta.get("val"), torch.Tensor):
        return
    if value.target is aten.select.int and into.target is value.target and into.args[1:] == value.args[1:]:
        yield into.all_input_nodes[0], path[:-1]
    while len(shape(into)) == len(shape(value)):
        yield into, path
        if into.target is not aten.slice.Tensor:
            return
        into = into.all_input_nodes[0]


def viewed(node: Node) -> Iterator[Node]:
    """``node`` and what it is a view of, back to the value that owns the storage."""
    while True:
        yield node
        schema = getattr(node.target, "_schema", None)
        views = schema is not None and any(r.alias_info is not None for r in schema.returns)
        if node.op != "call_function" or not views or not node.args or not isinstance(node.args[0], Node):
            return
        node = node.args[0]


def written(node: Node) -> Node | None:
    """The (first) value that an op writes into in place, or None; ``compat.written_nodes`` has all of them."""
    return next(iter(written_nodes(node)), None)


def is_read(node: Node, limit: int = LIMIT) -> bool:
    """Whether attention reads ``node``, perhaps through one more product with a weight (multi-head latent attention
    caches what it expands to keys and values later). An op that is not known might be attention, and so might what
    lies past the limit; a convolution is not.
    """
    queue, seen = [node], {node}
    while queue and limit:
        limit -= 1
        node = queue.pop(0)
        if any(_reads(user, node) for user in node.users):
            return True
        for user in node.users:
            rule = rule_of(user)
            if user in seen or user.op == "output" or user.target in _CONVOLUTIONS:
                continue
            if rule is None and user.target not in CACHE_OPS and user.target not in _PADS:
                return True
            seen.add(user)
            if rule is not None and rule.role == "contract":
                if find_reader(user) is not None:
                    return True
            else:
                queue.append(user)
            target = written(user)
            bases = [] if target is None else [base for base in viewed(target) if base not in seen]
            seen.update(bases)
            queue += bases
    return bool(queue)


def is_masked(reader: Reader, limit: int = 24) -> bool:
    """Whether attention surely keeps some tokens out: it is causal, or its scores meet flags before the softmax, in a
    mask or as one. A bias alone (ALiBi) keeps nothing out; False also where that cannot be told."""
    if reader.node.target is aten.scaled_dot_product_attention.default:
        mask = arg(reader.node, 3, "attn_mask")
        return bool(arg(reader.node, 5, "is_causal")) or (isinstance(mask, Node) and _has_flags(mask))
    forward = reader.kind == "key"
    first = int(reader.node.target is aten.baddbmm.default)
    start = reader.node if forward else reader.node.args[first]
    queue: list[Node] = [start] if isinstance(start, Node) else []
    seen = set(queue)
    while queue and limit:
        limit -= 1
        node = queue.pop(0)
        for other in node.users if forward else node.all_input_nodes:
            if other in seen or other.target in _PRODUCTS:
                continue
            seen.add(other)
            queue.append(other)
            if other.target in _FILLS:
                return True
            if other.target is aten.add.Tensor and any(_has_flags(n) for n in other.all_input_nodes if n not in seen):
                return True
    return False


_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther}


def _has_flags(mask: Node, limit: int = LIMIT) -> bool:
    """Whether a mask is made of flags, or comes in ready-made."""
    queue, seen = [mask], {mask}
    while queue and limit:
        limit -= 1
        node = queue.pop(0)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            given = node.op == "placeholder" and not node.meta.get("state") and value.dim() == 4
            if value.dtype == torch.bool or given:
                return True
        if node.target not in _PRODUCTS:
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            queue += fresh
    return False


def _carries(user: Node) -> bool:
    """Whether what a node makes of a cached value is still keys or values: any token-wise op, or a cache write."""
    rule = rule_of(user)
    return user.target in CACHE_OPS or (rule is not None and rule.role != "contract")


def _reads(user: Node, value: Node) -> tuple[str, int] | None:
    """("key" or "value", token axis of ``value``) where ``user`` is attention's product with ``value``."""
    rank = len(shape(value)) if isinstance(value.meta.get("val"), torch.Tensor) else 0
    if user.target in (aten.scaled_dot_product_attention.default, torch.ops.higher_order.flex_attention):
        if user.args[1] is value:
            return "key", rank - 2
        return ("value", rank - 2) if user.args[2] is value else None
    if user.target in _PRODUCTS and rank >= 3:
        right = user.args[2] if user.target is aten.baddbmm.default else user.args[1]
        if right is value:  # [.., S, X] @ [.., X, Y]: over features it is q k^T, over tokens it is weights v
            scores = _feeds_softmax(user)
            return ("key", rank - 1) if scores else ("value", rank - 2)
    return None


def _feeds_softmax(node: Node, limit: int = 24) -> bool:
    queue, seen = [node], {node}
    while queue and limit:
        limit -= 1
        for user in queue.pop(0).users:
            if user.target in SOFTMAX:
                return True
            if user not in seen and user.target not in _PRODUCTS and user.target is not aten.linear.default:
                seen.add(user)
                queue.append(user)
    return False


def _axis_before(axis: int | None, path: tuple[Node, ...], start: Node) -> int | None:
    """Follow an axis of the last value in ``path`` back to ``start`` with the matcher's own rules; what moves cached
    tokens about keeps it. None where a value on the way does not have it or mixes along it: no keys or values then."""
    for node, source in reversed(list(zip(path, (start, *path), strict=False))):
        rule = rule_of(node)
        if rule is None or axis is None:
            continue
        try:
            axis = next((a.token for n, a in rule.back(node, Axes(None, axis)) if n is source), axis)
        except Mixes:
            if node.target not in CACHE_OPS:
                return None
    return axis
