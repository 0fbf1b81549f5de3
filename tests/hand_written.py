"""A decoder as people write them, in many forms, and what its compiled self must be."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from helpers import Recorder, assert_close, options
from lorc_fx.errors import LorcWarning

VOCAB, WIDTH, HEADS, KV, DIM, ROOM = 50, 32, 4, 2, 8, 32
N = KV * DIM


def turns(pos, base=100.0):
    angle = pos[:, None].float() * (1.0 / base ** (torch.arange(0, DIM, 2) / DIM))
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin, spin="halves"):
    """[..., S, D] with cos and sin [S, D]; ``spin``: how it is written."""
    if spin == "chunks":
        (a, b), (cos, sin) = x.chunk(2, -1), (t[:, : DIM // 2] for t in (cos, sin))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    if spin == "complex":
        turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, : DIM // 2]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    return x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin


class Lora(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(d, n), nn.Linear(d, 3, bias=False), nn.Linear(3, n, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Attention(nn.Module):
    """One layer. ``layout`` of the cache; ``rope``: "before" or "after" the cache, or None; ``fused``: None, "rows"
    (q, k, v one behind the other) or "heads" (interleaved per kv head); ``lora``: a low-rank update on K and V;
    ``form`` of the write; ``kept``: the buffers are the module's own, allocated before the first call; ``angles``: how
    they are had; ``read``: SDPA, or products written as "matmul" or "einsum"."""

    def __init__(
        self, layout="BHTD", rope="before", fused=None, lora=False, form="cat", twist=None, spin="halves",
        kept=False, angles=None, read="sdpa",
    ):  # fmt: skip
        super().__init__()
        self.layout, self.rope, self.fused, self.form = layout, rope, fused, form
        self.twist, self.spin = twist, spin
        self.kept, self.angles, self.read = kept, angles, read
        self.table = {"cpu": turns(torch.arange(ROOM))}  # no buffer: a plain attribute
        if kept:
            for name in ("keys", "values"):
                self.register_buffer(name, self.room(self.to_cache(torch.zeros(3, KV, 1, DIM))), persistent=False)
        make = Lora if lora else nn.Linear
        self.q, self.o = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.k, self.v = make(WIDTH, N), make(WIDTH, N)
        self.qkv = nn.Linear(WIDTH, HEADS * DIM + 2 * N)
        self.kk = nn.Linear(WIDTH, 2 * N)
        self.g, self.conv = nn.Linear(WIDTH, N), nn.Conv1d(WIDTH, WIDTH, 2)

    def project(self, x):
        if self.fused == "rows":
            y = self.qkv(x)
            if self.twist == "norm":
                y = F.layer_norm(y.unflatten(-1, (-1, DIM)), (DIM,)).flatten(-2)
            return (y.clamp(-0.5, 0.5) if self.twist == "clamp" else y).split([HEADS * DIM, N, N], -1)
        if self.fused == "heads":
            y = self.qkv(x)
            grouped = (y.clamp_(-0.5, 0.5) if self.twist == "clamp" else y).unflatten(-1, (KV, HEADS // KV + 2, DIM))
            parts = (grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :])
            return [part.flatten(-2) for part in parts]
        source = x
        if self.twist == "shift":
            source = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        if self.twist == "conv":
            source = self.conv(F.pad(x.mT, (1, 0))).mT
        k, v = self.k(source), self.v(source)
        if self.twist == "gate":
            k, v = k * torch.sigmoid(self.g(x)), v * torch.sigmoid(self.g(x))
        if self.twist == "glu":
            k, v = (a * torch.sigmoid(b) for a, b in (self.kk(x).chunk(2, -1), self.kk(x + 1).chunk(2, -1)))
        if self.twist == "late shift":
            k, v = k + F.pad(k, (0, 0, 1, 0))[:, :-1], v + F.pad(v, (0, 0, 1, 0))[:, :-1]
        if self.twist == "unknown":
            k, v = k + k.cumsum(1), v + v.cumsum(1)
        return self.q(x), k, v

    def to_cache(self, x):
        """[B, H, S, D] -> the cache's layout, and back."""
        return {"BHTD": lambda: x, "BTHD": lambda: x.transpose(1, 2), "BTn": lambda: x.transpose(1, 2).flatten(2),
                "TBn": lambda: x.permute(2, 0, 1, 3).flatten(2), "BHDT": lambda: x.mT}[self.layout]()  # fmt: skip

    def from_cache(self, x):
        if self.layout == "BHDT":
            return x.transpose(2, 3)
        if self.layout in ("BHTD", "BTHD"):
            return x if self.layout == "BHTD" else x.transpose(1, 2)
        heads = x.unflatten(2, (KV, DIM)) if self.twist == "unflatten" else x.view(*x.shape[:2], KV, DIM)
        return heads.transpose(1, 2) if self.layout == "BTn" else heads.permute(1, 2, 0, 3)

    @property
    def axis(self):
        return {"BHTD": 2, "BTHD": 1, "BTn": 1, "TBn": 0, "BHDT": 3}[self.layout]

    def room(self, new):
        """An empty buffer for rows like ``new``, in the cache's layout."""
        size = list(new.shape)
        size[self.axis] = ROOM
        return new.new_zeros(size)

    def angle(self, pos):
        if self.angles is None:
            return turns(pos)
        if self.angles == "table":  # looked up, and cut to as many as there are
            return [table[pos].narrow(0, 0, pos.shape[0]) for table in self.table["cpu"]]
        found = [torch.index_select(table, 0, pos).unsqueeze(0) for table in self.table["cpu"]]
        return [f.view(*f.shape[:1], 1, *f.shape[1:]) for f in found]  # "lone": an axis for heads

    def store(self, cached, new, past):
        if cached is None and self.form == "cat":
            return new
        if self.form == "cat":
            return torch.cat([cached, new], self.axis)
        if cached is None:
            cached = self.room(new)
        end = past + new.shape[self.axis]
        if self.form == "slice":
            cached[(slice(None),) * self.axis + (slice(past, end),)] = new
        elif self.form == "put":
            cached[(slice(None),) * self.axis + (torch.arange(past, end),)] = new
        elif self.form == "rows":  # each batch row by itself
            for buffer, rows in zip(cached, new, strict=True):
                buffer.index_copy_(self.axis - 1, torch.arange(past, end), rows)
        elif self.form == "copy":
            cached[(slice(None),) * self.axis + (slice(past, end),)].copy_(new)
        elif self.form == "narrow":
            cached.narrow(self.axis, past, end - past).copy_(new)
        else:
            cached.index_copy_(self.axis, torch.arange(past, end), new)
        return cached

    def attend(self, q, k, v, mask):
        if self.read == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.read == "einsum" else q @ k.mT
        weights = (scores / DIM**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.read == "einsum" else weights @ v

    def forward(self, x, cached, past, turn=None):
        b, s, _ = x.shape
        q, k, v = (p.unflatten(-1, (-1, DIM)).transpose(1, 2) for p in self.project(x))
        pos = torch.arange(past, past + s)
        turn = self.angle(pos) if turn is None else tuple(t[-s:] for t in turn)
        if self.rope:
            q = rotate(q, *turn, self.spin)
        if self.rope == "before":
            k = rotate(k, *turn, self.spin)
        old = (self.keys, self.values) if self.kept else cached or (None, None)
        keys, values = (self.store(c, self.to_cache(n), past) for c, n in zip(old, (k, v), strict=True))
        k, v = self.from_cache(keys), self.from_cache(values)
        at = torch.arange(k.shape[2])
        if self.rope == "after":
            k = rotate(k, *turns(at), self.spin)
        out = self.attend(q, k, v, at[None] <= pos[:, None]).transpose(1, 2)
        out = (
            out.view(b, s, -1)
            if self.twist == "view"
            else out.as_strided((b, s, out.shape[2] * DIM), (s * out.shape[2] * DIM, out.shape[2] * DIM, 1))
            if self.twist == "strides"
            else out.flatten(2)
        )
        return self.o(out), (keys, values)


class Decoder(nn.Module):
    """``nest``: how the cache is kept: a list, a tuple or a dict of (key, value); ``once``: all layers have the same
    angles, else each makes its own where none come in."""

    def __init__(self, nest="list", layers=1, once=False, **kind):
        super().__init__()
        self.once, self.nest, self.embed = once, nest, nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Attention(**kind) for _ in range(layers))

    def forward(self, ids, cache, past, turn=None):
        x, kept = self.embed(ids), []
        turn = turns(torch.arange(past, past + ids.shape[1])) if self.once and turn is None else turn
        for i, layer in enumerate(self.layers):
            y, pair = layer(x, None if cache is None else cache[i], past, turn)
            x, kept = x + y, [*kept, pair]
        kept = dict(enumerate(kept)) if self.nest == "dict" else tuple(kept) if self.nest == "tuple" else kept
        return x @ self.embed.weight.T, kept


