"""Codecs follow the weights: whatever is done to a model after compile, its next call computes with what it holds."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Recorder, assert_close, options
from lorc_fx.errors import EagerWarning, LorcWarning
from lorc_fx.latent import LatentKV
from lorc_fx.store import STORE

VOCAB, WIDTH, HEADS, DIM, ROOM = 40, 24, 2, 8, 24
N = HEADS * DIM

pytestmark = pytest.mark.usefixtures("clean")


class Decoder(nn.Module):
    """One layer, a norm on its keys; ``static``: the cache is a buffer written in place."""

    def __init__(self, static=False):
        super().__init__()
        self.static, self.embed, self.norm = static, nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(WIDTH, N) for _ in range(3))
        self.o = nn.Linear(N, WIDTH)

    def keep(self, old, new, past):
        if not self.static:
            return new if old is None else torch.cat([old, new], 2)
        old = new.new_zeros(new.shape[0], HEADS, ROOM, DIM) if old is None else old
        old[:, :, past : past + new.shape[2]] = new
        return old

    def forward(self, ids, cache, past):
        x = self.embed(ids)
        q, k, v = (p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (self.keep(old, new, past) for old, new in zip(cache or (None, None), (self.norm(k), v), strict=True))
        mask = torch.arange(k.shape[2])[None] <= torch.arange(past, past + x.shape[1])[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (x + self.o(out.transpose(1, 2).flatten(2))) @ self.embed.weight.T, (k, v)


def decoder(seed=0, static=False):
    torch.manual_seed(seed)
    return Decoder(static).eval().requires_grad_(False)


IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def prefill(call):
    return call(IDS[:, :7], None, 0)


def step(call, cache, at=7):
    return call(IDS[:, at : at + 1], cache, at)


def both(call):
    first, cache = prefill(call)
    second, cache = step(call, cache)
    return torch.cat([first, second], 1), cache


def compiled(model, recorder=None, **given):
    return torch.compile(model, backend="lorc", options=options(ratio=1.0, inner=recorder or "eager", **given))


def same(call, model):
    """The compiled model is the eager one, coded, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorcWarning)
        got, cache = both(call)
    assert_close("logits", got, both(model)[0], 1e-5)
    assert all(isinstance(t, LatentKV) for t in cache)


def test_two_models_share_compiled_code_and_nothing_else():
    """Dynamo does not guard parameters by identity: the second model runs through the graphs of the first."""
    one, two, recorder = decoder(1), decoder(2), Recorder()

    @torch.compile(backend="lorc", options=options(ratio=1.0, inner=recorder))
    def call(model, *args):
        return model(*args)

    for _ in range(2):
        for model in (one, two):
            same(lambda *args, m=model: call(m, *args), model)
    assert len(recorder.graphs) == 2, "one for prefill, one for decode"


CHANGES = {
    "parameter": lambda m: setattr(m, "k", decoder(9).k),
    "new parameter": lambda m: setattr(m.v, "weight", nn.Parameter(torch.randn(N, WIDTH), requires_grad=False)),
    "in place": lambda m: m.k.weight.mul_(1.5),
    "bias in place": lambda m: m.v.bias.add_(1.0),
    "one element": lambda m: m.k.weight[0].zero_(),
    "data": lambda m: setattr(m.k.weight, "data", torch.randn(N, WIDTH)),
    "load_state_dict": lambda m: m.load_state_dict(decoder(9).state_dict()),
    "assigned state": lambda m: m.load_state_dict(decoder(9).state_dict(), assign=True),
    "norm in place": lambda m: m.norm.weight.add_(0.5),
    "norm swapped": lambda m: setattr(m, "norm", decoder(9).norm),
    "norm loaded": lambda m: m.norm.load_state_dict({"weight": torch.randn(DIM), "bias": torch.randn(DIM)}),
}


def frozen(change, model):
    with torch.no_grad():
        change(model)
        if change is CHANGES["norm swapped"]:
            model.norm.weight.add_(torch.randn(DIM))
    model.requires_grad_(False)


