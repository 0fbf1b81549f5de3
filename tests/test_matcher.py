"""Decoders as people write them, and the graphs before and after: what is coded, what is left alone and why."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Recorder, assert_close, options
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV
from lorc_fx.passes import sites

VOCAB, WIDTH, HEADS, KV, DIM, ROOM = 50, 32, 4, 2, 8, 32
N = KV * DIM

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore::lorc_fx.errors.EagerWarning")]


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
    (q, k, v one behind the other) or "heads" (interleaved per kv head); ``lora``: a low-rank update on K and V."""

    def __init__(self, layout="BHTD", rope="before", fused=None, lora=False, form="cat", twist=None, spin="halves"):
        super().__init__()
        self.layout, self.rope, self.fused, self.form = layout, rope, fused, form
        self.twist, self.spin = twist, spin
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
                "TBn": lambda: x.permute(2, 0, 1, 3).flatten(2)}[self.layout]()  # fmt: skip

    def from_cache(self, x):
        if self.layout in ("BHTD", "BTHD"):
            return x if self.layout == "BHTD" else x.transpose(1, 2)
        heads = x.unflatten(2, (KV, DIM)) if self.twist == "unflatten" else x.view(*x.shape[:2], KV, DIM)
        return heads.transpose(1, 2) if self.layout == "BTn" else heads.permute(1, 2, 0, 3)

    @property
    def axis(self):
        return {"BHTD": 2, "BTHD": 1, "BTn": 1, "TBn": 0}[self.layout]

    def store(self, cached, new, past):
        if cached is None and self.form == "cat":
            return new
        if self.form == "cat":
            return torch.cat([cached, new], self.axis)
        if cached is None:
            size = list(new.shape)
            size[self.axis] = ROOM
            cached = new.new_zeros(size)
        end = past + new.shape[self.axis]
        if self.form == "slice":
            cached[(slice(None),) * self.axis + (slice(past, end),)] = new
        elif self.form == "narrow":
            cached.narrow(self.axis, past, end - past).copy_(new)
        else:
            cached.index_copy_(self.axis, torch.arange(past, end), new)
        return cached

    def forward(self, x, cached, past, turn=None):
        b, s, _ = x.shape
        q, k, v = (p.unflatten(-1, (-1, DIM)).transpose(1, 2) for p in self.project(x))
        pos = torch.arange(past, past + s)
        turn = turns(pos) if turn is None else turn
        if self.rope:
            q = rotate(q, *turn, self.spin)
        if self.rope == "before":
            k = rotate(k, *turn, self.spin)
        old = cached or (None, None)
        keys, values = (self.store(c, self.to_cache(n), past) for c, n in zip(old, (k, v), strict=True))
        k, v = self.from_cache(keys), self.from_cache(values)
        at = torch.arange(k.shape[2])
        if self.rope == "after":
            k = rotate(k, *turns(at), self.spin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=at[None] <= pos[:, None], enable_gqa=True)
        out = out.transpose(1, 2)
        out = (
            out.view(b, s, -1)
            if self.twist == "view"
            else out.as_strided((b, s, out.shape[2] * DIM), (s * out.shape[2] * DIM, out.shape[2] * DIM, 1))
            if self.twist == "strides"
            else out.flatten(2)
        )
        return self.o(out), (keys, values)


class Decoder(nn.Module):
    """``nest``: how the cache is kept: a list, a tuple or a dict of (key, value)."""

    def __init__(self, nest="list", layers=1, **kind):
        super().__init__()
        self.nest, self.embed = nest, nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Attention(**kind) for _ in range(layers))

    def forward(self, ids, cache, past, turn=None):
        x, kept = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            y, pair = layer(x, None if cache is None else cache[i], past, turn)
            x, kept = x + y, [*kept, pair]
        kept = dict(enumerate(kept)) if self.nest == "dict" else tuple(kept) if self.nest == "tuple" else kept
        return x @ self.embed.weight.T, kept


def decoder(**kind):
    torch.manual_seed(0)
    return Decoder(**kind).eval().requires_grad_(False)


def run(call, cache=None, tokens=9, steps=3, turn=False):
    """Logits of a prompt and of ``steps`` more tokens, and the cache at the end."""
    ids = torch.randint(0, VOCAB, (3, tokens + steps), generator=torch.Generator().manual_seed(1))
    logits = []
    for begin, end in [(0, tokens), *((t, t + 1) for t in range(tokens, tokens + steps))]:
        extra = (turns(torch.arange(begin, end)),) if turn else ()
        out, cache = call(ids[:, begin:end], cache, begin, *extra)
        logits.append(out)
    return torch.cat(logits, 1), cache