def decoder(**kind):
    torch.manual_seed(0)
    return Decoder(**kind).eval().requires_grad_(False)


def run(call, cache=None, tokens=9, steps=3, turn=False):
    """Logits of a prompt and of ``steps`` more tokens, and the cache at the end. ``turn``: cosines and sines come in:
    those of the new tokens (True), of "all" tokens so far, or with the prompt alone ("first")."""
    ids = torch.randint(0, VOCAB, (3, tokens + steps), generator=torch.Generator().manual_seed(1))
    logits = []
    for begin, end in [(0, tokens), *((t, t + 1) for t in range(tokens, tokens + steps))]:
        given = turn and (turn != "first" or begin == 0)
        extra = (turns(torch.arange(0 if turn == "all" else begin, end)),) if given else ()
        out, cache = call(ids[:, begin:end], cache, begin, *extra)
        logits.append(out)
    return torch.cat(logits, 1), cache


def check(model, ratio=1.0, cache=None, basis="auto", **how):
    """The compiled model is the eager one at full rank; returns (values in the cache, graphs, messages)."""
    again = None if cache is None else [tuple(t.clone() for t in pair) for pair in cache]
    want, _ = run(model, again, **how)
    recorder = Recorder()
    call = torch.compile(model, backend="lorc", options=options(ratio=ratio, inner=recorder, basis=basis))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, cache = run(call, cache, **how)
    if ratio == 1.0:
        assert_close("logits", got, want, 1e-5)
    pairs = cache.values() if isinstance(cache, dict) else cache
    said = [str(w.message) for w in caught if issubclass(w.category, LorcWarning)]
    return [t for pair in pairs for t in pair], recorder, said
