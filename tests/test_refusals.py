"""What is refused, and how the caller hears of it: its own class of error, or one warning and a model that is right."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close, options
from lorc_fx import Calibration, errors
from lorc_fx.latent import LatentKV
from lorc_fx.packing import MODEL, Segment
from lorc_fx.passes import normalise
from lorc_fx.records import Plan, PlannedSite

VOCAB, WIDTH, HEADS, DIM = 40, 24, 2, 8
N = HEADS * DIM

pytestmark = pytest.mark.usefixtures("clean", "fresh_hints")


class Decoder(nn.Module):
    """One layer. ``cached``: whether it returns its keys and values."""

    def __init__(self, cached=True):
        super().__init__()
        self.cached, self.embed = cached, nn.Embedding(VOCAB, WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * N), nn.Linear(N, WIDTH)

    def forward(self, ids, cache=None, past=0):
        x = self.embed(ids)
        q, k, v = (p.view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        mask = torch.arange(k.shape[2])[None] <= torch.arange(past, past + x.shape[1])[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        logits = (x + self.o(out.transpose(1, 2).flatten(2))) @ self.embed.weight.T
        return (logits, (k, v)) if self.cached else logits


def decoder(grad=False, **kind):
    torch.manual_seed(0)
    return Decoder(**kind).eval().requires_grad_(grad)


IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


def compiled(model, **given):
    model.compile(backend="lorc", options=options(**given))
    return model


def plan(rank=4, kinds=("key", "value"), layers=1):
    sites = [
        PlannedSite(i, k, N, (Segment(rank, MODEL),), 1, 4 * rank, 4 * N, None, 1.0)
        for i in range(layers)
        for k in kinds
    ]
    return Plan(tuple(sites))


#: name -> options, class of the error, words in it
BAD = {
    "unknown option": ({"ration": 0.5}, errors.UnknownOption, "Did you mean 'ratio'"),
    "ratio above one": ({"ratio": 1.5}, errors.BadOption, "ratio=1.5"),
    "ratio of zero": ({"ratio": 0}, errors.BadOption, "ratio=0"),
    "ratio as text": ({"ratio": "half"}, errors.BadOption, "ratio='half'"),
    "both budgets": ({"ratio": 0.5, "bytes_per_token": 64}, errors.ConflictingOptions, "Give one of them"),
    "a budget of one byte": ({"bytes_per_token": 1}, errors.BudgetTooSmall, "they need 8 bytes"),
    "a tiny ratio": ({"ratio": 0.001}, errors.BudgetTooSmall, "ratio 0.0625"),
    "unknown scheduler": ({"scheduler": "unifrom"}, errors.UnknownScheduler, "Did you mean 'uniform'"),
    "unknown inner": ({"inner": "inductr"}, errors.UnknownBackend, "Did you mean 'inductor'"),
    "itself inside": ({"inner": "lorc"}, errors.UnknownBackend, "'lorc'"),
    "unknown mode": ({"mode": "fastest"}, errors.BadOption, "mode='fastest'"),
    "groups of a joint basis": ({"basis": "joint", "group_size": 2}, errors.ConflictingOptions, "only grouped bases"),
    "a calibration of no model": ({"calibration": Calibration(())}, errors.BadCalibration, "made for other weights"),
    "knobs that do not fit": ({"ratio": 0.2, "d_min": 12, "d_max": 12}, errors.KnobsDoNotFit, "d_max=12"),
    "a plan that is none": ({"plan": 7}, errors.BadPlan, "neither a Plan nor a path"),
    "a plan that is missing": ({"plan": "/no/such/plan.json"}, errors.BadPlan, "cannot be read"),
    "a plan of too few sites": ({"plan": plan(kinds=("key",))}, errors.BadPlan, "no rank for layer 0 value"),
    "a plan of too many sites": ({"plan": plan(layers=2)}, errors.BadPlan, "this model lacks"),
    "a plan of too high a rank": ({"plan": plan(rank=17)}, errors.BadPlan, "not in 1..16"),
    "a plan of no rank": ({"plan": plan(rank=0)}, errors.BadPlan, "not in 1..16"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["model.compile", "torch.compile"])
def test_bad_options_reach_the_caller_as_their_own_class(name, form):
    given, kind, words = BAD[name]
    model, given = decoder(), options(**given)
    if form == "model.compile":
        model.compile(backend="lorc", options=given)
        call = model
    else:
        call = torch.compile(model, backend="lorc", options=given)
    for _ in range(2):  # and the second call says it again
        with pytest.raises(kind) as raised:
            call(IDS)
        assert type(raised.value) is kind and words in str(raised.value)


def test_a_good_plan_is_followed():
    _, cache = compiled(decoder(), plan=plan(rank=5))(IDS)
    assert [t.codec.rank for t in cache] == [5, 5]


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def test_a_graph_that_cannot_be_read_runs_as_it_is(monkeypatch):
    """Never a crash: the inner compiler gets the untouched graph, with a warning; an error under strict."""
    from lorc_fx import backend

    def broken(gm, examples):
        raise RuntimeError("no tracing today")

    monkeypatch.setattr(backend, "normalise", broken)
    model, x = Doubled(), torch.ones(3)
    model.compile(backend="lorc", options=options())
    with pytest.warns(errors.LorcWarning, match="cannot be read: RuntimeError: no tracing today"):
        assert torch.equal(model(x), x * 2)
    strict = Doubled()
    strict.compile(backend="lorc", options=options(strict=True))
    with pytest.raises(errors.UnreadableGraph):
        strict(x)


def test_what_leaves_no_trace_runs_as_it_is(monkeypatch):
    """torch's tracer makes constants without data of what is under vmap (were that not expanded): such a graph must not
    be run."""
    monkeypatch.setattr(normalise, "expand_vmap", lambda gm: gm)

    class Mapped(Decoder):
        def forward(self, ids, cache=None, past=0):
            logits, kept = super().forward(ids, cache, past)
            return torch.vmap(lambda a, b: a + torch.zeros(2, b.shape[-1])[:1].sum(0) * b)(logits, logits), kept

    torch.manual_seed(0)
    model, ids = Mapped().eval(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        want = model(ids)[0]
        with pytest.warns(errors.LorcWarning, match="cannot be read"):
            got, (keys, _) = torch.compile(model, backend="lorc", options=options(ratio=0.5))(ids)
    assert_close("logits", got, want, 1e-6)
    assert not isinstance(keys, LatentKV)


def test_no_sites_is_a_warning():
    model = decoder(cached=False)
    want = model(IDS)
    with pytest.warns(errors.NoSitesWarning, match="use_cache=True"):
        got = compiled(model)(IDS)
    assert_close("logits", got, want, 1e-6)


def test_no_sites_under_strict():
    with pytest.raises(errors.NoSites):
        compiled(decoder(cached=False), strict=True)(IDS)


def test_a_miss_under_strict():
    model = decoder()
    _, cache = model(IDS[:, :7])
    with pytest.raises(errors.StrictMiss, match="stays dense|preallocated"):
        compiled(model, strict=True)(IDS[:, 7:8], cache, 7)


def test_strict_says_nothing_where_all_is_coded():
    model = compiled(decoder(), strict=True, ratio=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.LorcWarning)
        _, cache = model(IDS[:, :7])
        _, cache = model(IDS[:, 7:8], cache, 7)
    assert all(isinstance(t, LatentKV) for t in cache)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_runs_untouched():
    """Grad mode and weights that require it: nothing is compressed, said once, and gradients are eager's."""
    model, plain = decoder(grad=True).train(), decoder(grad=True).train()
    with pytest.warns(errors.LorcWarning, match="no gradient.*uncompressed") as caught:
        logits, cache = compiled(model)(IDS)
    said = [w for w in caught if issubclass(w.category, errors.LorcWarning)]  # torch has its own about Python 3.13.0
    assert len(said) == 1 and not any(isinstance(t, LatentKV) for t in cache)
    logits.square().mean().backward()
    plain(IDS)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, plain.get_parameter(name).grad, 1e-5)


