"""Faster readers than decoding to memory, where the algebra allows them.

With K_hat = c S_k + mu_k and V_hat = c S_v + mu_v (no rotation or norm after the projection):

    q K_hat^T = (q S_k^T) c^T + q mu_k          absorb K: the query moves into latent space
    A V_hat   = (A c) S_v + (sum_t A) mu_v      absorb V: up-project once per query, not per token

Both replace a product with a cached value, whatever stands between (masks, soft caps, sinks), so eager attention
needs no pattern; SDPA is first taken apart into its two products. Which is used where is decided by ``cost``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from lorc_fx.codec import Codec
from lorc_fx.kernels import pack, sums

from .attention import Reading, find_attention
from .axes import Axes, arg, shape
from .caches import Group
from .facts import Facts, static_size
from .grouped import own_columns
from .operands import Seen, seen_as

if TYPE_CHECKING:
    from .rewrite import Rewriter
    from .sites import Matched

aten = torch.ops.aten
_sums = torch.ops.lorc.sums


# -- emission -------------------------------------------------------------------------------------------------


def _matrix(r: Rewriter, latent: Seen) -> Node:
    """S as [heads, r, D]; of a codec in groups what each head has of its own one."""
    decode = r.codec_input(latent.group, "decode")
    assert decode is not None
    rows, columns = _rows(r.templates[latent.group]), _columns(r, latent, decode, 1)
    return r.call(
        aten.transpose.int, r.call(aten.reshape.default, columns, [rows, latent.heads, latent.head_dim]), 0, 1
    )


def _rows(codec: Codec) -> int:
    """Rows of its matrix: k, or what a group has of it."""
    return codec.format.columns // codec.groups + codec.format.choices - 1


def _columns(r: Rewriter, latent: Seen, source: Node, dim: int) -> Node:
    if latent.columns is None:
        return source
    order = r.constant(torch.tensor(latent.columns))
    return r.call(aten.index_select.default, source, dim, order)


def _mean(r: Rewriter, latent: Seen, per_head: int) -> Node | None:
    """mu as [heads * per_head, 1, D] for the operand's heads, or None."""
    mean = r.codec_input(latent.group, "mean")
    if mean is None:
        return None
    rows = r.call(aten.reshape.default, _columns(r, latent, mean, 0), [latent.heads, 1, latent.head_dim])
    return r.call(aten.repeat_interleave.self_int, rows, per_head, 0) if per_head > 1 else rows


def query_latent(r: Rewriter, query: Node, latent: Seen, sizes: tuple[Any, int, int], shift: bool) -> Node:
    """q [B, H, S, D] -> q K_hat^T [B, H, S, T], with the q mu term where ``shift``."""
    batch, heads, queries = sizes
    each = heads // latent.heads
    rank = r.templates[latent.group].latent_width
    grouped = r.call(aten.reshape.default, query, [batch, latent.heads, each * queries, latent.head_dim])
    matrix = r.call(aten.transpose.int, _matrix(r, latent), 1, 2)
    moved = r.call(aten.matmul.default, grouped, matrix)
    moved = r.call(aten.reshape.default, moved, [batch, heads * queries, rank])
    cell = r.cells[latent.cell]
    codes = r.call(aten.permute.default, r.latents(latent.group, cell), [1, 2, 0])
    scores = r.tokens(r.call(aten.matmul.default, moved, codes), 2, latent.group, cell)
    scores = r.call(aten.reshape.default, scores, [batch, heads, queries, -1])
    mean = _mean(r, latent, each) if shift else None
    if mean is None:
        return scores
    constant = r.call(aten.matmul.default, query, r.call(aten.transpose.int, mean, 1, 2))
    return r.call(aten.add.Tensor, scores, constant)


