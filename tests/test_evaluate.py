"""Loss through the cache, generation, and the walk over a cache's storages."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from lorc_fx import cache_nbytes, evaluate

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=16)).eval()


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, 61, (tokens,), generator=torch.Generator().manual_seed(tokens))


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("tokens", [2, 33, 64, 65, 100])
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_chunked_loss_is_the_loss_in_one_piece(llama: Any, tokens: int, chunk: int) -> None:
    text = ids(tokens)
    with torch.no_grad():
        expected = llama(input_ids=text[None], labels=text[None]).loss.item()
    found = evaluate.chunked_loss(llama, text.tolist(), chunk)
    assert found.tokens == tokens - 1
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_chunked_loss_under_a_sliding_window(mistral: Any) -> None:
    whole = evaluate.chunked_loss(mistral, ids(65), 64)
    assert evaluate.chunked_loss(mistral, ids(65), 8).nats == pytest.approx(whole.nats, rel=1e-5)


def test_chunked_loss_reads_from_the_cache_it_is_given(llama: Any) -> None:
    done: list[tuple[int, int]] = []
    cache = DynamicCache(config=llama.config)
    fresh = evaluate.chunked_loss(llama, ids(41), 16, cache, lambda *at: done.append(at))
    assert cache.get_seq_length() == 40
    assert done == [(16, 40), (32, 40), (40, 40)]
    assert evaluate.chunked_loss(llama, ids(41), 16, cache).nats != pytest.approx(fresh.nats, rel=1e-5)


@pytest.mark.parametrize(("tokens", "chunk"), [(0, 32), (1, 32), (8, 0)])
def test_chunked_loss_refuses(llama: Any, tokens: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        evaluate.chunked_loss(llama, ids(tokens), chunk)


def test_sample_text_is_english_prose() -> None:
    text = evaluate.sample_text()
    assert 6000 < len(text) < 8000
    assert text.isascii()
    assert " the " in text


# --------------------------------------------------------------------------------------------------------- generation


class Words:
    """A tokenizer of digits."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        found = torch.tensor([[int(part) for part in text.split()]])
        return BatchEncoding({"input_ids": found, "attention_mask": torch.ones_like(found)})

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens.tolist()))


def test_generate_text(llama: Any) -> None:
    plain = llama.generate(ids(5)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    prompt = " ".join(map(str, ids(5).tolist()))
    found = evaluate.generate_text(llama, Words(), prompt, 6, min_new_tokens=6)
    assert found.text == " ".join(map(str, plain[0, 5:].tolist()))
    assert found.cache.get_seq_length() == 10
    assert len(found.step_seconds) == 5  # the first token comes from prefill
    assert found.tokens_per_second > 0


def test_median_step_ignores_the_step_that_compiles() -> None:
    steps = evaluate.Generation("", None, (9.0, 0.1, 0.1, 0.1))
    assert steps.tokens_per_second == pytest.approx(10)


def test_decode_speed(llama: Any) -> None:
    assert evaluate.decode_speed(llama, ids(5).tolist(), n=4) > 0


@pytest.mark.parametrize("ends", [None, 7, [7, 9]], ids=str)
def test_decode_speed_with_any_number_of_end_tokens(llama: Any, monkeypatch: pytest.MonkeyPatch, ends: Any) -> None:
    """Llama 3 has several, and no token to pad with."""
    monkeypatch.setattr(llama.generation_config, "eos_token_id", ends)
    monkeypatch.setattr(llama.generation_config, "pad_token_id", None)
    assert evaluate.decode_speed(llama, ids(9), n=3) > 0


# -------------------------------------------------------------------------------------------------------------- bytes


def test_shared_storages_count_once() -> None:
    base = torch.zeros(10, 8)
    assert evaluate.cache_bytes([base, base[2:4], {"view": base.view(80)}, (base,)]) == 320
    assert evaluate.cache_bytes([base[2:4]]) == 320  # a view holds all of its storage


class Pair(torch.Tensor):
    """A tensor subclass that stores two others."""

    @staticmethod
    def __new__(cls: type[Pair], a: torch.Tensor, b: torch.Tensor) -> Pair:
        self = torch.Tensor._make_wrapper_subclass(cls, (1, 2, 1000, 16), dtype=torch.float32)
        self.a, self.b, self.codec = a, b, {"theirs": torch.zeros(1000)}
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_subclasses_count_as_what_they_hold() -> None:
    rows = torch.zeros(100, 4)
    pair = Pair(rows[:10], torch.zeros(10, dtype=torch.int32))
    assert evaluate.cache_bytes({"k": pair, "rows": rows}) == 1600 + 40


@pytest.mark.parametrize("tokens", [7, 63])
def test_dynamic_cache(llama: Any, tokens: int) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=ids(tokens)[None], **{evaluate.cache_keyword(llama): cache})
    per_token = 2 * 2 * 16 * 4  # layers, keys and values, 2 heads of 8, fp32
    assert evaluate.cache_bytes(cache) == cache_nbytes(cache, used=True) == tokens * per_token
    assert evaluate.bytes_per_token(cache) == per_token


def test_sliding_window_keeps_bytes_per_token(mistral: Any) -> None:
    cache = DynamicCache(config=mistral.config)
    evaluate.chunked_loss(mistral, ids(65), 8, cache)
    assert cache.layers[0].keys.shape[-2] == 15
    assert evaluate.bytes_per_token(cache) == 2 * 2 * 16 * 4


def test_static_cache_holds_its_capacity(llama: Any) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with torch.no_grad():
        llama(input_ids=ids(5)[None], **{evaluate.cache_keyword(llama): cache})
    tensors = {id(t) for layer in cache.layers for t in (layer.keys, layer.values)}
    held = sum(t.untyped_storage().nbytes() for t in evaluate.cache_tensors(cache) if id(t) in tensors)
    assert held == 32 * 2 * 2 * 16 * 4
    assert held <= evaluate.cache_bytes(cache) <= held + 64  # and its counters


def test_coded_cache_is_held_as_cache_nbytes_says(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(torch.compiler.reset)
    model = tiny.llama()
    model.compile(backend="lorc", options={"ratio": 0.5, "inner": "eager"})
    cache = DynamicCache(config=model.config)
    evaluate.chunked_loss(model, [i % 28 for i in range(65)], 16, cache)
    dense = 2 * 2 * 16 * 4
    assert 0.4 * dense < evaluate.bytes_per_token(cache) <= 0.5 * dense
    anchors = 4 * 8  # of the codecs, one number each
    assert cache_nbytes(cache) <= evaluate.cache_bytes(cache) <= cache_nbytes(cache) + anchors
    assert cache_nbytes(cache, used=True) <= 0.5 * dense * 64
