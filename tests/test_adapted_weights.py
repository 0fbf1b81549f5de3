"""Weights that are no plain parameters of one projection each: subclasses, opaque ops, shared, on meta, in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapted import FAMILY, IDS, MASK, UNIFORM, Scaled, check, effective, projections
from test_weights import Decoder, both, decoder, frozen, prefill, same, step
from test_weights import compiled as compiled_decoder
from torch import nn

import lorc_fx
from helpers import assert_close, compiled, generate, latents, options
from lorc_fx import parts
from lorc_fx.errors import EagerWarning, NoSitesWarning, UnloadedWeights
from lorc_fx.latent import LatentKV
from lorc_fx.options import FIRST_PROMPT, Options
from lorc_fx.passes.axes import Mixes
from lorc_fx.passes.rules import RULES, register_rule
from lorc_fx.report import examined
from lorc_fx.store import STORE
from lorc_fx.timing import COUNTS

pytestmark = pytest.mark.usefixtures("clean")


# -- subclasses -------------------------------------------------------------------------------------------------------


def quantised(times=1.0, per_row=True):
    model = FAMILY.build()
    for module in projections(model):
        module.weight = Scaled.of(module.weight, times, per_row)
    return model


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_quantised_weight(ratio):
    run = check(quantised(), quantised(), ratio=ratio)
    codec = latents(run.cache)[0][0].codec
    assert codec.encode is None or codec.encode.dtype == torch.float32


@pytest.mark.slow
def test_with_inductor():
    """What ``test_a_quantised_weight`` checks under eager."""
    check(quantised(), quantised(), inner="inductor")


EDITS = {
    "codes in place": lambda w: w.codes.mul_(-1),
    "scale in place": lambda w: w.scale.mul_(1.5),
    "scale replaced": lambda w: setattr(w, "scale", w.scale * 0.5),
    "scale of another shape": lambda w: setattr(w, "scale", w.scale.amax().reshape(1, 1)),
    "number": lambda w: setattr(w, "times", 2.0),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_a_part_is_noticed(what):
    model, eager = quantised(), quantised()
    check(model, eager)
    before = generate(eager, IDS, MASK)
    for changed in (model, eager):
        for module in projections(changed):
            EDITS[what](module.weight)
    want = generate(eager, IDS, MASK)
    assert not torch.equal(want.logits, before.logits), "the edit has no effect"
    got = generate(model, IDS, MASK)
    latents(got.cache)
    assert_close("logits", got.logits, want.logits)


def test_a_weight_of_another_kind():
    model, eager = quantised(), quantised()
    check(model, eager)
    for make in (lambda w: nn.Parameter(w.detach() * 2, requires_grad=False), lambda w: Scaled.of(w, per_row=False)):
        for changed in (model, eager):
            for module, plain in zip(projections(changed), projections(FAMILY.build()), strict=True):
                module.weight = make(plain.weight)
        got, want = generate(model, IDS, MASK), generate(eager, IDS, MASK)
        latents(got.cache)
        assert_close("logits", got.logits, want.logits)


def test_reports_and_statistics():
    model = quantised()
    report = examined(model, (IDS,), {"use_cache": True}, Options.parse(options(**UNIFORM, ratio=0.5)))
    assert len(report.sites) == 4 and not report.misses
    plain = examined(effective(model), (IDS,), {"use_cache": True}, Options.parse(options(**UNIFORM)))
    assert [s.cond for s in report.sites] == pytest.approx([s.cond for s in plain.sites], rel=1e-4)
    found = lorc_fx.calibrate(model, [IDS.repeat(4, 8)], progress=False)
    assert len(found.sites) == 4
    check(model, effective(model), calibration=found)


def test_the_first_prompt_informs_and_is_forgotten():
    model = compiled(quantised(), calibration=FIRST_PROMPT, ratio=0.5)
    with torch.no_grad():
        model(torch.randint(2, 101, (4, 100)), use_cache=True)
    assert len(lorc_fx.fidelity(model)) == 4
    held = len(STORE)
    lorc_fx.reset(model)
    assert not lorc_fx.fidelity(model) and len(STORE) < held


def test_a_plain_model_pays_nothing():
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    assert parts.in_parts(gm, [torch.ones(2)])[0] is gm


# -- opaque ops -------------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear as libraries of quantised kernels make them: an op of their own over a packed weight."""

    def __init__(self, linear):
        super().__init__()
        half = linear.weight.detach().half()
        self.register_buffer("packed", half.view(torch.uint8).reshape(len(half), -1))

    def forward(self, x):
        return torch.ops.lorc_test.packed_linear(x, self.packed)


