"""Epilogues that turn pairs of a head's features by the angles of a token's position, as a ``Turn``: then keys can be
decoded and turned inside of one kernel, whatever the ops are that say so (rotations by halves, by neighbours, of a part
of the features, as complex numbers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from lorc_fx.decoder import POSITION, Decoder
from lorc_fx.kernels.turned import Turn

if TYPE_CHECKING:
    from .caches import Group
    from .mirrors import Cell
    from .rewrite import Rewriter

aten = torch.ops.aten

POSITIONS = (1, 3)
"""At which an epilogue is run to find what it does."""

EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""How far a turn may be from what its epilogue makes of numbers, relative to the largest: what it rounds."""

SMALL, LARGE = 2.0**-12, 2.0**10
"""Sizes of numbers that it is run on besides those around 1: a norm or a clamp makes something else of some."""

MOST = 1 << 13
"""Features of a token, at most, of an epilogue that is looked at: their square is run through it."""

_FOUND: dict[tuple[str, int, int], Turn | None] = {}


def find(decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, head_dim: int) -> Turn | None:
    """What ``decoder`` does to y [B, T, n] as a turn of ``heads`` x ``head_dim`` features; None where it is anything
    else. Found by running it, on each feature alone and on other numbers, with others of the size of ``consts``."""
    key = (decoder.digest, heads, head_dim)
    if key not in _FOUND:
        fits = heads * head_dim == decoder.width <= MOST and decoder.side == POSITION and decoder.dtype in EXACT
        fits = fits and all(c.is_floating_point() for c in consts)
        _FOUND[key] = _find(decoder, consts, heads, head_dim) if fits else None
    return _FOUND[key]


def _find(decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, head_dim: int) -> Turn | None:
    n, draw = decoder.width, torch.Generator().manual_seed(0)
    others = [torch.rand([int(size) for size in c.shape], generator=draw).to(c.dtype) for c in consts]

    def run(y: torch.Tensor, position: int) -> torch.Tensor:
        """[tokens, n] -> [tokens, heads, D] of fp32."""
        kept = torch.full((1, len(y)), position, dtype=torch.int32)
        made = decoder.module(y[None].to(decoder.dtype), kept, *others)
        return made.movedim((decoder.batch_dim, decoder.token_dim), (0, 1))[0].reshape(len(y), heads, head_dim).float()

    try:
        responses = [run(torch.eye(n), position) for position in POSITIONS]
    except (RuntimeError, TypeError, IndexError):  # a table of fewer positions, say
        return None
    slots = _slots(responses, heads, head_dim)
    if slots is None:
        return None
    turn, tables = slots
    sizes = torch.tensor([0.0, SMALL, 1.0, LARGE])
    base = (torch.randn(4, n, generator=draw) * sizes[:, None]).to(decoder.dtype).float()
    for position, table in zip(POSITIONS, tables, strict=True):
        want, got = run(base, position), _turned(turn, base, table, heads)
        if not bool(((want - got).abs().amax((1, 2)) <= EXACT[decoder.dtype] * base.abs().amax(1)).all()):
            return None
    return turn


