"""What the tests of compiled models share: one assertion, the ways to run a model, and backends that record."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import DynamicCache, LogitsProcessor, StaticCache

from lorc_fx.latent import LatentKV

BEAMS = 3
CHUNK = 5


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest wanted value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, tol: float = 1e-4) -> None:
    """``got`` is ``want`` within ``tol``, relative to the largest wanted value; the message names the tensor."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    far = error(got, want)
    assert far <= tol, f"{name}: relative error {far:.2e}, allowed {tol:.0e}"


def assert_tokens(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got, want), f"{name}: tokens differ: {got.tolist()}, wanted {want.tolist()}"


# -- running a model -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """``logits`` [steps, rows, vocab] in the model's dtype; ``sequences`` [batch, tokens]."""

    sequences: torch.Tensor
    logits: torch.Tensor
    cache: Any


class Forced(LogitsProcessor):
    """Teacher forcing inside ``generate``: only the given token may come next (rows repeat for beams)."""

    def __init__(self, sequences: torch.Tensor) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.sequences[:, input_ids.shape[1]].repeat_interleave(len(scores) // len(self.sequences))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], scores.gather(1, token[:, None]))


def cache_name(model: Any) -> str:
    """How this transformers names the cache argument."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cache_of(out: Any) -> Any:
    """The cache in what ``generate`` returns."""
    return out["cache"] if "cache" in out else out["past_key_values"]


def new_cache(model: Any, kind: str = "dynamic", tokens: int = 32) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=tokens)
    return DynamicCache(config=model.config)


def prompt(batch: int = 2, tokens: int = 9, pad: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask; the first row is padded on the left by ``pad``."""
    ids = torch.randint(2, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return ids, mask


def generate(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any = None,
    new: int = 8,
    mode: str = "greedy",
    chunks: int = 1,
    forced: torch.Tensor | None = None,
    **more: Any,
) -> Run:
    """transformers' ``generate``; ``mode`` is greedy, sample or beam; two ``chunks``: prefill in pieces of CHUNK."""
    if "cache_implementation" not in more:
        more[cache_name(model)] = new_cache(model) if cache is None else cache
    if chunks > 1:
        more["prefill_chunk_size"] = CHUNK
    if forced is not None:
        more["logits_processor"] = [Forced(forced)]
    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "sample": {"do_sample": True, "top_k": 0}}
    kinds["beam"] = {"num_beams": BEAMS}
    torch.manual_seed(7)
    more = {"do_sample": False, **kinds[mode], **more}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **more
    )
    return Run(out.sequences, torch.stack(out.logits), getattr(out, cache_name(model)))


@torch.no_grad()
def loop(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any = None,
    new: int = 8,
    mode: str = "greedy",
    chunks: int = 1,
    forced: torch.Tensor | None = None,
    call: Any = None,
) -> Run:
    """The loop that a user writes; ``call`` is ``torch.compile(model)`` or None for the model itself."""
    cache = new_cache(model) if cache is None else cache
    named = inspect.signature(type(model).forward).parameters
    cuts = [slice(0, CHUNK), slice(CHUNK, ids.shape[1])] if chunks > 1 else [slice(0, ids.shape[1])]
    torch.manual_seed(7)
    logits: list[torch.Tensor] = []
    for _ in range(new):
        for cut in cuts:
            inputs = {"attention_mask": mask[:, : cut.stop], cache_name(model): cache, "use_cache": True}
            if "position_ids" in named:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, cut]
            out = (model if call is None else call)(ids[:, cut], **inputs)
        logits.append(out.logits[:, -1])
        if forced is not None:
            token = forced[:, ids.shape[1]]
        elif mode == "sample":
            token = torch.multinomial(logits[-1].float().softmax(-1), 1)[:, 0]
        else:
            token = logits[-1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(token[:, None])], 1)
        cuts = [slice(ids.shape[1] - 1, ids.shape[1])]
    return Run(ids, torch.stack(logits), cache)


@torch.no_grad()
def piecewise(model: Any, ids: torch.Tensor, cache: Any, cuts: list[int]) -> torch.Tensor:
    """Logits at every position, the prompt being fed in pieces that end at ``cuts``."""
    pieces = [ids[:, a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    return torch.cat([model(p, **{cache_name(model): cache, "use_cache": True}).logits for p in pieces], 1)


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
    """Logits [B, S, vocab] of ``ids`` behind what ``cache`` holds."""
    return model(ids, **{cache_name(model): cache, "use_cache": True}, **more).logits


def matrix(n: int, d: int, seed: int) -> torch.Tensor:
    """Normal numbers [n, d] in fp64."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- cases ----------------------------------------------------------------------------------------------------------


def some(cases: Any, quick: Any) -> list[Any]:
    """Cases (values, or tuples of them) as pytest's parameters: those in ``quick`` run by default; the others, which
    show the same on more models, are slow."""
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*v, marks=m) for v, m in zip(values, marks, strict=True)]


# -- compiling -------------------------------------------------------------------------------------------------------


def options(**given: Any) -> dict[str, Any]:
    """``given`` over the inner compiler and the codec that most tests are about: LoRC's, known without any data."""
    return {"inner": "eager", "calibration": "none", **given}


def compiled(model: Any, **given: Any) -> Any:
    """``model`` itself, its forward compiled with ``backend="lorc"``; what Dynamo knew before is forgotten."""
    torch._dynamo.reset()
    model.compile(backend="lorc", options=options(**given))
    return model


class Recorder:
    """An inner backend that runs graphs as they are and keeps them: ``ops()`` counts the calls of each."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    def ops(self, which: int = -1) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in self.graphs[which].graph.nodes:
            if node.op == "call_function":
                found[str(node.target)] = found.get(str(node.target), 0) + 1
        return found


def latents(cache: Any) -> list[tuple[LatentKV, LatentKV]]:
    """(keys, values) of each layer; fails where one is not coded."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    for i, pair in enumerate(pairs):
        for kind, value in zip(("keys", "values"), pair, strict=True):
            assert isinstance(value, LatentKV), f"layer {i}: {kind} stayed dense ({type(value).__name__})"
    return pairs
