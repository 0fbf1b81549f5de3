"""What a compressed cache does to a model: loss read through the cache, decode speed, texts, and bytes held.

Everything runs batch 1 under ``torch.no_grad`` on the model as it is: plain, or after ``model.compile(...)``.
"""

from __future__ import annotations

import contextlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple, Protocol

import torch

from lorc_fx.compat import compile_limits
from lorc_fx.latent import LatentKV
from lorc_fx.store import reset

#: called with (done, total)
Progress = Callable[[int, int], None]

#: of one torch.compile call: Dynamo's default of 8 is less than what growing sliding windows take
RECOMPILE_LIMIT = 64
#: tokens whose logits are in fp32 at a time: a vocabulary of 262,144 makes 1 MiB of each
LOGITS_AT_A_TIME = 512


class Show(Protocol):
    """Where progress goes."""

    def stage(self, text: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...


class Scores(NamedTuple):
    """Of each token of a text but the first, on the CPU: its negative log-likelihood in nats (fp32 [N - 1]), and the
    token that greedy decoding would have put in its place (int64 [N - 1])."""

    nats: torch.Tensor
    greedy: torch.Tensor

    @property
    def mean(self) -> float:
        """Nats per token, summed in fp64."""
        return self.nats.double().mean().item()


class Loss(NamedTuple):
    """Mean next-token negative log-likelihood in nats, and over how many tokens."""

    nats: float
    tokens: int


class Generation(NamedTuple):
    """What ``generate`` returned: the new text, its cache, and the seconds that each decode step took."""

    text: str
    cache: Any
    step_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """From the median step, so that prefill (not a step) and the few steps that compile do not count."""
        return 1 / statistics.median(self.step_seconds) if self.step_seconds else float("nan")


def sample_text() -> str:
    """The piece of English prose that comes with the package (written for it; about 1500 tokens)."""
    return resources.files("lorc_fx").joinpath("data/text.txt").read_text(encoding="utf-8")


def cache_keyword(model: Any) -> str:
    """The name under which the model's forward takes its cache: newer transformers call it ``cache``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def token_scores(
    model: Any, token_ids: Any, chunk: int = 32, cache: Any = None, progress: Progress | None = None
) -> Scores:
    """Feed ``token_ids`` (one piece of text, [N] or [1, N]) in chunks, so that all but the first read the cache.

    ``cache`` is the one to use (default: a fresh ``DynamicCache``); a ``chunk`` of N or more is one pass. Scores come
    from fp32 logits. Raises ValueError for fewer than two tokens or a chunk below 1.
    """
    ids = torch.as_tensor(token_ids, device=model.device).reshape(1, -1)
    total = ids.shape[1] - 1
    if total < 1 or chunk < 1:
        raise ValueError(f"needs two tokens and a chunk of at least 1, not {ids.shape[1]} and {chunk}")
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    keyword = cache_keyword(model)
    nats, greedy = torch.empty(total), torch.empty(total, dtype=torch.int64)
    for start in range(0, total, chunk):
        end = min(start + chunk, total)
        logits = model(input_ids=ids[:, start:end], use_cache=True, **{keyword: cache}).logits[0]
        for at in range(start, end, LOGITS_AT_A_TIME):
            part = slice(at, min(at + LOGITS_AT_A_TIME, end))
            exact = logits[at - start : part.stop - start].float()
            want = ids[0, at + 1 : part.stop + 1]
            nats[part] = torch.nn.functional.cross_entropy(exact, want, reduction="none").cpu()
            greedy[part] = exact.argmax(-1).cpu()
        if progress:
            progress(end, total)
    return Scores(nats, greedy)


def chunked_loss(
    model: Any, token_ids: Any, chunk: int = 32, cache: Any = None, progress: Progress | None = None
) -> Loss:
    """The mean of ``token_scores`` (same arguments)."""
    scores = token_scores(model, token_ids, chunk, cache, progress)
    return Loss(scores.mean, len(scores.nats))


@torch.no_grad()
def first_prompt(model: Any, token_ids: Any) -> None:
    """Run ``token_ids`` ([N] or [1, N]) once in a cache of its own: a compiled model with calibration="first-prompt"
    keeps what it learns from them."""
    ids = torch.as_tensor(token_ids, device=model.device).reshape(1, -1)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)


@contextlib.contextmanager
def never_dense() -> Iterator[None]:
    """In this block Dynamo raises where it would give up recompiling and run the uncompiled, uncompressed model."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def compress(model: Any, options: Mapping[str, Any]) -> None:
    """Compile ``model`` in place with ``backend="lorc"``, without codecs or compiled code of before."""
    torch.compiler.reset()
    reset(model)
    model.compile(backend="lorc", options=dict(options), **compile_limits(RECOMPILE_LIMIT))


@contextlib.contextmanager
def compressed(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """In this block ``model`` is compiled in place with ``backend="lorc"``; after it, it runs as it did before.

    It starts without codecs and leaves none, so no statistics of a first prompt come in or stay.
    """
    before = model._compiled_call_impl
    compress(model, options)
    try:
        with never_dense():
            yield
    finally:
        model._compiled_call_impl = before
        torch.compiler.reset()
        reset(model)


def generate_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 48, **kwargs: Any) -> Generation:
    """Greedy text (``kwargs`` go to ``generate``), with the cache that it leaves and the time of each step."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids, generation = _generate(model, dict(inputs), max_new_tokens, **kwargs)
    return generation._replace(text=tokenizer.decode(ids, skip_special_tokens=True))


WARMUP_STEPS = 3
"""Before what ``decode_speed`` times."""


def decode_speed(model: Any, prompt: Any, n: int = 32, progress: Progress | None = None) -> float:
    """Tokens per second from the median of ``n`` decode steps after ``prompt`` ([N] or [1, N] token ids).

    It goes through ``generate`` and repeats a warm-up run of a few steps before, so neither prefill nor compiles count.
    """
    ids = torch.as_tensor(prompt, device=model.device).reshape(1, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _generate(model, inputs, WARMUP_STEPS + 1, min_new_tokens=WARMUP_STEPS + 1)
    if progress:
        progress(1, 2)
    _, generation = _generate(model, inputs, n + 1, min_new_tokens=n + 1)
    if progress:
        progress(2, 2)
    return generation.tokens_per_second


def _generate(
    model: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, **kwargs: Any
) -> tuple[torch.Tensor, Generation]:
    """New token ids, and a Generation whose text is still empty."""
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        """Never stops; notes when each token was there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    clock = Clock()
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "stopping_criteria": [clock]}
    if model.generation_config.pad_token_id is None:  # else transformers says at each call that it takes the first end
        end = model.generation_config.eos_token_id
        settings["pad_token_id"] = (end[0] if isinstance(end, list) else end) or 0
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings | kwargs)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    steps = tuple(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))
    return out.sequences[0, inputs["input_ids"].shape[1] :], Generation("", cache, steps)


