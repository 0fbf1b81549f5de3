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

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lorc_fx.codec import Codec
from lorc_fx.compat import size_expr
from lorc_fx.errors import GraphInvariant
from lorc_fx.kernels import ops as _ops  # noqa: F401  (registers lorc::table)
from lorc_fx.kernels import pack as by_op
from lorc_fx.kernels.attend import Attend
from lorc_fx.packing import unpack
from lorc_fx.rows import zero_unwritten

from . import grouped
from .axes import shape
from .caches import Group, viewed, written
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
_unpack = torch.ops.lorc.unpack


class Rewriter:
    """Builds the new graph in one walk over the old one."""

    def __init__(self, gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing) -> None:
        self.old, self.matched = gm, matched
        self.graph = Graph()
        self.inputs: list[Input] = []
        self.env: dict[Node, Node] = {}
        self.cells: dict[Node, Cell] = {}
        self.writes: dict[Group, int] = {}
        self.reads: dict[tuple[Node, int], Node] = {}
        self.site_of = {site.node: (i, site) for i, site in enumerate(matched.sites)}
        self.codecs = codecs
        self.owners: dict[Group, tuple[str, int]] = {}
        self.templates: dict[Group, Codec] = {}
        self.codec_nodes: dict[tuple[tuple[str, int], str], Node] = {}
        self.arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.last: Node | None = None
        self.pure: dict[str, Node] = {}
        self.unread: list[tuple[Node, Group, Cell]] = []
        self.attends: list[Attend] = []
        self._owners()
        self.same_const = dict(sharing.consts)
        self.places = {n: i for i, n in enumerate(self.arguments)}
        self.joined = {self.places[n]: s for s, x in enumerate(matched.sites) for n in x.group.find().latents}
        self.symbols = self._symbols()
        self.windows = {n: extra for n in self.arguments if (extra := self._appended(n)) is not None}
        self.leaders = shared_tracks(gm, matched, dict(sharing.tracks), self.windows)
        self.followers: dict[Group, list[Group]] = {}
        for group, leader in self.leaders.items():
            if leader is not group:
                self.followers.setdefault(leader, []).append(group)
        self.ordinals: dict[Group, int] = {}
        self.lanes: dict[tuple[Group, int], Node | None] = {}
        self.returned: dict[Node, int] = {}
        self.written = {seen for n in gm.graph.nodes if (into := written(n)) is not None for seen in viewed(into)}
        self.absorptions: dict[Node, Absorption] = absorb(gm, matched, self.templates)

    def _symbols(self) -> dict[sympy.Expr, tuple[Node, int | None]]:
        """The first input that has each size: an int itself, or one dim of a tensor that goes in as it is."""
        found: dict[sympy.Expr, tuple[Node, int | None]] = {}
        for node in self.arguments:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt):
                found.setdefault(size_expr(value), (node, None))
            elif isinstance(value, torch.Tensor) and node.meta.get("latent") is None:
                for dim, size in enumerate(value.shape):
                    found.setdefault(size_expr(size), (node, dim))
        return found

    def _owners(self) -> None:
        """Who names the codec of each coded group: the LatentKV that comes in (decoding must fit its codes), else
        the site."""
        for i, node in enumerate(self.arguments):
            group = self.matched.caches.group(node)
            if node.meta.get("latent") is not None and group in self.matched.coded and group not in self.owners:
                self.owners[group] = ("latent", i)
                self.templates[group] = node.meta["latent"].codec
        for i, site in enumerate(self.matched.sites):
            group = site.group.find()
            if group not in self.owners:
                self.owners[group] = ("site", i)
                self.templates[group] = self.codecs[site]

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

    def coded(self, node: Node) -> Group | None:
        group = self.matched.caches.group(node)
        return group if group in self.matched.coded else None

    def constant(self, value: torch.Tensor) -> Node:
        """A small constant tensor of the new graph."""
        name = f"_lorc_constant{len(list(self.old.named_buffers()))}_{id(value)}"
        self.old.register_buffer(name, value, persistent=False)
        return self.graph.get_attr(name)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def placeholder(self, name: str, spec: Input, value: Any) -> Node:
        """A new input; all inputs come before the first op, in the order of ``inputs``."""
        self.inputs.append(spec)
        with self.graph.inserting_after(self.last):
            self.last = self.graph.placeholder(name)
        self.last.meta["val"] = value
        return self.last

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

    def codec_input(self, group: Group, name: str) -> Node | None:
        """The codec's tensor ``name`` as an input of the graph (None where this codec has none)."""
        owner, template = self.owners[group], self.templates[group]
        value = template.tensors().get(name)
        if value is None:
            return None
        return self.codec_tensor(owner, name, value)

    def codec_tensor(self, owner: tuple[str, int], name: str, value: torch.Tensor) -> Node:
        kind, index = owner
        site = index if kind == "site" else self.joined.get(index)
        if site is not None and (site, name) in self.same_const:
            owner, name = ("site", self.same_const[site, name][0]), self.same_const[site, name][1]
        key = (owner, name)
        if key not in self.codec_nodes:
            kind, index = owner
            self.codec_nodes[key] = self.placeholder(f"{kind}{index}_{name}", Input(kind, index, name), value)
        return self.codec_nodes[key]

    def env_value(self, node: Node) -> Node:
        return self.read(node) if self.coded(node) is not None else self.env[node]

    def size(self, node: Node, axis: int) -> Any:
        """A size of an old node's value: an int, or a node of the new graph."""
        expr = shape(node)[axis]
        return int(expr) if expr.is_number else self.expression(expr)

    def expression(self, expr: sympy.Expr) -> Any:
        """A SymPy expression of sizes as nodes of the new graph, from the graph's own symbolic inputs."""
        if expr.is_number:
            return int(expr)
        if expr in self.symbols:
            node, dim = self.symbols[expr]
            return self.env[node] if dim is None else self.call(aten.sym_size.int, self.env[node], dim)
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            op = operator.add if isinstance(expr, sympy.Add) else operator.mul
            parts = [self.expression(a) for a in expr.args]
            total = parts[0]
            for part in parts[1:]:
                total = self.call(op, total, part)
            return total
        raise GraphInvariant("rewrite", "sizes are sums and products of the graph's symbolic inputs", str(expr))

    # -- reading ----------------------------------------------------------------------------------------------

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

    def _once(self, version: int, inner: Node, env: Mapping[Node, Any]) -> Node:
        args, kwargs = map_arg(inner.args, env.__getitem__), map_arg(inner.kwargs, env.__getitem__)
        return self.once(version, inner.target, args, kwargs)

    def once(self, version: int, target: Any, args: Any, kwargs: Any) -> Node:
        """An op without side effects: emitted once for the same arguments and ``version`` (writes before it)."""
        key = repr((version, target, args, sorted(kwargs.items())))
        if key not in self.pure:
            self.pure[key] = self.graph.call_function(target, args, kwargs)
        return self.pure[key]

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
    target = written(node)
    return target is not None and argument in viewed(target)


def _appends(user: Node, node: Node) -> bool:
    return user.target is aten.cat.default and user.args[0][0] is node and len(user.args[0]) > 1


def rewrite(
    gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing | None = None
) -> Rewritten:
    """Replace projections by factorised ones and cells by rows; everything else reads decoded tokens."""
    return Rewriter(gm, matched, codecs, sharing or Sharing()).run()
