"""How often Dynamo compiles: once for a prefill, once for decoding, and never more than for a stock backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch._dynamo.backends.debugging import aot_eager

import lorc_fx
from helpers import Recorder, compiled, generate, latents, new_cache, prompt, some
from lorc_fx import backend

FULL = ("llama-gqa", "gpt2", "bloom")
SLIDING = ("mistral-window", "gemma3")


class Stock:
    """What inductor is to Dynamo (AOTAutograd, but nothing compiled), counting how often it is called. Tracing asks
    whether results are contiguous, so AOTAutograd tells cases apart that Dynamo alone does not: a window that is just
    full, with transformers 5.17."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.calls += 1
        return aot_eager(gm, example_inputs)


def build(name: str) -> Any:
    return FAMILIES[name].build()


def calls() -> int:
    return backend.counts()["backend_calls"]


Phase = Callable[[Any], Any]


def counted(name: str, *phases: Phase) -> tuple[list[int], list[int]]:
    """New backend calls in each phase, of lorc and of the stock backend on the same model."""
    model, ours, theirs = compiled(build(name), ratio=0.5), [], []
    backend.reset_timings()
    for phase in phases:
        before = calls()
        cache = phase(model).cache
        latents(cache)
        ours.append(calls() - before)
    assert backend.counts()["inner_compiles"] <= calls()
    torch._dynamo.reset()
    stock, model = Stock(), build(name)
    model.compile(backend=stock)
    for phase in phases:
        before = stock.calls
        phase(model)
        theirs.append(stock.calls - before)
    print(f"{name}: backend calls per phase: lorc {ours}, stock {theirs}")
    return ours, theirs


def run(tokens: int = 9, new: int = 8, kind: str = "dynamic", batch: int = 2) -> Phase:
    def phase(model: Any) -> Any:
        ids, mask = prompt(batch, tokens)
        return generate(model, ids, mask, new_cache(model, kind, tokens + new), new=new)

    return phase


def never_more(ours: list[int], theirs: list[int]) -> None:
    assert sum(ours) <= sum(theirs), f"lorc {ours}, stock {theirs}"


@pytest.mark.parametrize("name", some(FULL, FULL[:2]))
def test_full_attention_compiles_twice(name, clean):
    """Prefill and decode; then nothing: a second generate, a cache that outgrows its buffer twice."""
    ours, theirs = counted(name, run(), run(), run(new=150), run(new=150))
    assert ours == [2, 0, 0, 0]
    never_more(ours, theirs)


@pytest.mark.parametrize("name", some(["llama-gqa", "gpt2"], ["llama-gqa"]))
def test_a_new_prompt_length_compiles_once_more_and_once_only(name, clean):
    ours, theirs = counted(name, run(9), run(12), run(17), run(11), run(9))
    assert ours[0] == 2 and ours[1] <= 1 and ours[2:] == [0, 0, 0]
    never_more(ours, theirs)


@pytest.mark.parametrize("name", some(SLIDING, SLIDING[:1]))
def test_a_sliding_window_compiles_once_per_branch(name, clean):
    """A prompt (3) within the window (6). Branches of transformers' layer: prefill, filling, full, and two that last
    one step: the cache is just full, and clipped while its mask is not."""
    ours, theirs = counted(name, run(3, 12), run(3, 12), run(3, 40))
    assert ours[0] <= 5 and ours[1:] == [0, 0]
    never_more(ours, theirs)


@pytest.mark.parametrize("name", some(SLIDING, SLIDING[:1]))
def test_a_prompt_beyond_the_window_compiles_twice(name, clean):
    ours, theirs = counted(name, run(9, 12), run(9, 12), run(9, 40))
    assert ours == [2, 0, 0]
    never_more(ours, theirs)


@pytest.mark.parametrize("name", some(["llama-gqa", "gpt2", "gemma3"], ["llama-gqa", "gpt2"]))
def test_static_caches_compile_no_more_than_stock(name, clean):
    ours, theirs = counted(name, run(kind="static"), run(kind="static"))
    assert ours[0] <= 3 and ours[1] == 0
    never_more(ours, theirs)


def test_another_batch_size_compiles_once_more_and_once_only(clean):
    """Both graphs; the batch is dynamic from then on."""
    ours, theirs = counted("llama-gqa", run(), run(batch=3), run(batch=5), run())
    assert ours == [2, 2, 0, 0]
    never_more(ours, theirs)


def test_the_first_long_prompt_compiles_once_more_and_once_only(quiet):
    """It gives statistics, and the rows are others from then on, of whatever prompt."""
    model, found = compiled(build("llama-gqa"), ratio=0.5, calibration="first-prompt"), []
    for tokens in (9, 12, 40, 41, 9):  # 8 rows: 40 tokens are enough
        before = backend.counts()["inner_compiles"]  # Dynamo itself has a graph for that prompt
        latents(run(tokens, batch=8)(model).cache)
        found.append(backend.counts()["inner_compiles"] - before)
    assert found == [2, 1, 2, 0, 0]
    assert len(lorc_fx.fidelity(model)) == 4


def test_reset_compiles_nothing(clean):
    model = compiled(build("llama-gqa"), ratio=0.5)
    codecs = [x.codec for pair in latents(run()(model).cache) for x in pair]
    before = calls()
    lorc_fx.reset(model)
    again = [x.codec for pair in latents(run()(model).cache) for x in pair]
    assert not any(a is b for a, b in zip(codecs, again, strict=True)), "nothing was forgotten"
    assert calls() == before


def test_other_weights_compile_nothing(clean):
    """A second model of the same config runs through the same graphs, with codecs of its own."""
    family = FAMILIES["llama-gqa"]
    first, second = family.build(), family.build(seed=5)
    want = generate(second, *prompt())
    recorder = Recorder()
    compiled(first, ratio=1.0, inner=recorder)
    generate(first, *prompt())
    graphs = len(recorder.graphs)
    assert graphs == 2
    state = second.state_dict()
    first.load_state_dict(state)
    got = generate(first, *prompt())
    assert len(recorder.graphs) == graphs
    assert torch.equal(got.sequences, want.sequences)


def test_the_graphs_before_and_after(clean):
    """Prefill and decode: one narrow projection per site, and no wide one is left."""
    recorder = Recorder()
    model = compiled(build("llama-gqa"), ratio=0.5, scheduler="uniform", inner=recorder)
    run = generate(model, *prompt())
    ranks = [x.codec.rank for pair in latents(run.cache) for x in pair]
    shapes = [
        tuple(node.args[1].meta["val"].shape)
        for gm in recorder.graphs
        for node in gm.graph.nodes
        if str(node.target) == "aten.linear.default"
    ]
    assert len(recorder.graphs) == 2
    for rank in set(ranks):
        assert sum(shape == (rank, 64) for shape in shapes) == 2 * ranks.count(rank)
    assert (32, 64) not in shapes, "a dense key or value projection is left"
