"""Caches that a call was not made for: the error that a dense cache gives, or dense and right with a word about it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, make_low_rank

from helpers import assert_close, compiled, feed, generate, latents, new_cache, options, prompt
from lorc_fx.errors import EagerWarning, LorcWarning
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("clean", "many_shapes", "fresh_hints")


def low_rank(name: str = "llama-gqa", layers: int = 2) -> Any:
    family = FAMILIES[name]
    model = family.build(layers=layers)
    make_low_rank(family, model, 0.25)
    return model


PROMPT, REST = prompt(2, 9)[0], prompt(2, 4, seed=1)[0].split(1, 1)


def went_on(model: Any, cache: Any) -> torch.Tensor:
    return torch.cat([feed(model, token, cache) for token in REST], 1)


def expected(model: Any) -> torch.Tensor:
    cache = new_cache(model)
    feed(model, PROMPT, cache)
    return went_on(model, cache)


def test_another_plan_of_the_same_weights():
    """Written without loss, gone on with at a ratio that keeps fewer columns: decoded once, dense from there on, and
    said. A plan that gives the same codecs (as many columns as the weights have rank) is no other one."""
    eager = low_rank()
    want = expected(eager)
    wide = compiled(eager, ratio=0.8, scheduler="uniform")
    cache = new_cache(wide)
    feed(wide, PROMPT, cache)
    wide.compile(backend="lorc", options=options(ratio=0.7, scheduler="uniform"))
    assert_close("the same codecs", went_on(wide, copy.deepcopy(cache)), want, 1e-4)
    fresh = new_cache(wide)
    feed(wide, PROMPT, fresh)
    assert_close("with a fresh cache", went_on(wide, fresh), want, 1e-4)
    latents(fresh)
    wide.compile(backend="lorc", options=options(ratio=0.1, scheduler="uniform"))
    with pytest.warns(EagerWarning, match="another plan"):
        got = went_on(wide, cache)
    assert_close("logits", got, want, 1e-4)
    fresh = new_cache(wide)
    feed(wide, PROMPT, fresh)
    latents(fresh)


def test_a_cache_of_another_model_in_generate():
    """What it holds is read as it was written: as a dense cache of the other model would be."""
    eager, other = low_rank(), low_rank()
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    dense = new_cache(other)
    feed(other, PROMPT, dense)
    want = went_on(eager, dense)
    writer, reader = copy.deepcopy(other), copy.deepcopy(eager)
    compiled(writer, ratio=0.6, scheduler="uniform")
    reader.compile(backend="lorc", options=options(ratio=0.6, scheduler="uniform"))
    cache = new_cache(writer)
    feed(writer, PROMPT, cache)
    with pytest.warns(EagerWarning, match="other weights"):
        got = went_on(reader, cache)
    assert_close("logits", got, want, 1e-4)
    assert float((want - expected(eager)).abs().max()) > 1e-2, "the caches are alike: this shows nothing"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("warm", [False, True])
def test_another_batch_size(rows, warm):
    """Refused as a dense cache refuses it, when sizes have become dynamic too; the cache is as it was."""
    eager = low_rank()
    model = compiled(copy.deepcopy(eager), ratio=0.6, scheduler="uniform")
    if warm:
        for batch in (1, 3, 2):
            generate(model, *prompt(batch, 9), new=3)
    ids, caches = prompt(rows, 1, seed=2)[0], []
    for each in (eager, model):
        caches.append(new_cache(each))
        feed(each, PROMPT, caches[-1])
        with pytest.raises(RuntimeError, match="[Ss]ize"):
            feed(each, ids, caches[-1])
    fresh = new_cache(eager)
    feed(eager, PROMPT, fresh)
    for layer, clean in zip(caches[1].layers, fresh.layers, strict=True):
        assert isinstance(layer.keys, LatentKV) and layer.keys.shape[2] == clean.keys.shape[2]
    assert_close("logits", went_on(model, caches[1]), went_on(eager, fresh), 1e-4)


def test_more_tokens_than_a_static_cache_holds():
    eager = low_rank()
    model = compiled(copy.deepcopy(eager), ratio=0.6, scheduler="uniform")
    for each in (eager, model):
        cache = new_cache(each, "static", 10)
        feed(each, PROMPT, cache)
        feed(each, REST[0], cache)
        with pytest.raises((RuntimeError, IndexError), match="out of (range|bounds)"):
            feed(each, REST[1], cache)


@pytest.mark.parametrize("dense", ["keys of layer 0", "layer 0", "layer 1", "values"])
def test_layers_of_two_kinds(dense):
    """Some made dense by hand: these go on dense, the others coded, and the logits are right."""
    eager = low_rank()
    want = expected(eager)
    model = compiled(eager, ratio=0.6, scheduler="uniform")
    cache = new_cache(model)
    feed(model, PROMPT, cache)
    for i, layer in enumerate(cache.layers):
        if dense in ("keys of layer 0", "layer 0") and i == 0 or dense == "layer 1" and i == 1:
            layer.keys = layer.keys.dense()
        if dense == "layer 0" and i == 0 or dense == "layer 1" and i == 1 or dense == "values":
            layer.values = layer.values.dense()
    kinds = [isinstance(t, LatentKV) for layer in cache.layers for t in (layer.keys, layer.values)]
    with pytest.warns(LorcWarning):
        got = went_on(model, cache)
    assert_close("logits", got, want, 1e-4)
    assert kinds == [isinstance(t, LatentKV) for layer in cache.layers for t in (layer.keys, layer.values)]


def test_an_uncompiled_model_goes_on_and_hands_back():
    """Coded by the compiled model, appended to by an uncompiled one, read by the compiled one again."""
    eager = low_rank()
    want = expected(eager)
    model = compiled(copy.deepcopy(eager), ratio=0.6, scheduler="uniform")
    cache = new_cache(model)
    feed(model, PROMPT, cache)
    with pytest.warns(EagerWarning, match="appended dense tokens"):
        got = [feed(each, token, cache) for each, token in zip((eager, eager, model, model), REST, strict=True)]
    assert_close("logits", torch.cat(got, 1), want, 1e-4)


def test_a_dense_cache_goes_on_dense():
    eager = low_rank()
    want = expected(eager)
    model = compiled(copy.deepcopy(eager), ratio=0.6, scheduler="uniform")
    cache = new_cache(eager)
    feed(eager, PROMPT, cache)
    with pytest.warns(LorcWarning, match="stay dense"):
        got = went_on(model, cache)
    assert_close("logits", got, want, 1e-4)
    assert not any(isinstance(t, LatentKV) for layer in cache.layers for t in (layer.keys, layer.values))