@pytest.fixture
def packed_linear():
    with torch.library._scoped_library("lorc_test", "FRAGMENT") as library:
        library.define("packed_linear(Tensor x, Tensor packed) -> Tensor")
        library.impl("packed_linear", lambda x, packed: F.linear(x, packed.view(torch.half).to(x)), "CPU")
        library.impl("packed_linear", lambda x, packed: x.new_empty(*x.shape[:-1], packed.shape[0]), "Meta")
        op = torch.ops.lorc_test.packed_linear.default
        yield op
        RULES.pop(op, None)


def packed():
    model = FAMILY.build()
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    return model


def test_an_op_without_a_rule_is_a_miss_that_names_it(packed_linear):
    with pytest.warns(NoSitesWarning, match=r"lorc_test\.packed_linear\.default"):
        got = generate(compiled(packed(), **UNIFORM, ratio=0.5), IDS, MASK)
    want = generate(packed(), IDS, MASK)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.sequences, want.sequences)
    assert not any(isinstance(layer.keys, LatentKV) for layer in got.cache.layers)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_an_op_that_was_taught(packed_linear, ratio):
    @register_rule(packed_linear, role="contract", words="multiplies by a packed weight")
    def rule(node, axis):
        if axis == 2:
            raise Mixes("multiplies the tokens")
        return [(node.args[0], axis), (node.args[1], None)]

    plain = FAMILY.build()
    for p in FAMILY.projections(plain):
        p.module.weight.data = p.module.weight.detach().half().float()
    check(packed(), packed(), plain=plain, ratio=ratio)


def test_a_linear_that_is_not_compiled():
    """A graph break at each projection: what it returns is an input of the next graph, and has no weight there."""

    class Eager(nn.Linear):
        @torch.compiler.disable
        def forward(self, x):
            return super().forward(x)

    model = FAMILY.build()
    for p in FAMILY.projections(model):
        p.module.__class__ = Eager
    with pytest.warns(NoSitesWarning):
        got = generate(compiled(model, **UNIFORM, ratio=0.5), IDS, MASK)
    assert_close("logits", got.logits, generate(FAMILY.build(), IDS, MASK).logits, 1e-6)
    assert not any(isinstance(layer.keys, LatentKV) for layer in got.cache.layers)


# -- the same weights, used in another way ----------------------------------------------------------------------------


class Acting(Decoder):
    """A function of the caller's own between projection and cache, and a number in the projection."""

    act, by = staticmethod(F.silu), 2.0

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def keep(self, old, new, past):
        return super().keep(old, self.act(new * self.by), past)


USES = {
    "activation": lambda m: setattr(m, "act", F.gelu),
    "slope": lambda m: setattr(m, "act", lambda x: F.leaky_relu(x, 0.3)),
    "number": lambda m: setattr(m, "by", 3.0),
}


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("what", USES)
def test_the_same_weights_used_differently(what, anew):
    """Dynamo recompiles, and the codecs of the graphs before must not be taken for those of the new ones."""
    torch.manual_seed(0)
    model = Acting().eval().requires_grad_(False)
    if what == "slope":
        model.act = lambda x: F.leaky_relu(x, 0.1)
    call = compiled_decoder(model)
    same(call, model)
    _, dense = prefill(model)
    _, cache = prefill(call)
    before = both(model)[0]
    USES[what](model)
    assert not torch.equal(both(model)[0], before), "the change has no effect"
    if anew:
        torch._dynamo.reset()
    same(call, model)
    with pytest.warns(EagerWarning):
        got, _ = step(call, cache)
    assert_close("a live cache", got, step(model, dense)[0], 1e-5)


# -- shared weights ---------------------------------------------------------------------------------------------------


