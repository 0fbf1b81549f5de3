"""Keys and values as attention sees them: which columns of which cache, through the layout ops between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from lorc_fx.codec import Codec
from lorc_fx.decoder import Decoder
from lorc_fx.kernels.attend import Operand

from .axes import Axes, Mixes
from .caches import Group
from .cost import absorbs
from .epilogue import emit
from .facts import Facts, NoSite
from .rules import rule_of

if TYPE_CHECKING:
    from .sites import Matched


@dataclass(frozen=True)
class Seen:
    """A cached operand of a product: ``heads`` groups of ``head_dim`` columns, each shared by ``repeat`` consecutive
    heads of the operand. ``columns``: which feature of y (``latent``: the epilogue only moves columns, so the product
    can be taken with latents) or of the dense token each of them is; None where they are simply in order."""

    cell: Node
    group: Group
    heads: int
    head_dim: int
    repeat: int
    columns: tuple[int, ...] | None
    latent: bool

    def worth(self, codec: Codec, queries: int, heads: int) -> bool:
        """Whether a product with latents is cheaper than decoding first."""
        fits = self.latent and heads % self.heads == 0
        return fits and absorbs(queries, heads, self.head_dim, codec.width, codec.latent_width, codec.groups)

    def reads_groups(self, codec: Codec) -> bool:
        """Whether consecutive heads read one group of a codec's columns each, and none needs those of several."""
        if codec.groups == 1 or self.heads % codec.groups:
            return codec.groups == 1
        index = torch.arange(codec.width) if self.columns is None else torch.tensor(self.columns)
        own = (index * codec.groups // codec.width).view(codec.groups, -1)
        return torch.equal(own, torch.arange(codec.groups)[:, None].expand_as(own))

    def operand(self, codec: Codec, queries: int, heads: int) -> Operand:
        """For ``lorc::attend`` with ``heads`` query heads."""
        latent = self.latent and (codec.decode is None or self.worth(codec, queries, heads))
        latent = latent and self.reads_groups(codec)
        turned = codec.unprojected and bool(codec.consts)
        if turned and (self.columns is not None or self.head_dim != len(codec.consts[0])):
            latent = False  # the product is not one of whole heads
        return Operand(
            codec.format,
            codec.latent_width,
            codec.decoder,
            self.heads,
            self.head_dim,
            self.columns,
            absorbed=latent,
            decodes=codec.decode is not None,
            has_mean=codec.mean is not None,
            turned=turned and latent,
            groups=codec.groups,
        )


def seen_as(
    matched: Matched, codecs: Mapping[Group, Codec], facts: Facts, operand: Node, axes: Axes, latent: bool = False
) -> Seen | None:
    """The operand of a product with its tokens along ``axes``: follow layout ops back to a cell, then number its
    columns forward. None where that is no cell of a coded group. ``latent``: only if it can be read as latents."""
    node, at = operand, axes
    while matched.caches.group(node) not in matched.coded:
        rule = rule_of(node)
        if rule is None or rule.role != "layout":
            return None
        try:
            sources = [(s, a) for s, a in rule.back(node, at) if a.token is not None]
        except Mixes:
            return None
        if len(sources) != 1:
            return None
        node, at = sources[0]
    group = matched.caches.group(node)
    assert group is not None
    if group in matched.bare:
        return None
    codec = codecs[group]
    decoder = codec.decoder
    if (at.batch, at.token) != (decoder.batch_dim, decoder.token_dim):
        return None
    index = None if codec.unprojected else selection(decoder)
    moves = codec.unprojected or index is not None
    if latent and (not moves or codec.unprojected):
        return None
    size = features(decoder)
    if index is None:
        index = torch.arange(size).view(decoder.shape(1, 1))
    columns = _columns(facts, operand, axes, node, at, index)
    if columns is None or columns.dim() != 4:
        return None
    rows = columns.movedim((axes.batch, axes.token), (0, 1))[0, 0]
    return _grouped(node, group, rows, decoder.width if moves else size, moves)


def features(decoder: Decoder) -> int:
    """Numbers of one token in the dense cache."""
    found = 1
    for size in decoder.layout:
        found *= size if isinstance(size, int) else 1
    return found


def selection(decoder: Decoder) -> torch.Tensor | None:
    """Which column of y each element of the dense value is, in the decoder's layout with B = T = 1; None where the
    epilogue does more than move columns. Found by running it on numbered columns."""
    if decoder.needs_positions:
        return None
    return _moved(decoder.module, decoder.width, lambda y: decoder.module(y, None))


def _moved(module: GraphModule, width: int, run: Any) -> torch.Tensor | None:
    """As ``selection``: numbered columns say which, others of both signs and all sizes (an activation leaves positive
    numbers alone, a clamp small ones) whether that is all."""
    if any(node.op == "get_attr" for node in module.graph.nodes):
        return None
    base = torch.arange(1, width + 1, dtype=torch.float64)
    few = (7 * base + 3).remainder(15) - 7  # -7 .. 7: with a power of two, they survive a cast
    others = [-base, *(scale * few for scale in (2.0**-20, 1.0, 2.0**20))]
    try:
        first, *rest = (run(value.view(1, 1, -1)) for value in (base, *others))
    except (RuntimeError, TypeError):  # the epilogue has constants: it is no mere selection
        return None
    index = first.round().long() - 1
    inside = bool(((index >= 0) & (index < width)).all())
    same = inside and all(torch.equal(x, v[index]) for x, v in zip((first, *rest), (base, *others), strict=True))
    return index if same else None


def _columns(facts: Facts, operand: Node, axes: Axes, cell: Node, at: Axes, index: torch.Tensor) -> torch.Tensor | None:
    """Which column each element of the operand is, for B = T = 1 and the columns ``index`` of the cell; None where
    the ops between do more than move them. Found by running them on numbered columns, and on their squares, which tell
    a column from a mean of its neighbours."""
    graph = Graph()
    start = graph.placeholder("index")
    try:
        region = facts.region(operand, axes, {cell: at}, lambda n, a: False)
        graph.output(emit(graph, region, {cell: start}, 1, 1, {cell}) if region.nodes else start)
        run = GraphModule(torch.nn.Module(), graph)
        first, second = run(index.double() + 1), run(0.5 - 3 * index.double() ** 2)
    except (NoSite, RuntimeError):
        return None
    found = first.round().long() - 1
    same = torch.equal(first, found.double() + 1) and torch.equal(second, 0.5 - 3 * found.double() ** 2)
    return found if same else None


def _grouped(cell: Node, group: Group, rows: torch.Tensor, width: int, latent: bool) -> Seen:
    """[heads of the operand, D] column numbers -> consecutive repeats of the cached heads."""
    heads = [rows[0]]
    for row in rows[1:]:
        if not torch.equal(row, heads[-1]):
            heads.append(row)
    repeat = len(rows) // len(heads)
    base = torch.stack(heads)
    if not torch.equal(base.repeat_interleave(repeat, 0), rows):
        base, repeat = rows, 1
    plain = torch.equal(base.flatten(), torch.arange(width))  # all of them: a reader may take some heads only
    columns = None if plain else tuple(base.flatten().tolist())
    return Seen(cell, group, len(base), rows.shape[1], repeat, columns, latent)
