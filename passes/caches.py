"""Which values are caches: the token-axis programs that start at a cache and end in an output or a mutated input.

A *cell* is a node whose value is a run of cached tokens: a LatentKV input, an empty or zeroed buffer that a write
fills, the new rows themselves, or what the ops of ``PROGRAMS`` (``cat``, ``slice``, ``index_copy_``, ..) make of cells.
Cells that flow into one another form a *group*, which is coded as a whole or not at all. Whatever else reads a cell
is a reader, and gets decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from lorc_fx.compat import written_nodes

from .axes import arg, dim_of, is_end, shape, tensors
from .facts import static_size
from .readers import ALLOCATIONS, CACHE_OPS, find_reader, viewed

aten = torch.ops.aten


@dataclass(eq=False)
class Group:
    """Cells that flow into one another. ``rows``: nodes that bring new tokens, with their token axis. ``in_place``: new
    tokens are written into a buffer, not appended. ``split``: the axis along which single entries of the buffer are
    written, which must turn out to be the batch."""

    token: int
    rows: dict[Node, int] = field(default_factory=dict)
    latents: list[Node] = field(default_factory=list)
    blanks: list[Node] = field(default_factory=list)
    window: int | None = None
    in_place: bool = False
    split: int | None = None
    broken: tuple[Node, str] | None = None
    merged_into: Group | None = None

    def find(self) -> Group:
        group = self
        while group.merged_into is not None:
            group = group.merged_into
        return group

    def union(self, other: Group) -> Group:
        a, b = self.find(), other.find()
        if a is not b:
            a.rows.update(b.rows)
            a.latents += b.latents
            a.blanks += b.blanks
            a.window = a.window if b.window is None else b.window
            a.in_place |= b.in_place
            a.split = a.split if b.split is None else b.split
            a.broken = a.broken or b.broken
            b.merged_into = a
        return a


@dataclass(frozen=True)
class DenseWrite:
    """A write to a cache that was not born in a rewritten graph: it stays dense (Miss ``preallocated``)."""

    node: Node
    rows: Node
    token: int


class Caches:
    """Cells of one graph: ``cells[node]`` is the node's group; ``dense`` the writes that must stay dense."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.cells: dict[Node, Group] = {}
        self.dense: list[DenseWrite] = []
        self.nodes = list(nodes)
        for node in self.nodes:
            self._visit(node)
        self._bare_outputs()
        self._other_writes()

    def group(self, node: Node) -> Group | None:
        found = self.cells.get(node)
        return None if found is None else found.find()

    def groups(self) -> dict[Group, list[Node]]:
        """Those that hold a LatentKV or leave the graph, with their cells; others are values of the moment (routing
        tables, masks)."""
        output = next(n for n in self.nodes if n.op == "output")
        kept = {self.group(seen) for node in output.all_input_nodes for seen in viewed(node)}
        found: dict[Group, list[Node]] = {}
        for cell, group in self.cells.items():
            found.setdefault(group.find(), []).append(cell)
        return {group: cells for group, cells in found.items() if group in kept or group.latents}

    # -- the scan ---------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            latent = node.meta.get("latent")
            if latent is not None:
                token = latent.codec.decoder.token_dim
                self.cells[node] = Group(token, latents=[node])
            return
        program = PROGRAMS.get(node.target) if node.op == "call_function" else None
        if program is not None:
            program(self, node)

    def join(self, node: Node, sources: list[Node], token: int) -> Group:
        """Make ``node`` a cell with all ``sources``; those that are none yet become rows (or blanks)."""
        group = Group(token)
        for source in sources:
            if source in self.cells:
                group = self.cells[source].union(group)
            elif is_blank(source):
                group.blanks.append(source)
                self.cells[source] = group
            elif is_empty(source):
                continue
            else:
                group.rows[source] = token
                self.cells[source] = group
        self.cells[node] = group
        return group.find()

    def is_kept(self, group: Group) -> bool:
        """Whether a group is a cache of its own, as far as its cells are known: it came in as one, or leaves."""
        cells = [cell for cell, at in self.cells.items() if at.find() is group]
        return any(c.meta.get("latent") is not None or any(u.op == "output" for u in c.users) for c in cells)

    def base(self, node: Node) -> tuple[Node, int | None, list[Node]]:
        """Follow slices along one axis back to what they slice: (base, axis, the slice nodes)."""
        axis: int | None = None
        path: list[Node] = []
        while node.target is aten.slice.Tensor and node not in self.cells:
            source = tensors(node)[0]
            at = dim_of(arg(node, 1, "dim", 0), len(shape(source)))
            if axis is not None and at != axis:
                break
            axis = at if axis is None else axis
            path.append(node)
            node = source
        return node, axis, path

    def _other_writes(self) -> None:
        """A write into a cell, or a view of one, that no program stands for: the group cannot be coded."""
        for node in self.nodes:
            if node in self.cells:
                continue
            for source in (seen for target in written_nodes(node) for seen in viewed(target)):
                if source in self.cells:
                    self.cells[source].find().broken = (node, f"op `{node.target}` writes to it in place")

    def _bare_outputs(self) -> None:
        """Rows that leave the graph without a write (a hand-written cache's first step), if attention reads them."""
        output = next(n for n in self.nodes if n.op == "output")
        dense = {write.node for write in self.dense}
        for node in output.all_input_nodes:
            if self.base(node)[0] in dense:
                continue
            value = node.meta.get("val")
            if node in self.cells or not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if node.op == "placeholder" or value.dim() < 3:
                continue
            reader = find_reader(node)
            if reader is not None:
                self.join(node, [node], reader.token)


