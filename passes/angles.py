"""Cosines and sines of cached positions for keys that are turned as they are read, and the weight of a norm before:
found in an epilogue, and emitted for a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from lorc_fx.decoder import Decoder
from lorc_fx.kernels.native import KINDS
from lorc_fx.kernels.turned import Turn

from .norms import ROWS, TOKENS, Norm

if TYPE_CHECKING:
    from .caches import Group
    from .mirrors import Cell
    from .rewrite import Rewriter
    from .turns import Found

aten = torch.ops.aten


@dataclass(frozen=True)
class Angles:
    """Where an epilogue has them: a node of its graph that depends on positions alone, which axes of it are batch rows
    (None: one for all) and tokens, its ``sizes`` besides, and which of its features [pairs] they are."""

    node: str
    batch: int | None
    token: int
    sizes: tuple[int, ...]
    features: tuple[int, ...]


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


def find_angles(
    decoder: Decoder, turn: Turn, consts: Sequence[torch.Tensor], norm: Norm | None, far: bool
) -> tuple[Angles, Angles] | tuple[()]:
    """Cosines and sines where the epilogue has them as they are; () where it has not. ``turn``: of what follows the
    norm, if there is one. ``far``: asked up to 750,000 positions, a tenth further each time; else up to 142."""
    steps = torch.arange(ROWS * TOKENS)
    kept = (steps + far * 1.1**steps).int().view(ROWS, TOKENS)
    y = probe(turn, decoder).expand(ROWS, TOKENS, -1)
    if norm is not None:
        y = y.reshape(ROWS, TOKENS, *norm.sizes).movedim((0, 1), (norm.batch, norm.token))
    seen = _Seen(decoder.module if norm is None else norm.after)
    made = seen.run(y, kept, *consts)
    want = made.movedim((decoder.batch_dim, decoder.token_dim), (0, 1)).flatten(2)[..., results(turn)]
    found = []
    for part in want.split(turn.pairs, 2):
        at = next((a for name, value in seen.values.items() if (a := _among(name, value, part)) is not None), None)
        if at is None:
            return ()
        found.append(at)
    return found[0], found[1]


def _among(name: str, value: Any, want: torch.Tensor) -> Angles | None:
    """``want`` [B, T, pairs] among a node's features."""
    if not isinstance(value, torch.Tensor) or value.dtype not in KINDS or value.shape.count(TOKENS) != 1:
        return None
    if value.shape.count(ROWS) > 1:
        return None
    token = value.shape.index(TOKENS)
    batch = value.shape.index(ROWS) if ROWS in value.shape else None
    by_token = value.movedim(token, 0)[None] if batch is None else value.movedim((batch, token), (0, 1))
    by_token = by_token.reshape(*by_token.shape[:2], -1).to(want.dtype)
    same = (by_token[..., None] == want[..., None, :]).all(0).all(0)
    if not bool(same.any(0).all()):
        return None
    return Angles(name, batch, token, tuple(value.shape), tuple(same.int().argmax(0).tolist()))


# -- emission ---------------------------------------------------------------------------------------------------------


def emit(r: Rewriter, group: Group, cell: Cell, found: Found) -> list[Node]:
    """A turn's own tensors, as ``Turn`` says: one table for all layers that turn alike."""
    return [*([] if found.norm is None else [_weight(r, group, found)]), _table(r, group, cell, found)]


def _table(r: Rewriter, group: Group, cell: Cell, found: Found) -> Node:
    decoder, turn, version = r.templates[group].decoder, found.turn, r.version(group)
    assert cell.positions is not None
    if found.angles:
        values = {node.name: value for node, value in r.angles(group, cell).items()}
        parts = [_rows(r, version, values[at.node], at) for at in found.angles]
    else:
        given = _constant(r, f"probe {decoder.digest}", probe(turn, decoder))
        sizes = [r.once(version, aten.sym_size.int, (cell.positions, dim), {}) for dim in (1, 0)]
        y = r.once(version, aten.expand.default, (given, [*sizes, decoder.width]), {})
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
    return r.once(version, aten.index_select.default, (rows, 0, _constant(r, f"rows {which}", torch.tensor(which))), {})


def _weight(r: Rewriter, group: Group, found: Found) -> Node:
    """What the norm makes of ones, times sqrt(1 + eps): [D] fp32, in the order of the turn."""
    norm, turn = found.norm, found.turn
    assert norm is not None and turn.eps is not None
    decoder, env = r.templates[group].decoder, dict[Node, Any]()
    for node in norm.before.graph.nodes:
        if node.op == "placeholder":
            ones = _constant(r, f"ones {decoder.digest}", torch.ones(1, 1, decoder.width, dtype=decoder.dtype))
            env[node] = (
                ones if node.name == "y" else None if node.name == "positions" else r.codec_input(group, node.name)
            )
        elif node.target is aten.sym_size.int and node.args[0].name in ("y", "positions"):
            env[node] = 1
        elif node.op == "output":
            made = env[node.args[0]]
        else:
            args, kwargs = map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__)
            env[node] = r.once(0, node.target, args, kwargs)
    others = [i for i in range(len(norm.sizes) + 2) if i not in (norm.batch, norm.token)]
    moved = r.once(0, aten.permute.default, (made, [norm.batch, norm.token, *others]), {})
    flat = r.once(0, aten.to.dtype, (r.once(0, aten.reshape.default, (moved, [-1]), {}), torch.float32), {})
    place = {column: z for z, column in enumerate(norm.columns)}
    order = torch.tensor([place[s] for s in turn.sources[: len(turn.dims)]])
    picked = r.once(0, aten.index_select.default, (flat, 0, _constant(r, f"weights {decoder.digest}", order)), {})
    return r.once(0, aten.mul.Tensor, (picked, (1 + turn.eps) ** 0.5), {})


def _constant(r: Rewriter, name: str, value: torch.Tensor) -> Node:
    if name not in r.pure:
        r.pure[name] = r.constant(value)
    return r.pure[name]
