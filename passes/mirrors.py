"""What each cache op does to rows: one function per op, the table below. The token axis of rows is 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from lorc_fx.latent import UNWRITTEN

from .rules import _arg, shape, tensors

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


def _each(r: Rewriter, cell: Cell, fn: Callable[[Node], Node], **kept: Any) -> Cell:
    return Cell(fn(cell.codes), None if cell.positions is None else fn(cell.positions), **kept)


def _cat(r: Rewriter, node: Node) -> Cell:
    parts = [r.cells[p] for p in node.args[0] if p in r.cells]
    if len(parts) == 1:
        return parts[0]
    group = r.coded(node)
    assert group is not None
    first = parts[0]
    if first.window is not None:
        for name in ("codes", "positions"):
            window = getattr(first, name)
            if window is None:
                continue
            rows = [getattr(p, name) for p in parts[1:]]
            new = rows[0] if len(rows) == 1 else r.call(aten.cat.default, rows, 0)
            begin = r.size(node.args[0][0], group.token)
            end = r.size(node, group.token)
            room = r.call(aten.slice.Tensor, window, 0, begin, end)
            r.call(aten.copy_.default, room, new)
        return Cell(first.codes, first.positions, window=first.window)
    codes = r.call(aten.cat.default, [p.codes for p in parts], 0)
    positions = None
    if first.positions is not None:
        positions = r.call(aten.cat.default, [p.positions for p in parts], 0)
    return Cell(codes, positions, fresh=True)


def _slice(r: Rewriter, node: Node) -> Cell:
    source = tensors(node)[0]
    group = r.coded(node)
    assert group is not None
    cell = r.cells[source]
    start, end = _arg(node, 2, "start"), _arg(node, 3, "end")
    total, kept = shape(source)[group.token], shape(node)[group.token]
    if total == kept:
        return cell
    to_end = end is None or (isinstance(end, int) and end >= 1 << 62)
    offset = total - kept if to_end else sympy.Integer(start or 0) if not isinstance(start, Node) else None
    use = lambda a: r.env[a] if isinstance(a, Node) else a  # noqa: E731
    made = _each(r, cell, lambda t: r.call(aten.slice.Tensor, t, 0, use(start), use(end)))
    if cell.window is not None and offset is not None and not (offset.is_number and offset < 0):
        made.window, made.start = cell.window, cell.start + offset
    return made


def _clone(r: Rewriter, node: Node) -> Cell:
    return _each(r, r.cells[tensors(node)[0]], lambda t: r.call(aten.clone.default, t), fresh=True)


def _roll(r: Rewriter, node: Node) -> Cell:
    source, shifts = tensors(node)[0], node.args[1]
    return _each(r, r.cells[source], lambda t: r.call(aten.roll.default, t, shifts, [0]), fresh=True)


def _written(r: Rewriter, node: Node, write: Callable[[Node, Node], Any], rows: Node) -> Cell:
    """An in-place write of ``rows`` into the first argument: the same write on codes and positions."""
    target, source = r.cells[node.args[0]], r.cells[rows]
    write(target.codes, source.codes)
    if target.positions is not None and source.positions is not None:
        write(target.positions, source.positions)
    group = r.coded(node)
    assert group is not None
    r.writes[group] = r.writes.get(group, 0) + 1
    return target


def _index_copy(r: Rewriter, node: Node) -> Cell:
    index = r.env[node.args[2]]
    return _written(
        r,
        node,
        lambda into, rows: r.call(aten.index_copy_.default, into, 0, index, rows),
        node.args[3],
    )


def _index_put(r: Rewriter, node: Node) -> Cell:
    index = next(r.env[x] for x in node.args[1] if x is not None)
    return _written(
        r,
        node,
        lambda into, rows: r.call(aten.index_put_.default, into, [index], rows),
        node.args[2],
    )


def _copy(r: Rewriter, node: Node) -> Cell:
    return _written(r, node, lambda into, rows: r.call(aten.copy_.default, into, rows), node.args[1])


def _blank(r: Rewriter, node: Node) -> Cell:
    """A buffer that this graph allocates. Rows that are never written are masked by attention, as in a dense buffer;
    they hold negative zeros, which decode like zeros and tell eager code (``latent.unwritten``) that no token is there.
    """
    group = r.coded(node)
    assert group is not None
    template = r.templates[group]
    tokens = r.size(node, group.token)
    batch = 1 if template.decoder.batch_dim < 0 else r.size(node, template.decoder.batch_dim)
    device = node.meta["val"].device
    size = [tokens, batch, template.rank]
    codes = r.call(aten.full.default, size, UNWRITTEN, dtype=template.dtype, device=device)
    positions = None
    if template.decoder.needs_positions:
        positions = r.call(aten.zeros.default, [tokens, batch], dtype=torch.int32, device=device)
    return Cell(codes, positions, fresh=True)


MIRRORS: dict[Any, Callable[[Rewriter, Node], Cell]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.clone.default: _clone,
    aten.contiguous.default: _clone,
    aten.roll.default: _roll,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.copy_.default: _copy,
    aten.zeros.default: _blank,
    aten.empty.memory_format: _blank,
    aten.full.default: _blank,
    aten.new_zeros.default: _blank,
    aten.new_empty.default: _blank,
    aten.new_full.default: _blank,
    aten.zeros_like.default: _blank,
    aten.empty_like.default: _blank,
}
