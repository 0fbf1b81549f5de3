"""Whole models for ``bench.gpu``: a small one whose tokens must be those of eager, and layers of Llama 3 8B's shape
whose decode steps and prompts are timed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorc_fx import PAPER
from lorc_fx.decode_command import apart, twin
from lorc_fx.errors import KernelWarning
from lorc_fx.evaluate import cache_keyword, compress
from lorc_fx.latent import LatentKV, cache_nbytes

ROWS = {"calibration": "none", "scheduler": "uniform", "basis": "identity", "ratio": 0.6}
"""Options beside ``precision`` for rows that hold what the dense cache would."""


@dataclass(frozen=True)
class Check:
    """A small model that is compared with eager. ``closest``: the largest difference of logits that is right, relative
    to the largest logit; 0: tokens must be equal."""

    options: Mapping[str, Any]
    static: bool = False
    dtype: torch.dtype = torch.float32
    closest: float = 0.0


FULL = {**PAPER, "ratio": 1.0}
CHECKS = {
    "full rank, dynamic": Check(FULL),
    "full rank, static": Check(FULL, static=True),
    "full rank, static, CUDA graphs": Check({**FULL, "mode": "reduce-overhead"}, static=True),
    "int8 rows, bf16": Check({**ROWS, "precision": "int8"}, dtype=torch.bfloat16, closest=0.05),
    "int8 rows, static, CUDA graphs": Check(
        {**ROWS, "precision": "int8", "mode": "reduce-overhead"}, static=True, closest=0.05
    ),
}


def llama(layers: int, hidden: int, heads: int, cached: int, dim: int, inner: int, vocab: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=cached,
        head_dim=dim,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=0.1,  # with the usual 0.02 attention changes few logits
        bos_token_id=0,
        eos_token_id=None,
    )


SMALL = (2, 256, 4, 2, 64, 512, 512)
LLAMA = (4, 4096, 32, 8, 128, 14336, 16032)
"""An eighth of Llama 3 8B, output matrix too: 4 of 32 layers, 16,032 of 128,256 tokens."""
TINY = (1, 64, 4, 2, 16, 64, 64)


def made(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of ``llama``'s ``sizes`` with random weights, made on ``device``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(llama(*sizes), dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def fresh(model: Any, static: bool, tokens: int) -> Any:
    from transformers import DynamicCache, StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens) if static else DynamicCache(config=model.config)


@torch.no_grad()
def fed(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last token's logits [B, vocabulary]."""
    torch.compiler.cudagraph_mark_step_begin()
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache}).logits[:, -1]


# -- tokens -----------------------------------------------------------------------------------------------------------


def greedy(model: Any, ids: torch.Tensor, steps: int, static: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, steps], and logits [B, vocabulary] of the first that read the cache."""
    cache = fresh(model, static, ids.shape[1] + steps)
    token = fed(model, ids, cache).argmax(-1, keepdim=True)
    tokens, logits = [token], torch.empty(0)
    for step in range(steps - 1):
        found = fed(model, token, cache)
        if step == 0:
            logits = found.float().clone()
        token = found.argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, 1), logits


def checked(check: Check, device: torch.device, inner: str | None, sizes: Sequence[int] = SMALL) -> dict[str, Any]:
    """Whether a compressed model does what eager does, and how: warnings that a kernel was not made, CUDA graphs that
    were not. ``inner``: the inner compiler, None for the usual one."""
    from torch._dynamo.utils import counters

    model = made(sizes, device, check.dtype)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    want, logits = greedy(model, ids, 12, check.static)
    counters.clear()
    compress(model, {**check.options, **({} if inner is None else {"inner": inner})})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got, close = greedy(model, ids, 12, check.static)
        again, _ = greedy(model, ids, 12, check.static)
    error = float((close - logits).abs().max() / logits.abs().max())
    equal = torch.equal(got, want) and torch.equal(again, want)
    skips = int(counters["inductor"]["cudagraph_skips"]) if "mode" in check.options else None
    torch.compiler.reset()
    return {
        "right": error <= check.closest if check.closest else equal,
        "tokens_equal": equal,
        "error": error,
        "cudagraph_skips": skips,
        "said": [str(w.message) for w in said if issubclass(w.category, KernelWarning)],
    }


# -- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """``options``: of the backend lorc, or None for a dense cache under inductor."""

    options: Mapping[str, Any] | None
    static: bool = False
    mode: str | None = None


FASTER = "reduce-overhead"
VARIANTS = {
    "dense, static, CUDA graphs": Variant(None, True, FASTER),
    "int8 rows": Variant({**ROWS, "precision": "int8"}),
    "dense": Variant(None),
    "int8 rows, static, CUDA graphs": Variant({**ROWS, "precision": "int8"}, True, FASTER),
    "4-bit rows": Variant({**ROWS, "precision": "int4"}),
}
"""By importance: the last ones are left out first where time is short."""


@dataclass
class Ready:
    """A variant with a cache of many tokens, compiled."""

    model: Any
    variant: Variant
    prompt: torch.Tensor
    tokens: int
    room: int
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        self.cache = fresh(self.model, self.variant.static, self.tokens + self.room)
        fed(self.model, self.prompt, self.cache)
        fill(self.cache, self.prompt.shape[1], self.tokens, self.variant.static)
        for _ in range(3):
            self.step()

    def step(self) -> None:
        fed(self.model, self.prompt[:, :1], self.cache)

    def prefill(self) -> None:
        fed(self.model, self.prompt, fresh(self.model, self.variant.static, self.tokens + self.room))


def ready(model: Any, variant: Variant, prompt: torch.Tensor, tokens: int, room: int, inner: str | None) -> Ready:
    """``model`` (shared weights) compiled as ``variant`` says, its cache filled by a prompt that is repeated up to
    ``tokens``, with ``room`` for as many steps."""
    own = twin(model)
    if variant.options is None:
        own.compile(backend=inner or "inductor", **({} if inner else {"mode": variant.mode}), **apart())
    else:
        extra = {"inner": inner} if inner else {"mode": variant.mode} if variant.mode else {}
        own.compile(backend="lorc", options={**variant.options, **extra}, **apart())
    return Ready(own, variant, prompt, tokens, room)


def fill(cache: Any, filled: int, tokens: int, static: bool) -> None:
    """Repeats the first ``filled`` tokens of a cache until it holds ``tokens``, a multiple of them: as rows where they
    are rows. Raises RuntimeError where the cache then says another length, AttributeError where a static layer keeps
    its length in a way that is not known here."""
    times = tokens // filled
    for layer in cache.layers:
        if not static:
            layer.keys, layer.values = (torch.cat([x] * times, -2) for x in (layer.keys, layer.values))
            continue
        for value in (layer.keys, layer.values):
            for tensor, dim in [(t, 0) for t in value.parts()] if isinstance(value, LatentKV) else [(value, -2)]:
                for i in range(1, times):
                    tensor.narrow(dim, i * filled, filled).copy_(tensor.narrow(dim, 0, filled))
        if isinstance(layer.cumulative_length, torch.Tensor):
            layer.cumulative_length.fill_(tokens)
        else:
            layer.cumulative_length = tokens
    if int(cache.get_seq_length()) != tokens:
        raise RuntimeError(f"a cache that was filled up to {tokens} tokens says {int(cache.get_seq_length())}")


def held(one: Ready) -> int:
    """Bytes of the rows, keys and values that a step reads."""
    return cache_nbytes(one.cache, used=True)
