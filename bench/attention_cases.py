"""Readers of packed rows, made by hand to check generated kernels: an ``Attend`` and tensors for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lorc_fx.decoder import POSITION, Decoder, Side
from lorc_fx.kernels.attend import Attend, Extra, Operand
from lorc_fx.kernels.stored import Stored
from lorc_fx.packing import Format, Segment, pack
from lorc_fx.passes import turns
from lorc_fx.passes.angles import probe, results

aten = torch.ops.aten
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Given = tuple[Attend, torch.Tensor, Stored, Stored, tuple[torch.Tensor, ...]]
"""The arguments of ``attend``."""


# -- epilogues: y [B, T, n], positions [B, T], constants -> [B, H, T, D] ---------------------------------------------


def heads_of(y: torch.Tensor, heads: int) -> torch.Tensor:
    return y.view(y.shape[0], y.shape[1], heads, -1).transpose(1, 2)


def angles(positions: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    return (positions.float()[..., None] * freq)[:, None]


def half_split(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    a = angles(positions, freq)
    a = torch.cat([a, a], -1)
    half = x.shape[-1] // 2
    return x * a.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * a.sin()


def interleaved(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    cos, sin = (f(angles(positions, freq)).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def complex_pairs(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    a = angles(positions, freq)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(a.cos(), a.sin())).flatten(3).to(x.dtype)


def partial(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    turned = 2 * freq.shape[0]
    return torch.cat([half_split(x[..., :turned], positions, freq), x[..., turned:]], -1)


def table(x: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosines and sines from a table by position."""
    both = rows[positions.long()][:, None]
    half = x.shape[-1] // 2
    cos, sin = both[..., :half], both[..., half:]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def kept_angles(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Angles are kept beside rows, [B, T, D / 2]."""
    cos, sin = kept[:, None].cos(), kept[:, None].sin()
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def own_frequencies(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Frequencies are made in the graph."""
    half = int(x.shape[-1]) // 2
    return half_split(x, positions, 10000 ** (-torch.arange(half) / half))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight)


def l2(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1) * weight


ROTARY: dict[str, Callable[..., torch.Tensor]] = {
    "half": half_split, "interleaved": interleaved, "complex": complex_pairs, "partial": partial, "table": table,
    "kept": kept_angles, "own": own_frequencies,
}  # fmt: skip


def small_rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of values so small that it matters which eps torch takes where none is given."""
    return torch.nn.functional.rms_norm(0.02 * x, (x.shape[-1],), w)


def flags(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Flags that add up as numbers."""
    return x * ((w > 0.9).to(torch.int64) + (w > 0.7).to(torch.int64))


def constants(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Numbers of the graph's own, of other types than what they meet."""
    x = torch.cat([x[..., :-4], torch.zeros_like(x[..., -4:])], -1)
    return x * (torch.full_like(w, 2, dtype=torch.int64).float().to(x.dtype) + w)


NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "rms": rms, "layer": layer_norm, "l2": l2, "small rms": small_rms, "flags": flags, "constants": constants,
}  # fmt: skip


