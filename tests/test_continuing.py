"""One cache, used for longer than one call of ``generate``: prefixes, chats, pieces, padding, rows that end early."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, make_low_rank
from transformers import DynamicCache

from helpers import (
    assert_close,
    assert_tokens,
    compiled,
    feed,
    generate,
    latents,
    new_cache,
    piecewise,
    prompt,
)
from lorc_fx.latent import cache_nbytes, in_step

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")

PREFIX, TURN, STEPS = 9, 4, 5
RATIOS = {1.0: 1.0, 0.6: 0.25}
"""ratio -> rank of the weights, as a fraction, that it holds without loss (positions come on top of the codes)"""


def both(name: str = "llama-gqa", ratio: float = 1.0, layers: int | None = None, **given: Any) -> tuple[Any, Any]:
    """(eager, compiled) of the same weights, which lose nothing at ``ratio``."""
    family = FAMILIES[name]
    eager = family.build(layers=layers)
    if RATIOS[ratio] < 1:
        make_low_rank(family, eager, RATIOS[ratio])
    return eager, compiled(copy.deepcopy(eager), ratio=ratio, scheduler="uniform", **given)


def answer(model: Any, ids: torch.Tensor, cache: Any, steps: int = STEPS) -> torch.Tensor:
    """Logits of a turn and of ``steps`` greedy tokens after it: [B, S + steps, vocab]."""
    seen = [feed(model, ids, cache)]
    for _ in range(steps):
        seen.append(feed(model, seen[-1][:, -1:].argmax(-1), cache))
    return torch.cat(seen, 1)


def coded(cache: Any) -> None:
    """All layers are coded, without dense tails, and keys of all layers share one track of positions."""
    pairs = latents(cache)
    assert all(x.tail is None for pair in pairs for x in pair)
    kept = [k for k, _ in pairs if k.positions is not None]
    groups = {k.length for k in kept}  # layers with a sliding window keep other tokens
    for length in groups:
        same = [k for k in kept if k.length == length]
        assert all(in_step(k, same[0]) for k in same), "positions are no longer shared"


def turn(seed: int, rows: int = 1) -> torch.Tensor:
    return prompt(rows, TURN, seed=seed)[0]


@pytest.mark.parametrize(("name", "ratio"), [("llama-gqa", 1.0), ("gpt2", 0.6)])
def test_a_prefix_reused_in_place(name, ratio):
    """A system prompt, then several requests behind it, each cut off again."""
    models = both(name, ratio)
    answers: dict[int, list[torch.Tensor]] = {}
    for model in models:
        cache = new_cache(model)
        feed(model, prompt(1, PREFIX)[0], cache)
        for seed in (1, 2, 1):
            answers.setdefault(seed, []).append(answer(model, turn(seed), cache))
            cache.crop(PREFIX - cache.get_seq_length())
    coded(cache)
    for seed, found in answers.items():
        for got in found[1:]:
            assert_close(f"answer to {seed}", got, found[0], 1e-4)


@pytest.mark.parametrize("way", ["deepcopy", "repeat", "select", "cat"])
def test_a_prefix_for_several_requests(way):
    """One row prefilled, then a cache of two rows (or two caches) made of it; the original goes on too."""
    seen, rows = [], 1 if way == "deepcopy" else 2
    for model in both("llama-gqa", 0.6):
        cache = new_cache(model)
        feed(model, prompt(1, PREFIX)[0], cache)
        again = copy.deepcopy(cache)
        if way == "repeat":
            again.batch_repeat_interleave(2)
        elif way == "select":
            again.batch_select_indices(torch.tensor([0, 0]))
        elif way == "cat":
            layers = [(torch.cat([x.keys, x.keys]), torch.cat([x.values, x.values])) for x in cache.layers]
            again = DynamicCache(layers, config=model.config)
        turns = ((3, rows, again), (4, 1, cache), (5, rows, again))
        seen.append(torch.cat([answer(model, turn(seed, n), c).flatten(0, 1) for seed, n, c in turns]))
    coded(cache)
    coded(again)
    assert cache_nbytes(again, used=True) == rows * again.get_seq_length() * per_token(again)
    assert_close("logits", seen[1], seen[0], 1e-4)


def per_token(cache: Any) -> int:
    """Bytes that a token of one row takes, once for positions."""
    pairs = latents(cache)
    codes = sum(x.codes.shape[2] * x.codes.element_size() for pair in pairs for x in pair)
    return codes + (4 if any(x.positions is not None for pair in pairs for x in pair) else 0)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_a_chat(name):
    """generate, more user tokens, generate again, with one cache."""
    said = []
    for model in both(name, 0.6, FAMILIES[name].fewest):
        cache, ids = new_cache(model), prompt(2, PREFIX)[0]
        for seed in (1, 2, 3):
            ids = torch.cat([ids, turn(seed, 2)], 1)
            ids = generate(model, ids, torch.ones_like(ids), cache, new=STEPS).sequences
        said.append(ids)
    coded(cache)
    assert_tokens("the chat", said[1], said[0])


PIECES = [("qwen3", 1.0, "model"), ("qwen3", 0.25, "auto"), ("gpt2", 0.5, "int8"), ("gpt2", 0.25, "model")]


@pytest.mark.parametrize(("name", "ratio", "precision"), PIECES)
def test_the_same_text_in_any_pieces(name, ratio, precision):
    """The compressed model is one function at every ratio: token by token from nothing, or all at once."""
    model = compiled(FAMILIES[name].build(layers=1), ratio=ratio, precision=precision)
    ids = prompt(2, 10)[0]
    found = {}
    for how, ends in {"whole": [10], "pieces": [3, 4, 8, 10], "tokens": list(range(1, 11))}.items():
        cache = new_cache(model)
        found[how] = piecewise(model, ids, cache, ends)
        coded(cache)
    assert_close("in pieces", found["pieces"], found["whole"], 1e-4)
    assert_close("token by token", found["tokens"], found["whole"], 1e-4)


@pytest.mark.parametrize(("name", "side"), [("llama-gqa", "left"), ("llama-gqa", "right"), ("gpt2", "right")])
def test_prompts_of_different_lengths(name, side):
    """Padded on either side, with positions that leave the padding out: each row answers as it does alone."""
    lengths, most = (5, 9, 7), 9
    rows = [prompt(1, n, seed=n)[0] for n in lengths]
    eager, model = both(name, 0.6)
    mask = torch.zeros(3, most, dtype=torch.long)
    ids = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        at = slice(most - row.shape[1], most) if side == "left" else slice(0, row.shape[1])
        ids[i, at], mask[i, at] = row[0], 1
    cache, positions = new_cache(model), (mask.cumsum(1) - 1).clamp_min(0)
    logits = feed(model, ids, cache, attention_mask=mask, position_ids=positions)
    last = torch.full((3,), most - 1) if side == "left" else torch.tensor(lengths) - 1
    steps = [logits[torch.arange(3), last]]
    for _ in range(STEPS):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        token = steps[-1].argmax(-1, keepdim=True)
        at = mask.sum(1, keepdim=True) - 1
        steps.append(feed(model, token, cache, attention_mask=mask, position_ids=at)[:, -1])
    coded(cache)
    got = torch.stack(steps, 1)
    for i, row in enumerate(rows):
        alone = answer(eager, row, new_cache(eager))[:, row.shape[1] - 1 :]
        assert_close(f"row {i}", got[i : i + 1], alone, 1e-4)


def test_rows_that_end_at_different_times():
    """An end token that one row says early: it is padded, the others go on as they did."""
    eager, model = both("gpt2", 0.6)
    ids, mask = prompt(3, PREFIX, 2)
    free = generate(eager, ids, mask, new=10).sequences[:, PREFIX:]
    end = next(int(t) for t in free[0, 2:5] if all(int(t) not in row[:6].tolist() for row in free[1:]))
    want = generate(eager, ids, mask, new=10, eos_token_id=end, pad_token_id=0)
    got = generate(model, ids, mask, new=10, eos_token_id=end, pad_token_id=0)
    assert bool((want.sequences[0, -3:] == 0).all()) and bool((want.sequences[1:, -1] != 0).any())
    assert_tokens("sequences", got.sequences, want.sequences)
    coded(got.cache)


def test_two_generations_in_turns():
    """Two caches of one model, a step of each in turn: as one after the other."""
    _, model = both("llama-gqa", 0.6)
    alone = [answer(model, prompt(1, n, seed=n)[0], new_cache(model)) for n in (9, 6)]
    caches = [new_cache(model) for _ in alone]
    seen = [[feed(model, prompt(1, n, seed=n)[0], c)] for n, c in zip((9, 6), caches, strict=True)]
    for _ in range(STEPS):
        for mine, cache in zip(seen, caches, strict=True):
            mine.append(feed(model, mine[-1][:, -1:].argmax(-1), cache))
    for got, want in zip(seen, alone, strict=True):
        assert_close("logits", torch.cat(got, 1), want, 1e-6)


def test_a_long_sequence():
    """3000 tokens in pieces, then more one by one: bytes as planned, spare room at most an eighth, tokens equal."""
    family = FAMILIES["llama-gqa"]
    eager = family.build(layers=1)
    make_low_rank(family, eager, 0.25)
    model = compiled(copy.deepcopy(eager), ratio=0.4, scheduler="uniform")
    ids, tokens = prompt(1, 3000)[0], []
    for each in (eager, model):
        cache = new_cache(each)
        for piece in ids.split(750, 1):
            logits = feed(each, piece, cache)
        said = [logits[:, -1:].argmax(-1)]
        for _ in range(120):
            said.append(feed(each, said[-1], cache).argmax(-1))
        tokens.append(torch.cat(said, 1))
        if each is eager:
            dense = cache_nbytes(cache)
    assert_tokens("tokens", tokens[1], tokens[0])
    coded(cache)
    used, held = cache_nbytes(cache, used=True), cache_nbytes(cache)
    assert used <= 0.4 * dense and used == 3120 * per_token(cache)
    assert held <= used * 9 / 8 + 64 * per_token(cache)
