"""Attention written in ways of its own: each step is what the model without a compiler makes, whatever was coded and
however it is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorc_fx
from helpers import assert_close, options
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("quiet")

WIDTH, RANK, TOKENS = 32, 8, (6, 2, 1, 3)


class Plain(nn.Module):
    """Causal attention over a cache that is handed on; keys and values are of rank ``RANK``."""

    heads = cached = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dim = WIDTH // self.heads
        n = self.cached * self.dim
        self.q, self.o = nn.Linear(WIDTH, self.heads * self.dim), nn.Linear(self.heads * self.dim, WIDTH)
        self.k, self.v, self.other = nn.Linear(WIDTH, n), nn.Linear(WIDTH, n), nn.Linear(WIDTH, n)
        inner = torch.randn(RANK, WIDTH) / WIDTH**0.5  # the two projections of keys read the same few directions
        for linear in (self.k, self.v, self.other):
            linear.weight.data = torch.randn(n, RANK) @ inner / RANK**0.5

    def keys(self, x):
        return self.k(x)

    def seen(self, queries, tokens):
        return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)

    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(q.shape[2], k.shape[2]))

    def split(self, y, heads):
        return y.view(*y.shape[:2], heads, self.dim).transpose(1, 2)

    def queries(self, x):
        return self.split(self.q(x), self.heads)

    def forward(self, x, past=None):
        k, v = self.split(self.keys(x), self.cached), self.split(self.v(x), self.cached)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        made = self.attention(self.queries(x), k, v)
        return self.o(made.transpose(1, 2).flatten(2)), (k, v)


class LargestOfHeads(Plain):
    """What is taken off before the softmax is not the same for all tokens of a head."""

    def attention(self, q, k, v):
        scores = 2 * q @ k.transpose(2, 3)
        return (scores - scores.amax(1, keepdim=True)).softmax(-1) @ v


class LargestOfTokens(Plain):
    """Here it is, and changes nothing."""

    def attention(self, q, k, v):
        scores = 2 * q @ k.transpose(2, 3)
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


class MeanOfHeads(Plain):
    """Three cached heads that are read as one: their mean is not the middle one."""

    heads = cached = 3

    def attention(self, q, k, v):
        k, v = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
        scores = q @ k.transpose(2, 3) / self.dim**0.5
        return scores.masked_fill(~self.seen(q.shape[2], k.shape[2]), -1e9).softmax(-1) @ v


class Uninitialised(Plain):
    """``baddbmm`` with beta = 0 ignores what it would add, NaN too."""

    def attention(self, q, k, v):
        batch, heads, queries, dim = q.shape
        tokens = k.shape[2]
        nothing = torch.full((batch * heads, queries, tokens), float("nan"))
        left, right = q.reshape(-1, queries, dim), k.reshape(-1, tokens, dim).transpose(1, 2)
        scores = torch.baddbmm(nothing, left, right, beta=0, alpha=dim**-0.5).view(batch, heads, queries, tokens)
        return scores.masked_fill(~self.seen(queries, tokens), -1e9).softmax(-1) @ v


class NarrowFromTheEnd(Plain):
    def attention(self, q, k, v):
        return super().attention(q, k.narrow(-1, -self.dim, self.dim), v.narrow(-1, -self.dim, self.dim))


class TwoViews(Plain):
    """Keys of two projections, each of a view of its own."""

    def keys(self, x):
        half = self.cached * self.dim // 2
        first, second = (f(x.reshape(-1, WIDTH)).view(*x.shape[:2], -1) for f in (self.k, self.other))
        return torch.cat([first[..., :half], second[..., :half]], -1)


class LearnedQueries(Plain):
    """The same few queries for all rows of a batch."""

    def __init__(self):
        super().__init__()
        self.asked = nn.Parameter(torch.randn(1, self.heads, 5, self.dim))

    def queries(self, x):
        return self.asked

    def attention(self, q, k, v):
        return (q @ k.transpose(2, 3) / self.dim**0.5).softmax(-1) @ v


KINDS = (
    Plain, LargestOfHeads, LargestOfTokens, MeanOfHeads, Uninitialised, NarrowFromTheEnd, TwoViews, LearnedQueries,
)  # fmt: skip
#: options -> how near the result must be
WAYS = {
    "all columns": ({**lorc_fx.PAPER, "ratio": 1.0}, 1e-5),
    "as many as there are": ({**lorc_fx.PAPER, "ratio": 0.6}, 1e-4),
    "8 bits": ({"precision": "int8", "calibration": "none", "ratio": 0.45, "basis": "joint"}, 3e-2),
    "8 bits as they are": ({"basis": "identity", "precision": "int8", "ratio": 0.45}, 3e-2),
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_step_is_what_eager_makes(kind, way):
    given, near = WAYS[way]
    model = kind().eval().requires_grad_(False)
    call = torch.compile(model, backend="lorc", options=options(**given))
    torch.manual_seed(1)
    want = got = None
    for tokens in TOKENS:
        x = torch.randn(2, tokens, WIDTH)
        out, want = model(x, want)
        made, got = call(x, got)
        assert_close(f"{tokens} tokens", made, out, near)
    assert all(isinstance(value, LatentKV) for value in got), "it became dense"
