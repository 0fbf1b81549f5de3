"""Norms of each head that an epilogue begins with: z = w y / sqrt(mean y^2 + eps), whatever the ops are that say so (as
models spell out an RMS norm, with a weight w or one more than it)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from lorc_fx.decoder import Decoder

aten = torch.ops.aten

ROWS, TOKENS = 11, 13
"""Sizes by which a value's axes of batch rows and tokens are told from others."""


@dataclass(frozen=True)
class Norm:
    """``before(y, positions, *consts)`` -> z, ``after(z, positions, *consts)`` -> what the decoder returns. batch,
    token: axes of z, whose other sizes are ``sizes``. columns [n]: the feature of y that each of z is. eps: as
    above."""

    before: GraphModule
    after: GraphModule
    batch: int
    token: int
    sizes: tuple[int, ...]
    columns: tuple[int, ...]
    eps: float


def spread_of(norm: Norm, z: torch.Tensor) -> torch.Tensor:
    """z [tokens, n] as the norm gives it, for one batch row."""
    return z.reshape(1, len(z), *norm.sizes).movedim((0, 1), (norm.batch, norm.token))


def find_norm(decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, exact: float) -> Norm | None:
    """The norm of each of ``heads`` heads that ``decoder`` begins with, if there is one. ``exact``: how far what it
    makes of numbers may be from that, relative to the largest."""
    graph = decoder.module.graph
    of_y = _from(graph, "y")
    if _sized(graph, {n for n in of_y if n.op != "placeholder"}):
        return None
    found = (_norm_at(cut, of_y, decoder, consts, heads, exact) for cut in _cuts(graph, of_y))
    return next((norm for norm in found if norm is not None), None)


def _norm_at(
    cut: Node, of_y: set[Node], decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, exact: float
) -> Norm | None:
    numbers = list(_small(cut))
    before, after = _halves(decoder.module, cut, of_y)
    if len(numbers) != 1 or _sized(after.graph, _from(after.graph, "y")):
        return None  # (z has its axes elsewhere)
    n, draw = decoder.width, torch.Generator().manual_seed(2)

    def run(y: torch.Tensor) -> torch.Tensor:
        """[B, T, n] -> z."""
        made: torch.Tensor = before(y.to(decoder.dtype), torch.zeros(y.shape[:2], dtype=torch.int32), *consts)
        return made

    sizes = run(torch.ones(ROWS, TOKENS, n)).shape
    if sizes.count(ROWS) != 1 or sizes.count(TOKENS) != 1 or sizes.numel() != ROWS * TOKENS * n:
        return None
    batch, token = sizes.index(ROWS), sizes.index(TOKENS)

    def rows(y: torch.Tensor) -> torch.Tensor:
        """[tokens, n] -> z [tokens, n] fp32."""
        return run(y[None]).movedim((batch, token), (0, 1))[0].reshape(len(y), n).float()

    alone = rows(torch.eye(n)) != 0
    columns = alone.int().argmax(0)
    if not bool((alone.sum(0) == 1).all()) or len(columns.unique()) != n:
        return None
    eps = numbers[0]
    weight = rows(torch.ones(1, n))[0] * (1 + eps) ** 0.5
    base = torch.randn(4, n, generator=draw) * torch.tensor([0.0, eps**0.5, 1.0, 2.0**7])[:, None]
    base = base.to(decoder.dtype).float()
    y = base[:, columns].unflatten(1, (heads, -1))
    want = (y / (y.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1) * weight
    each, apart = weight.view(heads, -1), (rows(base) - want).abs()
    same = torch.equal(each, each[:1].expand_as(each))
    if not same or not bool((apart <= 2 * exact * want.abs().amax(1, keepdim=True)).all()):
        return None
    others = tuple(size for i, size in enumerate(sizes) if i not in (batch, token))
    return Norm(before, after, batch, token, others, tuple(columns.tolist()), eps)


def _from(graph: Graph, name: str) -> set[Node]:
    """Values that depend on one input, sizes apart."""
    found = {node for node in graph.nodes if node.op == "placeholder" and node.name == name}
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and node.target is not aten.sym_size.int
            and not found.isdisjoint(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _sized(graph: Graph, values: set[Node]) -> bool:
    """Whether sizes of these are asked for."""
    return any(node.target is aten.sym_size.int and node.args[0] in values for node in graph.nodes)


def _cuts(graph: Graph, of_y: set[Node]) -> list[Node]:
    """The values that depend on y and on no position, and through which all goes that does depend on y; the last
    first."""
    of_positions, found = _from(graph, "positions"), list[Node]()
    nodes = list(graph.nodes)
    for at, node in enumerate(nodes):
        if node in of_y and node not in of_positions and node.op == "call_function":
            found += [node] if _all_through(node, nodes[at + 1 :], of_y) else []
    return found[::-1]


def _all_through(node: Node, later: list[Node], of_y: set[Node]) -> bool:
    through = {node}
    for other in later:
        sources = of_y.intersection(other.all_input_nodes)
        if sources and not through.issuperset(sources):
            return False
        if sources:
            through.add(other)
    return True


def _small(cut: Node) -> Iterator[float]:
    """Small numbers that are added to something before ``cut``."""
    for node in cut.graph.nodes:
        if node.op == "call_function" and node.target in (aten.add.Tensor, aten.add.Scalar):
            yield from (a for a in node.args if isinstance(a, float) and 0 < a < 1e-2)
        if node is cut:
            return


def _halves(module: GraphModule, cut: Node, of_y: set[Node]) -> tuple[GraphModule, GraphModule]:
    """What leads to ``cut``, and what follows it with ``cut`` instead of y."""
    before, after = Graph(), Graph()
    first: dict[Node, Node] = {}
    second: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            after.output(second[node.args[0]])
            continue
        if cut not in first:
            first[node] = before.node_copy(node, first.__getitem__)
        if node.op == "placeholder" and node.name == "y":
            second[node] = second[cut] = after.placeholder("y")
        elif node not in of_y or (cut in first and node is not cut):
            second[node] = after.node_copy(node, second.__getitem__)
    before.output(first[cut])
    for made in (before, after):
        made.eliminate_dead_code()
    return GraphModule(module, before), GraphModule(module, after)