def _slots(responses: list[torch.Tensor], heads: int, head_dim: int) -> tuple[Turn, list[torch.Tensor]] | None:
    """From what each feature alone becomes [n, heads, D], at each position: the turn, and its [2, pairs] cosines and
    sines there."""
    made = torch.stack(responses)  # [positions, n, heads, D]
    meets = (made != 0).any(0)
    if bool((meets.sum(0) > 2).any()) or bool((meets.sum(0) == 0).any()):
        return None
    pairs: list[tuple[int, int]] = []
    alone: list[int] = []
    sources: list[list[int]] = [[] for _ in range(heads)]
    tables: list[torch.Tensor] = []
    for head in range(heads):
        from_ = [meets[:, head, d].nonzero().flatten().tolist() for d in range(head_dim)]
        partner = {tuple(s): [d for d in range(head_dim) if from_[d] == s] for s in from_ if len(s) == 2}
        first: list[tuple[int, int]] = []
        angles: list[torch.Tensor] = []
        for (a, b), dims in partner.items():
            if len(dims) != 2:
                return None
            for i, j in ((a, b), (b, a)):
                x, y = made[:, [i, j], head, dims[0]], made[:, [j, i], head, dims[1]]  # by cos and -sin; cos and sin
                if torch.equal(x[:, 0], y[:, 0]) and torch.equal(x[:, 1], -y[:, 1]):
                    first.append((dims[0], dims[1]))
                    sources[head] += [i, j]
                    angles.append(y)
                    break
            else:
                return None
        others = [d for d in range(head_dim) if len(from_[d]) == 1]
        if any(bool((made[:, from_[d][0], head, d] != 1).any()) for d in others):
            return None
        sources[head] += [from_[d][0] for d in others]
        table = torch.stack(angles, 2) if angles else torch.zeros(len(made), 2, 0)
        if head == 0:
            pairs, alone, tables = first, others, list(table)
        elif (pairs, alone) != (first, others) or not torch.equal(torch.stack(tables), table):
            return None
    if not pairs:
        return None
    dims = [d for pair in pairs for d in pair] + alone
    return Turn(tuple(dims), tuple(s for own in sources for s in own), len(pairs)), tables


def _turned(turn: Turn, y: torch.Tensor, table: torch.Tensor, heads: int) -> torch.Tensor:
    """y [tokens, n] by one table of cosines and sines -> [tokens, heads, D]."""
    x = y[:, list(turn.sources)].unflatten(1, (heads, -1))
    first, other, cos, sin = x[..., : 2 * turn.pairs : 2], x[..., 1 : 2 * turn.pairs : 2], *table
    made = torch.stack([first * cos - other * sin, other * cos + first * sin], -1).flatten(2)
    found = torch.empty_like(x)
    found[..., list(turn.dims)] = torch.cat([made, x[..., 2 * turn.pairs :]], -1)
    return found


def probe(turn: Turn, width: int) -> torch.Tensor:
    """y [n] of which an epilogue makes the angles: 1 for the first feature of each pair of the first head."""
    made = torch.zeros(width)
    made[list(turn.sources[: 2 * turn.pairs : 2])] = 1
    return made


def angles(turn: Turn) -> list[int]:
    """Which features of the first head the cosines and sines then are."""
    return [*turn.dims[: 2 * turn.pairs : 2], *turn.dims[1 : 2 * turn.pairs : 2]]


def emit_table(r: Rewriter, group: Group, cell: Cell, turn: Turn) -> Node:
    """Cosines and sines [2 pairs, B, T] of a cell's tokens: one for all layers that turn alike."""
    decoder = r.templates[group].decoder
    assert cell.positions is not None
    name = f"probe {decoder.digest}"
    if name not in r.pure:
        r.pure[name] = r.constant(probe(turn, decoder.width).to(decoder.dtype))
    version = r.version(group)
    sizes = [r.once(version, aten.sym_size.int, (cell.positions, dim), {}) for dim in (1, 0)]
    y = r.once(version, aten.expand.default, (r.pure[name], [*sizes, decoder.width]), {})
    value = r.decoded(group, cell, y, shared=True)
    by_token = [decoder.batch_dim, decoder.token_dim]
    features = [i for i in range(len(decoder.layout)) if i not in by_token]
    rows = r.once(version, aten.permute.default, (value, [*features, *by_token]), {})
    flat = r.once(version, aten.reshape.default, (rows, [decoder.width, *sizes]), {})
    index = f"angles {decoder.digest}"
    if index not in r.pure:
        r.pure[index] = r.constant(torch.tensor(angles(turn)))
    picked = r.once(version, aten.index_select.default, (flat, 0, r.pure[index]), {})
    return r.once(version, torch.ops.lorc.table.default, (picked,), {})
