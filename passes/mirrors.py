"""What each cache op does to rows: one function per op, the table below. The token axis of rows is 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from lorc_fx.rows import blank

from .axes import arg, is_end, shape, tensors
from .readers import ALLOCATIONS

if TYPE_CHECKING:
    from .rewrite import Rewriter

aten = torch.ops.aten


@dataclass
class Cell:
    """A cell as rows: nodes for codes [T, B, r] and positions [T, B] (or None)."""

    codes: Node
    positions: Node | None
    argument: int | None = None  # the LatentKV argument whose own rows these are
    window: int | None = None  # the LatentKV argument whose window these are rows of
    start: sympy.Expr = sympy.Integer(0)
    fresh: bool = False  # owns its storage exactly


@dataclass(frozen=True)
class Mirror:
    """What a cache op does to rows. ``emit(lane)`` emits it on one of a cell's nodes, "codes" or "positions"; the other
    fields are those of the cell that comes out."""

    emit: Callable[[str], Node]
    window: int | None = None
    start: sympy.Expr = sympy.Integer(0)
    fresh: bool = False


def _cat(r: Rewriter, node: Node) -> Mirror | Cell:
    parts = [r.cells[p] for p in node.args[0] if p in r.cells]
    if len(parts) == 1:
        return parts[0]
    group = r.coded(node)
    assert group is not None
    first, token = parts[0], group.token

    def append(lane: str) -> Node:
        window, rows = getattr(first, lane), [getattr(p, lane) for p in parts[1:]]
        new = rows[0] if len(rows) == 1 else r.call(aten.cat.default, rows, 0)
        room = r.call(aten.slice.Tensor, window, 0, r.size(node.args[0][0], token), r.size(node, token))
        r.call(aten.copy_.default, room, new)
        return window

    if first.window is not None:
        return Mirror(append, window=first.window)
    return Mirror(lambda lane: r.call(aten.cat.default, [getattr(p, lane) for p in parts], 0), fresh=True)


def _slice(r: Rewriter, node: Node) -> Mirror | Cell:
    source = tensors(node)[0]
    group = r.coded(node)
    assert group is not None
    cell = r.cells[source]
    start, end = arg(node, 2, "start"), arg(node, 3, "end")
    total, kept = shape(source)[group.token], shape(node)[group.token]
    if total == kept:
        return cell
    offset = total - kept if is_end(end) else sympy.Integer(start or 0) if not isinstance(start, Node) else None

    def part(lane: str) -> Node:
        bounds = (r.env[a] if isinstance(a, Node) else a for a in (start, end))
        return r.call(aten.slice.Tensor, getattr(cell, lane), 0, *bounds)

    if cell.window is not None and offset is not None and not (offset.is_number and offset < 0):
        return Mirror(part, window=cell.window, start=cell.start + offset)
    return Mirror(part)


def _clone(r: Rewriter, node: Node) -> Mirror:
    cell = r.cells[tensors(node)[0]]
    return Mirror(lambda lane: r.call(aten.clone.default, getattr(cell, lane)), fresh=True)


def _roll(r: Rewriter, node: Node) -> Mirror:
    cell, shifts = r.cells[tensors(node)[0]], map_arg(node.args[1], r.env.__getitem__)
    return Mirror(lambda lane: r.call(aten.roll.default, getattr(cell, lane), shifts, [0]), fresh=True)


def _written(r: Rewriter, node: Node, write: Callable[[Node, Node], Any], rows: Node) -> Mirror:
    """An in-place write of ``rows`` into the first argument: the same write on codes and positions. Where both are one
    batch row, it is that of the codes."""
    into, row = node.args[0], None
    if into not in r.cells:
        into, rows, row = into.args[0], rows.args[0], into.args[2]
    target, source = r.cells[into], r.cells[rows]
    group = r.coded(node)
    assert group is not None
    r.writes[group] = r.writes.get(group, 0) + 1

    def emit(lane: str) -> Node:
        pair = getattr(target, lane), getattr(source, lane)
        write(*(pair if row is None else (r.call(aten.select.int, part, 1, row) for part in pair)))
        return getattr(target, lane)

    return Mirror(emit, target.window, target.start, target.fresh)


def _index_copy(r: Rewriter, node: Node) -> Mirror:
    index = r.env[node.args[2]]
    return _written(r, node, lambda into, rows: r.call(aten.index_copy_.default, into, 0, index, rows), node.args[3])


def _index_put(r: Rewriter, node: Node) -> Mirror:
    index = next(r.env[x] for x in node.args[1] if x is not None)
    return _written(r, node, lambda into, rows: r.call(aten.index_put_.default, into, [index], rows), node.args[2])


def _copy(r: Rewriter, node: Node) -> Mirror:
    return _written(r, node, lambda into, rows: r.call(aten.copy_.default, into, rows), node.args[1])


def _blank(r: Rewriter, node: Node) -> Mirror:
    """A buffer that this graph allocates. Rows that are never written are masked by attention, as in a dense buffer;
    they hold what tells eager code (``rows.unwritten``) that no token is there.
    """
    group = r.coded(node)
    assert group is not None
    template = r.templates[group]
    tokens = r.size(node, group.token)
    batch = 1 if template.decoder.batch_dim < 0 else r.size(node, template.decoder.batch_dim)
    device = node.meta["val"].device

    def emit(lane: str) -> Node:
        side = template.decoder.side
        if lane == "positions" and side is not None:
            return r.call(aten.zeros.default, [tokens, batch, *side.features], dtype=side.dtype, device=device)
        storage = template.format.storage
        size = [tokens, batch, template.format.width]
        return r.call(aten.full.default, size, blank(storage), dtype=storage, device=device)

    return Mirror(emit, fresh=True)


MIRRORS: dict[Any, Callable[[Rewriter, Node], Mirror | Cell]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.clone.default: _clone,
    aten.contiguous.default: _clone,
    aten.roll.default: _roll,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.copy_.default: _copy,
    **dict.fromkeys(ALLOCATIONS, _blank),
}