def check(model, ratio=1.0, cache=None, **how):
    """The compiled model is the eager one at full rank; returns (values in the cache, graphs, messages)."""
    again = None if cache is None else [tuple(t.clone() for t in pair) for pair in cache]
    want, _ = run(model, again, **how)
    recorder = Recorder()
    call = torch.compile(model, backend="lorc", options=options(ratio=ratio, inner=recorder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, cache = run(call, cache, **how)
    if ratio == 1.0:
        assert_close("logits", got, want, 1e-5)
    pairs = cache.values() if isinstance(cache, dict) else cache
    said = [str(w.message) for w in caught if issubclass(w.category, LorcWarning)]
    return [t for pair in pairs for t in pair], recorder, said


FORMS = [
    {"layout": layout, "rope": rope} for layout in ("BHTD", "BTHD", "BTn", "TBn") for rope in ("before", "after", None)
] + [
    {"fused": "rows"}, {"fused": "heads"}, {"lora": True}, {"fused": "rows", "layout": "BTn", "rope": None},
    {"nest": "tuple"}, {"nest": "dict"}, {"form": "slice"}, {"form": "index"}, {"form": "slice", "rope": "after"},
    {"form": "slice", "layout": "BTHD"}, {"form": "index", "layout": "TBn", "rope": None}, {"form": "narrow"},
    {"layout": "BTn", "twist": "unflatten"}, {"layers": 2},
    {"spin": "chunks"}, {"spin": "complex"}, {"spin": "complex", "fused": "heads", "layout": "BTn"},
    {"fused": "rows", "twist": "clamp"}, {"fused": "heads", "twist": "clamp"}, {"fused": "rows", "twist": "norm"},
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMS, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()))
def test_hand_written_decoders_are_coded(kind):
    values, _, said = check(decoder(**kind))
    assert all(isinstance(v, LatentKV) for v in values), said
    assert not said


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("layout", ["BHTD", "BTHD", "BTn", "TBn"])
def test_prompts_of_one_token(layout, tokens):
    values, _, said = check(decoder(layout=layout), tokens=tokens)
    assert all(isinstance(v, LatentKV) for v in values), said


# -- what must be left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twist", ["shift", "conv"])
def test_what_mixes_tokens_before_the_projection_is_fair(twist):
    """A token shift or a convolution makes the activation; keys and values are still affine in it, token by token."""
    values, _, said = check(decoder(rope=None, twist=twist))
    assert all(isinstance(v, LatentKV) for v in values) and not said


@pytest.mark.parametrize(("twist", "reason"), [
    ("late shift", "`aten.cat.default` concatenates along the tokens|has no rule|takes some tokens"),
    ("gate", "no single vector to code"),
    ("glu", "32 features of its projection become 16 in the cache"),
    ("unknown", "aten.cumsum.default"),
])  # fmt: skip
def test_what_is_not_understood_stays_dense_and_right(twist, reason):
    values, recorder, said = check(decoder(rope=None, twist=twist))
    assert not any(isinstance(v, LatentKV) for v in values)
    assert said and "not understood" in said[0] and re.search(reason, said[0]), said


def test_angles_as_inputs_of_the_call():
    """cos and sin come with the call, for one layer only: they would cost more than half of what the cache holds."""
    values, _, said = check(decoder(), turn=True)
    keys, others = values[::2], values[1::2]
    assert not any(isinstance(k, LatentKV) for k in keys)
    assert all(isinstance(v, LatentKV) for v in others)
    assert any("bytes per token beside the projection" in text for text in said), said


@pytest.mark.parametrize("ratio", [1.0, 0.75])
def test_angles_as_inputs_are_kept_where_that_costs_little(monkeypatch, ratio):
    """They are kept for each token, once for all layers that share them."""
    monkeypatch.setattr(sites, "SIDE_SHARE", 2.0)
    values, _, said = check(decoder(), ratio=ratio, turn=True)
    assert all(isinstance(v, LatentKV) for v in values), said
    assert values[0].positions.shape == (12, 3, 2 * DIM) and values[0].positions.dtype == torch.float32


class WithState(nn.Module):
    """A decoder that also keeps the inputs of a convolution, and a table of where each token was sorted to."""

    def __init__(self):
        super().__init__()
        self.inner, self.p, self.conv = decoder(), nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, VOCAB, 3)

    def forward(self, ids, cache, past):
        pairs, state = (None, torch.zeros(len(ids), 0, WIDTH)) if cache is None else cache
        logits, pairs = self.inner(ids, pairs, past)
        state = torch.cat([state, self.p(self.inner.embed(ids))], 1)
        order = ids.flatten().argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        mixed = self.conv(F.pad(state.mT, (2, 0))).mT[:, -ids.shape[1] :].flatten(0, 1)
        return logits + mixed[order][back].view_as(logits), (pairs, state)


