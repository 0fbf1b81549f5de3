"""Attention over stored rows in tiles of tokens, in torch ops and (products with rows, on a CPU) ``rows.cpp``.

For each tile of t tokens (of T), with M = H_q / heads * S queries per cached head and k numbers per token:

    absorbed keys    (q S_k^T) c^T                          2 M heads k FLOP a token, nothing decoded
    decoded keys     q . epilogue(c S_k + mu)               2 k n FLOP and the epilogue; n numbers a token for a moment
    softmax          online: a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867)
    absorbed values  (p c) accumulated, times S_v at the end
    decoded values   p . epilogue(c S_v + mu) accumulated

Quantised columns are never scaled one by one: c = scale_t (levels - half) step, so the query takes ``step``, the scores
take ``scale_t``, and what ``half`` adds is one number per query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch

from lorc_fx.groups import split
from lorc_fx.packing import MODEL, Parts, level_constants, parts_of

from . import fused, native, tuned, words
from .attend import WATCHERS, Attend, Operand, turned_back, turned_queries
from .config import Tile
from .reference import features
from .stored import Stored, by_head

TILE_NUMBERS = 1 << 19
"""Numbers in a tile: 2 MiB of fp32, so that a tile of keys and one of values stay in a core's cache between their
ops."""

TILE_LEAST = 256
"""Tokens in a tile, at least: below it, calling an op costs more than what it does."""

TILE_SCORES = 1 << 20
"""Scores in a tile where ``rows.cpp`` reads the rows: nothing else of a tile is ever in memory."""


def attend(
    about: Attend,
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    extras: tuple[torch.Tensor, ...],
    tile: int | None = None,
) -> torch.Tensor:
    """The op's result [B, H, S, D_v] in the query's dtype. ``tile``: tokens at a time; None for what a tuner found
    best, else for ``default_tile``."""
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


def _default(left: _Absorbed | _Decoded, right: _Absorbed | _Decoded, batch: int, lines: int) -> int:
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


# -- one operand ------------------------------------------------------------------------------------------------------


Kind = type["_Absorbed"] | type["_Decoded"]


def _ways(about: Attend, keys: Stored, values: Stored) -> tuple[tuple[Kind, Kind], tuple[str, str]]:
    """What reads keys and values, and its name: both by one call where that can be."""
    kinds = _kind(about.keys, keys), _kind(about.values, values)
    if fused.reads(about, keys, values):
        return kinds, (fused.WAY, fused.WAY)
    return kinds, (kinds[0].way, kinds[1].way)


def _kind(operand: Operand, stored: Stored) -> Kind:
    readable = stored.rows.device.type == "cpu" and stored.rows.stride(2) == 1 and native.library() is not None
    if not operand.direct:
        return _Decoded
    return _Native if readable and native.reads(operand) else _Absorbed


class _Absorbed:
    """Products with what rows hold. ``blocks``: 1 where all heads read all columns (through S), else one per head."""

    way = "torch"

    def __init__(self, operand: Operand, stored: Stored) -> None:
        self.operand, self.rows, self.form = operand, stored.rows, operand.format
        decode, mean, _ = stored.parts(operand)
        self.width = operand.latent_width
        self.blocks = native.blocks(operand)
        self.exact = self.form.columns if self.form.plain else sum(s.columns for s in self.form.segments if not s.bits)
        if self.form.scaled:
            self.step, self.half = native.block_constants(self.form, self.blocks, stored.rows.device)
        self.matrix = None if decode is None else by_head(operand, decode.float())  # [heads, a block's k, D]
        self.mean = None if mean is None else by_head(operand, mean.float()[None])  # [heads, 1, D]

    def tile(self, batch: int, lines: int) -> int:
        """Tokens that a tile should have; ``lines``: queries of all heads."""
        return TILE_NUMBERS // (batch * self.width)

    def _parts(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None, Parts]:
        """Exact columns and levels of tokens, [B, blocks, t, c / blocks], and what rows hold besides."""
        parts = parts_of(self.rows[start:stop], self.form)
        exact = [s for s in self.form.segments if s.bits == MODEL]
        levels = [s for s in self.form.segments if s.bits != MODEL]
        found = [
            None if part is None else split(part, segments, self.blocks).permute(1, 2, 0, 3)
            for part, segments in ((parts.exact, exact), (parts.levels, levels))
        ]
        return found[0], found[1], parts

    def scores(self, query: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        """q [B, H, S, D] fp32 -> (start, stop) -> q K^T [B, H, S, t]."""
        batch, heads, queries, dim = query.shape
        q = query.reshape(batch, self.operand.heads, -1, dim)
        constant = None
        if self.mean is not None:
            constant = (q @ self.mean.transpose(1, 2)).reshape(batch, heads, queries, 1)
        if self.matrix is not None:
            q = q @ self.matrix.transpose(1, 2)
        q = q.reshape(batch, self.blocks, -1, q.shape[-1])
        e, r = self.exact // self.blocks, self.form.columns // self.blocks
        exact, quantised, further = q[..., :e], q[..., e:r], q[..., r:]
        offset = torch.zeros_like(q[..., :1])
        if self.form.scaled:
            quantised = quantised * self.step
            offset = quantised @ self.half[:, None]  # [B, blocks, M, 1]
        product = self._product(exact, quantised, further, offset)

        def tile(start: int, stop: int) -> torch.Tensor:
            found = product(start, stop).reshape(batch, heads, queries, stop - start)
            return found if constant is None else found.add_(constant)

        return tile

    def _product(
        self, exact: torch.Tensor, quantised: torch.Tensor, further: torch.Tensor, offset: torch.Tensor
    ) -> Callable[[int, int], torch.Tensor]:
        """What the query has for each kind of column, [B, blocks, M, ..] -> (start, stop) -> [B, blocks, M, t]."""

        def tile(start: int, stop: int) -> torch.Tensor:
            numbers, levels, parts = self._parts(start, stop)
            found = None
            if levels is not None and parts.scale is not None:
                found = quantised @ levels.transpose(2, 3)
                found = found.sub_(offset).mul_(parts.scale.permute(1, 2, 0)[:, None])
            for weights, part in ((exact, numbers), (further, _for_all(parts.further))):
                if part is not None:
                    product = weights @ part.transpose(2, 3)
                    found = product if found is None else found.add_(product)
            assert found is not None
            return found

        return tile

    def sum_up(self, p: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
        """p [B, blocks, M, t] -> sums over these tokens: of exact columns, of what further means have, of levels times
        their token's scale, of scales; those that there are."""
        numbers, levels, parts = self._parts(start, stop)
        terms = [p @ part for part in (numbers, _for_all(parts.further)) if part is not None]
        if levels is not None and parts.scale is not None:
            scaled = p * parts.scale.permute(1, 2, 0)[:, None]
            terms += [scaled @ levels, scaled.sum(-1, keepdim=True)]
        return terms

    def sums(self, batch: int, heads: int, queries: int) -> _Sums:
        return _LatentSums(self, batch, heads, queries)