@functools.cache
def decoder_of(rotary: str | None, norm: str | None, heads: int, dim: int, dtype: torch.dtype) -> tuple[Decoder, tuple]:
    """The decoder and its constants."""
    consts = []
    if rotary == "table":
        a = torch.arange(512)[:, None] * 10000 ** (-torch.arange(dim // 2) / (dim // 2))
        consts.append(torch.cat([a.cos(), a.sin()], -1))
    elif rotary and rotary not in ("kept", "own"):
        count = dim // 2 if rotary != "partial" else dim // 8
        consts.append(10000 ** (-torch.arange(count) / count))
    if norm:
        consts.append(torch.rand(dim, generator=torch.Generator().manual_seed(3)).to(dtype) + 0.5)

    def run(y: Any, positions: Any, *given: Any) -> Any:
        x = heads_of(y, heads)
        if norm:
            x = NORMS[norm](x, given[-1])
        return ROTARY[rotary](x, positions, *given[: len(consts) - bool(norm)]) if rotary else x

    side = None if rotary is None else Side(dim // 2, F32) if rotary == "kept" else POSITION
    y, positions = torch.zeros(2, 3, heads * dim, dtype=dtype), torch.zeros(2, 3, dtype=torch.int32)
    if side is not None and side.features:
        positions = torch.zeros(2, 3, *side.features)
    module = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(y, positions, *consts)
    graph = module.graph
    for node, name in zip(graph.find_nodes(op="placeholder"), ["y", "positions"], strict=False):
        node.name = name
    made = GraphModule(torch.nn.Module(), graph)
    return Decoder(made, heads * dim, ("B", heads, "T", dim), dtype, side, f"{norm} {rotary}"), tuple(consts)


# -- scores ----------------------------------------------------------------------------------------------------------


def program(kind: str, dim: int) -> tuple[GraphModule, tuple[Extra, ...], int | None]:
    """What scores become: ``none``, ``bool`` (a mask), ``hidden`` (one in which a batch row sees nothing), ``free``
    and ``free bias`` (a long end that none sees), ``add`` (a bias), ``alibi`` (a bias per head), ``head`` (one number
    per head), ``cap`` (a soft cap and a bias)."""
    graph = Graph()
    made = graph.call_function(aten.mul.Tensor, (graph.placeholder("scores"), 1 / math.sqrt(dim)))
    if kind != "none":
        extra = graph.placeholder("extra0")
    if kind == "cap":
        made = graph.call_function(aten.div.Tensor, (made, 5.0))
        made = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.tanh.default, (made,)), 5.0))
    if kind in ("bool", "hidden", "free"):
        made = graph.call_function(aten.where.ScalarOther, (extra, made, -math.inf))
    elif kind != "none":
        made = graph.call_function(aten.add.Tensor, (made, extra))
    graph.output(made)
    extras = () if kind == "none" else (Extra(kind != "head"),)
    return (
        GraphModule(torch.nn.Module(), graph),
        extras,
        0 if kind in ("bool", "hidden", "add", "free", "free bias") else None,
    )


