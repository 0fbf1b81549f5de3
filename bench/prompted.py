"""A prompt read in one piece, then its continuation scored in one pass on the prompt's cache: what a method that
compresses whole prompts can be measured by. Needs torch only, so that it also runs beside an older transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: logits of so many tokens are in fp32 at a time
PIECE = 512


class Prompted(NamedTuple):
    """Mean next-token loss in nats over the continuation, and the cache's bytes when the prompt had been read."""

    nats: float
    prompt_bytes: dict[str, int]


def mean_nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean cross-entropy in nats of ``logits`` [N, vocabulary] at ``targets`` [N]; fp32, summed in fp64."""
    total = 0.0
    for piece, want in zip(logits.split(PIECE), targets.split(PIECE), strict=True):
        total += float(torch.nn.functional.cross_entropy(piece.float(), want, reduction="none").double().sum())
    return total / len(targets)


@torch.no_grad()
def prompted(
    model: Any,
    ids: torch.Tensor,
    prompt: int,
    cache: Any,
    count: Callable[[Any], dict[str, int]],
    keyword: str = "past_key_values",
    compressing: contextlib.AbstractContextManager[Any] | None = None,
    more: Callable[[Any], dict[str, Any]] = lambda cache: {},
) -> Prompted:
    """Read ``ids[:, :prompt]`` into ``cache``, count its bytes, then feed all other ids but the last at once.

    Only what the continuation's own tokens predict is scored: N - prompt - 1 of the N ids. ``compressing`` is entered
    for the prompt alone; ``more`` gives further arguments of the second call (positions, masks) from the cache.
    """
    with compressing or contextlib.nullcontext():
        model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1, **{keyword: cache})
    held = count(cache)
    logits = model(input_ids=ids[:, prompt:-1], use_cache=True, **{keyword: cache}, **more(cache)).logits[0]
    return Prompted(mean_nats(logits, ids[0, prompt + 1 :]), held)
