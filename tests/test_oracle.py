"""At half the bytes the compiled model is one known function: the eager model with projected keys and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from families import FAMILIES
from oracle import oracle, ranks_of

from helpers import assert_close, assert_tokens, compiled, error, generate, new_cache, piecewise, prompt, some

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")

TOKENS = 12
#: the ends of the pieces
CUTS = {"token by token": list(range(1, 13)), "in two chunks": [7, 12], "in one piece": [12]}


def check(name: str, cuts: dict[str, list[int]], kind: str = "dynamic", **options: Any) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain, truth = copy.deepcopy(model), copy.deepcopy(model)
    compiled(model, ratio=0.5, **options)
    ids = prompt(2, TOKENS)[0]
    got, want = {}, None
    for how, ends in cuts.items():
        cache = new_cache(model, kind, TOKENS)
        got[how] = piecewise(model, ids, cache, ends)
        if want is None:
            ranks = ranks_of(cache)
            want = piecewise(oracle(family, truth, ranks), ids, new_cache(model, kind, TOKENS), [TOKENS])
        assert ranks_of(cache) == ranks, how
        assert_close(f"{name}, logits {how}, ranks {ranks}", got[how], want, 1e-4)
    dense = piecewise(plain, ids, new_cache(model, kind, TOKENS), [TOKENS])
    assert error(want, dense) > 1e-2, "the ranks take nothing away: this test shows nothing"


QUICK = ("llama-bias", "gpt2", "gpt-neox", "falcon-gqa", "bloom", "gemma3", "mistral-window")


@pytest.mark.parametrize("name", some(FAMILIES, QUICK))
def test_in_chunks_and_in_one_piece(name):
    check(name, {how: CUTS[how] for how in ("in two chunks", "in one piece")}, scheduler="uniform")


@pytest.mark.parametrize("name", some(["llama-bias", "gemma3", "gpt2", "gpt-neox"], ["llama-bias", "gpt2"]))
def test_token_by_token(name):
    check(name, {"token by token": CUTS["token by token"]}, scheduler="uniform")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_in_any_pieces_through_one_model(name):
    check(name, CUTS, scheduler="uniform")


@pytest.mark.parametrize(("name", "scheduler"), [("llama-gqa", "progressive"), ("gpt2", "energy")])
def test_other_schedules(name, scheduler):
    check(name, {"in two chunks": CUTS["in two chunks"]}, scheduler=scheduler)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "gpt2"])
def test_static_caches(name):
    check(name, {how: CUTS[how] for how in ("in two chunks", "in one piece")}, "static", scheduler="uniform")


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-gqa"])
def test_generate_gives_the_oracle_s_tokens(name):
    family = FAMILIES[name]
    model = family.build()
    truth = copy.deepcopy(model)
    ids, mask = prompt(2, 9, 3)
    got = generate(compiled(model, ratio=0.5, scheduler="uniform"), ids, mask)
    want = generate(oracle(family, truth, ranks_of(got.cache)), ids, mask)
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert_tokens("sequences", got.sequences, want.sequences)
