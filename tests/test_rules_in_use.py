"""Every row of the matcher's table, in a decoder that caches what its op makes: coded, and right at full rank and half.

``USES`` has one way from an activation to a cached value for each row. A row that no decoder can reach has no place in
the table: ``test_no_row_is_unused`` fails for it.
"""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close, options
from lorc_fx import backend
from lorc_fx.latent import LatentKV
from lorc_fx.passes.rules import RULES

aten = torch.ops.aten
VOCAB, WIDTH, HEADS, DIM, ROOM, BATCH = 40, 24, 2, 8, 16, 2
N = HEADS * DIM
IDS = torch.randint(0, VOCAB, (BATCH, 11), generator=torch.Generator().manual_seed(5))
LOW = 3
"""Rank of the projections that are cut to half of their columns: these hold all of it."""
CUTS = [0, 7, 9, 11]
"""Steps of two tokens: an axis of one token would be dropped by ``squeeze`` without a dim."""


def heads(y):
    return aten.transpose.int(aten.view.default(y, [*y.shape[:2], HEADS, DIM]), 1, 2)


def four(y):
    return y.reshape(*y.shape[:2], HEADS, DIM)


def flat(y):
    return y.reshape(-1, y.shape[-1])


def joined(pieces):
    return aten.cat.default(list(reversed(pieces)), -1)


def twice(op):
    """Of the values as a matrix: there and back."""
    return lambda p, x, pos: heads(op(op(flat(p(x)))).reshape(*x.shape[:2], N))


def of(fn):
    """A function of the heads [B, H, S, D]."""
    return lambda p, x, pos: fn(heads(p(x)))


def added(fn):
    """A vector per position, added."""
    return lambda p, x, pos: heads(p(x) + fn(p.table, pos))


