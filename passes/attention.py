"""Attention whose keys and values are both stored rows -> one op over the rows (``lorc::attend``).

SDPA is taken as it is. Eager attention is found from its last product backward:

    scores = matmul(q, K^T)             [B, H, S, T]
    x      = any pointwise ops          scale, soft cap, masks, biases of positions
    x      = cat([x, sink], -1)         perhaps
    w      = softmax(x, -1)             and casts; without the sink's column
    out    = matmul(w, V)               [B, H, S, D_v]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lorc_fx.codec import Codec
from lorc_fx.kernels import fallback, native, turned
from lorc_fx.kernels.attend import CODEC_TENSORS, Attend, Extra, Operand, intern
from lorc_fx.kernels.chain import chain

from . import angles, turns
from .axes import Axes, arg, shape
from .caches import Group
from .facts import Facts, static_size
from .operands import Seen, seen_as
from .readers import SOFTMAX
from .rules import rule_of

if TYPE_CHECKING:
    from .rewrite import Rewriter
    from .sites import Matched

aten = torch.ops.aten

ANGLES = False
"""Whether keys that are rotated after decoding are decoded in tiles by ops, each with its own cosines. On a CPU those
of all positions, computed once for all layers, are cheaper (Llama shape, T = 8192, one thread: a step of 294 ms
against 426)."""

TURNS = True
"""Whether keys that are turned after decoding (``turns``) are decoded and turned by one kernel, on a CPU."""

PLAIN = False
"""Whether rows in the model's dtype are read by the op too. On a CPU torch's own products are faster on them (GPT-2
shape, LoRC at 0.45, T = 1024, two threads: a step of 27.5 ms against 31.8); packed rows they would have to unpack
first."""

MOST_QUERIES = 16
"""Query tokens of a step that reads rows; more (a prompt) share one decoding of keys and values."""

_CASTS = {aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True)
class Reading:
    """An attention to emit over rows: what it is, which sites it reads, its operands, and the nodes that scores
    meet."""

    about: Attend
    name: str
    query: Node
    key: Seen
    value: Seen
    extras: tuple[Node, ...]

    def emit(self, r: Rewriter, node: Node) -> Node:
        keys, values = (self._stored(r, seen, o) for seen, o in zip(self.seen, self.operands, strict=True))
        extras = [r.env_value(n) for n in self.extras]
        r.attends.append(self.about)
        fallback.used_at(self.about, self.name)
        query = r.env_value(self.query)
        made = r.call(torch.ops.lorc.attend.default, query, *keys, *values, extras, self.about.digest)
        kind = node.meta["val"].dtype
        return made if self.query.meta["val"].dtype == kind else r.call(aten.to.dtype, made, kind)

    @property
    def seen(self) -> tuple[Seen, Seen]:
        return self.key, self.value

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.about.keys, self.about.values

    def _stored(self, r: Rewriter, seen: Seen, operand: Operand) -> tuple[Node, Node | None, list[Node]]:
        cell = r.cells[seen.cell]
        names = [n for n, there in zip(CODEC_TENSORS, (operand.decodes, operand.has_mean), strict=True) if there]
        names += ["const0"] if operand.turned else []
        if operand.absorbed:
            return cell.codes, None, [self._given(r, seen, n) for n in names]
        holders = [n.name for n in operand.decoder.module.graph.nodes if n.op == "placeholder"]
        names += [n for n in holders if n not in ("y", "positions")]
        tensors = [self._given(r, seen, n) for n in names]
        if operand.turn is not None:
            found = turns.known(operand.decoder, operand.heads, operand.head_dim)
            tensors += angles.emit(r, seen.group, cell, found)
        return cell.codes, cell.positions, tensors

    def _given(self, r: Rewriter, seen: Seen, name: str) -> Node:
        made = r.codec_input(seen.group, name)
        assert made is not None
        return made


def find_attention(
    node: Node, matched: Matched, codecs: Mapping[Group, Codec], facts: Facts, step: bool
) -> Reading | None:
    """The reading of an SDPA, or of eager attention's last product; None where it is not understood as such."""
    if node.target is aten.scaled_dot_product_attention.default:
        found = _fused(node, step)
    elif node.target is aten.matmul.default and len(shape(node)) == 4:
        found = _eager(node, facts)
    else:
        return None
    if found is None:
        return None
    query, operands, program, extras, more = found
    if len(shape(query)) != 4:
        return None
    heads, queries = (static_size(s) for s in query.meta["val"].shape[1:3])
    queries = 1 if step else queries
    if heads is None or queries is None or queries > MOST_QUERIES:
        return None
    seen = [seen_as(matched, codecs, facts, operand, axes) for operand, axes in operands]
    if seen[0] is None or seen[1] is None or heads % seen[0].heads or heads % seen[1].heads:
        return None
    rows = [shape(s.cell)[codecs[s.group].decoder.batch_dim] for s in seen if s is not None]
    if any(size != shape(query)[0] for size in rows):  # one row of a cache for many of queries, say
        return None
    key, value = (s.operand(codecs[s.group], queries, heads) for s in seen if s is not None)
    kernels = query.meta["val"].device.type == "cuda"
    joint = key.groups == value.groups == 1
    if joint and not (PLAIN or kernels) and key.format.plain and value.format.plain:
        return None
    sinks = tuple(n for n in [more.pop("sink_node", None)] if n is not None)
    about = Attend(key, value, program, tuple(Extra(t) for _, t in extras), **more)
    if not (ANGLES or kernels) and any(not o.absorbed and o.decoder.needs_positions for o in (key, value)):
        about = _turning(about, codecs[seen[0].group])
        if about is None:
            return None
    about = intern(about)
    read = {s.group for s in seen if s is not None}
    name = " and ".join(s.name for s in matched.sites if s.group.find() in read) or f"`{node.name}`"
    return Reading(about, name, query, seen[0], seen[1], (*(n for n, _ in extras), *sinks))


