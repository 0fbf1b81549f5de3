"""Attention over stored rows in tiles of tokens, in torch ops and (products with rows, on a CPU) ``rows.cpp``.

For each tile of t tokens (of T), with M = H_q / heads * S queries per cached head and k numbers per token:

    absorbed keys    (q S_k^T) c^T                          2 M heads k FLOP a token, nothing decoded
    decoded keys     q . epilogue(c S_k + mu)               2 k n FLOP and the epilogue; n numbers a token for a moment
    softmax          online: a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867)
    absorbed values  (p c) accumulated, times S_v at the end
    decoded values   p . epilogue(c S_v + mu) accumulated
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import fused, native, tuned, words
from .attend import WATCHERS, Attend, Operand, turned_back, turned_queries
from .config import Tile
from .stored import Stored
from .tile_readers import Absorbed, Decoded, Native

TILE_LEAST = 256
"""Tokens in a tile, at least: below it, calling an op costs more than what it does."""


def attend(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    tile: int | None = None,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype, of ``turned`` operands as ``launch.attend``'s. ``tile``:
    tokens at a time; None for what a tuner found best, else for ``default_tile``."""
    batch, heads, queries, _ = query.shape
    total = keys.rows.shape[0]
    kinds, ways = _ways(about, keys, values)
    if tile is None:
        tile = _chosen(about, ways, query, keys, values)
    if ways == (fused.WAY, fused.WAY):
        return fused.attend(about, query, keys, values, extras, tile)
    left, right = kinds[0](about.keys, keys), kinds[1](about.values, values)
    tile = tile or _default(left, right, batch, heads * queries)
    score, sum_up = left.scores(query.float()), right.sums(batch, heads, queries)
    sink = extras[-1].float() if about.sink else None
    extras = extras[: len(about.extras)]
    top: torch.Tensor | None = None
    weight = query.new_zeros((batch, heads, queries, 1), dtype=torch.float32)
    for start, stop in _tiles(about, extras, total, tile):
        seen = [e[..., start:stop] if extra.tokens else e for e, extra in zip(extras, about.extras, strict=True)]
        scores = about.scores(score(start, stop), *seen)
        highest = scores.amax(-1, keepdim=True)
        if sink is not None and top is None:
            highest = torch.maximum(highest, sink)
        if top is not None:
            highest = torch.maximum(highest, top)
        shift = highest.masked_fill(highest == -torch.inf, 0.0)
        p = scores.sub_(shift).exp_() if scores.dtype == torch.float32 else (scores - shift).float().exp()
        if top is not None:
            less = (top - shift).exp_()
            weight.mul_(less)
            sum_up.scale(less)
        weight += p.sum(-1, keepdim=True)
        sum_up.add(p, start, stop)
        top = highest
    summed = sum_up.total(weight)
    if sink is not None:
        weight = weight + (torch.zeros_like(sink) if top is None else sink - top).exp()
    return _divided(summed, weight, about.blind).to(query.dtype)


def op(
    about: Attend, query: torch.Tensor, keys: Stored, values: Stored, extras: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """``attend`` of queries as the model has them."""
    if not fused.reads(about, keys, values):
        return turned_back(
            about, attend(about, turned_queries(about, query, keys.codec), keys, values, extras), values.codec
        )
    tile = _chosen(about, (fused.WAY, fused.WAY), query, keys, values)
    if not WATCHERS:
        fused.remember(about, query, keys.rows.shape[0], tile)
    return fused.attend(about, query, keys, values, extras, tile, True)


def _chosen(about: Attend, ways: tuple[str, str], query: torch.Tensor, keys: Stored, values: Stored) -> int | None:
    """Tokens at a time that a tuner found best, if one has looked."""
    if query.device.type != "cpu":
        return None
    batch, heads, queries, _ = query.shape
    more = (heads, queries, *ways, torch.get_num_threads())
    found = tuned.chosen(about, keys.rows.shape[0], batch, more, lambda: problem(about, query, keys, values))
    return found.tokens if isinstance(found, Tile) else None


def default_tile(about: Attend, query: torch.Tensor, keys: Stored, values: Stored) -> int:
    """Tokens at a time where no tuner has found anything."""
    batch, heads, queries, _ = query.shape
    kinds, ways = _ways(about, keys, values)
    if ways == (fused.WAY, fused.WAY):
        return fused.CHUNK
    return _default(kinds[0](about.keys, keys), kinds[1](about.values, values), batch, heads * queries)


def _default(left: Absorbed | Decoded, right: Absorbed | Decoded, batch: int, lines: int) -> int:
    return max(TILE_LEAST, min(reader.tile(batch, lines) for reader in (left, right)))


def problem(about: Attend, query: torch.Tensor, keys: Stored, values: Stored) -> tuple[tuned.Target, str]:
    """What a tuner's database has such a call under."""
    _, ways = _ways(about, keys, values)
    return words.tiled_target(), words.tiled_words(about, ways, query.shape[1], query.shape[2])


def _divided(total: torch.Tensor, weight: torch.Tensor, blind: bool) -> torch.Tensor:
    """Sums over their weights; a query that sees nothing gives 0 or NaN."""
    return total / (weight.masked_fill(weight == 0, 1.0) if blind else weight)


def _tiles(about: Attend, extras: tuple[torch.Tensor, ...], total: int, tile: int) -> Iterator[tuple[int, int]]:
    """The tiles to look at: all but those that a mask leaves out for every query (a static cache's free end, say)."""
    starts = range(0, total, tile)
    mask = None if about.masks is None or len(starts) == 1 else extras[about.masks]
    if mask is None or mask.shape[-1] != total:
        yield from ((s, min(s + tile, total)) for s in starts)
        return
    seen = (mask if mask.dtype == torch.bool else mask != -torch.inf).flatten(0, -2).any(0)
    for s in starts:
        if bool(seen[s : s + tile].any()):
            yield s, min(s + tile, total)


Kind = type[Absorbed] | type[Decoded]


def _ways(about: Attend, keys: Stored, values: Stored) -> tuple[tuple[Kind, Kind], tuple[str, str]]:
    """What reads keys and values, and its name: both by one call where that can be."""
    kinds = _kind(about.keys, keys), _kind(about.values, values)
    if fused.reads(about, keys, values):
        return kinds, (fused.WAY, fused.WAY)
    return kinds, (kinds[0].way, kinds[1].way)


def _kind(operand: Operand, stored: Stored) -> Kind:
    readable = stored.rows.device.type == "cpu" and stored.rows.stride(2) == 1 and native.library() is not None
    if not operand.direct:
        return Decoded
    return Native if readable and native.reads(operand) else Absorbed