def turned(fn):
    """Pairs of features as complex numbers, turned by ``fn(angles)``."""

    def use(p, x, pos):
        pairs = aten.view_as_complex.default(heads(p(x)).reshape(*x.shape[:1], HEADS, x.shape[1], DIM // 2, 2))
        angles = pos[:, None].float() * p.table[0, : DIM // 2]
        return aten.view_as_real.default(pairs * fn(angles)).flatten(-2)

    return use


def double(cast):
    return of(lambda h: aten.to.dtype(cast(h) * 2, torch.float32))


#: row -> (projection, activation [B, S, d], positions [S]) -> what is cached, [B, H, S, D]
USES = {
    aten.t.default: twice(aten.t.default),
    aten.numpy_T.default: twice(aten.numpy_T.default),
    aten.transpose.int: of(lambda h: h),
    aten.view.default: of(lambda h: h * 2),
    aten.swapaxes.default: lambda p, x, pos: aten.swapaxes.default(four(p(x)), 1, 2),
    aten.swapdims.default: lambda p, x, pos: aten.swapdims.default(four(p(x)), 1, 2),
    aten.mT.default: of(lambda h: aten.mT.default(aten.mT.default(h) * 2)),
    aten.permute.default: lambda p, x, pos: aten.permute.default(four(p(x)), [0, 2, 1, 3]),
    aten.unsqueeze.default: of(lambda h: aten.unsqueeze.default(h, 2).flatten(1, 2)),
    aten.squeeze.dim: of(lambda h: aten.squeeze.dim(aten.unsqueeze.default(h, 2), 2)),
    aten.squeeze.dims: of(lambda h: aten.squeeze.default(aten.unsqueeze.default(h, 2))),  # normalised to ``dims``
    aten.slice.Tensor: of(lambda h: joined([aten.slice.Tensor(h, 3, 0, 4), aten.slice.Tensor(h, 3, 4, 8)])),
    aten.select.int: of(lambda h: aten.stack.default([aten.select.int(h, 3, DIM - 1 - i) for i in range(DIM)], -1)),
    aten.split.Tensor: of(lambda h: joined(aten.split.Tensor(h, 4, 3))),
    aten.split.sizes: of(lambda h: joined(aten.split.sizes(h, [2, 6], 3))),
    aten.split_with_sizes.default: of(lambda h: joined(aten.split_with_sizes.default(h, [2, 6], 3))),
    aten.chunk.default: of(lambda h: joined(aten.chunk.default(h, 2, 3))),
    aten.unbind.int: of(lambda h: aten.stack.default(list(reversed(aten.unbind.int(h, 3))), 3)),
    operator.getitem: of(lambda h: torch.cat(operator.getitem(torch.split(h, 4, 3), slice(None)), 3) * 2),
    aten.repeat.default: of(lambda h: aten.repeat.default(h[..., :4], [1, 1, 1, 2])),
    aten.repeat_interleave.self_int: of(lambda h: aten.repeat_interleave.self_int(h[..., :4], 2, 3)),
    aten.flip.default: of(lambda h: aten.flip.default(h, [3])),
    aten.roll.default: of(lambda h: aten.roll.default(h, [3], [3])),
    aten.clone.default: of(lambda h: aten.clone.default(h) * 2),
    aten.contiguous.default: of(lambda h: aten.contiguous.default(h) * 2),
    aten.neg.default: of(aten.neg.default),
    aten.sum.dim_IntList: of(lambda h: h + aten.sum.dim_IntList(h, [-1], True)),
    aten.mean.dim: of(lambda h: h - aten.mean.dim(h, [-1], True)),
    aten.cat.default: of(lambda h: aten.cat.default([-h[..., 4:], h[..., :4]], -1)),
    aten.stack.default: of(lambda h: aten.stack.default([-h[..., 1::2], h[..., ::2]], -1).flatten(-2)),
    aten.slice_scatter.default: of(lambda h: aten.slice_scatter.default(h, -h[..., 4:], 3, 0, 4)),
    aten.select_scatter.default: of(lambda h: aten.select_scatter.default(h, 2 * h[..., 3], 3, 0)),
    aten.linear.default: lambda p, x, pos: heads(aten.linear.default(x, p.weight, p.bias)),
    aten.addmm.default: lambda p, x, pos: heads(
        aten.addmm.default(p.bias, flat(x), p.weight.t()).reshape(*x.shape[:2], N)
    ),
    aten.mm.default: lambda p, x, pos: heads(aten.mm.default(flat(x), p.weight.t()).reshape(*x.shape[:2], N)),
    aten.bmm.default: lambda p, x, pos: heads(aten.bmm.default(x, p.weight.t().expand(x.shape[0], -1, -1))),
    aten.matmul.default: lambda p, x, pos: heads(aten.matmul.default(x, p.weight.t()) + p.bias),
    aten.amax.default: of(lambda h: h - aten.amax.default(h, [-1], True)),
    aten.amin.default: of(lambda h: h - aten.amin.default(h, [-1], True)),
    aten.linalg_vector_norm.default: of(lambda h: h / aten.linalg_vector_norm.default(h, 2, [-1], True)),
    aten.norm.ScalarOpt_dim: of(lambda h: h / aten.norm.ScalarOpt_dim(h, 2, [-1], True)),
    aten.var.dim: of(lambda h: h * (aten.var.dim(h, [-1], False, True) + 0.1).rsqrt()),
    aten.var.correction: of(lambda h: h * (aten.var.correction(h, [-1], correction=0, keepdim=True) + 0.1).rsqrt()),
    aten.softmax.int: of(lambda h: aten.softmax.int(h, -1)),
    aten._softmax.default: of(lambda h: aten._softmax.default(h, -1, False)),
    aten.layer_norm.default: of(lambda h: aten.layer_norm.default(h, [DIM])),
    aten.rms_norm.default: of(lambda h: aten.rms_norm.default(h, [DIM])),
    aten.embedding.default: added(lambda table, pos: aten.embedding.default(table, pos)),
    aten.index.Tensor: added(lambda table, pos: aten.index.Tensor(table, [pos])),
    aten.index_select.default: added(lambda table, pos: aten.index_select.default(table, 0, pos)),
    aten.view_as_complex.default: turned(lambda a: torch.polar(torch.ones_like(a), a)),
    aten.view_as_real.default: turned(lambda a: torch.polar(torch.full_like(a, 2.0), a)),
    aten.polar.default: turned(lambda a: aten.polar.default(torch.cos(a), a)),
    aten.complex.default: turned(lambda a: aten.complex.default(a.cos(), a.sin())),
    aten.ones_like.default: of(lambda h: h * 2 + aten.ones_like.default(h)),
    aten.zeros_like.default: of(lambda h: torch.cat([h[..., :4], aten.zeros_like.default(h[..., 4:])], -1)),
    aten.full_like.default: of(lambda h: h + aten.full_like.default(h, 0.5)),
    aten.to.dtype: double(lambda h: aten.to.dtype(h, torch.float64)),
    aten.to.device: double(lambda h: aten.to.device(h, torch.device("cpu"), torch.float64)),
    aten.to.dtype_layout: double(lambda h: aten.to.dtype_layout(h, dtype=torch.float64)),
    aten._to_copy.default: double(lambda h: aten._to_copy.default(h, dtype=torch.float64)),
    aten.reshape.default: lambda p, x, pos: aten.reshape.default(p(x), [*x.shape[:2], HEADS, DIM]).transpose(1, 2),
    aten._unsafe_view.default: lambda p, x, pos: aten._unsafe_view.default(p(x), [*x.shape[:2], HEADS, DIM]).transpose(
        1, 2
    ),
    aten.flatten.using_ints: of(lambda h: aten.flatten.using_ints(h.unflatten(3, (2, 4)), 3, 4)),
    aten.unflatten.int: lambda p, x, pos: aten.unflatten.int(p(x), 2, [HEADS, DIM]).transpose(1, 2),
    aten.expand.default: of(lambda h: aten.expand.default(h[:, :1], [-1, HEADS, -1, -1])),
    aten.broadcast_to.default: of(lambda h: aten.broadcast_to.default(h[:, :1], [h.shape[0], HEADS, h.shape[2], DIM])),
    aten.add.Tensor: of(lambda h: aten.add.Tensor(h, 0.5)),
    aten.sub.Tensor: of(lambda h: aten.sub.Tensor(h, h.flip(-1), alpha=0.5)),
    aten.mul.Tensor: of(lambda h: aten.mul.Tensor(h, torch.arange(1.0, DIM + 1))),
    aten.div.Tensor: of(lambda h: aten.div.Tensor(h, 2.0)),
    aten.mul.Scalar: of(lambda h: aten.mul.Scalar(h, 2.0)),
    aten.div.Scalar: of(lambda h: aten.div.Scalar(h, 2.0)),
    aten.silu.default: of(F.silu),  # no row of its own: pointwise by torch's own tag
}


class Projection(nn.Linear):
    def __init__(self, low):
        super().__init__(WIDTH, N)
        if low:
            self.weight = nn.Parameter(torch.randn(N, LOW) @ torch.randn(LOW, WIDTH) / WIDTH**0.5)
        self.table = nn.Parameter(torch.randn(ROOM, N))


class Decoder(nn.Module):
    """A projection and a cache for each row, all of one activation, so that an error is that row's alone."""

    def __init__(self, rows, low):
        super().__init__()
        self.rows = rows
        self.embed, self.q = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, N)
        self.made = nn.ModuleList(Projection(low) for _ in rows)

    def forward(self, ids, cache, past):
        x = self.embed(ids)
        pos = torch.arange(past, past + ids.shape[1])
        q, kept, out = heads(self.q(x)), [], 0.0
        for i, (op, p) in enumerate(zip(self.rows, self.made, strict=True)):
            new = USES[op](p, x, pos)
            kept.append(new if cache is None else torch.cat([cache[i], new], 2))
            mask = torch.arange(kept[-1].shape[2])[None] <= pos[:, None]
            out = out + F.scaled_dot_product_attention(q, kept[-1], kept[-1], attn_mask=mask)
        return out, kept


def built(rows, ratio):
    torch.manual_seed(0)
    return Decoder(rows, ratio < 1).eval().requires_grad_(False)


def run(call):
    cache, outs = None, []
    for start, stop in zip(CUTS[:-1], CUTS[1:], strict=True):
        out, cache = call(IDS[:, start:stop], cache, start)
        outs.append(out)
    return torch.cat(outs, 2), cache


def used(matched):
    """Ops between an activation and a cached value, in what is coded."""
    regions = [r for site in matched.sites for r in (site.rows.chain, site.rows.epilogue)]
    return {node.target for region in regions for node, _ in region.nodes}


PARTS = [list(USES)[i::3] for i in range(3)]


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("rows", PARTS, ids=range(3))
def test_rows_in_use(clean, monkeypatch, rows, ratio):
    seen = []
    match = backend.match
    monkeypatch.setattr(backend, "match", lambda gm: seen.append(match(gm)) or seen[-1])
    given = options(scheduler="uniform", precision="model", ratio=ratio)
    out, cache = run(torch.compile(built(rows, ratio), backend="lorc", options=given))
    dense = [str(op) for op, value in zip(rows, cache, strict=True) if not isinstance(value, LatentKV)]
    assert not dense, dense
    assert set(rows) <= used(seen[0]), f"coded without: {set(rows) - used(seen[0])}"
    assert ratio == 1 or all(2 * v.codec.rank <= v.codec.decoder.width for v in cache)
    want, kept = run(built(rows, ratio))
    for op, got, exact in zip(rows, cache, kept, strict=True):
        assert_close(str(op), got.dense(), exact, 1e-4)
    assert_close("attention", out, want, 1e-4)


def test_no_row_is_unused():
    assert set(RULES) - set(USES) == set(), "rows that no decoder here caches anything by"
