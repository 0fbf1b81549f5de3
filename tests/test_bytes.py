"""Bytes: what a cache uses never exceeds its budget, and what it holds exceeds that by spare capacity only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES

from helpers import cache_name, compiled, latents, new_cache, prompt
from lorc_fx.latent import LatentKV, cache_nbytes
from lorc_fx.rows import capacity

RATIOS = (0.3, 0.45, 0.5, 0.77, 1.0)
#: every ratio on one model, three where windows and full attention mix (slow to compile), and both ends on others
CASES = [("llama-gqa", r) for r in RATIOS] + [("gemma3", r) for r in (0.3, 0.77, 1.0)]
CASES += [(n, r) for n in ("llama-mha", "mistral-window", "gpt2") for r in (0.3, 1.0)]
#: prompt, then one token at a time: sliding windows (6) fill, overflow and roll
LENGTHS = (4, *[1] * 7)


def parts(latent: LatentKV) -> list[torch.Tensor]:
    return [t for t in (latent.codes, latent.positions) if t is not None]


def storages(cache: Any) -> int:
    """Bytes of the distinct storages that the keys and values reach."""
    held: dict[int, int] = {}
    for pair in latents(cache):
        for latent in pair:
            track = [] if latent.rows.track is None else [latent.rows.track.data]
            for t in (*parts(latent), latent.rows.codes, *track):
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(held.values())


def used(cache: Any) -> int:
    """Bytes of the tokens shown, counted here and not by lorc_fx."""
    return sum(t.numel() * t.element_size() for pair in latents(cache) for x in pair for t in parts(x))


def dense(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for pair in latents(cache) for x in pair)


def position_bytes(cache: Any) -> int:
    """4 bytes per token of each site whose epilogue needs positions; only keys may."""
    for _, values in latents(cache):
        assert values.positions is None
    return sum(4 * k.shape[0] * k.shape[-2] for k, _ in latents(cache) if k.positions is not None)


def steps(model: Any, kind: str = "dynamic", batch: int = 2) -> Any:
    """The cache after each of LENGTHS."""
    cache = new_cache(model, kind, sum(LENGTHS))
    ids = prompt(batch, sum(LENGTHS))[0]
    with torch.no_grad():
        for new, end in zip(LENGTHS, torch.tensor(LENGTHS).cumsum(0).tolist(), strict=True):
            model(ids[:, end - new : end], **{cache_name(model): cache, "use_cache": True})
            yield cache


def check(cache: Any, ratio: float) -> None:
    allowed = ratio * dense(cache) + (position_bytes(cache) if ratio == 1.0 else 0)
    assert used(cache) <= allowed
    for pair in latents(cache):
        for latent in pair:
            assert latent.used_nbytes() == sum(t.numel() * t.element_size() for t in parts(latent))
            shown, rows = latent.length, latent.rows
            assert rows.codes.shape[0] <= max(capacity(rows.used), rows.used)
            assert rows.codes.shape[0] - shown <= 64 + shown // 8, "more spare rows than stated"
    assert used(cache) <= storages(cache)
    just_latents = [list(pair) for pair in latents(cache)]
    assert cache_nbytes(just_latents, used=True) == used(cache)
    assert cache_nbytes(just_latents) <= storages(cache)


@pytest.mark.parametrize(("name", "ratio"), CASES)
def test_never_more_than_the_ratio_at_any_length(name, ratio, clean):
    model = compiled(FAMILIES[name].build(layers=FAMILIES[name].fewest), ratio=ratio)
    for cache in steps(model):
        check(cache, ratio)
    one_rank = sum(x.shape[0] * x.shape[-2] * x.element_size() for pair in latents(cache) for x in pair)
    assert used(cache) > ratio * dense(cache) - one_rank, "the budget is not used"


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_static_caches_are_as_small(name, clean):
    model = compiled(FAMILIES[name].build(layers=FAMILIES[name].fewest), ratio=0.45)
    for cache in steps(model, "static"):
        check(cache, 0.45)


@pytest.mark.parametrize(("kind", "each"), [("dynamic", 4), ("static", 8)])
def test_positions_are_kept_once_or_in_static_caches_once_per_layer(kind, each, clean):
    """At ratio 1 they alone come on top: of two layers 4 bytes per token, or 8."""
    for cache in steps(compiled(FAMILIES["llama-gqa"].build(layers=2), ratio=1.0), kind):
        keys, rows = latents(cache)[0][0], [x.codes for pair in latents(cache) for x in pair]
        tokens = keys.shape[0] * keys.shape[-2]
        assert sum(t.numel() * t.element_size() for t in rows) == dense(cache)
        assert cache_nbytes([list(pair) for pair in latents(cache)], used=True) - dense(cache) == each * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(dtype, clean):
    model = compiled(FAMILIES["llama-gqa"].build(dtype, layers=1), ratio=0.45)
    for cache in steps(model):
        check(cache, 0.45)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_bytes_per_token(name, clean):
    model = FAMILIES[name].build(layers=FAMILIES[name].fewest)
    whole = next(steps(compiled(model, ratio=1.0)))
    per_token = dense(whole) // (2 * LENGTHS[0])
    wanted = per_token * 2 // 3
    model = compiled(FAMILIES[name].build(layers=FAMILIES[name].fewest), bytes_per_token=wanted)
    for cache in steps(model):
        tokens = [k.shape[0] * k.shape[-2] for k, _ in latents(cache)]
        assert used(cache) <= sum(wanted * t / len(tokens) for t in tokens) or len(set(tokens)) > 1
        assert used(cache) <= wanted * max(tokens)


def test_a_long_cache_holds_an_eighth_more_at_most(clean):
    model = compiled(FAMILIES["gpt-neox"].build(layers=1), ratio=0.5)
    cache = new_cache(model)
    with torch.no_grad():
        ids = prompt(1, 203)[0]
        for end in (200, 201, 202, 203):
            start = 0 if end == 200 else end - 1
            model(ids[:, start:end], **{cache_name(model): cache, "use_cache": True})
            check(cache, 0.5)
    spare = max(x.rows.codes.shape[0] - x.length for pair in latents(cache) for x in pair)
    assert 0 < spare <= 64
