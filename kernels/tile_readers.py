"""What reads keys or values of an attention in tiles (``tiled.py``): rows as they are stored, by torch ops or
``rows.cpp``, or decoded; and what becomes of the weighted sums of values.

Quantised columns are never scaled one by one: c = scale_t (levels - half) step, so the query takes ``step``, the scores
take ``scale_t``, and what ``half`` adds is one number per query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from lorc_fx.groups import split
from lorc_fx.packing import MODEL, Parts, level_constants, parts_of

from . import native
from .attend import Operand
from .reference import features
from .stored import Stored, by_head

TILE_NUMBERS = 1 << 19
"""Numbers in a tile: 2 MiB of fp32, so that a tile of keys and one of values stay in a core's cache between their
ops."""

TILE_SCORES = 1 << 20
"""Scores in a tile where ``rows.cpp`` reads the rows: nothing else of a tile is ever in memory."""


class Absorbed:
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

    def sums(self, batch: int, heads: int, queries: int) -> Sums:
        return LatentSums(self, batch, heads, queries)


def _for_all(further: torch.Tensor | None) -> torch.Tensor | None:
    """What tokens have of further means [t, B, m - 1], for all blocks: [B, 1, t, m - 1]."""
    return None if further is None else further.transpose(0, 1)[:, None]


class Native(Absorbed):
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


class Decoded:
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

    def sums(self, batch: int, heads: int, queries: int) -> Sums:
        return DenseSums(self, batch, heads, queries)


# -- sums of values ---------------------------------------------------------------------------------------------------


class Sums(ABC):
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


class LatentSums(Sums):
    def __init__(self, reader: Absorbed, batch: int, heads: int, queries: int) -> None:
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


class DenseSums(Sums):
    def __init__(self, reader: Decoded, batch: int, heads: int, queries: int) -> None:
        super().__init__(batch, heads, queries, reader.operand.heads)
        self.reader = reader

    def add(self, p: torch.Tensor, start: int, stop: int) -> None:
        self._add([p.reshape(*self.shape, -1) @ self.reader.tokens(start, stop)])

    def total(self, weight: torch.Tensor) -> torch.Tensor:
        batch, heads, queries = self.sizes
        dim = self.reader.operand.head_dim
        return self.held[0].reshape(batch, heads, queries, dim) if self.held else weight.new_zeros((*self.sizes, dim))