def weights_latent(r: Rewriter, weights: Node, latent: Seen, sizes: tuple[Any, int, int], partial: bool) -> Node:
    """A [B, H, S, T] -> A V_hat [B, H, S, D]; ``partial`` where the weights of a query may not sum to one."""
    batch, heads, queries = sizes
    each, codec = heads // latent.heads, r.templates[latent.group]
    lines, form, cell = heads * queries, codec.format, r.cells[latent.cell]
    if not form.plain and codec.encode.device.type in sums.DEVICES and lines // codec.groups <= sums.FEW:
        grouped = r.call(aten.reshape.default, weights, [batch, codec.groups, lines // codec.groups, -1])
        summed = r.call(_sums.default, cell.codes, grouped, *form.parts)
    else:
        flat = r.call(aten.reshape.default, weights, [batch, lines, -1])
        codes = r.tokens(r.latents(latent.group, cell), 0, latent.group, cell)
        codes = r.call(aten.transpose.int, codes, 0, 1)
        summed = r.call(aten.matmul.default, flat, codes)
        if codec.groups > 1:
            summed = own_columns(r.call, summed, batch, lines, codec)
    grouped = r.call(aten.reshape.default, summed, [batch, latent.heads, each * queries, _rows(codec)])
    values = r.call(aten.matmul.default, grouped, _matrix(r, latent))
    values = r.call(aten.reshape.default, values, [batch, heads, queries, latent.head_dim])
    mean = _mean(r, latent, each)
    if mean is None:
        return values
    if partial:
        mean = r.call(aten.mul.Tensor, r.call(aten.sum.dim_IntList, weights, [-1], True), mean)
    return r.call(aten.add.Tensor, values, mean)


@dataclass(frozen=True)
class Product:
    """A product of eager attention with an absorbed operand: scores (``key``) or values."""

    latent: Seen
    kind: str
    sizes: tuple[Any, int, int]

    def emit(self, r: Rewriter, node: Node) -> Node:
        left = r.env_value(node.args[0])
        sizes = (r.size(node, 0), *self.sizes[1:])
        if self.kind == "key":
            return query_latent(r, left, self.latent, sizes, shift=True)
        return weights_latent(r, left, self.latent, sizes, partial=True)


@dataclass(frozen=True)
class Attention:
    """SDPA taken apart, with one or both cached operands absorbed (None: decoded). ``keys`` and ``values``
    [B, H, T, D]: the operands, of a decoded one the cached value where heads only share it."""

    key: Seen | None
    value: Seen | None
    keys: Node
    values: Node
    sizes: tuple[Any, int, int]

    def emit(self, r: Rewriter, node: Node) -> Node:
        query, sizes = node.args[0], (r.size(node, 0), *self.sizes[1:])
        batch, heads, queries = sizes
        q = r.env_value(query)
        if self.key is not None:
            scores = query_latent(
                r, q, self.key, sizes, shift=False
            )  # q mu is the same for all tokens: softmax drops it
        else:
            cached, dim = int(shape(self.keys)[1]), int(shape(self.keys)[3])
            q = r.call(aten.reshape.default, q, [batch, cached, heads // cached * queries, dim])
            scores = _scores(r, q, r.env_value(self.keys), self.keys.meta["val"])
            scores = r.call(aten.reshape.default, scores, [batch, heads, queries, -1])
        scale = node.kwargs.get("scale")
        scale = 1 / math.sqrt(int(shape(query)[3])) if scale is None else scale
        scores = r.call(aten.mul.Tensor, r.call(aten.to.dtype, scores, torch.float32), scale)
        mask = arg(node, 3, "attn_mask")
        if mask is not None:
            kept = r.env_value(mask)
            if mask.meta["val"].dtype == torch.bool:
                kept = r.call(aten.masked_fill.Scalar, scores, r.call(aten.logical_not.default, kept), -math.inf)
                scores = kept
            else:
                scores = r.call(aten.add.Tensor, scores, kept)
        weights = r.call(aten._safe_softmax.default, scores, -1)
        weights = r.call(aten.to.dtype, weights, node.meta["val"].dtype)
        if self.value is not None:
            return weights_latent(r, weights, self.value, sizes, partial=mask is not None)
        cached, dim = int(shape(self.values)[1]), int(shape(self.values)[3])
        grouped = r.call(aten.reshape.default, weights, [batch, cached, heads // cached * queries, -1])
        out = r.call(aten.matmul.default, grouped, r.env_value(self.values))
        return r.call(aten.reshape.default, out, [batch, heads, queries, dim])


def _scores(r: Rewriter, query: Node, keys: Node, like: torch.Tensor) -> Node:
    """query [B, H, M, D] times decoded keys [B, H, T, D], which are ``like`` this: [B, H, M, T]. Where T grows, keys
    have zeros behind them up to a size for which products are compiled (``kernels.pack.MULTIPLE``)."""
    multiple = pack.multiple(like.dtype, like.device)
    if multiple == 1 or static_size(like.shape[2]) is not None:
        return r.call(aten.matmul.default, query, r.call(aten.transpose.int, keys, 2, 3))
    tokens = r.call(aten.sym_size.int, keys, 2)
    more = r.call(operator.sub, multiple, r.call(operator.mod, tokens, multiple))  # never none: that is another graph
    padded = r.call(aten.constant_pad_nd.default, keys, [0, 0, 0, more])
    scores = r.call(aten.matmul.default, query, r.call(aten.transpose.int, padded, 2, 3))
    return r.call(aten.slice.Tensor, scores, 3, 0, tokens)


Absorption = Product | Attention | Reading


def absorb(
    gm: GraphModule, matched: Matched, codecs: Mapping[Group, Codec], step: bool = False
) -> dict[Node, Absorption]:
    """What to emit over rows, by node of the canonical graph. With ``step``: as if this graph had one query token (for
    reports: how a decode step will read)."""
    facts = Facts(gm.graph.nodes)
    found: dict[Node, Absorption] = {}
    for node in gm.graph.nodes:
        made: Absorption | None = find_attention(node, matched, codecs, facts, step)
        if made is None and node.target is aten.scaled_dot_product_attention.default:
            made = _attention(node, matched, codecs, facts, step)
        elif made is None and node.target is aten.matmul.default and len(shape(node)) == 4:
            made = _product(node, matched, codecs, facts, step)
        if made is not None:
            found[node] = made
    return found


def readings(absorptions: Mapping[Node, Absorption]) -> dict[Group, str]:
    """How groups are read that are not decoded as a whole: as "latent", as the "rows" that they are, "turned" as they
    are decoded, or in "tiles"."""
    found: dict[Group, str] = {}
    for made in absorptions.values():
        if isinstance(made, Reading):
            for seen, operand in zip(made.seen, made.operands, strict=True):
                decoded = "tiles" if operand.turn is None else "turned"
                how = decoded if not operand.absorbed else "latent" if operand.decodes else "rows"
                found.setdefault(seen.group, how)
        else:
            parts = [made.latent] if isinstance(made, Product) else [made.key, made.value]
            found |= {part.group: "latent" for part in parts if part is not None}
    return found


def _sizes(node: Node, step: bool) -> tuple[Any, int, int] | None:
    """(batch, heads, queries) of [B, H, S, X] where heads and queries are static."""
    batch, heads, queries = node.meta["val"].shape[:3]
    queries = 1 if step else queries
    static = static_size(heads), static_size(queries)
    return None if static[0] is None or static[1] is None else (batch, static[0], static[1])


def _latent(
    matched: Matched,
    codecs: Mapping[Group, Codec],
    facts: Facts,
    operand: Node,
    axes: Axes,
    sizes: tuple[Any, int, int],
    kind: str,
) -> Seen | None:
    """The operand where reading it as latents is cheaper than decoding it."""
    seen = seen_as(matched, codecs, facts, operand, axes, latent=True)
    if seen is None or codecs[seen.group].decode is None:
        return None
    codec = codecs[seen.group]
    if codec.groups > 1 and (kind == "key" or not seen.reads_groups(codec)):
        return None  # such keys are decoded by groups, or read by ``lorc::attend``
    return seen if seen.worth(codec, sizes[2], sizes[1]) else None


def _attention(
    node: Node, matched: Matched, codecs: Mapping[Group, Codec], facts: Facts, step: bool
) -> Attention | None:
    sizes = _sizes(node, step)
    dropout, causal = arg(node, 4, "dropout_p", 0.0), arg(node, 5, "is_causal", False)
    if sizes is None or len(shape(node)) != 4 or dropout or (causal and not step):
        return None
    given = zip(node.args[1:3], ("key", "value"), strict=True)
    key, value = (_latent(matched, codecs, facts, operand, Axes(0, 2), sizes, kind) for operand, kind in given)
    if key is None and value is None:
        return None
    keys, values = (
        operand if seen else _once(matched, codecs, facts, operand)
        for seen, operand in zip((key, value), node.args[1:3], strict=True)
    )
    return Attention(key, value, keys, values, sizes)


def _once(matched: Matched, codecs: Mapping[Group, Codec], facts: Facts, operand: Node) -> Node:
    """The cached value [B, cached heads, T, D] of which ``operand`` [B, H, T, D] has each head several times over, else
    ``operand``: a query for each copy would read as many times as much."""
    seen = seen_as(matched, codecs, facts, operand, Axes(0, 2))
    if seen is None or seen.columns is not None:
        return operand
    sizes, layout = shape(seen.cell), codecs[seen.group].decoder
    whole = len(sizes) == 4 and (layout.batch_dim, layout.token_dim) == (0, 2)
    return seen.cell if whole and (sizes[1], sizes[3]) == (seen.heads, seen.head_dim) else operand


def _product(node: Node, matched: Matched, codecs: Mapping[Group, Codec], facts: Facts, step: bool) -> Product | None:
    sizes = _sizes(node, step)
    left, right = node.args[:2]
    if sizes is None or len(shape(right)) != 4 or shape(left)[:2] != shape(node)[:2]:
        return None  # the same queries for all batch rows, say
    for kind, axes in (("value", Axes(0, 2)), ("key", Axes(0, 3))):
        latent = _latent(matched, codecs, facts, right, axes, sizes, kind)
        if latent is not None:
            return Product(latent, kind, sizes)
    return None
