"""Tokens that rows of a cache stand for: rows -> y_hat -> epilogue, the lowering that serves every reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorc_fx.codec import Codec
from lorc_fx.kernels import ops as _ops  # noqa: F401  (registers lorc::table)
from lorc_fx.kernels import pack as by_op
from lorc_fx.packing import unpack
from lorc_fx.rows import zero_unwritten

from . import grouped
from .caches import Group
from .emitter import Emitter
from .interface import Sharing
from .mirrors import Cell
from .sites import Matched, Site

aten = torch.ops.aten
_unpack = torch.ops.lorc.unpack


class Decoding(Emitter):
    """Reads ``cells`` of coded groups, as they are after the ``writes`` to each group so far."""

    leaders: dict[Group, Group]

    def __init__(self, gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing) -> None:
        super().__init__(gm, matched, codecs, sharing)
        self.cells: dict[Node, Cell] = {}
        self.writes: dict[Group, int] = {}
        self.reads: dict[tuple[Node, int], Node] = {}

    def env_value(self, node: Node) -> Node:
        return self.read(node) if self.coded(node) is not None else self.env[node]

    def read(self, node: Node) -> Node:
        """Decoded tokens of a cell as they are now: rows -> y_hat -> epilogue (the universal lowering)."""
        group = self.coded(node)
        assert group is not None
        key = (node, self.writes.get(group, 0))
        if key not in self.reads:
            cell, decoder = self.cells[node], self.templates[group].decoder
            value = self._decode(group, cell)
            if group in self.matched.bare:
                value = self.call(zero_unwritten, value, cell.codes, decoder.batch_dim, decoder.token_dim)
            self.reads[key] = value
        return self.reads[key]

    def latents(self, group: Group, cell: Cell) -> Node:
        """What a cell's rows hold now: [T, B, k] in the model's dtype. Where ``multiple`` says so zeros follow, which
        ``tokens`` takes off a product with them."""
        form = self.templates[group].format
        if form.plain:
            return cell.codes
        version = self.writes.get(group, 0)
        if self.templates[group].encode.device.type not in by_op.DEVICES:
            return self.once(version, unpack, (cell.codes, form.spec, form.choices, form.dtype), {})
        return self.once(version, _unpack.default, (cell.codes, *form.parts, self.multiple(group)), {})

    def multiple(self, group: Group) -> int:
        """Of how many tokens ``latents`` are."""
        codec = self.templates[group]
        return by_op.multiple(codec.dtype, codec.encode.device)

    def tokens(self, value: Node, dim: int, group: Group, cell: Cell) -> Node:
        """``latents``, or a product with them, with as many tokens along ``dim`` as the cell has."""
        if self.templates[group].format.plain or self.multiple(group) == 1:
            return value
        return self.call(aten.slice.Tensor, value, dim, 0, self.call(aten.sym_size.int, cell.codes, 0))

    def vectors(self, group: Group, cell: Cell) -> Node:
        """y_hat [B, T, n]."""
        y, decode, mean = self.latents(group, cell), self.codec_input(group, "decode"), self.codec_input(group, "mean")
        template = self.templates[group]
        if decode is not None and template.groups > 1:
            y = grouped.vectors(self.call, y, decode, template)
        elif decode is not None:
            y = self.call(aten.matmul.default, y, decode)
        y = self.call(aten.transpose.int, self.tokens(y, 0, group, cell), 0, 1)
        return y if mean is None else self.call(aten.add.Tensor, y, mean)

    def _decode(self, group: Group, cell: Cell) -> Node:
        return self.decoded(group, cell, self.vectors(group, cell))

    def version(self, group: Group) -> int:
        """How often the positions of a group's cells were written: angles before a write are not those after it."""
        return self.writes.get(self.leaders.get(group, group), 0)

    def angles(self, group: Group, cell: Cell) -> dict[Node, Any]:
        """What a decoder makes of positions and constants alone (angles, their cosines), by node of it: emitted once
        for all sites that read the same positions."""
        version, found = self.version(group), dict[Node, Any]()
        for inner in self.templates[group].decoder.module.graph.nodes:
            if inner.op == "placeholder" and inner.name == "positions":
                found[inner] = None
                if cell.positions is not None:
                    found[inner] = self.once(version, aten.transpose.int, (cell.positions, 0, 1), {})
            elif inner.op == "placeholder" and inner.name != "y":
                found[inner] = self.codec_input(group, inner.name)
            elif inner.op == "call_function" and all(source in found for source in inner.all_input_nodes):
                found[inner] = self._once(version, inner, found)
        return found

    def decoded(self, group: Group, cell: Cell, y: Node, shared: bool = False) -> Node:
        """Inline the decoder for ``y``. Angles are stored where they meet it; with ``shared`` y is a constant, and all
        of it is emitted once."""
        version, angles = self.version(group), self.angles(group, cell)
        env = dict(angles)
        for inner in self.templates[group].decoder.module.graph.nodes:
            if inner.op == "placeholder" and inner.name == "y":
                env[inner] = y
            elif inner.op == "output":
                return env[inner.args[0]]
            elif inner not in env and shared:
                env[inner] = self._once(version, inner, env)
            elif inner not in env:
                for source in inner.all_input_nodes:
                    if source in angles and source.op != "placeholder" and source.target is not aten.sym_size.int:
                        env[source] = self.once(version, torch.ops.lorc.table.default, (env[source],), {})
                env[inner] = self.graph.node_copy(inner, env.__getitem__)
        raise AssertionError("a decoder has an output")
