"""A step that raises: the cache is then as good as a dense one would be, and the step can be made again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import LogitsProcessor

from helpers import assert_close, assert_tokens, compiled, feed, generate, latents, new_cache, prompt

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")


class Failing:
    """An inner compiler whose graphs raise once when ``armed``: ``before`` they run, or ``after`` (all writes made)."""

    def __init__(self) -> None:
        self.armed = ""

    def __call__(self, gm: Any, examples: Any) -> Any:
        def run(*arguments: Any) -> Any:
            when, self.armed = self.armed, ""
            if when == "before":
                raise KeyboardInterrupt
            results = gm.forward(*arguments)
            if when == "after":
                raise KeyboardInterrupt
            return results

        return run


def interrupted(model: Any, failing: Failing, when: str, kind: str, at: int = 3) -> tuple[torch.Tensor, Any]:
    """A prompt and six tokens one by one, the step ``at`` (0: the prompt) being made twice. Logits, cache."""
    cache, seen = new_cache(model, kind, 20), []
    for i, piece in enumerate([prompt(2, 7)[0], *prompt(2, 6, seed=1)[0].split(1, 1)]):
        if i == at and when:
            failing.armed = when
            with pytest.raises(KeyboardInterrupt):
                feed(model, piece, cache)
        seen.append(feed(model, piece, cache))
    return torch.cat(seen, 1), cache


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_a_step_made_again(name, when, at):
    """A cache that grows: it is as it was before the step, so that the step is right when it is made again."""
    family = FAMILIES[name]
    eager, failing = family.build(layers=family.fewest), Failing()
    model = compiled(copy.deepcopy(eager), ratio=1.0, inner=failing)
    got, cache = interrupted(model, failing, when, "dynamic", at)
    latents(cache)
    if name == "gemma3" and at:  # transformers counts the tokens of a window before the step: so does a dense cache
        torch._dynamo.reset()
        eager.compile(backend=failing)
    else:
        when = ""
    assert_close("logits", got, interrupted(eager, failing, when, "dynamic", at)[0], 1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_into_a_buffer_made_again(when):
    """A static cache counts in the graph: it does what a dense one does in the hands of a stock backend."""
    eager, failing = FAMILIES["llama-gqa"].build(), Failing()
    model = compiled(copy.deepcopy(eager), ratio=1.0, inner=failing)
    got, cache = interrupted(model, failing, when, "static")
    latents(cache)
    torch._dynamo.reset()
    eager.compile(backend=failing)
    assert_close("logits", got, interrupted(eager, failing, when, "static")[0], 1e-4)


class Raising(LogitsProcessor):
    """Raises at the fourth token, once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.ids = input_ids
        if self.calls == 4:
            raise ArithmeticError("not this token")
        return scores


def test_generate_after_a_processor_raised():
    """What was generated is in the cache: with the tokens so far, generate goes on as if nothing had been."""
    eager = FAMILIES["qwen3"].build(layers=1)
    model = compiled(copy.deepcopy(eager), ratio=1.0)
    ids, mask = prompt(2, 9)
    want, processor, cache = generate(eager, ids, mask, new=8), Raising(), new_cache(model)
    with pytest.raises(ArithmeticError):
        generate(model, ids, mask, cache, new=8, logits_processor=[processor])
    cache.crop(processor.ids.shape[1] - 1 - cache.get_seq_length())  # the step whose token was refused is made again
    got = generate(model, processor.ids, torch.ones_like(processor.ids), cache, new=5)
    assert_tokens("sequences", got.sequences, want.sequences)
    latents(got.cache)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_hook_that_raises_between_two_layers(name):
    """With a graph for each layer, the first has the step's tokens and the second has not, as in a dense cache: with
    each layer cut to what all have, the step can be made again. (Rotary keys stay dense across a graph break.)"""
    eager = FAMILIES[name].build()
    model = compiled(copy.deepcopy(eager), ratio=1.0)
    found = []
    for each in (eager, model):
        raised = {"armed": False}

        def hook(module: Any, args: Any, raised: dict[str, bool] = raised) -> None:
            torch._dynamo.graph_break()
            if raised["armed"]:
                raised["armed"] = False
                raise ArithmeticError("between two layers")

        each.get_submodule(FAMILIES[name].layers)[1].register_forward_pre_hook(hook)
        cache, pieces = new_cache(each), prompt(1, 4, seed=1)[0].split(1, 1)
        feed(each, prompt(1, 7)[0], cache)
        raised["armed"] = True
        with pytest.raises(ArithmeticError):
            feed(each, pieces[0], cache)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        for layer in cache.layers:
            layer.crop(7 - layer.get_seq_length())
        found.append((lengths, torch.cat([feed(each, piece, cache) for piece in pieces], 1)))
    assert found[0][0] == found[1][0] == [8, 7]
    assert_close("logits", found[1][1], found[0][1], 1e-4)
    if name == "gpt2":
        latents(cache)