def shared(how):
    model = FAMILY.build()
    first, second = (layer.self_attn for layer in model.model.layers)
    if how == "one module for keys and values":
        for attention in (first, second):
            attention.v_proj = attention.k_proj
    elif how == "one weight in two layers":
        second.k_proj.weight = first.k_proj.weight
    elif how == "one layer twice":
        model.model.layers[1].self_attn.k_proj, second.v_proj = first.k_proj, first.v_proj
        second.q_proj, second.o_proj = first.q_proj, first.o_proj
    else:
        for attention in (first, second):
            attention.k_proj.weight = attention.v_proj.weight = first.k_proj.weight
    return model


SHARED = ["one module for keys and values", "one weight in two layers", "one layer twice", "one weight for all"]


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("how", SHARED)
def test_shared_weights(how, ratio):
    """With the rows of a shared projection taken once: a hook on one module for two uses would project twice."""
    plain = shared(how)
    for layer in plain.model.layers:
        for name in ("k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            own = nn.Linear(linear.in_features, linear.out_features, bias=False)
            own.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            setattr(layer.self_attn, name, own)
    check(shared(how), shared(how), plain=plain, ratio=ratio)


class Looped(nn.Module):
    """One block, run three times: all its caches come from the same two weights."""

    def __init__(self):
        super().__init__()
        self.block = decoder()

    def forward(self, ids, cache, past):
        found = []
        for i in range(3):
            logits, kept = self.block((ids + i) % 40, None if cache is None else cache[2 * i : 2 * i + 2], past)
            found += [logits, *kept]
        return sum(found[::3]), tuple(t for i, t in enumerate(found) if i % 3)


def test_a_block_that_runs_three_times():
    model = Looped()
    call = compiled_decoder(model)
    same(call, model)
    frozen(lambda m: m.block.k.weight.mul_(1.5), model)
    same(call, model)


# -- weights on meta --------------------------------------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return decoder()


def test_weights_on_meta_until_loaded():
    model = on_meta()
    call = compiled_decoder(model)
    with torch.device("meta"), pytest.raises(UnloadedWeights, match="load_state_dict"):
        call(torch.zeros(2, 7, dtype=torch.int64), None, 0)
    model.load_state_dict(decoder().state_dict(), assign=True)
    same(call, model.requires_grad_(False))


def test_reports_name_weights_on_meta():
    with torch.device("meta"):
        model = FAMILY.build()
    with pytest.raises(UnloadedWeights, match=r"model\.embed_tokens\.weight"):
        lorc_fx.explain(model, IDS)
    with pytest.raises(UnloadedWeights):
        lorc_fx.calibrate(model, [IDS], progress=False)


def test_one_weight_on_meta_is_torchs_own_error():
    model = decoder()
    call = compiled_decoder(model)
    same(call, model)
    plain = model.k
    model.k = on_meta().k.requires_grad_(False)
    with pytest.raises(RuntimeError, match="meta"):
        prefill(call)
    model.k = plain
    same(call, model)


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_shards(world, tmp_path):
    """All cases of ``sharded.py`` in a group of ``world`` processes: coded and right, or a miss that is said."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *(p for p in sys.path if p)])
    run = subprocess.run(
        [sys.executable, str(here / "sharded.py"), str(world), str(tmp_path / "group"), str(tmp_path / "found.json")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for rank, seen in enumerate(found.pop("lopsided", ())):
        assert not seen["without"]["informed"] and seen["with"]["informed"], (rank, seen)
        assert max(seen[way]["error"] for way in seen) < 0.1, (rank, seen)
    for case, seen in found.items():
        assert seen["error"] < 1e-4 and seen["tokens"], (case, seen)
        assert all(seen["coded"]) or (not any(seen["coded"]) and seen["said"]), (case, seen)
    assert all(found["column shards"]["coded"]) and all(found["column shards, half"]["coded"])
    assert all(found["gathered"]["coded"]) == (world == 1), "rows of all shards are gathered: no one weight makes them"


def test_backend_is_called_for_these():
    """The checks above mean nothing where Dynamo skips a frame."""
    seen = COUNTS["backend_calls"]
    check(quantised(), quantised())
    assert COUNTS["backend_calls"] >= seen + 2
