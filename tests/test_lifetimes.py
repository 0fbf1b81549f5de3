"""What is held, and for how long: rows as long as their cache, codecs as long as their model."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from families import FAMILIES

from helpers import assert_close, assert_tokens, compiled, feed, generate, latents, new_cache, prompt
from lorc_fx.compat import is_fake
from lorc_fx.latent import LatentKV
from lorc_fx.store import STORE, reset

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")


def live_latents() -> int:
    """Those with data: compiled graphs keep fake ones."""
    gc.collect()
    return sum(type(x) is LatentKV and not is_fake(x.codes) for x in gc.get_objects())


def test_a_cache_dies_with_its_last_name():
    """Neither compiled graphs, nor tracks, nor views keep the rows of a cache that is gone."""
    model = compiled(FAMILIES["llama-gqa"].build(), ratio=0.5)
    generate(model, *prompt(2, 9))
    before = live_latents()
    run = generate(model, *prompt(2, 9), mode="beam")
    cache = run.cache
    cache.crop(-3)
    again = copy.deepcopy(cache)
    feed(model, prompt(6, 1)[0], again)
    rows = [weakref.ref(x.codes) for c in (cache, again) for pair in latents(c) for x in pair]
    assert live_latents() > before
    del run, cache, again
    assert live_latents() == before
    assert not any(ref() is not None for ref in rows)


def test_a_model_dies_and_its_codecs_leave_the_store():
    """A cache that is still about can be read: it has its codec itself."""
    gc.collect()
    held = len(STORE)
    model = compiled(FAMILIES["gpt2"].build(), ratio=0.5)
    cache = generate(model, *prompt(2, 9)).cache
    want, dead = cache.layers[0].keys.dense(), [weakref.ref(p) for p in model.parameters()]
    assert len(STORE) > held
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE) == held and not any(ref() is not None for ref in dead)
    assert torch.equal(cache.layers[0].keys.dense(), want)
    codecs = [weakref.ref(x.codec) for pair in latents(cache) for x in pair]
    del cache
    gc.collect()
    assert not any(ref() is not None for ref in codecs)  # torch's own caches keep fake tensors, which hold none


def test_codecs_go_when_they_are_forgotten_or_replaced():
    """And not with their weights only, which live on: other options, resets and changed weights do not add up."""
    model = compiled(FAMILIES["gpt2"].build(), ratio=0.5)
    for change in (reset, lambda model: [p.mul_(1.01) for p in model.parameters()]):
        feed(model, prompt(2, 9)[0], new_cache(model))
        codecs = [weakref.ref(codec) for codec in STORE.codecs(model.parameters())]
        with torch.no_grad():
            change(model)
        torch._dynamo.reset()
        feed(model, prompt(2, 9)[0], new_cache(model))
        gc.collect()
        assert codecs and not any(ref() is not None for ref in codecs)


def test_dynamo_reset_between_two_steps():
    """Graphs are made anew; codecs are those of the weights, so the cache goes on coded."""
    eager = FAMILIES["llama-gqa"].build()
    model = compiled(copy.deepcopy(eager), ratio=1.0)
    cache, dense = new_cache(model), new_cache(eager)
    for i, piece in enumerate([prompt(2, 7)[0], *prompt(2, 4, seed=1)[0].split(1, 1)]):
        assert_close(f"piece {i}", feed(model, piece, cache), feed(eager, piece, dense), 1e-4)
        torch._dynamo.reset()
    latents(cache)
    want = generate(eager, *prompt(2, 9))
    assert_tokens("sequences", generate(model, *prompt(2, 9)).sequences, want.sequences)
