"""Several threads at once: each gets what it gets alone. Dynamo compiles under a lock; ours must be safe too."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

import lorc_fx
from helpers import (
    assert_close,
    assert_tokens,
    compiled,
    feed,
    generate,
    latents,
    new_cache,
    options,
    prompt,
)
from lorc_fx import runtime
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("clean", "many_shapes", "restless")


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns every few bytecodes."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of jobs that start at once; what one raises is raised here."""
    results: list[Any] = [None] * len(jobs)
    failed: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        try:
            start.wait()
            results[i] = jobs[i]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return results


def build(seed: int = 0, layers: int = 1) -> Any:
    return FAMILIES["llama-gqa"].build(seed=seed, layers=layers)


def test_generations_at_once():
    """From a cold start (whoever comes first compiles) and again, prompts of several lengths."""
    eager = build(layers=2)
    model = compiled(copy.deepcopy(eager), ratio=1.0)
    prompts = [prompt(1, 5 + i, seed=i) for i in range(3)]
    want = [generate(eager, *p) for p in prompts]
    for _ in range(3):
        for got, expected in zip(together(*(lambda p=p: generate(model, *p) for p in prompts)), want, strict=True):
            assert_tokens("sequences", got.sequences, expected.sequences)
            assert_close("logits", got.logits, expected.logits, 1e-4)
            latents(got.cache)


def test_models_that_share_a_graph(monkeypatch):
    """A call of another model comes in between a call's look at its weights and the graph's run."""
    family, ids = [build(), build(seed=5)], prompt(1, 6)[0]
    want = [feed(m, ids, new_cache(m)) for m in family]
    first, second = family
    compiled(first, ratio=1.0)
    second.compile(backend="lorc", options=options(ratio=1.0))
    for model in family:
        feed(model, ids, new_cache(model))
    run, calls = runtime.Binding.__call__, []

    def interrupted(binding: Any, *given: Any) -> Any:
        calls.append(binding)
        if len(calls) == 1:
            together(lambda: feed(second, ids, new_cache(second)))
        return run(binding, *given)

    monkeypatch.setattr(runtime.Binding, "__call__", interrupted)
    assert_close("logits", feed(first, ids, new_cache(first)), want[0], 1e-4)
    assert len(calls) == 2 and calls[0] is calls[1], "they do not share a graph: this shows nothing"
    assert_close("logits of the other", feed(second, ids, new_cache(second)), want[1], 1e-4)


def test_one_prefix_continued_at_once():
    """Caches of their own over the very same LatentKVs: nobody writes into the others' rows."""
    model = compiled(build(layers=2), ratio=0.5)
    prefix = new_cache(model)
    feed(model, prompt(1, 9)[0], prefix)

    def mine() -> Any:
        return DynamicCache([(layer.keys, layer.values) for layer in prefix.layers], config=model.config)

    def answer(seed: int) -> torch.Tensor:
        cache, seen = mine(), []
        for token in prompt(1, 6, seed=seed)[0].split(1, 1):
            seen.append(feed(model, token, cache))
        latents(cache)
        return torch.cat(seen)

    want = [answer(seed) for seed in range(4)]
    before = prefix.layers[0].keys.dense()
    for _ in range(5):
        for got, expected in zip(together(*(lambda s=s: answer(s) for s in range(4))), want, strict=True):
            assert_close("logits", got, expected, 1e-6)
    assert torch.equal(prefix.layers[0].keys.dense(), before)


def test_two_first_prompts():
    """One of them gives the statistics; both caches are coded by the codecs made of it, and both go on so."""
    model = compiled(build(), ratio=0.5, calibration="first-prompt")
    feed(model, prompt(1, 20)[0], new_cache(model))
    prompts = [prompt(1, 300, seed=i)[0] for i in (1, 2)]

    def read(ids: torch.Tensor) -> Any:
        cache = new_cache(model)
        feed(model, ids, cache)
        feed(model, ids[:, :1], cache)
        return cache

    caches = together(*(lambda p=p: read(p) for p in prompts))
    assert lorc_fx.fidelity(model)
    (one, other) = (latents(cache)[0] for cache in caches)
    assert all(a.codec is b.codec for a, b in zip(one, other, strict=True))
    assert all(isinstance(x, LatentKV) and x.tail is None for x in (*one, *other))
