"""Re-emit a region of the graph for any number of tokens and batch rows, and evaluate affine chains on weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lorc_fx.decoder import Decoder

from .axes import Axes, arg, dim_of
from .facts import NoSite, Region, Rows, static_size
from .rules import rule_of

aten = torch.ops.aten
PRODUCTS = {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default
}  # fmt: skip
_EXPANDS = {aten.expand.default, aten.broadcast_to.default}


def may_project(node: Node) -> bool:
    """Whether a node multiplies by a weight, or might: an op that is not torch's own is not known."""
    if node.op != "call_function":
        return False
    return node.target in PRODUCTS or getattr(node.target, "namespace", "aten") not in ("aten", "prims", "prim")


def resized(node: Node, axes: Axes, batch: Any, tokens: Any) -> list[Any]:
    """The sizes of a node's value with its batch and token axes replaced; all others must be static."""
    sizes: list[Any] = []
    for i, size in enumerate(node.meta["val"].shape):
        if i == axes.token and i == axes.batch:
            sizes.append(-1)
        elif i == axes.token:
            sizes.append(tokens)
        elif i == axes.batch:
            sizes.append(batch)
        else:
            static = static_size(size)
            if static is None:
                raise NoSite(node, f"`{node.name}` has a feature dimension of unknown size")
            sizes.append(static)
    return sizes


def _static_args(node: Node) -> Any:
    """The node's arguments with symbolic ints as ints; a size that varies is refused."""

    def fix(arg: Node) -> Any:
        value = arg.meta.get("val")
        if isinstance(value, (torch.Tensor, list, tuple)):
            return arg
        static = static_size(value) if isinstance(value, (int, torch.SymInt)) else None
        if static is None:
            raise NoSite(node, f"op `{node.target}` takes a size that changes from call to call")
        return static

    return map_arg(node.args, fix), map_arg(node.kwargs, fix)


def feature_sizes(node: Node, axes: Axes) -> list[int]:
    """The static sizes of a value's feature axes, in order; their product is the width n of a site at y."""
    sizes = []
    for i, size in enumerate(node.meta["val"].shape):
        if i in (axes.batch, axes.token):
            continue
        static = static_size(size)
        if static is None:
            raise NoSite(node, f"`{node.name}` has a feature dimension of unknown size")
        sizes.append(static)
    return sizes


def from_rows(graph: Graph, rows: Node, sizes: list[int], axes: Axes, batch: Any, tokens: Any) -> Node:
    """[B, T, prod(sizes)] -> the layout in which ``axes`` says where batch and tokens are (others: ``sizes``)."""
    if axes.batch is not None and axes.batch == axes.token:
        flat = graph.call_function(aten.reshape.default, (rows, [-1, *sizes]))
        order = _order([0], [axes.token], len(sizes) + 1)
    elif axes.batch is None:
        first = graph.call_function(aten.select.int, (rows, 0, 0))
        flat = graph.call_function(aten.reshape.default, (first, [tokens, *sizes]))
        order = _order([0], [axes.token], len(sizes) + 1)
    else:
        flat = graph.call_function(aten.reshape.default, (rows, [batch, tokens, *sizes]))
        order = _order([0, 1], [axes.batch, axes.token], len(sizes) + 2)
    if order == sorted(order):
        return flat
    return graph.call_function(aten.permute.default, (flat, order))


def _order(leading: list[int], places: list[int | None], rank: int) -> list[int]:
    """The permutation that brings the leading axes to ``places`` and leaves the others in order."""
    rest = iter(i for i in range(rank) if i not in leading)
    at = dict(zip(places, leading, strict=True))
    return [at[i] if i in at else next(rest) for i in range(rank)]


