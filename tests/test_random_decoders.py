"""Random small decoders: at full rank the compiled model is the eager one, and so it is on exactly low-rank weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import assert_close, options
from lorc_fx.latent import LatentKV
from lorc_fx.packing import MODEL, Segment
from lorc_fx.records import Plan, PlannedSite

VOCAB, LOW = 40, 3

few = settings(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder: ``rope`` is the fraction of the head dim that is rotated, ``norm`` acts on keys before it."""

    kv: int
    group: int
    dim: int
    width: int
    layers: int
    bias: bool
    norm: str
    rope: float
    interleaved: bool
    fused: bool
    batch: int
    prompt: int
    seed: int


shapes = st.builds(
    Shape,
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([24, 36]),
    layers=st.integers(1, 2),
    bias=st.booleans(),
    norm=st.sampled_from(["none", "rms", "layer"]),
    rope=st.sampled_from([0.0, 0.5, 1.0]),
    interleaved=st.booleans(),
    fused=st.booleans(),
    batch=st.integers(1, 3),
    prompt=st.integers(1, 6),
    seed=st.integers(0, 99),
)


class Rms(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x, pos, part, interleaved):
    """The first ``part`` features of [B, H, S, D] rotated by position, as pairs (i, i + part/2) or (2i, 2i + 1)."""
    if not part:
        return x
    angle = pos[:, None].float() * 50.0 ** -(torch.arange(0, part, 2) / part)
    cos, sin = angle.cos(), angle.sin()
    turn, rest = x[..., :part], x[..., part:]
    a, b = (turn[..., ::2], turn[..., 1::2]) if interleaved else turn.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turn = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turn, rest], -1)


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s, heads = s, s.kv * s.group
        self.sizes = [heads * s.dim, s.kv * s.dim, s.kv * s.dim]
        if s.fused:
            self.qkv = nn.Linear(s.width, sum(self.sizes), s.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(s.width, n, s.bias) for n in self.sizes)
        self.o = nn.Linear(heads * s.dim, s.width)
        self.norm = {"none": nn.Identity, "rms": lambda: Rms(s.dim), "layer": lambda: nn.LayerNorm(s.dim)}[s.norm]()

    def forward(self, x, cached, past):
        s = self.s
        parts = self.qkv(x).split(self.sizes, -1) if s.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(*x.shape[:2], -1, s.dim).transpose(1, 2) for p in parts)
        pos, part = torch.arange(past, past + x.shape[1]), int(s.dim * s.rope) // 2 * 2
        q, k = rotated(q, pos, part, s.interleaved), rotated(self.norm(k), pos, part, s.interleaved)
        if cached is not None:
            k, v = torch.cat([cached[0], k], 2), torch.cat([cached[1], v], 2)
        mask = torch.arange(k.shape[2])[None] <= pos[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2)), (k, v)

    @torch.no_grad()
    def make_low_rank(self, rank):
        whole = [self.qkv.weight[a:b] for a, b in self.cuts()] if self.s.fused else [self.k.weight, self.v.weight]
        for weight in whole:
            u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :rank] * sigma[:rank] @ v[:rank])

    def cuts(self):
        first, second, third = self.sizes
        return (first, first + second), (first + second, first + second + third)


class Decoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))

    def forward(self, ids, cache, past):
        x, kept = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            y, pair = layer(x, None if cache is None else cache[i], past)
            x, kept = x + y, [*kept, pair]
        return x @ self.embed.weight.T, kept


def decoder(s):
    torch._dynamo.reset()
    torch.manual_seed(s.seed)
    return Decoder(s).eval().requires_grad_(False)


def run(call, s):
    ids = torch.randint(0, VOCAB, (s.batch, s.prompt + 3), generator=torch.Generator().manual_seed(s.seed))
    logits, cache, at = [], None, 0
    for end in (s.prompt, s.prompt + 1, s.prompt + 2, s.prompt + 3):
        out, cache = call(ids[:, at:end], cache, at)
        logits, at = [*logits, out], end
    return torch.cat(logits, 1), cache


def check(model, s, **given):
    want, dense = run(model, s)
    got, cache = run(torch.compile(model, backend="lorc", options=options(**given)), s)
    assert_close(f"logits of {s}", got, want, 1e-5)
    for pair, plain in zip(cache, dense, strict=True):
        for kind, value, truth in zip(("keys", "values"), pair, plain, strict=True):
            assert isinstance(value, LatentKV), f"{kind} of {s} stayed dense"
            assert_close(f"{kind} of {s}", value.dense(), truth, 1e-5)
    return cache


@few
@given(s=shapes)
def test_full_rank_is_the_eager_model(s):
    check(decoder(s), s, ratio=1.0)


@few
@given(s=shapes)
def test_low_rank_weights_are_lossless_at_their_rank(s):
    model, n = decoder(s), s.kv * s.dim
    for layer in model.layers:
        layer.make_low_rank(LOW)
    fixed = 4 if s.rope and int(s.dim * s.rope) // 2 * 2 else 0
    sites = [
        PlannedSite(i, kind, n, (Segment(LOW, MODEL),), 1, 4 * LOW + (fixed if kind == "key" else 0), 4 * n, None, 1.0)
        for i in range(s.layers)
        for kind in ("key", "value")
    ]
    cache = check(model, s, plan=Plan(tuple(sites)))
    assert {t.codec.rank for pair in cache for t in pair} == {LOW}
    row = sum(site.bytes for site in sites)
    tokens = s.prompt + 3
    assert sum(t.used_nbytes() for pair in cache for t in pair) == row * tokens * s.batch


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("rope", [0.0, 0.5, 1.0])
def test_a_budget_is_kept(norm, rope):
    s = Shape(2, 2, 8, 24, 1, True, norm, rope, False, False, 2, 5, 0)
    torch._dynamo.reset()
    call = torch.compile(decoder(s), backend="lorc", options=options(ratio=0.5))
    logits, cache = run(call, s)
    assert bool(torch.isfinite(logits).all())
    used, dense = (sum(f(t) for pair in cache for t in pair) for f in (LatentKV.used_nbytes, lambda t: t.numel() * 4))
    assert used <= 0.5 * dense