def test_a_state_that_no_attention_reads_is_left_alone():
    torch.manual_seed(0)
    model = WithState().eval().requires_grad_(False)
    want, _ = run(model)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0, strict=True))
    got, (pairs, state) = run(call)
    assert_close("logits", got, want, 1e-5)
    assert all(isinstance(v, LatentKV) for pair in pairs for v in pair)
    assert type(state) is torch.Tensor and state.shape == (3, 12, WIDTH)


@pytest.mark.parametrize("form", ["slice", "index", "narrow"])
def test_a_buffer_from_outside_stays_dense(form):
    cache = [tuple(torch.zeros(3, KV, ROOM, DIM) for _ in range(2))]
    values, _, said = check(decoder(form=form), cache=cache)
    assert not any(isinstance(v, LatentKV) for v in values)
    assert said and re.search("(?s)outside of a compiled graph.*model.compile", said[0]), said


def test_a_filled_cache_from_outside_stays_dense():
    model = decoder()
    _, cache = run(model, steps=0)
    want, _ = run(model)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0))
    with pytest.warns(LorcWarning, match="(?s)outside of a compiled graph.*model.compile"):
        out, cache = call(torch.tensor([[1]] * 3), cache, 9)
    assert_close("logits", out, model(torch.tensor([[1]] * 3), run(model, steps=0)[1], 9)[0], 1e-5)
    assert not any(isinstance(v, LatentKV) for pair in cache for v in pair)


# -- the graph before and after ---------------------------------------------------------------------------------------


def linears(graph):
    return [tuple(n.args[1].meta["val"].shape) for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]


def test_the_dense_projection_is_gone():
    model = decoder(layers=1)
    values, recorder, _ = check(model, ratio=0.5)
    assert all(isinstance(v, LatentKV) for v in values)
    ranks = sorted(v.codec.rank for v in values)
    for graph in recorder.graphs:
        shapes = linears(graph)
        assert (N, WIDTH) not in shapes
        assert sorted(rows for rows, _ in shapes if rows < N) == ranks
        assert len(shapes) == 4  # q, two encoders, o


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("twist", ["view", "strides"])
def test_attention_over_latents_has_other_strides(twist, tokens):
    """SDPA's result can be viewed after its transpose; what is absorbed need not be so laid out."""
    model, plain = decoder(rope=None, twist=twist), decoder(rope=None)
    plain.load_state_dict(model.state_dict())
    got, _ = run(torch.compile(model, backend="lorc", options=options(ratio=0.5)), tokens=tokens)
    want, _ = run(torch.compile(plain, backend="lorc", options=options(ratio=0.5)), tokens=tokens)
    assert_close("logits", got, want, 1e-5)


def test_decode_writes_rows_in_place():
    _, recorder, _ = check(decoder(layers=1), ratio=0.5)
    assert len(recorder.graphs) == 2
    prefill, decode = ({**recorder.ops(i)} for i in (0, 1))
    assert "aten.copy_.default" not in prefill
    assert decode["aten.copy_.default"] == 3  # codes of k and v, positions of k
    for node in recorder.graphs[1].graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            window = node.args[0].args[0]
            assert window.op == "placeholder" and window.name.endswith(("codes", "positions"))
        if node.target is torch.ops.aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            assert dim == -1, f"{node.format_node()} joins tokens"


def test_what_comes_out_is_what_was_planned():
    values, _, _ = check(decoder(), ratio=0.5)
    dense = len(values) * N * 4
    used = sum(v.used_nbytes() for v in values) / (3 * 12)
    assert used <= 0.5 * dense
    for value in values:
        assert value.shape == (3, KV, 12, DIM) and value.codes.shape == (12, 3, value.codec.rank)
    keys = values[::2]
    assert all(torch.equal(k.positions, torch.arange(12, dtype=torch.int32)[:, None].expand(12, 3)) for k in keys)
    assert all(v.positions is None for v in values[1::2])