def _turning(about: Attend, codec: Codec) -> Attend | None:
    """The same with keys that are turned as they are read, by ``attend.cpp``; None where it cannot."""
    key, value = about.keys, about.values
    if not TURNS or key.absorbed or not value.direct or native.library() is None:
        return None
    if not native.reads(value) or chain(about) is None:
        return None
    found = turns.find(key.decoder, codec.consts, key.heads, key.head_dim)
    key = replace(key, turn=None if found is None else found.turn)
    return replace(about, keys=key) if turned.reads(key) else None


Operands = tuple[tuple[Node, Axes], tuple[Node, Axes]]
Met = list[tuple[Node, bool]]
Found = tuple[Node, Operands, GraphModule, Met, dict[str, Any]]


def _fused(node: Node, step: bool) -> Found | None:
    given: Any = node.args[:3]
    query, key, value = given
    mask, dropout, causal = arg(node, 3, "attn_mask"), arg(node, 4, "dropout_p", 0.0), arg(node, 5, "is_causal", False)
    if dropout or (causal and not step):
        return None
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(int(shape(query)[3])) if scale is None else scale
    if not isinstance(scale, (int, float)):
        return None
    graph = Graph()
    scores = graph.placeholder("scores")
    extras: Met = [] if mask is None else [(mask, True)]
    met = [graph.placeholder(f"extra{i}") for i in range(len(extras))]
    made = graph.call_function(aten.mul.Tensor, (scores, scale))
    if mask is not None and shape(mask)[-1] != shape(key)[-2]:
        return None
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        made = graph.call_function(aten.where.ScalarOther, (met[0], made, -math.inf))
    elif mask is not None:
        made = graph.call_function(aten.add.Tensor, (made, met[0]))
    graph.output(made)
    program = GraphModule(torch.nn.Module(), graph)
    return query, ((key, Axes(0, 2)), (value, Axes(0, 2))), program, extras, {"masks": None if mask is None else 0}


