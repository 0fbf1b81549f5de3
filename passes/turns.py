"""Epilogues that turn pairs of a head's features by the angles of a token's position, as a ``Turn``: then keys can be
decoded and turned inside of one kernel, whatever the ops are that say so (rotations by halves, by neighbours, of a part
of the features, as complex numbers)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Interpreter, Node

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
    _ANGLES[decoder.digest] = _angles(decoder, turn, others)
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


# -- cosines and sines ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Angles:
    """Where an epilogue has them: a node of its graph that depends on positions alone, which axes of it are batch rows
    (None: one for all) and tokens, its ``sizes`` besides, and which of its features [pairs] they are."""

    node: str
    batch: int | None
    token: int
    sizes: tuple[int, ...]
    features: tuple[int, ...]


_ANGLES: dict[str, tuple[Angles, ...]] = {}


class _Seen(Interpreter):
    """Values of the nodes that depend on positions alone."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}
        self.alone = {n for n in module.graph.nodes if n.op == "placeholder" and n.name != "y"}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and n.all_input_nodes and self.alone.issuperset(n.all_input_nodes):
            self.alone.add(n)
            self.values[n.name] = value
        return value


def probe(turn: Turn, decoder: Decoder) -> torch.Tensor:
    """y [n] of which an epilogue makes the angles: 1 for the first feature of each pair of the first head."""
    made = torch.zeros(decoder.width)
    made[list(turn.sources[: 2 * turn.pairs : 2])] = 1
    return made.to(decoder.dtype)


def results(turn: Turn) -> list[int]:
    """Which features of the first head the cosines and sines then are."""
    return [*turn.dims[: 2 * turn.pairs : 2], *turn.dims[1 : 2 * turn.pairs : 2]]


def _angles(decoder: Decoder, turn: Turn, consts: Sequence[torch.Tensor]) -> tuple[Angles, ...]:
    """Cosines and sines where the epilogue has them as they are; () where it has not."""
    rows, tokens = 3, 5
    kept = torch.arange(rows * tokens, dtype=torch.int32).view(rows, tokens)
    seen = _Seen(decoder.module)
    made = seen.run(probe(turn, decoder).expand(rows, tokens, -1), kept, *consts)
    want = made.movedim((decoder.batch_dim, decoder.token_dim), (0, 1)).flatten(2)[..., results(turn)]
    found = []
    for part in want.split(turn.pairs, 2):
        at = next((a for name, value in seen.values.items() if (a := _among(name, value, part)) is not None), None)
        if at is None:
            return ()
        found.append(at)
    return tuple(found)


def _among(name: str, value: Any, want: torch.Tensor) -> Angles | None:
    """``want`` [B, T, pairs] among a node's features."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    rows, tokens, _ = want.shape
    for token in (i for i, size in enumerate(value.shape) if size == tokens):
        own: list[int | None] = [i for i, size in enumerate(value.shape) if size == rows]
        for batch in own or [None]:
            by_token = value.movedim(token, 0)[None] if batch is None else value.movedim((batch, token), (0, 1))
            same = (by_token.reshape(*by_token.shape[:2], -1).to(want.dtype)[..., None] == want[..., None, :]).all(0).all(0)
            if bool(same.any(0).all()):
                return Angles(name, batch, token, tuple(value.shape), tuple(same.int().argmax(0).tolist()))
    return None


def emit_table(r: Rewriter, group: Group, cell: Cell, turn: Turn) -> Node:
    """Cosines and sines [2 pairs, B or 1, T] of a cell's tokens: one for all layers that turn alike."""
    decoder = r.templates[group].decoder
    assert cell.positions is not None
    version = r.version(group)
    batch, tokens = (r.once(version, aten.sym_size.int, (cell.positions, dim), {}) for dim in (1, 0))
    if found := _ANGLES[decoder.digest]:
        values = {node.name: value for node, value in r.angles(group, cell).items()}
        parts = [_rows(r, version, values[at.node], at) for at in found]
    else:
        name = f"probe {decoder.digest}"
        if name not in r.pure:
            r.pure[name] = r.constant(probe(turn, decoder))
        y = r.once(version, aten.expand.default, (r.pure[name], [batch, tokens, decoder.width]), {})
        value, which = r.decoded(group, cell, y, shared=True), results(turn)
        at = Angles("", decoder.batch_dim, decoder.token_dim, tuple(decoder.shape(1, 1)), tuple(which[: turn.pairs]))
        parts = [_rows(r, version, value, x) for x in (at, replace(at, features=tuple(which[turn.pairs :])))]
    both = r.once(version, aten.cat.default, (parts,), {})
    return r.once(version, torch.ops.lorc.table.default, (both,), {})


def _rows(r: Rewriter, version: int, value: Node, at: Angles) -> Node:
    """These features of ``value`` as [pairs, B or 1, T]: a slice where they are evenly apart, which compiled code does
    not look up one by one."""
    axes = [at.token] if at.batch is None else [at.batch, at.token]
    others = [i for i in range(len(at.sizes)) if i not in axes]
    moved = r.once(version, aten.permute.default, (value, [*others, *axes]), {})
    tokens = r.once(version, aten.sym_size.int, (value, at.token), {})
    width = math.prod(at.sizes[i] for i in others)
    rows = r.once(version, aten.reshape.default, (moved, [width, -1, tokens]), {})
    which = list(at.features)
    step = which[1] - which[0] if len(which) > 1 else 1
    if step > 0 and which == list(range(which[0], which[-1] + 1, step)):
        return r.once(version, aten.slice.Tensor, (rows, 0, which[0], which[-1] + 1, step), {})
    name = f"rows {which}"
    if name not in r.pure:
        r.pure[name] = r.constant(torch.tensor(which))
    return r.once(version, aten.index_select.default, (rows, 0, r.pure[name]), {})
