"""``calibration="first-prompt"``: the first long enough prompt gives the statistics, and is coded with them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from calibrating import ordinary, projected, quiet, text
from families import FAMILIES
from oracle import coded_oracle

import lorc_fx
from helpers import assert_close, compiled, generate, latents, new_cache, piecewise
from lorc_fx.errors import EagerWarning, QualityWarning
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")
ASKED = {"calibration": "first-prompt", "ratio": 0.09}
LONG = text(rows=8, tokens=40)


def codes(cache):
    return [x.codes for pair in latents(cache) for x in pair]


def fill(model, ids, cuts=None, kind="dynamic"):
    cache = new_cache(model, kind, ids.shape[1])
    return piecewise(model, ids, cache, cuts or [ids.shape[1]]), cache


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_first_prompt_is_coded_with_its_own_statistics(name, kind):
    """Twice the same prompt, and a second model of the same weights: bit-equal caches, and the function that the codecs
    say."""
    family = FAMILIES[name]
    model = family.build(layers=family.fewest)
    again, truth = copy.deepcopy(model), copy.deepcopy(model)
    compiled(model, **ASKED)
    got, cache = fill(model, LONG, kind=kind)
    assert all(x.codec.offsets is not None for pair in latents(cache) for x in pair), "the sink has a mean of its own"
    assert any(x.codec.rank < x.codec.width for pair in latents(cache) for x in pair)
    _, second = fill(model, LONG, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(codes(cache), codes(second), strict=True))
    compiled(again, **ASKED)
    same, third = fill(again, LONG, kind=kind)
    assert torch.equal(got, same)
    assert all(torch.equal(a, b) for a, b in zip(codes(cache), codes(third), strict=True))
    want, _ = fill(coded_oracle(family, truth, latents(cache)), LONG, kind=kind)
    assert_close("logits", got, want, 2e-3)


def test_it_is_the_calibration_of_that_prompt():
    model = FAMILIES["llama-gqa"].build()
    known = quiet(copy.deepcopy(model), [LONG])
    one, other = compiled(copy.deepcopy(model), **ASKED), copy.deepcopy(model)
    _, cache = fill(one, LONG)
    _, given = fill(compiled(other, ratio=0.09, calibration=known), LONG)
    for (a, b), (c, d) in zip(latents(cache), latents(given), strict=True):
        for x, y in ((a, c), (b, d)):
            assert x.codec.format == y.codec.format
            assert_close("mean", x.codec.mean, y.codec.mean, 1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_does_not_count(attn):
    """Half the rows padded on the left: the statistics are those of the real tokens, whatever lies in the padding."""
    model = FAMILIES["llama-gqa"].build(attn=attn)
    mask = torch.ones_like(LONG)
    mask[:4, :6] = 0
    found = []
    for padding in (0, 7):
        ids = LONG.clone()
        ids[:4, :6] = padding
        run = generate(compiled(copy.deepcopy(model), **ASKED), ids, mask, new=2)
        found.append([x.codec for pair in latents(run.cache) for x in pair])
    for a, b in zip(*found, strict=True):
        assert a.format == b.format and torch.equal(a.decode, b.decode) and torch.equal(a.mean, b.mean)


def test_a_short_prompt_drops_nothing_and_goes_on_as_it_began():
    """Its cache keeps its codec after statistics came in, and goes on right."""
    family = FAMILIES["llama-gqa"]
    model = family.build()
    truth = copy.deepcopy(model)
    compiled(model, **ASKED)
    ids = text(rows=2, tokens=14, seed=5)
    cache = new_cache(model, "dynamic", 14)
    first = piecewise(model, ids[:, :9], cache, [9])
    early = [x.codec for pair in latents(cache) for x in pair]
    assert all(c.rank == c.width for c in early)
    _, late = fill(model, LONG)
    assert all(x.codec is not c for x, c in zip((x for p in latents(late) for x in p), early, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        rest = piecewise(model, ids[:, 9:], cache, [1, 5])
    assert [x.codec for pair in latents(cache) for x in pair] == early
    want, _ = fill(coded_oracle(family, truth, latents(cache)), ids)
    assert_close("logits", torch.cat([first, rest], 1), want, 2e-3)


def test_a_prompt_of_nan_gives_no_statistics_and_runs():
    model = FAMILIES["llama-gqa"].build(layers=1)
    model.model.embed_tokens.weight.data[5] = float("nan")
    compiled(model, **ASKED)
    ids = LONG.clone()
    ids[0, 3] = 5
    with pytest.warns(QualityWarning, match="no statistics: its activations are not finite"):
        _, cache = fill(model, ids)
    assert all(x.codec.rank == x.codec.width for x in latents(cache)[0])


def test_too_small_a_budget_is_said_and_safe():
    model = FAMILIES["llama-gqa"].build(layers=1)
    compiled(model, calibration="first-prompt", ratio=0.07)
    with pytest.warns(QualityWarning, match="until a prompt of 256 tokens"):
        _, cache = fill(model, text(rows=1, tokens=9))
    assert {s.bits for pair in latents(cache) for x in pair for s in x.codec.format.segments} == {4}
    _, cache = fill(model, LONG)
    dense = 2 * 4 * latents(cache)[0][0].codec.width
    assert lorc_fx.cache_nbytes(cache, used=True) <= 0.07 * dense * LONG.numel()


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_reset_forgets_and_a_live_cache_goes_on_right(ratio):
    """At ratio 1 the codecs that are made again are the same, so the cache goes on coded; at 0.6 it is decoded."""
    model = FAMILIES["llama-gqa"].build()
    plain = copy.deepcopy(model)
    compiled(model, calibration="first-prompt", ratio=ratio)
    _, cache = fill(model, LONG)
    before = latents(cache)[0][0].codec
    lorc_fx.reset(model)
    more = text(rows=8, tokens=3, seed=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = piecewise(model, more, cache, [3])
    decoded = any("goes on uncompressed" in str(w.message) for w in caught)
    assert decoded == (ratio < 1) and decoded != isinstance(cache.layers[0].keys, LatentKV)
    want = piecewise(plain, torch.cat([LONG, more], 1), new_cache(plain, "dynamic", 43), [43])[:, 40:]
    assert_close("logits", got, want, 1e-4 if ratio == 1 else 5e-2)
    _, fresh = fill(model, text(rows=8, tokens=40, seed=11))
    assert latents(fresh)[0][0].codec is not before


def test_the_first_prompt_says_how_well_it_is_read_back():
    """As measured by hand on the projections; the prediction is of its size."""
    family = FAMILIES["llama-gqa"]
    model = family.build(layers=family.fewest)
    truth = copy.deepcopy(model)
    compiled(model, **ASKED | {"ratio": 0.2})
    assert lorc_fx.fidelity(model) == ()
    _, cache = fill(model, LONG)
    found = {f.name: f for f in lorc_fx.fidelity(model)}
    assert len(found) == 2 * family.fewest
    want = projected(family, truth, LONG)
    for (layer, kind), y in want.items():
        f = found[f"layer {layer} {kind}"]
        assert 0.3 * f.predicted < f.measured < 3 * f.predicted
        latent = latents(cache)[layer][kind == "value"]
        if kind == "value":  # keys are stored before the rotation, and read after it
            got = latent.dense().transpose(1, 2).flatten(2).double()
            rest = ordinary(y, torch.ones(y.shape[:2], dtype=torch.bool))
            first_layer = layer == 0  # further layers have read what is compressed
            if first_layer:
                error = (got - y)[rest].norm() / (y[rest] - y[rest].mean(0)).norm()
                assert f.measured == pytest.approx(float(error), rel=0.25)
    lorc_fx.reset(model)
    assert lorc_fx.fidelity(model) == ()


def test_a_prompt_that_is_read_back_badly_is_said():
    model = FAMILIES["llama-gqa"].build(layers=1)
    compiled(model, **ASKED | {"ratio": 0.06})
    with pytest.warns(QualityWarning, match=r"relative error on the first prompt .*layer 0 .*Raise `ratio`"):
        fill(model, LONG)
    compiled(model, **ASKED | {"ratio": 0.5})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "relative error", QualityWarning)
        fill(model, LONG)


def test_bytes_for_everything_at_less_than_full_rank():
    """Keys whose heads repeat need fewer columns than they have; the sink then needs no mean, and nothing is lost."""
    model = FAMILIES["llama-gqa"].build(layers=1)
    weight = model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        half = len(weight) // 2
        weight[half:] = weight[:half]
    want, _ = fill(copy.deepcopy(model), LONG)
    compiled(model, **ASKED | {"ratio": 1.0, "basis": "joint"})
    got, cache = fill(model, LONG)
    assert_close("logits", got, want, 1e-4)
    assert latents(cache)[0][0].codec.rank == half
    assert max(f.measured for f in lorc_fx.fidelity(model)) < 1e-4


def test_inference_mode_gives_the_same_statistics():
    """Gradients of scores are taken there too."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        model = compiled(FAMILIES["llama-gqa"].build(layers=2), **ASKED)
        with mode():
            _, cache = fill(model, LONG)
        found.append([latent.codec.encode for pair in latents(cache) for latent in pair])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


PROCESS = """
import hashlib, sys, torch, lorc_fx
sys.path[:0] = sys.argv[1:]
from families import FAMILIES
from test_first_prompt import ASKED, LONG, fill
from helpers import compiled, latents
torch.set_num_threads(1)
model = compiled(FAMILIES["llama-gqa"].build(layers=2), **ASKED)
_, cache = fill(model, LONG)
rows = [latent.codes.contiguous().view(torch.uint8).numpy().tobytes() for pair in latents(cache) for latent in pair]
print(hashlib.sha256(b"".join(rows)).hexdigest())
"""


def test_two_processes_get_bit_equal_caches():
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, *sys.path]
    one, two = (subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2))
    assert len(one.strip()) == 64 and one == two
