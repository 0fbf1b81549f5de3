"""Attention without a mask, over buffers that are not full; and over two caches at once."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close, options
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV

VOCAB, WIDTH, HEADS, DIM, ROOM = 40, 24, 2, 8, 12
N = HEADS * DIM


class Layer(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(a, b) for a, b in ((WIDTH, N), (WIDTH, N), (WIDTH, N), (N, WIDTH)))
        for linear in (self.k, self.v):
            linear.weight.copy_(torch.randn(N, rank) @ torch.randn(rank, WIDTH) / rank**0.5 / WIDTH**0.5)
            linear.bias.copy_(torch.randn(N))

    @staticmethod
    def heads(y):
        return y.unflatten(2, (HEADS, DIM)).transpose(1, 2)

    def forward(self, x, keys, values, mask=None):
        out = F.scaled_dot_product_attention(self.heads(self.q(x)), keys, values, attn_mask=mask)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Unmasked(nn.Module):
    """Reads all of its buffers, zeros behind the last token too, as some do that were not made for static caches."""

    def __init__(self, rank=N, bias=None):
        super().__init__()
        self.embed, self.one, self.head = nn.Embedding(VOCAB, WIDTH), Layer(rank), nn.Linear(WIDTH, VOCAB)
        self.bias = bias

    def forward(self, ids, cache, past):
        x = self.embed(ids)
        new = [self.one.heads(p(x)) for p in (self.one.k, self.one.v)]
        if cache is None:
            cache = tuple(t.new_zeros(t.shape[0], HEADS, ROOM, DIM) for t in new)
        for buffer, rows in zip(cache, new, strict=True):
            buffer.index_copy_(2, torch.arange(past, past + rows.shape[2]), rows)
        mask = None
        if self.bias is not None:  # further back counts less: no token is kept out
            mask = self.bias * torch.arange(ROOM, dtype=torch.float32).expand(1, 1, ids.shape[1], ROOM)
        return self.head(self.one(x, *cache, mask)), cache


class Both(nn.Module):
    """A decoder whose attention reads its own tokens (the last ``window``) and an encoder's at once, by the same
    projections."""

    def __init__(self, rank=N, window=None):
        super().__init__()
        self.window = window
        self.embed, self.one, self.head = nn.Embedding(VOCAB, WIDTH), Layer(rank), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids, cache, past, encoded=None):
        x = self.embed(ids)
        new = [self.one.heads(p(x)) for p in (self.one.k, self.one.v)]
        if cache is None:
            cross = tuple(self.one.heads(p(encoded)) for p in (self.one.k, self.one.v))
            cross, own = (tuple(torch.cat([torch.tensor([]), t], 2) for t in pair) for pair in (cross, new))
        else:
            own, cross = cache
            own = tuple(torch.cat([a, b], 2) for a, b in zip(own, new, strict=True))
        keys, values = (torch.cat([a, b], 2) for a, b in zip(own, cross, strict=True))
        own = tuple(t[:, :, -self.window :] if self.window else t for t in own)
        return self.head(self.one(x, keys, values)), (own, cross)


def run(call, *more):
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    logits, cache = [], None
    for begin, end in ((0, 5), *((t, t + 1) for t in range(5, 9))):
        out, cache = call(ids[:, begin:end], cache, begin, *more)
        logits.append(out)
    return torch.cat(logits, 1), cache


def both(model, ratio, *more):
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        want, _ = run(model, *more)
        got, cache = run(torch.compile(model, backend="lorc", options=options(ratio=ratio)), *more)
    assert_close("logits", got, want, 1e-5)
    return cache, [str(w.message) for w in caught if issubclass(w.category, LorcWarning)]


@pytest.mark.parametrize(("rank", "ratio"), [(N, 1.0), (4, 0.5)])
@pytest.mark.parametrize("bias", [None, 0.1])
def test_rows_that_hold_no_token_are_zeros_where_nothing_masks_them(bias, rank, ratio):
    with torch.no_grad():
        torch.manual_seed(0)
        model = Unmasked(rank, bias).eval().requires_grad_(False)
    cache, _ = both(model, ratio)
    assert all(isinstance(t, LatentKV) and t.tail is None for t in cache)


@pytest.mark.parametrize(("rank", "ratio"), [(N, 1.0), (4, 0.5)])
@pytest.mark.parametrize("window", [None, 3])
def test_two_caches_that_are_read_at_once(window, rank, ratio):
    with torch.no_grad():
        torch.manual_seed(0)
        model = Both(rank, window).eval().requires_grad_(False)
    (own, cross), said = both(model, ratio, torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(4)))
    assert all(isinstance(t, LatentKV) for t in (*own, *cross)) and not said
