"""Epilogues that turn pairs of a head's features by the angles of a token's position, as a ``Turn``: then keys can be
decoded and turned inside of one kernel, whatever the ops are that say so (rotations by halves, by neighbours, of a part
of the features, as complex numbers; after a norm of each head, or not).

What an epilogue does is found by running it, on each feature alone and on other numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorc_fx.decoder import POSITION, Decoder
from lorc_fx.kernels.turned import Turn

from .angles import Angles, find_angles
from .norms import Norm, find_norm, spread_of

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from .sites import Site

POSITIONS = (1, 3, 1_000_003)
"""At which an epilogue is run to find what it does: far ones too, as some scale what is beyond a length."""

EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""How far a turn may be from what its epilogue makes of numbers, relative to the largest: what it rounds."""

SIZES = (0.0, 2.0**-12, 1.0, 2.0**10)
"""Of numbers that it is run on: a norm or a clamp makes something else of some."""

MOST = 1 << 12
"""Features of a token, at most, of an epilogue that is looked at: their square is run through it (64 MiB of fp32)."""

Run = Callable[[torch.Tensor, int], torch.Tensor]
"""[tokens, features], a position -> [tokens, heads, D] fp32."""


@dataclass(frozen=True)
class Found:
    """A decoder's turn, where it has the angles (empty: nowhere), and the norm before it, if there is one."""

    turn: Turn
    angles: tuple[Angles, ...]
    norm: Norm | None


_FOUND: dict[tuple[str, int, int], Found | None] = {}


def find(decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, head_dim: int) -> Found | None:
    """What ``decoder`` does to y [B, T, n] as a turn of ``heads`` x ``head_dim`` features; None where it is anything
    else. Constants that it is run with have the sizes of ``consts``."""
    key = (decoder.digest, heads, head_dim)
    if key not in _FOUND:
        fits = heads * head_dim == decoder.width <= MOST and decoder.side == POSITION and decoder.dtype in EXACT
        fits = fits and all(c.is_floating_point() for c in consts)
        _FOUND[key] = _find(decoder, consts, heads, head_dim) if fits else None
    return _FOUND[key]


def of_site(site: Site) -> Found | None:
    """``find`` for a site's decoder."""
    return find(site.decoder, [c.meta["val"] for c in site.consts], site.decoder.width // site.head, site.head)


def known(decoder: Decoder, heads: int, head_dim: int) -> Found:
    """What ``find`` has found."""
    found = _FOUND[decoder.digest, heads, head_dim]
    assert found is not None
    return found


def _find(decoder: Decoder, consts: Sequence[torch.Tensor], heads: int, head_dim: int) -> Found | None:
    draw = torch.Generator().manual_seed(0)
    others = tuple((torch.rand([int(n) for n in c.shape], generator=draw) + 0.1).to(c.dtype) for c in consts)

    try:
        return _at(decoder, others, heads, head_dim, far=True)
    except IndexError:  # it looks positions up, and has fewer
        with contextlib.suppress(IndexError):
            return _at(decoder, others, heads, head_dim, far=False)
    except (RuntimeError, TypeError):
        pass
    return None


def _at(decoder: Decoder, others: tuple[torch.Tensor, ...], heads: int, head_dim: int, far: bool) -> Found | None:
    positions = POSITIONS if far else POSITIONS[:2]

    def after(module: GraphModule, placed: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        def run(y: torch.Tensor, position: int) -> torch.Tensor:
            kept = torch.full((1, len(y)), position, dtype=torch.int32)
            made = module(placed(y.to(decoder.dtype)), kept, *others)
            rows = made.movedim((decoder.batch_dim, decoder.token_dim), (0, 1))[0]
            return rows.reshape(len(y), heads, head_dim).float()

        return run

    turn = _turn(after(decoder.module, lambda y: y[None]), decoder, heads, head_dim, positions)
    norm = None if turn else find_norm(decoder, others, heads, EXACT[decoder.dtype])
    if norm is not None:
        turn = _turn(after(norm.after, lambda z: spread_of(norm, z)), decoder, heads, head_dim, positions)
    if turn is None:
        return None
    angles = find_angles(decoder, turn, others, norm, far)
    if norm is None:
        return Found(turn, angles, None)
    own = replace(turn, sources=tuple(norm.columns[s] for s in turn.sources), eps=norm.eps)
    return Found(own, angles, norm) if angles else None


def _turn(run: Run, decoder: Decoder, heads: int, head_dim: int, positions: Sequence[int]) -> Turn | None:
    n, draw = decoder.width, torch.Generator().manual_seed(1)
    each = torch.eye(n).split(256)  # a few at a time: ops between hold more than what comes out
    found = _slots([torch.cat([run(y, position) for y in each]) for position in positions], heads, head_dim)
    if found is None:
        return None
    turn, tables = found
    base = (torch.randn(len(SIZES), n, generator=draw) * torch.tensor(SIZES)[:, None]).to(decoder.dtype).float()
    for position, table in zip(positions, tables, strict=True):
        apart = (run(base, position) - _turned(turn, base, table, heads)).abs().amax((1, 2))
        if not bool((apart <= EXACT[decoder.dtype] * base.abs().amax(1)).all()):
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
