"""A canonical graph and codecs -> the same graph over latents.

Before (one layer, decode)                        After
    k = epilogue(x @ W^T)          [B,H,S,D]          c = x @ (P^T W)^T              [S,B,r]
    K = cat([past, k], 2)          [B,H,T+S,D]        rows[T:T+S] = c                rows [T+S,B,r], in place
    out = sdpa(q, K, V)                               K = epilogue(rows @ S + mu)    [B,H,T+S,D]
    return K, out                                     out = sdpa(q, K, V); return out

Every cell of a coded group is mirrored by ops on its rows; every other reader of a cell reads decoded tokens, a
token's own included. In-place ops stay in place and in order, so aliasing means what it meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lorc_fx.codec import Codec
from lorc_fx.compat import written_nodes
from lorc_fx.kernels.attend import Attend

from .axes import shape
from .caches import Group, viewed
from .decoding import Decoding
from .interface import Input, Output, Rewritten, Sharing
from .lower import Absorption, absorb, readings
from .mirrors import MIRRORS, Cell
from .narrow import narrow
from .new_rows import encoded, kept_beside
from .normalise import is_impure
from .sites import Matched, Site
from .together import pack_together
from .tracks import shared_tracks

aten = torch.ops.aten


class Rewriter(Decoding):
    """Builds the new graph in one walk over the old one."""

    def __init__(self, gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing) -> None:
        super().__init__(gm, matched, codecs, sharing)
        self.site_of = {site.node: (i, site) for i, site in enumerate(matched.sites)}
        self.unread: list[tuple[Node, Group, Cell]] = []
        self.attends: list[Attend] = []
        self.windows = {n: extra for n in self.arguments if (extra := self._appended(n)) is not None}
        self.leaders = shared_tracks(gm, matched, dict(sharing.tracks), self.windows)
        self.followers: dict[Group, list[Group]] = {}
        for group, leader in self.leaders.items():
            if leader is not group:
                self.followers.setdefault(leader, []).append(group)
        self.ordinals: dict[Group, int] = {}
        self.lanes: dict[tuple[Group, int], Node | None] = {}
        self.returned: dict[Node, int] = {}
        self.written = {seen for n in gm.graph.nodes for into in written_nodes(n) for seen in viewed(into)}
        self.absorptions: dict[Node, Absorption] = absorb(gm, matched, self.templates)

    # -- the walk ---------------------------------------------------------------------------------------------

    def run(self) -> Rewritten:
        outputs: list[Output] = []
        for i, node in enumerate(self.arguments):
            self._argument(i, node)
        for node, group, cell in self.unread:
            self.env[node] = self._decode(group, cell)
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                outputs = self._outputs(node)
            elif self.coded(node) is not None:
                self._cell(node)
            elif node in self.absorptions:
                self.env[node] = self.absorptions[node].emit(self, node)
            else:
                self.env[node] = self.copied(node)
        self.graph.eliminate_dead_code(is_impure)
        narrow(self.graph, {new: old for old, new in self.env.items()})
        self.graph.eliminate_dead_code(is_impure)
        pack_together(self.graph)
        module = GraphModule(self.old, self.graph)
        return self._pruned(Rewritten(module, self.inputs, outputs, self.attends, self._lowerings()))

    def _argument(self, i: int, node: Node) -> None:
        group = self.coded(node)
        if node.meta.get("latent") is None:
            kind = "dense" if node.meta.get("decode") else "argument"
            self.env[node] = self.placeholder(node.name, Input(kind, i), node.meta["val"])
            return
        latent = node.meta["latent"]
        if group is None and any(writes_to(user, node) for user in self.old.graph.nodes):
            self.env[node] = self.placeholder(node.name, Input("uncompress", i), node.meta["val"])
            return
        if group is None:  # what is written to it is not understood: read it once, and go on dense
            group = Group(latent.codec.decoder.token_dim)
            self.owners[group], self.templates[group] = ("latent", i), latent.codec
        extra = self.windows.get(node)
        kind = "codes" if extra is None else "window"

        def rows(name: str, together: tuple[int, ...] = ()) -> Node:
            value = getattr(latent, name)
            if extra is not None:
                appended = next(iter(node.users)).meta["val"].shape[group.token]
                value = value.new_empty((appended, *value.shape[1:]))
            return self.placeholder(f"{node.name}_{name}", Input(kind, i, name, extra, together), value)

        codes = rows("codes")
        positions = None
        if latent.positions is not None:
            mine = self._followers(group, i)
            positions = self.lane(group, lambda: rows("positions", mine))
        cell = Cell(codes, positions, argument=i, window=i if extra is not None else None)
        if self.coded(node) is None:
            self.unread.append((node, group, cell))
        else:
            self.cells[node] = cell

    def _appended(self, node: Node) -> sympy.Expr | None:
        """By how many tokens a LatentKV argument grows, where appending is all that the graph does with it."""
        group, users = self.coded(node), list(node.users)
        if group is None or node.meta.get("latent") is None or len(users) != 1 or not _appends(users[0], node):
            return None
        if self.coded(users[0]) is None:
            return None
        return sympy.expand(shape(users[0])[group.token] - shape(node)[group.token])

    def _followers(self, group: Group, argument: int) -> tuple[int, ...]:
        """The LatentKV arguments that this one keeps positions for, itself first."""
        return (argument, *(self.places[n] for g in self.followers.get(group, ()) for n in g.latents))

    def lane(self, group: Group, emit: Callable[[], Node | None]) -> Node | None:
        """The positions of the group's next cell: emitted by the group that keeps them, then read by the others."""
        leader = self.leaders.get(group, group)
        key = (leader, self.ordinals.get(group, 0))
        self.ordinals[group] = key[1] + 1
        if leader is group:
            self.lanes[key] = emit()
        return self.lanes[key]

    def copied(self, node: Node) -> Node:
        """A node as it was, reading decoded tokens where it read cells."""

        def use(arg: Node) -> Node:
            return self.read(arg) if self.coded(arg) is not None else self.env[arg]

        if node.op == "get_attr":
            return self.graph.node_copy(node)
        target, args = node.target, map_arg(node.args, use)
        if target is aten.view.default and node not in self.written:
            target = aten.reshape.default  # decoded tokens and absorbed attention may have other strides
        elif target is aten.as_strided.default and node.args[0].meta["val"].is_contiguous():
            args = (self.call(aten.contiguous.default, args[0]), *args[1:])
        return self.graph.create_node(node.op, target, args, map_arg(node.kwargs, use), node.name)

    # -- cells ------------------------------------------------------------------------------------------------

    def _cell(self, node: Node) -> None:
        group = self.coded(node)
        assert group is not None
        if node in self.site_of:
            index, site = self.site_of[node]
            codes = encoded(self, index, site)
            positions = self.lane(group, lambda: kept_beside(self, site))
            self.cells[node] = Cell(codes, positions, fresh=True)
            return
        made = MIRRORS[node.target](self, node)
        if isinstance(made, Cell):
            positions = self.lane(group, lambda: made.positions)
            self.cells[node] = replace(made, positions=positions)
            return
        stored = self.templates[group].decoder.needs_positions
        positions = self.lane(group, lambda: made.emit("positions") if stored else None)
        self.cells[node] = Cell(made.emit("codes"), positions, window=made.window, start=made.start, fresh=made.fresh)

    # -- outputs ----------------------------------------------------------------------------------------------

    def _outputs(self, node: Node) -> list[Output]:
        results: list[Any] = []
        outputs: list[Output] = []
        values = node.args[0]
        values = values if isinstance(values, (list, tuple)) else [values]
        for value in values:
            if not isinstance(value, Node):
                outputs.append(Output("none") if value is None else Output("plain", len(results)))
                results += [] if value is None else [value]
            elif self.coded(value) is None:
                outputs.append(Output("plain", len(results)))
                results.append(self.env[value])
            else:
                outputs.append(self._cell_output(value, results))
        self.graph.output(tuple(results))
        return outputs

    def _cell_output(self, node: Node, results: list[Any]) -> Output:
        group = self.coded(node)
        assert group is not None
        cell = self.cells[node]
        if cell.window is not None:
            return Output("window", cell.window, start=cell.start, length=shape(node)[group.token])
        if cell.argument is not None:
            return Output("same", cell.argument)
        codes = cell.codes if cell.fresh else self.call(aten.clone.default, cell.codes)
        results.append(codes)
        positions = None if cell.positions is None else self._returned(cell.positions, cell.fresh, results)
        return Output("born", results.index(codes), positions, self.owners[group])

    def _returned(self, positions: Node, fresh: bool, results: list[Any]) -> int:
        """The result that holds these positions: one for all sites that share them."""
        if positions not in self.returned:
            self.returned[positions] = len(results)
            results.append(positions if fresh else self.call(aten.clone.default, positions))
        return self.returned[positions]

    def _lowerings(self) -> dict[str, str]:
        """How each site is read in this graph."""
        read = readings(self.absorptions)
        return {s.name: read.get(s.group.find(), "decoding") for s in self.matched.sites}

    def _pruned(self, made: Rewritten) -> Rewritten:
        """Drop inputs that nothing reads (replaced weights), so that the compiled graph does not ask for them."""
        holders = [n for n in made.module.graph.nodes if n.op == "placeholder"]
        kept = []
        for holder, spec in zip(holders, made.inputs, strict=True):
            if holder.users:
                kept.append(spec)
            else:
                made.module.graph.erase_node(holder)
        made.inputs = kept
        made.module.graph.lint()
        made.module.recompile()
        return made


def writes_to(node: Node, argument: Node) -> bool:
    """Whether a node writes in place into ``argument`` or a view of it."""
    return any(argument in viewed(target) for target in written_nodes(node))


def _appends(user: Node, node: Node) -> bool:
    return user.target is aten.cat.default and user.args[0][0] is node and len(user.args[0]) > 1


def rewrite(
    gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing | None = None
) -> Rewritten:
    """Replace projections by factorised ones and cells by rows; everything else reads decoded tokens."""
    return Rewriter(gm, matched, codecs, sharing or Sharing()).run()
