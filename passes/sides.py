"""What an epilogue reads of each token beside y, which the cache must therefore keep: its position, as a rule.

Of all the ways to cut the values that do not depend on y from those that do, the one with the fewest bytes per token:
the position that angles come from; the angles, where their frequencies change from call to call (longrope); cosines and
sines, where another graph made them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from lorc_fx.decoder import POSITION, Side

from .axes import Axes, Mixes, shape
from .rules import rule_of

if TYPE_CHECKING:
    from .facts import Facts, Region

Front = dict[Node, Axes]


def stored(front: Front) -> Side | None:
    """How the values of ``front`` are kept per token (None where there are none): one integer as a position, else all
    features in one row of their dtype. Raises ValueError where no such row is."""
    if not front:
        return None
    if not all(isinstance(node.meta["val"], torch.Tensor) for node in front):
        raise ValueError("several values at once")
    widths = [width(node, axes) for node, axes in front.items()]
    kinds = {node.meta["val"].dtype for node in front}
    if all(not kind.is_floating_point and not kind.is_complex for kind in kinds):
        return POSITION if widths == [1] else Side(sum(widths), torch.int32)
    if len(kinds) > 1:
        raise ValueError("several dtypes")
    return Side(sum(widths), kinds.pop())


def width(node: Node, axes: Axes) -> int:
    """Features of one token; raises ValueError where their number is not static."""
    sizes = [size for i, size in enumerate(shape(node)) if i not in (axes.batch, axes.token)]
    if not all(size.is_number for size in sizes):
        raise ValueError("features of unknown size")
    return math.prod(int(size) for size in sizes)


def find_sides(facts: Facts, region: Region, y: Node, kept: Side | None = None) -> list[Front]:
    """The cheapest cuts, all stored alike, the earliest first (layers may share it); of those that are stored as
    ``kept`` the cheapest where there are any: a cache goes on as it began (with cosines, say, because a break hid the
    positions from the prompt's graph). ``region``: from the rows back to y, to constants, to integers and to inputs of
    the call."""
    front = _frontier(region, y)
    best, least = [dict(front)], _bytes(front, kept)
    while front:
        node = max((n for n in front if _steps(facts, n, front[n])), key=facts.order.__getitem__, default=None)
        if node is None:
            break
        axes = front.pop(node)
        rule = rule_of(node)
        assert rule is not None
        sources = [(n, a) for n, a in rule.back(node, axes) if a.token is not None]
        if any(front.setdefault(n, a) != a for n, a in sources):
            break
        cost = _bytes(front, kept)
        if cost <= least:
            best, least = [dict(front), *(best if cost == least else [])], cost
    return best


def _frontier(region: Region, y: Node) -> Front:
    """Per-token values that do not depend on y and that something reads which does."""
    depends, front = {y}, {}
    for node, axes in region.nodes:
        if depends.isdisjoint(node.all_input_nodes):
            continue
        depends.add(node)
        rule = rule_of(node)
        assert rule is not None  # the region was found by rules
        for source, at in rule.back(node, axes):
            if source not in depends and at.token is not None:
                front[source] = at
    return front


def _bytes(front: Front, kept: Side | None) -> tuple[bool, float]:
    """What a cut costs, to compare: first whether it is another one than ``kept``."""
    try:
        side = stored(front)
    except ValueError:
        return True, math.inf
    return kept is not None and side != kept, 0 if side is None else side.nbytes


def _steps(facts: Facts, node: Node, axes: Axes) -> bool:
    """Whether a value can be computed from earlier per-token ones and constants. A position is one, whatever it is
    computed from, unless it is repeated."""
    rule = rule_of(node)
    if rule is None or node.op != "call_function":
        return False
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex():
        try:
            if rule.role != "layout" or width(node, axes) == 1:
                return False
        except ValueError:
            return False
    try:
        sources = rule.back(node, axes)
    except Mixes:
        return False
    if not any(a.token is not None for _, a in sources):
        return False
    return all(a.token is not None or facts.constant(n) for n, a in sources)