def emit(graph: Graph, region: Region, env: dict[Node, Node], batch: Any, tokens: Any, full: set[Node]) -> Node:
    """The region's ops in ``graph``, for ``batch`` rows and ``tokens``; its output there. ``env``: its inputs there.
    ``full``: values that have a row for each batch row here, whether or not they had in the graph."""
    for node, axes in region.nodes:
        if not full.isdisjoint(node.all_input_nodes):
            full.add(node)
        rule = rule_of(node)
        if along_tokens(node, axes):
            env[node] = env[node.args[0]]
            continue
        if rule is not None and rule.sized:
            source = env[node.args[0]]
            op = aten.expand.default if node.target in _EXPANDS else aten.reshape.default
            rows = 1 if node not in full and _broadcast(node, axes, region) else batch
            env[node] = graph.call_function(op, (source, resized(node, axes, rows, tokens)))
            continue
        args, kwargs = _static_args(node)
        env[node] = graph.call_function(
            node.target,
            map_arg(args, env.__getitem__),
            map_arg(kwargs, env.__getitem__),
        )
    return env[region.output]


def along_tokens(node: Node, axes: Axes) -> bool:
    """Whether a slice is one of tokens or batch rows: as its rule let it pass, it drops none of them, whatever its
    numbers are, and it would where there are more."""
    if node.target is not aten.slice.Tensor:
        return False
    source: Node = node.args[0]
    return dim_of(arg(node, 1, "dim", 0), source.meta["val"].dim()) in axes


def _broadcast(node: Node, axes: Axes, region: Region) -> bool:
    """Whether a value has one batch row for all that the region's output has: a table of angles, say."""
    at, out = axes.batch, region.output_axes.batch
    if at is None or out is None or at == axes.token:
        return False
    sizes = node.meta["val"].shape[at], region.output.meta["val"].shape[out]
    return static_size(sizes[0]) == 1 and static_size(sizes[1]) != 1


def make_decoder(rows: Rows, words: str) -> tuple[Decoder, tuple[Node, ...]]:
    """The epilogue of a site as a Decoder, and the placeholders (or attributes) that are its constants, in order."""
    graph = Graph()
    y = graph.placeholder("y")
    positions = graph.placeholder("positions")
    region = rows.epilogue
    constants = tuple(n for n in region.inputs if n is not rows.y and n not in dict(rows.sides))
    env = {c: graph.placeholder(f"const{i}") for i, c in enumerate(constants)}
    sized = y if rows.side is None else positions  # so that angles depend on positions alone
    batch = graph.call_function(aten.sym_size.int, (sized, 0))
    tokens = graph.call_function(aten.sym_size.int, (sized, 1))
    sizes = feature_sizes(rows.y, rows.y_axes)
    width = math.prod(sizes)
    whole = y if rows.features is None else _spread(graph, y, rows.features, width)
    env[rows.y] = from_rows(graph, whole, sizes, rows.y_axes, batch, tokens)
    env |= _sides(graph, rows, positions, batch, tokens)
    full = {n for n, at in ((rows.y, rows.y_axes), *rows.sides) if at.batch is not None}
    graph.output(emit(graph, region, env, batch, tokens, full))
    graph.eliminate_dead_code()
    axes = region.output_axes
    value = region.output.meta["val"]
    layout: list[str | int] = [
        "B" if i == axes.batch else "T" if i == axes.token else int(s)
        for i, s in enumerate(_static_or_zero(value.shape, axes))
    ]
    width = width if rows.features is None else len(rows.features)
    module = GraphModule(torch.nn.Module(), graph)
    shared = axes.batch is not None and any(at.batch is None for _, at in rows.sides)
    return Decoder(module, width, tuple(layout), value.dtype, rows.side, words, shared), constants


def _sides(graph: Graph, rows: Rows, kept: Node, batch: Any, tokens: Any) -> dict[Node, Node]:
    """What is kept of each token, [B, T] or [B, T, width of all], as the values that the epilogue reads."""
    found, begin = {}, 0
    for node, axes in rows.sides:
        sizes = feature_sizes(node, axes)
        end = begin + math.prod(sizes)
        piece = graph.call_function(aten.slice.Tensor, (kept, 2, begin, end)) if len(rows.sides) > 1 else kept
        cast = graph.call_function(aten.to.dtype, (piece, node.meta["val"].dtype))
        found[node] = from_rows(graph, cast, sizes, axes, batch, tokens)
        begin = end
    return found


