"""Eager attention in many spellings: where it becomes one op over rows, and that it is right either way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers import Recorder, assert_close, options
from lorc_fx.kernels import tile_readers, tiled
from lorc_fx.passes import attention

WIDTH, HEADS, KV, DIM = 24, 4, 2, 6


class Layer(nn.Module):
    """One layer of attention without positions; ``spelling``: what lies between its two products."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, KV * DIM), nn.Linear(WIDTH, KV * DIM)
        self.sink = nn.Parameter(torch.randn(HEADS))
        self.slope = nn.Parameter(torch.rand(HEADS, 1, 1), requires_grad=False)
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x, mask, past=None):
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        kept = (k, v)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        if self.spelling == "scaled query":
            q = q * 0.3
        scores = q @ k.transpose(2, 3)
        out = self.weighted(scores, mask, k.shape[2], v)
        return self.o(out.transpose(1, 2).flatten(2)), kept

    def weighted(self, scores, mask, tokens, v):
        flags, added = mask, torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        s = self.spelling
        if s == "added":
            scores = scores / math.sqrt(DIM) + added
        elif s == "filled":
            scores = scores.mul(0.4).masked_fill(~flags, -torch.inf)
        elif s == "filled in place":
            scores = scores * 0.4
            scores.masked_fill_(~flags, -torch.inf)
        elif s == "product filled in place":
            scores.masked_fill_(~flags, -1e9)
        elif s == "capped":
            scores = 5 * torch.tanh(scores / 5) + added
        elif s == "slopes":
            scores = scores + self.slope * torch.arange(tokens) + added
        elif s == "last slopes of a table":
            scores = scores + self.slope * torch.arange(64)[torch.sym_max(0, 64 - tokens) :] + added
        elif s == "where":
            scores = torch.where(flags, scores * 0.4, torch.tensor(-1e9))
        elif s == "by length":
            scores = scores / math.sqrt(tokens) + added
        elif s == "twice":
            scores = scores + torch.sigmoid(scores) + added
        elif s == "shifted":
            scores = scores + added
            scores = scores - scores.amax(-1, keepdim=True)
        elif s == "sorted":
            scores = scores + added
            scores = scores + 0 * scores.sort(-1).values
        elif s == "two products":
            scores = scores + scores @ torch.eye(tokens) + added
        elif s == "sink":
            scores = torch.cat([scores + added, self.sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
            return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v
        elif s == "mask changed after":
            scores = scores + added
            added.zero_()
        else:
            scores = scores + added
        weights = scores.float().softmax(-1).to(v.dtype)
        if s == "weights kept":
            self.seen = weights
        if s == "weights changed":
            weights = weights * weights
        if s == "weights changed in place":
            weights.mul_(0.5)
        return weights @ v


#: spelling -> whether attention becomes one op
SPELLINGS = {
    "plain": True, "scaled query": True, "added": True, "filled": True, "capped": True, "slopes": True,
    "last slopes of a table": True, "where": True,
    "twice": True, "shifted": True, "sink": True, "filled in place": False, "product filled in place": False,
    "by length": False, "sorted": False, "two products": False, "mask changed after": False, "weights changed": False,
    "weights changed in place": False, "weights kept": False,
}  # fmt: skip


def steps(layer, x, mask):
    """A prompt of 6 tokens, then one at a time; each query reads what ``mask`` [B, T] lets it and what came before."""
    past, found = None, []
    for start, stop in [(0, 6), (6, 7), (7, 8), (8, 9)]:
        causal = torch.ones(stop, stop, dtype=torch.bool).tril()[start:]
        seen = causal & mask[:, None, None, :stop] | torch.eye(stop, dtype=torch.bool)[start:]
        out, past = layer(x[:, start:stop], seen, past)
        found.append(out)
    return torch.cat(found, 1)


@pytest.mark.parametrize("rank", [6, 12])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, rank, clean, many_shapes, monkeypatch):
    """At full rank nothing is lost, and of weights of rank 6 at half the columns neither; with several tiles a step."""
    for module, name, size in (
        (tiled, "TILE_LEAST", 4),
        (tile_readers, "TILE_NUMBERS", 1),
        (tile_readers, "TILE_SCORES", 1),
    ):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(attention, "PLAIN", True)
    torch.manual_seed(3)
    layer = Layer(spelling).eval()
    with torch.no_grad():
        for f in (layer.k, layer.v):
            u, s, v = torch.linalg.svd(f.weight)
            f.weight.copy_(u[:, :rank] * s[:rank] @ v[:rank])
        x, mask = torch.randn(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool)
        mask[1, :3] = False
        want, watched = steps(layer, x, mask), Recorder()
        torch.compiler.reset()
        compiled = torch.compile(
            layer, backend="lorc", options=options(ratio=rank / 12, inner=watched, scheduler="uniform")
        )
        got = steps(compiled, x, mask)
    assert_close("out", got, want, 1e-5)
    ops = [str(node.target) for node in watched.graphs[-1].graph.nodes]
    assert any("lorc.attend" in op for op in ops) == SPELLINGS[spelling], "in steps of any length"
    assert any("copy_" in op for op in ops), "the cache is coded in any case"
