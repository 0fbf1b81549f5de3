"""Bytes that are copied into a cache per decoded token, as it grows.

    python -m bench.growth [--tokens 4096] [--out bench/results/growth.json]

Counted, not timed: a dispatch mode sees each ATen op, and what an op writes into storage that the cache holds after the
step is a copy into the cache. A new tensor (``cat``, ``clone``) counts whole, a write in place by what is written into
it (``copy_``: the view, ``index_copy_``: its source). Not counted: what attention reads, and what it makes of that for
itself. A point at T is the mean over the tokens from T / 2 to T, so that growth by a fraction is seen in full.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorc_fx import PAPER, LatentKV, cache_nbytes, rows
from lorc_fx.console import write_json
from lorc_fx.latent import tensors_of

RESULTS = Path(__file__).parent / "results"
POINTS = (256, 512, 1024, 2048, 4096)
VOCAB = 64
VARIANTS = ("dynamic, eager", "static, eager", "lorc, full rank", "lorc, half", "lorc, first prompt")

aten = torch.ops.aten
#: ops that make a tensor without writing into it
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}
#: op -> the argument that holds what it writes, where that is not its first one
SOURCES = {aten.index_copy_.default: 3, aten.index_put_.default: 2, aten.index_copy.default: 3, aten.scatter_.src: 3}


class Step(NamedTuple):
    """Bytes copied into the cache, and bytes that it then held and used."""

    copied: int
    held: int
    used: int


class Writes(TorchDispatchMode):
    """While entered, notes how many bytes ops write into which tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, int]] = []  # holds the tensors, so that no storage is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.is_mutable:
            written = [
                a for a, s in zip(args, schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
            ]
            source = args[SOURCES[func]] if func in SOURCES else None
        else:
            fresh = func not in EMPTY and all(r.alias_info is None for r in schema.returns)
            written, source = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)] if fresh else [], None
        for tensor in written:
            self.seen.append((tensor, _nbytes(tensor if source is None else source)))
        return out

    def into(self, cache: Any) -> int:
        """Bytes written into storage of ``cache`` since the last call."""
        tensors = [p for t in tensors_of(cache) for p in (t.parts() if isinstance(t, LatentKV) else [t])]
        held = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        total = sum(n for tensor, n in self.seen if _plain(tensor) and tensor.untyped_storage().data_ptr() in held)
        self.seen.clear()
        return total


def _plain(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, LatentKV) and tensor.numel() > 0


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def model() -> Any:
    """A Llama of two layers, two kv heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def decode(variant: str, tokens: int, start: int = 16) -> list[Step]:
    """A prompt of ``start`` tokens, then one at a time up to ``tokens``: a Step for each of these, and an empty
    one for each of the prompt."""
    from transformers import DynamicCache, StaticCache

    from lorc_fx.evaluate import cache_keyword

    lm, writes = model(), Writes()
    torch._dynamo.reset()
    config = lm.config
    static = variant.startswith("static")
    cache = StaticCache(config=config, max_cache_len=tokens) if static else DynamicCache(config=config)
    counting: Callable[..., Any] = lm
    if variant.startswith("lorc"):
        ratio = {"full rank": 1.0, "half": 0.5}.get(variant.removeprefix("lorc, "))
        chosen: dict[str, Any] = {"ratio": 0.45} if ratio is None else {**PAPER, "ratio": ratio}
        start = start if ratio is not None else 300
        lm.compile(backend="lorc", options={**chosen, "inner": lambda gm, examples: _within(writes, gm.forward)})
    else:
        counting = _within(writes, lm)
    found = []
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(rows, "_grown", _within(writes, rows._grown)):
        for begin, end in [(0, start), *((t, t + 1) for t in range(start, tokens))]:
            counting(input_ids=ids[:, begin:end], use_cache=True, **{cache_keyword(lm): cache})
            copied = writes.into(cache)
            if begin:
                found.append(Step(copied, cache_nbytes(cache), cache_nbytes(cache, used=True)))
    return [Step(0, 0, 0)] * (tokens - len(found)) + found


def _within(writes: Writes, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, with its ops counted."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        with writes:
            return call(*args, **kwargs)

    return counted


def points(found: Sequence[Step]) -> list[dict[str, float]]:
    """At each of POINTS: mean bytes copied per token, bytes of a token, and the share that is held to spare."""
    made = []
    for at in (p for p in POINTS if p <= len(found)):
        half = [step for step in found[at // 2 : at] if step.used]
        if half:
            copied = sum(step.copied for step in half) / len(half)
            last = half[-1]
            made.append({"tokens": at, "copied": copied, "token": last.used / at, "spare": last.held / last.used - 1})
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes copied into a cache per decoded token.")
    parser.add_argument("--tokens", type=int, default=max(POINTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"command": "python -m bench.growth", "torch": torch.__version__, "variants": {}}
    for variant in VARIANTS:
        result["variants"][variant] = points(decode(variant, args.tokens))
        shown = ", ".join(f"{p['tokens']}: {p['copied']:.0f} ({p['token']:.0f})" for p in result["variants"][variant])
        print(f"{variant}: bytes copied per token (bytes of a token) at {shown}", flush=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