def _spread(graph: Graph, y: Node, features: tuple[int, ...], width: int) -> Node:
    """[B, T, len(features)] -> [B, T, width] with these at their places and zeros elsewhere."""
    runs: list[list[int]] = []
    for feature in features:
        if runs and feature == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([feature, feature + 1])
    pieces, taken, end = [], 0, 0
    for i, (start, stop) in enumerate(runs):
        piece = graph.call_function(aten.slice.Tensor, (y, 2, taken, taken + stop - start)) if len(runs) > 1 else y
        after = width - stop if i == len(runs) - 1 else 0
        pieces.append(graph.call_function(aten.constant_pad_nd.default, (piece, [start - end, after])))
        taken, end = taken + stop - start, stop
    return pieces[0] if len(pieces) == 1 else graph.call_function(aten.cat.default, (pieces, 2))


def trimmed_decoder(rows: Rows, words: str) -> tuple[Rows, Decoder, tuple[Node, ...]]:
    """``make_decoder`` of those features of y that the rows depend on, and the rows with these: a clamp or a norm may
    stand before a fused projection is split. Raises NoSite where these are more than the cache holds, so that coding
    them would lose what it keeps.

    Found by running the epilogue, a token for each feature, with that one changed: to NaN, which most ops pass on, and
    to other numbers.
    """
    decoder, constants = make_decoder(rows, words)
    held = math.prod(size for size in decoder.layout if isinstance(size, int))
    if decoder.width <= held:
        return rows, decoder, constants
    n, draw = decoder.width, torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=draw).to(decoder.dtype)
    values = [c.meta["val"] for c in constants]
    consts = [torch.ones([int(s) for s in v.shape], dtype=v.dtype) for v in values]
    side = decoder.side
    kept = None if side is None else torch.ones(1, n, *side.features, dtype=side.dtype)

    def run(y: torch.Tensor) -> torch.Tensor:
        found = decoder.module(y[None], kept, *consts)
        return found.movedim(decoder.token_dim, 0).flatten(1)

    plain, used = run(base.expand(n, n).contiguous()), torch.zeros(n, dtype=torch.bool)
    for other in (torch.nan, 0.0, -1.0, 1.0, -100.0, 100.0):
        changed = base.expand(n, n).clone()
        changed.fill_diagonal_(other)
        used |= ~(run(changed) == plain).all(1)
    if int(used.sum()) > held:
        reason = f"{int(used.sum())} features of its projection become {held} in the cache: coding them saves nothing"
        raise NoSite(rows.y, reason)
    rows = replace(rows, features=tuple(used.nonzero().flatten().tolist()))
    return rows, *make_decoder(rows, words)


def _static_or_zero(sizes: Any, axes: Axes) -> list[int]:
    return [0 if i in axes else (static_size(s) or 0) for i, s in enumerate(sizes)]