def is_empty(node: Node) -> bool:
    """An empty buffer that a cache begins with: a constant, an allocation or an input (and not, say, the empty
    un-rotated part of a key)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not any(s == 0 for s in shape(node)):
        return False
    while node.target in (aten.lift_fresh_copy.default, aten.clone.default, aten.to.dtype, aten.detach_.default):
        node = node.args[0]
    return node.op in ("get_attr", "placeholder") or node.target in ALLOCATIONS


def is_blank(node: Node) -> bool:
    """An allocation with room for tokens, which reads as zeros (or as whatever, where the graph says empty)."""
    if node.op != "call_function" or node.target not in ALLOCATIONS:
        return False
    fill = {aten.full.default: 1, aten.new_full.default: 2}.get(node.target)
    return (fill is None or bool(node.args[fill] == 0)) and all(s != 0 for s in shape(node))


def comes_in(node: Node) -> bool:
    """Whether a buffer (or what it is a view of) is an input of the graph: an argument, or a buffer of a module."""
    return any(source.op == "placeholder" for source in viewed(node))


def _cache_like(caches: Caches, node: Node) -> bool:
    return node in caches.cells or is_blank(node)


# -- programs: one function per op, the table below -----------------------------------------------------------


def _cat(caches: Caches, node: Node) -> None:
    parts: list[Node] = list(node.args[0])
    dim = dim_of(arg(node, 1, "dim", 0), len(shape(node)))
    cells = [p for p in parts if p in caches.cells]
    if cells and any(caches.cells[c].find().token != dim for c in cells):
        return
    groups = {caches.cells[c].find() for c in cells}
    if len(groups) > 1 and sum(caches.is_kept(group) for group in groups) > 1:
        return  # attention over two caches at once (an encoder's behind a decoder's): it reads both, and each stays
    if cells or any(is_empty(p) for p in parts):
        caches.join(node, parts, dim)
        return
    past = [p for p in parts if caches.base(p)[0].op == "placeholder" and not caches.base(p)[0].meta.get("state")]
    if past and len(shape(node)) >= 3 and past[0].meta["val"].is_floating_point():
        caches.dense += [DenseWrite(node, p, dim) for p in parts if p not in past]


def _slice(caches: Caches, node: Node) -> None:
    source = tensors(node)[0]
    if source not in caches.cells:
        return
    group = caches.cells[source].find()
    if dim_of(arg(node, 1, "dim", 0), len(shape(source))) != group.token:
        return
    start, end = arg(node, 2, "start"), arg(node, 3, "end")
    if isinstance(start, int) and start < 0 and is_end(end):
        group.window = -start if any(u.op == "output" for u in node.users) else group.window
    if arg(node, 4, "step", 1) == 1:
        caches.join(node, [source], group.token)


def _same(caches: Caches, node: Node) -> None:
    source = tensors(node)[0]
    if source in caches.cells and source.meta["val"].dtype == node.meta["val"].dtype:
        caches.join(node, [source], caches.cells[source].find().token)


def _roll(caches: Caches, node: Node) -> None:
    source = tensors(node)[0]
    dims = arg(node, 2, "dims", ())
    if source in caches.cells and len(dims) == 1:
        group = caches.cells[source].find()
        if dim_of(dims[0], len(shape(source))) == group.token:
            caches.join(node, [source], group.token)


def _index_copy(caches: Caches, node: Node) -> None:
    target, dim, _, rows = node.args[:4]
    assert isinstance(target, Node) and isinstance(rows, Node)
    dim = dim_of(dim, len(shape(target)))
    _write(caches, node, target, rows, dim)


def _index_put(caches: Caches, node: Node) -> None:
    target, indices, rows = node.args[:3]
    assert isinstance(target, Node) and isinstance(rows, Node)
    used = [i for i, x in enumerate(indices) if x is not None]
    index = indices[used[0]] if len(used) == 1 else None
    plain = isinstance(index, Node) and index.meta["val"].dim() == 1 and not arg(node, 3, "accumulate", False)
    if plain:
        _write(caches, node, target, rows, used[0])
    elif target in caches.cells:
        caches.cells[target].find().broken = (node, "it is written with several indices at once")


def _copy(caches: Caches, node: Node) -> None:
    target, rows = node.args[:2]
    if not isinstance(rows, Node):
        return
    assert isinstance(target, Node)
    source, source_axis, path = caches.base(rows)
    into, into_axis, into_path = caches.base(target)
    if not _cache_like(caches, into):
        if into_axis is not None and comes_in(into):
            caches.dense.append(DenseWrite(node, rows, into_axis))
        return
    group = caches.group(into)
    token = group.token if group else into_axis if into_axis is not None else source_axis
    known = caches.group(source)
    token = known.token if known and group is None else token
    if token is None:
        reader = find_reader(source)
        token = reader.token if reader else None
    if token is None or shape(rows) != shape(target):
        if group:
            group.broken = (node, "it is overwritten in a way that is not understood")
        return
    if source_axis not in (None, token) or into_axis not in (None, token):
        if group:
            group.broken = (node, "it is written along another axis than its tokens")
        return
    _write(caches, node, into, source, token)
    for piece in path + into_path:
        caches.cells[piece] = caches.cells[node]


def _all_rows(target: Node, rows: Node, dim: int) -> tuple[Node, Node, int, int | None]:
    """(buffer, what is written, token axis, the axis that is split) of all batch rows where one is written."""
    if target.target is rows.target is aten.select.int and target.args[1:] == rows.args[1:]:
        at = dim_of(rows.args[1], len(shape(rows)) + 1)
        return tensors(target)[0], tensors(rows)[0], dim + (dim >= at), at
    return target, rows, dim, None


def _write(caches: Caches, node: Node, target: Node, rows: Node, dim: int) -> None:
    split = None
    if not _cache_like(caches, target):
        target, rows, dim, split = _all_rows(target, rows, dim)
    if not _cache_like(caches, target):
        if comes_in(target):
            caches.dense.append(DenseWrite(node, rows, dim))
        return
    group = caches.group(target)
    if split is not None and (node.users or (group is not None and group.split not in (None, split))):
        return  # as a value of its own, it would be one row of a cell
    if group is not None and group.token != dim:
        group.broken = (node, "it is written along another axis than its tokens")
        return
    if shape(target)[:dim] != shape(rows)[:dim] or shape(target)[dim + 1 :] != shape(rows)[dim + 1 :]:
        if group is not None:
            group.broken = (node, "it is written with broadcasting")
        return
    joined = caches.join(node, [target, rows], dim)
    joined.in_place = True
    joined.split = joined.split if split is None else split
    if joined.window is None and joined.blanks:
        joined.window = static_size(joined.blanks[0].meta["val"].shape[dim])


PROGRAMS: dict[Any, Callable[[Caches, Node], None]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.roll.default: _roll,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.copy_.default: _copy,
}
assert set(PROGRAMS) == CACHE_OPS
