"""LORC_DISABLE turns the backend off: the inner compiler on the untouched graph, whatever else is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import lorc_fx
from helpers import cache_of
from lorc_fx.errors import BadOption
from lorc_fx.latent import LatentKV

ASKED: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
IDS = torch.arange(1, 9)[None]


def keys_of(model: Any) -> tuple[torch.Tensor, Any]:
    """Tokens of a greedy generation, and the keys of the first layer."""
    out = model.generate(IDS, **ASKED)
    return out.sequences, cache_of(out).layers[0].keys


@pytest.mark.parametrize("value", ["1", "true", " Yes ", "ON"])
def test_off(quiet: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    seen: list[Any] = []

    def inner(gm: Any, examples: Any) -> Any:
        seen.append(gm)
        return gm.forward

    model = tiny.llama()
    want, _ = keys_of(model)
    monkeypatch.setenv("LORC_DISABLE", value)
    # options that would be refused, but for the inner compiler, which still counts
    model.compile(backend="lorc", options={"ratio": 7, "calibration": "/no/such/file", "inner": inner})
    got, keys = keys_of(model)
    assert torch.equal(got, want)
    assert not isinstance(keys, LatentKV)
    assert seen, "the inner compiler was not asked"


@pytest.mark.parametrize("value", ["", "0", "no", "Off"])
def test_on(quiet: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORC_DISABLE", value)
    model = tiny.llama()
    model.compile(backend="lorc", options={**lorc_fx.PAPER, "ratio": 1.0, "inner": "eager"})
    assert isinstance(keys_of(model)[1], LatentKV)


def test_another_word_is_refused(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORC_DISABLE", "maybe")
    model = tiny.llama()
    model.compile(backend="lorc", options={"inner": "eager"})
    with pytest.raises(BadOption, match="LORC_DISABLE='maybe' is not allowed"):
        keys_of(model)


def test_a_coded_cache_goes_on_decoded(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    options = {**lorc_fx.PAPER, "ratio": 1.0, "inner": "eager"}
    cache = _cache(model)
    with torch.no_grad():
        want = model(IDS, use_cache=True).logits[:, -1]
        model.compile(backend="lorc", options=options)
        _call(model, IDS[:, :-1], cache)
        assert isinstance(cache.layers[0].keys, LatentKV)
        monkeypatch.setenv("LORC_DISABLE", "1")
        torch._dynamo.reset()
        model.compile(backend="lorc", options=options)
        got = _call(model, IDS[:, -1:], cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _call(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    from lorc_fx.evaluate import cache_keyword

    return model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache})