# ------------------------------------------------------------------------------------------------------------ bytes


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """All plain tensors reachable from a transformers cache or a nest.

    A tensor subclass stands for the tensors among its attributes, which is where it keeps its data; other attributes
    of it (its codec) belong to the model.
    """
    found: list[torch.Tensor] = []
    stack, seen = [cache], set()
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, (str, bytes, int, float, type, torch.nn.Module)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            parts = [part for part in vars(item).values() if isinstance(part, torch.Tensor)]
            if type(item) in (torch.Tensor, torch.nn.Parameter) or not parts:
                found.append(item)
            stack += parts
        elif isinstance(item, Mapping):
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        elif hasattr(item, "__dict__") and not callable(item):
            stack += vars(item).values()
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes really held by a cache: each distinct storage reachable from it, whole, spare capacity included.

    It knows nothing of ``LatentKV``, and so checks ``lorc_fx.cache_nbytes(cache)``.
    """
    storages = {}
    for tensor in cache_tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_per_token(cache: Any) -> float:
    """What one more token costs: over all cached tensors, used bytes divided by the tokens each one keeps, batch 1.
    Positions that layers share count once."""
    total = 0.0
    seen: set[tuple[Any, ...]] = set()
    for layer in getattr(cache, "layers", ()):
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            for part in value.parts() if isinstance(value, LatentKV) else [value]:
                key = (part.untyped_storage().data_ptr(), part.storage_offset())
                if key not in seen:
                    seen.add(key)
                    total += part.numel() * part.element_size() / (value.shape[0] * value.shape[-2])
    return total