# -- a case ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``keys``, ``values``: segments (columns, bits); columns of 0 bits are in ``dtype``. ``rotary``, ``norm``: the
    key's epilogue (absorbed where there is none); ``matrix``: whether rows are latents of a codec. ``groups``: of
    heads, each in columns of its own. ``turned``: keys have the turn that their epilogue is, if it is one."""

    tokens: int = 63
    heads: int = 2
    cached: int = 1
    dim: int = 64
    queries: int = 1
    batch: int = 2
    keys: tuple[tuple[int, int], ...] = ((32, 0),)
    values: tuple[tuple[int, int], ...] = ((32, 0),)
    means: int = 1
    dtype: torch.dtype = F32
    rotary: str | None = None
    norm: str | None = None
    matrix: bool = True
    decoded_values: bool = False
    mean: bool = False
    scores: str = "none"
    sink: bool = False
    blind: bool = True
    columns: tuple[int, ...] | None = None
    groups: int = 1
    turned: bool = False
    seed: int = 0

    def __str__(self) -> str:
        shown = {k: v for k, v in self.__dict__.items() if v != type(self).__dataclass_fields__[k].default}
        return "-".join(f"{k}={v}".replace(" ", "").removeprefix("dtype=torch.") for k, v in shown.items()) or "plain"


def build(case: Case) -> Given:
    """The arguments of ``attend`` for a case, on the CPU: the same numbers wherever they then go."""
    torch.manual_seed(case.seed)
    key, keys = _operand(case, case.keys, case.rotary, case.norm, not (case.rotary or case.norm))
    value, values = _operand(case, case.values, None, "rms" if case.decoded_values else None, not case.decoded_values)
    graph, extras, masks = program(case.scores, case.dim)
    about = Attend(key, value, graph, extras, case.sink, case.blind, masks)
    query = torch.randn(case.batch, case.heads, case.queries, case.dim).to(case.dtype)
    given: list[torch.Tensor] = []
    if case.scores != "none":
        seen = torch.rand(case.batch, 1, case.queries, case.tokens) < 0.8
        seen[0, ..., : case.tokens // 3] = False  # left padding
        seen[..., -1] = True
        bias = torch.randn(case.batch, 1, case.queries, case.tokens).masked_fill(~seen, torch.finfo(F32).min)
        if case.scores == "hidden":
            seen[1] = False
        per_head = torch.randn(1, case.heads, 1, 1 if case.scores == "head" else case.tokens)
        biases = {"bool": seen, "hidden": seen, "alibi": per_head, "head": per_head}
        free = seen & (torch.arange(case.tokens) < 90)
        biases |= {"free": free, "free bias": torch.where(free, bias, -torch.inf)}
        given.append(biases.get(case.scores, bias))
    if case.sink:
        given.append(torch.randn(1, case.heads, 1, 1))
    return about, query, keys, values, tuple(given)


def moved(given: Given, device: torch.device) -> Given:
    """The same arguments on ``device``."""
    about, query, keys, values, extras = given

    def there(stored: Stored) -> Stored:
        side = None if stored.side is None else stored.side.to(device)
        return Stored(stored.rows.to(device), side, tuple(t.to(device) for t in stored.codec))

    return about, query.to(device), there(keys), there(values), tuple(e.to(device) for e in extras)


def _operand(
    case: Case, segments: tuple[tuple[int, int], ...], rotary: str | None, norm: str | None, absorbed: bool
) -> tuple[Operand, Stored]:
    n = case.cached * case.dim
    form = Format(tuple(Segment(*s) for s in segments), case.means, case.dtype)
    decoder, consts = decoder_of(rotary, norm, case.cached, case.dim, case.dtype)
    k = form.columns + case.means - 1
    assert case.matrix or form.columns == n
    latents = torch.randn(case.tokens, case.batch, k)
    if case.means > 1:
        latents[..., form.columns :] = 0
        which = torch.randint(0, case.means, (case.tokens, case.batch))
        for j in range(1, case.means):
            latents[..., form.columns + j - 1] = (which == j).float() * 2 - 1
    if form.plain:
        rows = latents.to(case.dtype)
    else:
        offsets = torch.zeros(case.means, form.columns) if case.means > 1 else None
        rows = pack(latents, offsets, None, form.spec, case.means, case.dtype)
    codec: list[torch.Tensor] = []
    if case.matrix:
        each = form.columns // case.groups
        decode = torch.randn(each + case.means - 1, n) / math.sqrt(each)
        codec.append(decode.to(case.dtype))
    if case.mean:
        codec.append(torch.randn(n).to(case.dtype))
    operand = Operand(
        form, k, decoder, case.cached, case.dim, case.columns, absorbed, decodes=case.matrix, has_mean=case.mean,
        groups=case.groups,
    )  # fmt: skip
    positions = (torch.arange(case.tokens)[:, None] + torch.tensor([3, 0] * case.batch)[None, : case.batch]).int()
    side = None if absorbed or decoder.side is None else positions
    if side is not None and decoder.side is not None and decoder.side.features:
        side = torch.randn(case.tokens, case.batch, *decoder.side.features) * 9
    given = (*codec, *(() if absorbed else consts))
    found = turns.find(decoder, consts, case.cached, case.dim) if case.turned and not absorbed else None
    if found is not None:
        return replace(operand, turn=found.turn), Stored(
            rows, side, (*given, *_turning(found, decoder, positions, consts))
        )
    return operand, Stored(rows, side, given)


def _turning(
    found: turns.Found, decoder: Decoder, positions: torch.Tensor, consts: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """A turn's own tensors: what a graph would make of the positions [T, B]."""
    (tokens, batch), turn, norm = positions.shape, found.turn, found.norm
    y = probe(turn, decoder).expand(batch, tokens, -1)
    weight = []
    if norm is not None:
        made = norm.before(torch.ones(1, 1, decoder.width, dtype=decoder.dtype), positions[:1, :1], *consts)
        z = made.movedim((norm.batch, norm.token), (0, 1)).flatten() * (1 + norm.eps) ** 0.5
        place = {column: i for i, column in enumerate(norm.columns)}
        weight = [z.float()[[place[s] for s in turn.sources[: len(turn.dims)]]]]
        y = y[..., list(norm.columns)].reshape(batch, tokens, *norm.sizes).movedim((0, 1), (norm.batch, norm.token))
    made = (decoder.module if norm is None else norm.after)(y, positions.T, *consts)
    rows = made.movedim((decoder.batch_dim, decoder.token_dim), (0, 1)).flatten(2).permute(2, 0, 1)
    return [*weight, rows[results(turn)].contiguous()]
