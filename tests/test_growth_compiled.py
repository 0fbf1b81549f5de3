"""How caches grow in compiled steps: continuations of one prefix, room that is given back, bytes copied."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_cases import append, codec_of, latent_of, same

import lorc_fx
from bench import growth
from helpers import assert_close, compiled, latents, new_cache, options, piecewise, prompt
from lorc_fx.latent import in_step
from lorc_fx.rows import capacity
from lorc_fx.timing import COUNTS


@pytest.fixture(scope="module")
def pair():
    """A compiled model at full rank, and itself in eager."""
    plain = FAMILIES["llama-gqa"].build()
    yield compiled(copy.deepcopy(plain), ratio=1.0), plain
    torch._dynamo.reset()


def fork(cache, model, keep=None):
    """A second cache object over the same tensors, cut to ``keep`` tokens."""
    other = new_cache(model)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        vars(theirs).update(vars(mine))
        if keep is not None:
            theirs.keys, theirs.values = mine.keys.tokens(0, keep), mine.values.tokens(0, keep)
    return other


@settings(max_examples=12)
@given(data=st.data())
def test_compiled_continuations_never_meet(pair, data):
    """A tree of continuations and cuts of one prompt, each fed with tokens of its own by compiled steps: the logits and
    the contents of each are those of eager caches that share nothing."""
    model, plain = pair
    with torch._dynamo.config.patch(recompile_limit=64):
        ids = prompt(2, 9)[0]
        caches = [new_cache(model)]
        piecewise(model, ids, caches[0], [9])
        known = [(caches[0], ids)]
        for i in range(data.draw(st.integers(2, 5))):
            cache, ids = data.draw(st.sampled_from(known))
            keep = data.draw(st.one_of(st.none(), st.integers(1, ids.shape[1])))
            mine, kept = fork(cache, model, keep), ids[:, :keep]
            for step in range(data.draw(st.integers(1, 3))):
                token = torch.randint(2, 101, (2, 1), generator=torch.Generator().manual_seed(100 * i + step))
                got = piecewise(model, token, mine, [1])
                kept = torch.cat([kept, token], 1)
                assert_close("step", got, piecewise(plain, kept, new_cache(plain), [kept.shape[1]])[:, -1:], 1e-4)
            known.append((mine, kept))
        for cache, ids in known:
            dense = new_cache(plain)
            piecewise(plain, ids, dense, [ids.shape[1]])
            for (k, v), layer in zip(latents(cache), dense.layers, strict=True):
                assert_close("keys", k.dense(), layer.keys, 1e-4)
                assert_close("values", v.dense(), layer.values, 1e-4)


# -- giving room back --------------------------------------------------------------------------------------------------


def test_trimmed_to_what_is_used(pair):
    model, plain = pair
    ids = prompt(2, 20)[0]
    cache = new_cache(model)
    piecewise(model, ids[:, :12], cache, [9, 10, 11, 12])
    used = lorc_fx.cache_nbytes(cache, used=True)
    held = lorc_fx.cache_nbytes(cache)
    assert held > used
    assert lorc_fx.trim_cache(cache) == held - used == held - lorc_fx.cache_nbytes(cache)
    assert lorc_fx.cache_nbytes(cache, used=True) == used
    tensors = [x for both in latents(cache) for x in both]
    keys = [k for k, _ in latents(cache)]
    assert all(x.rows.codes.shape[0] == x.length == 12 for x in tensors)
    assert all(in_step(k, keys[0]) for k in keys) and keys[0].rows.track.data.shape[0] == 12, "one track for all"
    assert lorc_fx.trim_cache(cache) == 0
    compiles = COUNTS["backend_calls"]
    got = piecewise(model, ids[:, 12:], cache, [1, 2, 8])
    assert COUNTS["backend_calls"] - compiles <= 1, "the last piece is a new length, nothing else compiles"
    assert_close("logits", got, piecewise(plain, ids, new_cache(plain), [20])[:, 12:], 1e-4)
    assert all(x.rows.codes.shape[0] <= capacity(20) for x in tensors)


def test_a_cut_cache_gives_its_tokens_back(pair):
    model, _ = pair
    ids = prompt(2, 90)[0]
    cache = new_cache(model)
    piecewise(model, ids, cache, [90])
    whole = lorc_fx.cache_nbytes(cache)
    cache = fork(cache, model, 9)
    assert lorc_fx.cache_nbytes(cache) == whole, "a cut is a view"
    assert lorc_fx.trim_cache(cache) == whole - whole // 10 and lorc_fx.cache_nbytes(cache) == whole // 10


@settings(max_examples=40)
@given(data=st.data())
def test_trimming_changes_nothing_else(data):
    """Any of several continuations and views of one prefix: each shows what it showed, and goes on as it did."""
    codec = codec_of()
    known = [latent_of(codec, tokens=3)]
    for i in range(data.draw(st.integers(1, 6))):
        latent = data.draw(st.sampled_from(known))
        lo, hi = sorted(data.draw(st.tuples(st.integers(0, latent.shape[2]), st.integers(0, latent.shape[2]))))
        if data.draw(st.booleans()):
            latent = latent[:, :, lo:hi]
        known.append(append(latent, latent_of(codec, data.draw(st.integers(1, 9)), 2, i, latent.shape[2])))
    shown = [x.dense() for x in known]
    some = data.draw(st.lists(st.sampled_from(range(len(known))), unique=True))
    chosen = [known[i] for i in some]
    lorc_fx.trim_cache({"layers": chosen})
    assert lorc_fx.cache_nbytes(chosen) <= sum(x.used_nbytes() for x in chosen), "one track each at most"
    for latent, dense in zip(known, shown, strict=True):
        same(latent, dense)
    new = latent_of(codec, 2, 2, 77)
    longer = [append(x, new) for x in known]
    for latent, dense, more in zip(known, shown, longer, strict=True):
        same(latent, dense)
        same(more, torch.cat([dense, new.dense()], 2))


def test_a_trimmed_view_is_a_copy():
    codec = codec_of()
    base = latent_of(codec, tokens=6)
    view, before = base[:, :, :2], base.dense()
    lorc_fx.trim_cache(view)
    view.zero_()
    same(base, before)


def test_plain_tensors_are_left_alone():
    held = torch.zeros(9)[:3]
    assert lorc_fx.trim_cache([held, {"x": None}]) == 0 and lorc_fx.cache_nbytes(held) == 36


# -- bytes copied ------------------------------------------------------------------------------------------------------


def test_copies_per_token_do_not_grow():
    """Amortised over a doubling: the token's own row and at most ten more, where a dynamic dense cache copies all."""
    found = growth.decode("lorc, half", 700)
    token = found[-1].used / 700
    for at in (64, 128, 256, 350, 700):
        steps = [step.copied for step in found[at // 2 : at] if step.used]
        assert token <= sum(steps) / len(steps) <= 11 * token, at
    assert sorted(step.copied for step in found[16:])[600] == token, "most steps copy their own row alone"
    dense = growth.decode("dynamic, eager", 40)
    assert [step.copied for step in dense[16:]] == [step.used for step in dense[16:]]
    static = growth.decode("static, eager", 40)
    assert all(step.copied <= 1.1 * step.used / 40 for step in static[16:])


@pytest.mark.filterwarnings("ignore::lorc_fx.errors.LorcWarning")
@pytest.mark.parametrize("write", ["rows", "dense"])
def test_a_view_goes_in_as_what_it_is_of_was_written(pair, write):
    """Written in eager code, which makes the cache leave rows that it shares with another continuation."""
    model, _ = pair
    cache = new_cache(model)
    piecewise(model, prompt(2, 9)[0], cache, [9])
    base = cache.layers[0].keys
    view = base[:, :, :3]
    piecewise(model, prompt(2, 1)[0], cache, [1])
    call = torch.compile(lambda x: x * 1.0, backend="lorc", options=options())
    with torch.no_grad():
        assert torch.equal(call(view), view.dense())
        base.zero_() if write == "rows" else base.add_(1)
        assert torch.equal(call(view), base.dense()[:, :, :3])
