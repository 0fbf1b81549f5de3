"""The graph that a rewrite makes: its inputs (arguments, rows, tensors of codecs), sizes, ops that are emitted once."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lorc_fx.codec import Codec
from lorc_fx.compat import size_expr
from lorc_fx.errors import GraphInvariant

from .axes import shape
from .caches import Group
from .interface import Input, Sharing
from .sites import Matched, Site

aten = torch.ops.aten


class Emitter:
    """A new graph beside the old one, ``gm``'s, and what nodes of the old one are in it (``env``)."""

    def __init__(self, gm: GraphModule, matched: Matched, codecs: Mapping[Site, Codec], sharing: Sharing) -> None:
        self.old, self.matched, self.codecs = gm, matched, codecs
        self.graph = Graph()
        self.inputs: list[Input] = []
        self.env: dict[Node, Node] = {}
        self.arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.last: Node | None = None
        self.pure: dict[str, Node] = {}
        self.owners: dict[Group, tuple[str, int]] = {}
        self.templates: dict[Group, Codec] = {}
        self._owners()
        self.codec_nodes: dict[tuple[tuple[str, int], str], Node] = {}
        self.same_const = dict(sharing.consts)
        self.places = {n: i for i, n in enumerate(self.arguments)}
        self.joined = {self.places[n]: s for s, x in enumerate(matched.sites) for n in x.group.find().latents}
        self.symbols = self._symbols()

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

    def coded(self, node: Node) -> Group | None:
        group = self.matched.caches.group(node)
        return group if group in self.matched.coded else None

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
        for old, new in self.env.items():  # a quotient, say, that the graph itself has somewhere
            value = old.meta.get("val")
            for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
                if size_expr(size) == expr:
                    return self.call(aten.sym_size.int, new, dim)
        raise GraphInvariant("rewrite", "sizes are sums, products or sizes of what the graph computes", str(expr))

    def _once(self, version: int, inner: Node, env: Mapping[Node, Any]) -> Node:
        args, kwargs = map_arg(inner.args, env.__getitem__), map_arg(inner.kwargs, env.__getitem__)
        return self.once(version, inner.target, args, kwargs)

    def once(self, version: int, target: Any, args: Any, kwargs: Any) -> Node:
        """An op without side effects: emitted once for the same arguments and ``version`` (writes before it)."""
        key = repr((version, target, args, sorted(kwargs.items())))
        if key not in self.pure:
            self.pure[key] = self.graph.call_function(target, args, kwargs)
        return self.pure[key]