@pytest.mark.parametrize("what", CHANGES)
def test_weights_changed_after_compile(what):
    model, recorder = decoder(), Recorder()
    call = compiled(model, recorder)
    same(call, model)
    before, graphs = both(model)[0], len(recorder.graphs)
    frozen(CHANGES[what], model)
    assert not torch.equal(both(model)[0], before), "the change has no effect"
    same(call, model)
    assert len(recorder.graphs) - graphs in (0, 2), "at most Dynamo's own recompiles"


@pytest.mark.parametrize("what", CHANGES)
def test_a_live_cache_across_a_change(what):
    """A cache written by the old weights keeps what they computed: it goes on dense, with one warning."""
    model = decoder()
    call = compiled(model)
    _, dense = prefill(model)
    _, cache = prefill(call)
    step(call, cache)
    frozen(CHANGES[what], model)
    want = step(model, dense)
    with pytest.warns(EagerWarning) as caught:
        got, after = step(call, cache)
    assert len([w for w in caught if issubclass(w.category, LorcWarning)]) == 1
    assert_close("logits", got, want[0], 1e-5)
    assert not any(isinstance(t, LatentKV) for t in after)
    assert_close("keys", after[0], want[1][0], 1e-5)
    same(call, model)


def test_a_live_buffer_across_a_change():
    """A buffer that is written in place becomes dense in place: writes reach it, and it goes on."""
    model = decoder(static=True)
    call = compiled(model)
    same(call, model)
    caches = [prefill(m)[1] for m in (call, model)]
    frozen(CHANGES["in place"], model)
    with pytest.warns(EagerWarning, match="uncompressed"):
        got, want = (step(m, c) for m, c in zip((call, model), caches, strict=True))
    assert_close("logits", got[0], want[0], 1e-5)
    got, want = (step(m, c, 8) for m, c in zip((call, model), (got[1], want[1]), strict=True))
    assert_close("the step after", got[0], want[0], 1e-5)
    same(call, model)


def test_a_cache_of_another_model():
    one, two = decoder(1), decoder(2)

    @torch.compile(backend="lorc", options=options(ratio=1.0))
    def call(model, *args):
        return model(*args)

    _, cache = call(one, IDS[:, :7], None, 0)
    _, dense = prefill(one)
    both(lambda *args: call(two, *args))
    with pytest.warns(EagerWarning):
        got, _ = call(two, IDS[:, 7:8], cache, 7)
    assert_close("logits", got, step(two, dense)[0], 1e-5)


def test_going_back_to_weights_already_seen_factorises_nothing(monkeypatch):

    from lorc_fx import builder

    made = []
    gram = builder.gram
    monkeypatch.setattr(builder, "gram", lambda *args: made.append(args) or gram(*args))
    model, other = decoder(), decoder(3)
    call = compiled(model)
    mine = model.k
    same(call, model)
    seen = len(made)
    model.k = other.k
    same(call, model)
    more = len(made)
    model.k = mine
    same(call, model)
    assert seen == 2 and more > seen and len(made) == more


def test_the_store_forgets_dead_models():
    gc.collect()
    before = len(STORE)
    model = decoder()
    call = compiled(model)
    same(call, model)
    assert len(STORE) == before + 2
    del model, call
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE) == before


def test_edited_weights_leave_one_entry_behind():
    model = decoder()
    call = compiled(model)
    same(call, model)
    held = len(STORE)
    for _ in range(3):
        frozen(CHANGES["in place"], model)
        same(call, model)
    assert len(STORE) == held


def test_deepcopy_of_a_compiled_model():
    model = decoder()
    model.compile(backend="lorc", options=options(ratio=1.0))
    same(model, decoder())
    twin, plain = copy.deepcopy(model), decoder()
    for changed in (twin, plain):
        frozen(CHANGES["in place"], changed)
    logits, cache = both(twin)  # torch drops the compiled call of a copy
    assert_close("logits of the copy", logits, both(plain)[0], 1e-5)
    assert not any(isinstance(t, LatentKV) for t in cache)
    twin.compile(backend="lorc", options=options(ratio=1.0))
    same(twin, plain)
    same(model, decoder())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_tensors(mode):
    """Weights made under inference_mode have no version counter; caches cross the modes."""
    with mode():
        model = decoder()
        call = compiled(model)
        same(call, model)
        _, cache = prefill(call)
    with torch.no_grad():
        got, _ = step(call, cache)
        assert_close("logits", got, step(model, prefill(model)[1])[0], 1e-5)