def test_training_under_strict():
    with pytest.raises(errors.GradRequired, match="no_grad"):
        compiled(decoder(grad=True), strict=True)(IDS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_compresses_weights_that_require_grad(mode):
    with mode():
        _, cache = compiled(decoder(grad=True))(IDS)
    assert all(isinstance(t, LatentKV) for t in cache)


def test_training_after_inference():
    model = compiled(decoder(grad=True))
    with torch.no_grad():
        model(IDS)
    with pytest.warns(errors.LorcWarning, match="uncompressed"):
        logits, _ = model(IDS)
    logits.sum().backward()
    assert model.qkv.weight.grad is not None


def test_a_coded_cache_in_grad_mode():
    """A prompt under no_grad, then a step with gradients: right, and nothing silent."""
    model = compiled(decoder(grad=True), ratio=1.0)
    with torch.no_grad():
        _, cache = model(IDS[:, :7])
    with pytest.warns(errors.LorcWarning):
        logits, _ = model(IDS[:, 7:8], cache, 7)
    plain = decoder(grad=True)
    assert_close("logits", logits.detach(), plain(IDS[:, :8])[0][:, -1:].detach(), 1e-5)
    logits.sum().backward()


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_weights_that_are_not_finite(bad, ratio):
    model = decoder()
    with torch.no_grad():
        model.qkv.weight[2 * N + 3, 1] = bad
    with pytest.raises(errors.BadWeight, match="layer 0 value"):
        compiled(model, ratio=ratio)(IDS)


def test_a_weight_that_turns_bad_after_compile():
    model = compiled(decoder())
    model(IDS)
    with torch.no_grad():
        model.qkv.weight[N, 0] = float("nan")
    with pytest.raises(errors.BadWeight, match="layer 0 key"):
        model(IDS)


@pytest.mark.parametrize("what", ["zero", "rank one"])
@pytest.mark.parametrize("scheduler", ["progressive", "uniform", "energy"])
def test_degenerate_weights_are_coded_and_right(what, scheduler):
    model = decoder()
    with torch.no_grad():
        rows = model.qkv.weight[N : 2 * N]
        rows.copy_(torch.zeros(N, WIDTH) if what == "zero" else torch.randn(N, 1) @ torch.randn(1, WIDTH))
    want = model(IDS)[1][0]
    logits, cache = compiled(model, ratio=0.5, scheduler=scheduler)(IDS)
    assert bool(torch.isfinite(logits).all()) and isinstance(cache[0], LatentKV)
    assert_close("keys", cache[0].dense(), want, 1e-5)


# -- past Dynamo's limits ---------------------------------------------------------------------------------------------


@torch._dynamo.config.patch(recompile_limit=2)
def test_past_the_recompile_limit():
    """Dynamo gives a function up after too many compiles and runs it eagerly, with live LatentKVs in its hands."""
    plain, model = decoder(), compiled(decoder(), ratio=1.0)
    _, cache = model(IDS[:, :5])
    _, dense = plain(IDS[:, :5])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for begin, end in ((5, 6), (6, 8), (8, 9), (9, 12)):
            got, cache = model(IDS[:, begin:end], cache, begin)
            want, dense = plain(IDS[:, begin:end], dense, begin)
            assert_close(f"logits of {begin}:{end}", got, want, 1e-5)
    ours = [w for w in caught if issubclass(w.category, errors.LorcWarning)]
    assert len(ours) == 1 and "recompile" in str(ours[0].message)
    assert all(isinstance(t, LatentKV) for t in cache), "what is coded stays coded"


class Tagged(Decoder):
    """Dynamo compiles it once for each ``tag``."""

    def forward(self, ids, cache=None, past=0, tag=""):
        return super().forward(ids, cache, past) if tag else None


def test_past_the_default_recompile_limit(caplog):
    """The same at the limit that users have: Dynamo logs it, we warn once, and every step is right."""
    torch.manual_seed(0)
    plain, limit = Tagged().eval().requires_grad_(False), torch._dynamo.config.recompile_limit
    call = torch.compile(plain, backend="lorc", options=options(ratio=1.0))
    ids = torch.randint(0, VOCAB, (2, limit + 6))
    _, cache = call(ids[:, :2], None, 0, "prompt")
    _, dense = plain(ids[:, :2], None, 0, "prompt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for past in range(2, limit + 6):
            got, cache = call(ids[:, past : past + 1], cache, past, f"step {past}")
            want, dense = plain(ids[:, past : past + 1], dense, past, f"step {past}")
            assert_close(f"logits of {past}", got, want, 1e-5)
    assert "recompile_limit" in caplog.text
    ours = [w for w in caught if issubclass(w.category, errors.LorcWarning)]
    assert len(ours) == 1 and "recompile" in str(ours[0].message)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_backend_is_right_and_said(backend):
    """It does not know latents: the frame is left to Python, where what is coded stays coded."""
    model = decoder()
    _, cache = compiled(decoder(), ratio=1.0)(IDS[:, :7])
    torch._dynamo.reset()
    with pytest.warns(errors.EagerWarning):
        got, _ = torch.compile(model, backend=backend)(IDS[:, 7:8], cache, 7)
    assert_close("logits", got, model(IDS[:, :8])[0][:, -1:], 1e-5)