def _eager(node: Node, facts: Facts) -> Found | None:
    given: Any = node.args[:2]
    weights, value = given
    sink: Node | None = None
    cut = False
    while weights.target in _CASTS or _drops_last(weights):
        if len(weights.users) != 1:
            return None
        cut = cut or _drops_last(weights)
        weights = weights.args[0]
    if weights.target not in SOFTMAX or len(weights.users) != 1:
        return None
    last = len(shape(weights)) - 1
    if last != 3 or weights.args[1] % 4 != last:
        return None
    blind = weights.target is aten._safe_softmax.default
    source = _unshifted(weights.args[0])
    if source.target is aten.cat.default and cut:
        joined: Any = source.args[0]
        parts, dim = joined, arg(source, 1, "dim", 0)
        if len(parts) != 2 or dim % 4 != last or shape(parts[1])[-1] != 1:
            return None
        source, sink = parts
    elif cut:
        return None
    graph = Graph()
    body = _Program(graph)
    made = body.follow(source)
    if made is None or body.product is None or facts.writes_between(body.product, node):
        return None  # what is written in between may be the scores, a mask or the cache: all are read at the end now
    if not all(isinstance(extra.meta["val"], torch.Tensor) for extra in body.extras):
        return None  # a number that changes from call to call
    product: Any = body.product.args[:2]
    query, key = product
    graph.output(made)
    graph.lint()
    tokens = shape(body.product)[-1]
    extras = []
    for extra in body.extras:
        sizes = shape(extra)
        extras.append((extra, bool(sizes) and sizes[-1] != 1))  # it is broadcast to T, whatever its symbol is
    if shape(value)[2] != tokens or any(e[0] is body.product for e in extras):
        return None
    more: dict[str, Any] = {"blind": blind, "sink": sink is not None}
    if sink is not None:
        more["sink_node"] = sink  # a tensor like the extras, but last
    return query, ((key, Axes(0, 3)), (value, Axes(0, 2))), GraphModule(torch.nn.Module(), graph), extras, more


def _drops_last(node: Node) -> bool:
    """Whether a node takes all but the last of the last axis."""
    if node.target is not aten.slice.Tensor or not isinstance(node.args[0], Node):
        return False
    source = shape(node.args[0])
    at_last = arg(node, 1, "dim", 0) % len(source) == len(source) - 1
    return at_last and not arg(node, 2, "start") and shape(node)[-1] == source[-1] - 1


def _unshifted(node: Node) -> Node:
    """x of x - max(x), one maximum for all tokens: a softmax does not see the difference."""
    while node.target in _CASTS:
        node = node.args[0]
    if node.target is aten.sub.Tensor and isinstance(node.args[1], Node) and len(node.args) == 2:
        top = node.args[1]
        while not isinstance(top.target, str) and "getitem" in str(top.target):
            top = top.args[0]
        known = top.target in (aten.max.dim, aten.amax.default) and top.args[0] is node.args[0]
        if known and shape(node.args[1])[-1:] in ([], [1]):  # else each token has its own: a maximum over heads, say
            return _unshifted(node.args[0])
    return node


class _Program:
    """What lies between a product and the softmax, as a graph of its own: pointwise ops, in fp32 (casts are left
    out)."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.extras = graph, list[Node]()
        self.product: Node | None = None
        self.last = graph.placeholder("scores")

    def follow(self, node: Node) -> Node | None:
        """``node`` in the new graph, or None where it is no pointwise function of one product of queries and keys."""
        path: dict[Node, bool] = {}
        _leads(node, path)
        steps = sorted(n for n, leads in path.items() if leads)
        products = [n for n in steps if n.target is aten.matmul.default]
        if len(products) != 1 or any(user not in path for step in steps if step is not node for user in step.users):
            return None  # whoever else takes scores needs all of them
        self.product = products[0]
        env = {self.product: self.last}
        for step in steps:
            if step.target in _CASTS:
                env[step] = env[step.args[0]]
            elif step is not self.product:
                env[step] = self._add(step, env)
        return env[node]

    def _add(self, node: Node, env: dict[Node, Node]) -> Node:
        def use(n: Node) -> Node:
            if n not in env:
                with self.graph.inserting_after(self.last):
                    self.last = env[n] = self.graph.placeholder(f"extra{len(self.extras)}")
                self.extras.append(n)
            return env[n]

        args, kwargs = map_arg(node.args, use), map_arg(node.kwargs, use)
        return self.graph.call_function(node.target, args, kwargs)


def _leads(node: Node, path: dict[Node, bool], limit: int = 32) -> bool:
    """Whether pointwise ops lead from a product to ``node``; all that was looked at is noted in ``path``."""
    if node in path or not limit:
        return path.get(node, False)
    path[node] = node.target is aten.matmul.default
    if not path[node] and _is_pointwise(node):
        wide = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and len(shape(n)) == 4]
        path[node] = bool([n for n in wide if _leads(n, path, limit - 1)])  # each is looked at, and noted
    return path[node]


def _is_pointwise(node: Node) -> bool:
    rule = rule_of(node)
    if rule is None or node.target is aten.cat.default or node.target is aten.stack.default:
        return False
    tags = getattr(node.target, "tags", ())
    return node.target in _CASTS or rule.role in ("sum", "scale") or torch.Tag.pointwise in tags
