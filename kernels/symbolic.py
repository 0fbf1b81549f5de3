"""Pieces of a head: runs of its features that one expression over whole tiles computes, in order.

Every feature of the dense value has an expression of its own (``numbered.py``). Features whose expressions differ
only in the places of their leaves, by a constant step from one to the next, are a piece:

    half-split rotation    two pieces, the halves         y[d] cos - y[d + D/2] sin     y[d] cos + y[d - D/2] sin
    interleaved rotation   two pieces, even and odd       y[d] cos - y[d + 1] sin       y[d] cos + y[d - 1] sin
    partial rotation       two pieces and the rest
    moved columns          one piece, or one per run

so that a kernel holds a few [tokens, items] tiles and never reorders one. Places must step evenly from head to head
too: then one kernel does for all heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .attend import Operand
from .expressions import Expressions, NotGenerated
from .numbered import Constant, dense_value

MOST_ITEMS = 256
"""Items of a piece or a tile, at most: a tile of 64 tokens then is 64 KiB of fp32 in registers."""

MOST_PIECES = 16
"""Pieces of a head, at most: more are no rotation, but features in an order of their own."""


@dataclass(frozen=True)
class Places:
    """Numbers base + h * head + i * step, for head h and item i of ``items`` (0: the same for all items)."""

    base: int
    head: int
    step: int
    items: int


@dataclass(frozen=True)
class Term:
    """An expression over a piece. op: a key of ``expressions.SOURCE``, ``number``, ``sum`` (over the items of each
    argument), or a leaf: ``y``, ``side``, ``const`` (``which`` of them), ``table`` (rows by its argument, ``stride``
    apart).
    """

    op: str
    args: tuple[Term, ...] = ()
    places: Places | None = None
    which: int = 0
    stride: int = 0
    number: float | int | bool | None = None

    @cached_property
    def items(self) -> int:
        """Along the piece; 0 where there is one value for all of it."""
        if self.op == "sum":
            return 0
        own = self.places.items if self.places is not None else 0
        return max([own, *(a.items for a in self.args)])

    @cached_property
    def of_tokens(self) -> bool:
        """Whether it differs from token to token."""
        return self.op in ("y", "side") or any(a.of_tokens for a in self.args)

    def leaves(self, op: str) -> Iterator[Places]:
        if self.op == op and self.places is not None:
            yield self.places
        for a in self.args:
            yield from a.leaves(op)


@dataclass(frozen=True)
class Piece:
    """``features``: which ones of a head (its places have no step from head to head); ``term``: their expression."""

    features: Places
    term: Term


@dataclass(frozen=True, eq=False)
class Epilogue:
    """All pieces of a head, and the tiles of y that they are made of; ``tables``: constants behind the decoder's."""

    pieces: tuple[Piece, ...]
    tables: tuple[torch.Tensor, ...] = ()

    @cached_property
    def tiles(self) -> tuple[Places, ...]:
        return tuple(dict.fromkeys(p for piece in self.pieces for p in piece.term.leaves("y")))


def epilogue_of(operand: Operand, constants: Sequence[Constant]) -> Epilogue:
    """The epilogue of an operand that is decoded. Raises NotGenerated where its features do not fall into pieces."""
    ex = Expressions()
    if operand.absorbed:
        numbers = ex.leaves("y", (operand.decoder.width,))
    else:
        numbers = dense_value(ex, operand.decoder, constants)
    if operand.columns is not None:
        numbers = numbers[list(operand.columns)]
    if numbers.numel() != operand.heads * operand.head_dim:
        raise NotGenerated("epilogue", f"{numbers.numel()} features for {operand.heads} heads of {operand.head_dim}")
    return _Pieces(ex).cut(numbers.reshape(operand.heads, operand.head_dim).numpy())


