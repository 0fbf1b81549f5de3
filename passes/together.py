"""Rows that are packed one after the other, in one call: keys and values of a layer, as a rule. A call costs more than
what it does for one token, and two threads can share what it does."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .normalise import is_impure

_pack = torch.ops.lorc.pack.default


def pack_together(graph: Graph) -> None:
    """Unite each ``lorc::pack`` of a rewritten graph with the next one, where the order of writes allows it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    packs = [node for node in graph.nodes if node.target is _pack]
    while len(packs) > 1:
        first, second, *rest = packs
        between = _between(first, second, order)
        if between is None:
            packs = [second, *rest]
            continue
        _unite(graph, first, second, between)
        packs = rest


def _between(first: Node, second: Node, order: dict[Node, int]) -> list[Node] | None:
    """What is made of ``first`` before ``second`` comes, in order; None where that cannot wait until after it."""
    found: set[Node] = {first}
    waiting = [first]
    while waiting:
        for user in waiting.pop().users:
            if user is second or (order[user] < order[second] and is_impure(user)):
                return None
            if order[user] < order[second] and user not in found:
                found.add(user)
                waiting.append(user)
    return sorted(found - {first}, key=order.__getitem__)


def _unite(graph: Graph, first: Node, second: Node, between: list[Node]) -> None:
    left: list[Any] = list(first.args)
    right: list[Any] = list(second.args)
    joined = [[*a, *b] for a, b in zip(left[:-1], right[:-1], strict=True)]
    with graph.inserting_before(second):
        made = graph.call_function(_pack, (*joined, f"{left[-1]},{right[-1]}"))
    at = made
    for node in between:
        at.append(node)
        at = node
    for node, by in ((first, 0), (second, len(left[0]))):
        for piece in list(node.users):
            assert piece.target is operator.getitem
            piece.args = (made, piece.args[1] + by)
        graph.erase_node(node)