def effective_weight(rows: Rows, real: Mapping[Node, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [n, d] and bias [n] (None where zero) of the affine chain x -> y, by running it.

    The d rows of the identity are d tokens; the first product turns them into W^T for free. Constants that are added
    are left out of that run and give the bias in a second one, on a token of zeros. A chain of one product is
    evaluated in the weight's own dtype (then W is W, bit by bit); longer ones in at least fp32.
    """
    width_in = int(rows.x.meta["val"].shape[-1])
    with torch.no_grad():
        matrix = _run(rows, real, None, width_in)
        weight = matrix.reshape(width_in, -1).T
        weight = (weight if rows.features is None else weight[list(rows.features)]).contiguous()
        shift = _run(rows, real, torch.zeros(1, width_in, dtype=weight.dtype, device=weight.device), 1).reshape(-1)
        shift = shift if rows.features is None else shift[list(rows.features)]
    return weight, shift if bool((shift != 0).any()) else None


def _run(rows: Rows, real: Mapping[Node, torch.Tensor], zeros: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """Run the chain on a token of zeros, or (``zeros`` None) on the identity with added constants left out."""
    env: dict[Node, torch.Tensor] = {}
    for node in rows.chain.inputs:
        if node is not rows.x:
            env[node] = _precise(real[node], rows)
    if zeros is not None:
        env[rows.x] = _placed(zeros, rows.x, rows.x_axes)
    for node, axes in rows.chain.nodes:
        env[node] = _step(node, axes, env, rows, tokens, linear=zeros is None)
    return _gathered(env[rows.y], rows.y_axes)


def _precise(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    tensor = tensor.detach()
    low = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if low and rows.contractions > 1 else tensor


def _placed(flat: torch.Tensor, node: Node, axes: Axes) -> torch.Tensor:
    """[tokens, features] -> the node's layout with a batch of one."""
    return flat.reshape(resized(node, axes, 1, flat.shape[0]))


def _gathered(value: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A value with a batch of one -> [tokens, features in order]."""
    assert axes.token is not None
    return value.movedim(axes.token, 0).flatten(1)


def _step(node: Node, axes: Axes, env: dict[Node, Any], rows: Rows, tokens: int, linear: bool) -> Any:
    rule = rule_of(node)
    if rule is None:
        args, kwargs = _static_args(node)
        return node.target(*map_arg(args, env.__getitem__), **map_arg(kwargs, env.__getitem__))
    depends = [n for n, a in rule.back(node, axes) if a.token is not None] if axes.token is not None else []
    first = linear and rows.x in depends
    if first and not (rule.role == "contract" and node.target in PRODUCTS):
        env.setdefault(rows.x, _identity(rows))
    if along_tokens(node, axes):
        return env[node.args[0]]
    if rule.sized:
        value = env[node.args[0]]
        sizes = resized(node, axes, 1, tokens)
        return value.expand(sizes) if node.target in _EXPANDS else value.reshape(sizes)
    if first and rule.role == "contract" and node.target in PRODUCTS:
        return _placed(_weight_rows(node, env), node, axes)
    if linear and depends and rule.role == "contract" and node.target not in PRODUCTS:
        return _without_shift(node, env, depends)
    args, kwargs = _static_args(node)
    if linear and depends and node.target is aten.linear.default:
        args = args[:2]
    elif linear and depends and node.target is aten.addmm.default:
        return env[args[1]] @ env[args[2]] * kwargs.get("alpha", 1)
    elif linear and depends and rule.role == "sum" and len(depends) == 1 and len(node.all_input_nodes) == 2:
        other = next(n for n in node.all_input_nodes if n is not depends[0])
        env = {**env, other: torch.zeros_like(env[other])}
    elif linear and depends and rule.role == "sum" and not all(isinstance(a, Node) for a in args[:2]):
        args = tuple(a if isinstance(a, Node) or i != 1 or _is_dim(node) else 0 for i, a in enumerate(args))
    return node.target(*map_arg(args, env.__getitem__), **map_arg(kwargs, env.__getitem__))


def _without_shift(node: Node, env: dict[Node, Any], depends: list[Node]) -> Any:
    """A product of a library's own, which may add a bias inside: less what it makes of zeros."""
    args, kwargs = _static_args(node)
    nothing = {**env, **{n: torch.zeros_like(env[n]) for n in depends}}
    found, shift = (
        node.target(*map_arg(args, known.__getitem__), **map_arg(kwargs, known.__getitem__)) for known in (env, nothing)
    )
    if isinstance(found, (list, tuple)):
        return [one - other for one, other in zip(found, shift, strict=True)]
    return found - shift


def _is_dim(node: Node) -> bool:
    return node.target in (aten.cat.default, aten.stack.default)


def _identity(rows: Rows) -> torch.Tensor:
    value = rows.x.meta["val"]
    eye = torch.eye(int(value.shape[-1]), dtype=torch.float32, device=value.device).to(value.dtype)
    return _placed(_precise(eye, rows), rows.x, rows.x_axes)


def _weight_rows(node: Node, env: dict[Node, Any]) -> torch.Tensor:
    """What the identity becomes in the first product: the weight itself, [d, n]."""
    if node.target is aten.linear.default:
        return env[node.args[1]].T
    if node.target is aten.addmm.default:
        return (
            env[node.args[2]] * node.kwargs.get("alpha", 1) if node.kwargs.get("alpha", 1) != 1 else env[node.args[2]]
        )
    weight = env[node.args[1]]
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight = weight[0]
    if weight.dim() != 2:
        raise NoSite(node, "it multiplies by a different weight for each batch row")
    return weight