class _Pieces:
    def __init__(self, ex: Expressions) -> None:
        self.ex = ex
        self._shapes: dict[int, int] = {}
        self._interned: dict[tuple[object, ...], int] = {}
        self._leaves: dict[int, tuple[int, ...]] = {}
        self._terms: dict[tuple[bytes, tuple[int, ...]], Term] = {}
        self.tiles: list[tuple[int, ...]] = []  # columns of y that pieces of head 0 read together

    def cut(self, numbers: np.ndarray) -> Epilogue:
        """numbers [heads, D] -> pieces."""
        runs = self.runs(numbers[0].tolist())
        if len(runs) > MOST_PIECES:
            raise NotGenerated("epilogue", f"a head falls into {len(runs)} pieces, {MOST_PIECES} at most are taken")
        for run in runs:
            read = [self.columns(n) for n in numbers[0, run].tolist()]
            self.tiles += sorted(set(zip(*read, strict=True)))
        pieces = (Piece(_places(np.array([run]), "features"), self.term(numbers[:, run])) for run in runs)
        return Epilogue(tuple(pieces), tuple(self.ex.tables))

    def runs(self, numbers: list[int]) -> list[list[int]]:
        """Indices of ``numbers`` in runs of one shape whose leaves step evenly."""
        alike: dict[int, list[int]] = {}
        for at, number in enumerate(numbers):
            alike.setdefault(self.shape(number), []).append(at)
        found = []
        for group in alike.values():
            places = [np.array((at, *self.leaf_places(numbers[at]))) for at in group]
            run, step = [group[0]], None
            for i in range(1, len(group)):
                now = places[i] - places[i - 1]
                if (step is not None and not np.array_equal(now, step)) or len(run) == MOST_ITEMS:
                    found.append(run)
                    run, step = [], None
                else:
                    step = now
                run.append(group[i])
            found.append(run)
        return sorted(found)

    def shape(self, number: int) -> int:
        """Equal for expressions that differ in the places of their leaves only. A sum is a value of its own."""
        known = self._shapes.get(number)
        if known is None:
            ex, op = self.ex, self.ex.ops[number]
            key: tuple[object, ...]
            if op == "sum":
                key = ("sum", number)
            else:
                value = ex.values[number]
                own = {"y": (), "side": (), "const": value[:1], "table": value[::2]}.get(op, value)
                key = (op, own, type(own[0]) if own else None, *(self.shape(a) for a in ex.args[number]))
            known = self._shapes[number] = self._interned.setdefault(key, len(self._interned))
        return known

    def leaf_places(self, number: int) -> tuple[int, ...]:
        """The places of all leaves, in the order of a walk."""
        known = self._leaves.get(number)
        if known is None:
            op, value = self.ex.ops[number], self.ex.values[number]
            own = {"y": value[-1:], "side": value[-1:], "const": value[-1:], "table": value[1:2]}.get(op, ())
            inner = () if op == "sum" else tuple(p for a in self.ex.args[number] for p in self.leaf_places(a))
            known = self._leaves[number] = (*own, *inner)
        return known

    def term(self, numbers: np.ndarray) -> Term:
        """numbers [heads, items] of expressions of one shape -> their term."""
        key = (numbers.tobytes(), numbers.shape)
        if key not in self._terms:
            self._terms[key] = self._term(numbers)
        return self._terms[key]

    def _term(self, numbers: np.ndarray) -> Term:
        ex, first = self.ex, int(numbers[0, 0])
        op = ex.ops[first]
        distinct = np.unique(numbers).tolist()
        if any(ex.ops[n] != op or len(ex.args[n]) != len(ex.args[first]) for n in distinct):
            raise NotGenerated("epilogue", "heads are computed in different ways")
        values = {n: ex.values[n] for n in distinct}
        if op == "number":
            if len(distinct) > 1:
                raise NotGenerated("epilogue", "numbers differ from feature to feature")
            return Term("number", number=values[first][0])
        if op == "sum":
            return self._sum(numbers)
        args = tuple(
            self.term(np.array([[ex.args[n][i] for n in row] for row in numbers.tolist()]))
            for i in range(len(ex.args[first]))
        )
        if op not in ("y", "side", "const", "table"):
            return Term(op, args)
        at = 1 if op == "table" else len(values[first]) - 1
        rest = {v[:at] + v[at + 1 :] for v in values.values()}
        if len(rest) > 1:
            raise NotGenerated("epilogue", "one expression reads several constants")
        places = _places(np.array([[values[n][at] for n in row] for row in numbers.tolist()]), op)
        if op == "y" and places.items == 0:
            raise NotGenerated("epilogue", "a feature of y is spread over many")
        which = values[first][0] if op in ("const", "table") else 0
        return Term(op, args, places, which, values[first][2] if op == "table" else 0)

    def _sum(self, numbers: np.ndarray) -> Term:
        """A sum over features, in parts that use the tiles that there are."""
        if (numbers != numbers[:, :1]).any():
            raise NotGenerated("epilogue", "a piece has several sums")
        terms = np.array([self.ex.args[n] for n in numbers[:, 0].tolist()])  # [heads, of the sum]
        order = self._by_tile(terms[0].tolist())
        parts = []
        for group in order:
            for run in self.runs(terms[0, group].tolist()):
                parts.append(self.term(terms[:, [group[i] for i in run]]))
        if len(parts) > MOST_PIECES:
            raise NotGenerated("epilogue", f"a sum falls into {len(parts)} parts")
        if any(p.items == 0 for p in parts):
            raise NotGenerated("epilogue", "a sum over one value")
        return Term("sum", tuple(parts))

    def _by_tile(self, numbers: list[int]) -> list[list[int]]:
        """Indices of a sum's terms, those with their columns of y in the same tile together and in its order."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for at, number in enumerate(numbers):
            columns = self.columns(number)
            low = min(columns, default=0)
            tile = next((i for i, t in enumerate(self.tiles) if low in t), -1)
            groups.setdefault(tile, []).append((low, at))
        return [[at for _, at in sorted(group)] for group in groups.values()]

    def columns(self, number: int) -> list[int]:
        """Columns of y that an expression reads outside sums."""
        if self.ex.ops[number] == "y":
            return [self.ex.values[number][0]]
        return [] if self.ex.ops[number] == "sum" else [c for a in self.ex.args[number] for c in self.columns(a)]


def _places(found: np.ndarray, what: str) -> Places:
    """[heads, items] -> the even steps that they follow."""
    heads, items = found.shape
    base = int(found[0, 0])
    head = int(found[1, 0]) - base if heads > 1 else 0
    step = int(found[0, 1]) - base if items > 1 else 1 if what in ("y", "features") else 0
    if not np.array_equal(found, base + head * np.arange(heads)[:, None] + step * np.arange(items)[None]):
        raise NotGenerated("epilogue", f"places of {what} do not step evenly")
    return Places(base, head, step, items if step else 0)