def _for_all(further: torch.Tensor | None) -> torch.Tensor | None:
    """What tokens have of further means [t, B, m - 1], for all blocks: [B, 1, t, m - 1]."""
    return None if further is None else further.transpose(0, 1)[:, None]


class _Native(_Absorbed):
    """The same by ``rows.cpp``, which never has a tile's numbers in memory."""

    way = "rows.cpp"

    def __init__(self, operand: Operand, stored: Stored) -> None:
        super().__init__(operand, stored)
        about = native.layout(operand.format, self.blocks)
        assert about is not None
        self.about = about
        if self.form.scaled:
            self.step, self.half = native.constants(self.form, self.blocks)

    def tile(self, batch: int, lines: int) -> int:
        return TILE_SCORES // (batch * lines)

    def _product(
        self, exact: torch.Tensor, quantised: torch.Tensor, further: torch.Tensor, offset: torch.Tensor
    ) -> Callable[[int, int], torch.Tensor]:
        both = bool(exact.shape[-1]) and bool(quantised.shape[-1])
        columns = torch.cat([exact, quantised], -1) if both else exact if exact.shape[-1] else quantised
        weights = native.laid_out(columns, self.about)
        shift = offset[..., 0].contiguous()
        further = further[..., 0].contiguous() if further.shape[-1] else shift  # else no row has a second mean
        return lambda start, stop: native.scores(self.rows[start:stop], self.about, weights, shift, further)

    def sum_up(self, p: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
        held, scales, further = native.sums(self.rows[start:stop], self.about, p.contiguous())
        columns = native.gathered(held, self.about)
        e = self.exact // self.blocks
        terms = [columns[..., :e]] if e else []
        terms += [further[..., None]] if self.form.choices > 1 else []
        return [*terms, columns[..., e:], scales[..., None]] if self.form.scaled else terms


class _Decoded:
    """Tiles of decoded tokens."""

    way = "tiles"

    def __init__(self, operand: Operand, stored: Stored) -> None:
        self.operand, self.stored = operand, stored
        decode, mean, self.consts = stored.parts(operand)
        self.decode = None if decode is None else decode.float()
        self.mean = None if mean is None else mean.float()
        self.width = max(operand.decoder.width, operand.latent_width)
        if operand.format.scaled:
            self.step, self.half = level_constants(operand.format, stored.rows.device)

    def tile(self, batch: int, lines: int) -> int:
        return TILE_NUMBERS // (batch * self.width)

    def tokens(self, start: int, stop: int) -> torch.Tensor:
        """[B, heads, t, D] fp32."""
        o = self.operand
        y = self._numbers(parts_of(self.stored.rows[start:stop], o.format))
        if self.decode is not None:
            y = y @ self.decode if o.groups == 1 else self._by_group(y)
        y = y.transpose(0, 1)
        y = y if self.mean is None else y + self.mean
        if not o.absorbed:
            side = None if self.stored.side is None else self.stored.side[start:stop].transpose(0, 1)
            y = features(o, o.decoder.module(y.to(o.format.dtype), side, *self.consts)).float()
        y = y if o.columns is None else y[..., list(o.columns)]
        return y.unflatten(2, (o.heads, o.head_dim)).transpose(1, 2)

    def _by_group(self, numbers: torch.Tensor) -> torch.Tensor:
        """[t, B, k] -> y [t, B, n], each group's features from its own columns."""
        assert self.decode is not None
        form, groups, (t, batch) = self.operand.format, self.operand.groups, numbers.shape[:2]
        own = split(numbers[..., : form.columns], form.segments, groups).flatten(0, 1).transpose(0, 1)
        blocks, gaps = self.decode.split((form.columns // groups, form.choices - 1))
        y = torch.bmm(own, blocks.unflatten(1, (groups, -1)).transpose(0, 1)).transpose(0, 1).reshape(t, batch, -1)
        return y if form.choices == 1 else y + numbers[..., form.columns :] @ gaps

    def _numbers(self, parts: Parts) -> torch.Tensor:
        """[t, B, k] fp32."""
        columns = [] if parts.exact is None else [parts.exact]
        if parts.levels is not None and parts.scale is not None:
            columns.append(parts.levels.sub_(self.half).mul_(self.step).mul_(parts.scale))
        columns += [] if parts.further is None else [parts.further]
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def scores(self, query: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        batch, heads, queries, dim = query.shape
        q = query.reshape(batch, self.operand.heads, -1, dim)

        def tile(start: int, stop: int) -> torch.Tensor:
            return (q @ self.tokens(start, stop).transpose(2, 3)).reshape(batch, heads, queries, stop - start)

        return tile

    def sums(self, batch: int, heads: int, queries: int) -> _Sums:
        return _DenseSums(self, batch, heads, queries)


# -- sums of values ---------------------------------------------------------------------------------------------------


class _Sums(ABC):
    """Weighted sums of values over tokens so far: ``held`` fp32, all of the same leading sizes [B, blocks, M, ..]."""

    def __init__(self, batch: int, heads: int, queries: int, blocks: int) -> None:
        self.sizes = (batch, heads, queries)
        self.shape = (batch, blocks, heads // blocks * queries)
        self.held: list[torch.Tensor] = []

    @abstractmethod
    def add(self, p: torch.Tensor, start: int, stop: int) -> None:
        """Add these tokens by their weights p [B, H, S, t]."""

    @abstractmethod
    def total(self, weight: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D_v]: sums over tokens of weight times value. ``weight`` [B, H, S, 1]: their sum (sinks apart)."""

    def scale(self, less: torch.Tensor) -> None:
        """What was summed counts ``less`` [B, H, S, 1]: a larger maximum has come."""
        for held in self.held:
            held.mul_(less.reshape(*self.shape, 1))

    def _add(self, terms: list[torch.Tensor]) -> None:
        if not self.held:
            self.held = terms
        else:
            for held, term in zip(self.held, terms, strict=True):
                held.add_(term)


class _LatentSums(_Sums):
    def __init__(self, reader: _Absorbed, batch: int, heads: int, queries: int) -> None:
        super().__init__(batch, heads, queries, reader.blocks)
        self.reader = reader

    def add(self, p: torch.Tensor, start: int, stop: int) -> None:
        self._add(self.reader.sum_up(p.reshape(*self.shape, -1), start, stop))

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        r, (batch, heads, queries) = self.reader, self.sizes
        o, held = r.operand, list(self.held)
        if not held:
            return weight.new_zeros(batch, heads, queries, o.head_dim)
        pieces = [held.pop(0)] if r.exact else []
        further = [held.pop(0)] if r.form.choices > 1 else []
        if r.form.scaled:
            levels, scales = held
            pieces.append((levels - scales * r.half) * r.step)
        sums = pieces[0] if len(pieces + further) == 1 else torch.cat(pieces + further, -1)
        sums = sums.reshape(batch, o.heads, -1, sums.shape[-1])
        if r.matrix is not None:
            sums = sums @ r.matrix
        if r.mean is not None:
            sums = sums + weight.reshape(batch, o.heads, -1, 1) * r.mean
        return sums.reshape(batch, heads, queries, o.head_dim)


class _DenseSums(_Sums):
    def __init__(self, reader: _Decoded, batch: int, heads: int, queries: int) -> None:
        super().__init__(batch, heads, queries, reader.operand.heads)
        self.reader = reader

    def add(self, p: torch.Tensor, start: int, stop: int) -> None:
        self._add([p.reshape(*self.shape, -1) @ self.reader.tokens(start, stop)])

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        batch, heads, queries = self.sizes
        dim = self.reader.operand.head_dim
        return self.held[0].reshape(batch, heads, queries, dim) if self.held else weight.new_zeros((*self.sizes, dim))
