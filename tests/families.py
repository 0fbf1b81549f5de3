"""One tiny, fully random model per attention layout, and where its key and value projections lie.

A family is named by what it covers. ``Family.projections(model)`` says, per layer, which module projects keys and
values and which of its output features they are: it serves the oracle and ``make_low_rank``, and nothing of lorc_fx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.zoo import randomise

VOCAB, HIDDEN, HEADS, WINDOW = 101, 64, 4, 6
HEAD = HIDDEN // HEADS


@dataclass(frozen=True)
class Projection:
    """Keys or values of one layer: ``module``'s output features ``features`` (all kv heads, in cache order)."""

    layer: int
    kind: str
    module: torch.nn.Module
    features: torch.Tensor

    @property
    def conv1d(self) -> bool:
        return not isinstance(self.module, torch.nn.Linear)

    @property
    def weight(self) -> torch.Tensor:
        """[n, d], a copy."""
        whole = self.module.weight.detach()
        return (whole.T if self.conv1d else whole)[self.features].clone()

    @property
    def bias(self) -> torch.Tensor:
        """[n], zeros where the module has none."""
        bias = self.module.bias
        zeros = torch.zeros(len(self.features), dtype=self.module.weight.dtype)
        return zeros if bias is None else bias.detach()[self.features]

    def set_weight(self, weight: torch.Tensor) -> None:
        with torch.no_grad():
            if self.conv1d:
                self.module.weight[:, self.features] = weight.T
            else:
                self.module.weight[self.features] = weight


Layout = Callable[[Any], tuple[tuple[torch.nn.Module, torch.Tensor], tuple[torch.nn.Module, torch.Tensor]]]


@dataclass(frozen=True)
class Family:
    """``config`` on top of ``_BASE`` of ``cls``; ``layers`` and ``attention`` are attribute paths in the model."""

    name: str
    cls: str
    layout: Layout
    config: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    attention: str = "self_attn"
    static: bool = True
    """False where transformers' own eager model cannot run on a StaticCache."""
    static_loop: bool = True
    """False where it can in ``generate`` only (its mask must have the cache's full length)."""
    sdpa: bool = True
    """False where transformers has only an eager attention for it."""

    def build(
        self, dtype: torch.dtype = torch.float32, attn: str | None = None, seed: int = 0, layers: int | None = None
    ) -> Any:
        """A model in eval mode; its weights depend on the family, ``seed`` and ``layers`` (rounded to ``dtype``)."""
        attn = attn or ("sdpa" if self.sdpa else "eager")
        base = _BASE.get(self.cls, _LLAMA_LIKE)
        shared = {"vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
        config = getattr(transformers, self.cls + "Config")(
            **{**shared, **base, **self.config, **self.shortened(layers)}
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
        randomise(model, seed)
        generation = model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
        generation.cache_implementation = None
        return model.to(dtype)

    def shortened(self, layers: int | None) -> dict[str, Any]:
        """The config of the first ``layers`` layers."""
        if layers is None:
            return {}
        types = {"layer_types": self.config["layer_types"][:layers]} if "layer_types" in self.config else {}
        return {"n_layer" if self.cls in ("GPT2", "Bloom") else "num_hidden_layers": layers, **types}

    @property
    def fewest(self) -> int:
        """As few layers as show each layer type."""
        return 2 if "layer_types" in self.config else 1

    def projections(self, model: Any) -> list[Projection]:
        found = []
        for i, layer in enumerate(model.get_submodule(self.layers)):
            both = self.layout(getattr(layer, self.attention))
            for kind, (module, features) in zip(("key", "value"), both, strict=True):
                found.append(Projection(i, kind, module, features))
        return found


def make_low_rank(family: Family, model: Any, fraction: float) -> int:
    """Give every key and value projection the exact rank ``fraction * width`` (in any dtype), and return the largest.

    Each row is a row of the first ``rank`` times +-1, so this holds in 16 bits too. Query rows and biases stay.
    """
    most = 0
    for p in family.projections(model):
        weight, n = p.weight, len(p.features)
        rank = max(int(fraction * n), 1)
        generator = torch.Generator().manual_seed(n + p.layer)
        scale = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(weight.dtype)
        scale[:rank] = 1
        source = torch.randperm(n, generator=generator) % rank
        source[:rank] = torch.arange(rank)
        p.set_weight(scale[:, None] * weight[source])
        assert torch.linalg.matrix_rank(p.weight.double()) == rank
        most = max(most, rank)
    return most


# -- where keys and values lie ---------------------------------------------------------------------------------------


def separate(attention: Any) -> Any:
    k, v = attention.k_proj, attention.v_proj
    return (k, torch.arange(k.out_features)), (v, torch.arange(v.out_features))


def conv1d_thirds(attention: Any) -> Any:
    return tuple((attention.c_attn, torch.arange(i * HIDDEN, (i + 1) * HIDDEN)) for i in (1, 2))


def stacked(attention: Any) -> Any:
    """Phi-3: all queries, then all keys, then all values."""
    n = attention.num_key_value_heads * attention.head_dim
    q = attention.qkv_proj.out_features - 2 * n
    return tuple((attention.qkv_proj, torch.arange(q + i * n, q + (i + 1) * n)) for i in (0, 1))


def per_head(attention: Any) -> Any:
    """GPT-NeoX, Bloom, Falcon without groups: q, k, v of head 0, then of head 1, ..."""
    rows = torch.arange(3 * HIDDEN).view(HEADS, 3, HEAD)
    return tuple((attention.query_key_value, rows[:, i].reshape(-1)) for i in (1, 2))


def per_group(attention: Any) -> Any:
    """Falcon: for each kv head its queries, then its key, then its value (multi-query is one group)."""
    fused = attention.query_key_value
    groups = (fused.out_features // HEAD - HEADS) // 2
    rows = torch.arange(fused.out_features).view(groups, HEADS // groups + 2, HEAD)
    return tuple((fused, rows[:, i].reshape(-1)) for i in (-2, -1))


_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_SMALL: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_BASE: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 2, "n_inner": 96, "n_positions": 256},
    "GPTNeoX": _SMALL | {"intermediate_size": 96, "max_position_embeddings": 256, "rotary_pct": 0.25},
    "OPT": _SMALL | {"ffn_dim": 96, "max_position_embeddings": 256, "word_embed_proj_dim": HIDDEN},
    "Bloom": {"hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS},
    "Falcon": _SMALL | {"bias": True, "max_position_embeddings": 256},
}
_GEMMA = {"num_hidden_layers": 3, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_NEOX = {"layers": "gpt_neox.layers", "attention": "attention"}
_FALCON = {"layers": "transformer.h", "attention": "self_attention"}

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("llama-mha", "Llama", separate, {"num_key_value_heads": 4}),
        Family("llama-gqa", "Llama", separate),
        Family("llama-mqa", "Llama", separate, {"num_key_value_heads": 1}),
        Family("llama-bias", "Llama", separate, {"attention_bias": True}),
        Family("llama-tied", "Llama", separate, {"tie_word_embeddings": True}),
        Family("mistral-window", "Mistral", separate, {"sliding_window": WINDOW}),
        Family("mistral-full", "Mistral", separate, {"sliding_window": None}),
        Family("qwen2", "Qwen2", separate),
        Family("qwen3", "Qwen3", separate),
        Family("gemma2", "Gemma2", separate, _GEMMA | {"layer_types": _ALTERNATING}, sdpa=False),
        Family("gemma3", "Gemma3Text", separate, _GEMMA | {"layer_types": _ALTERNATING}),
        Family("phi3", "Phi3", stacked),
        Family("diffllama", "DiffLlama", separate),  # two readers of a cache, each of half of its value heads
        Family("gpt-neox", "GPTNeoX", per_head, **_NEOX),
        Family("gpt2", "GPT2", conv1d_thirds, layers="transformer.h", attention="attn"),
        Family("opt", "OPT", separate, layers="model.decoder.layers"),
        Family("bloom", "Bloom", per_head, **_FALCON, sdpa=False, static_loop=False),
        Family("falcon-gqa", "Falcon", per_group, {"new_decoder_architecture": True, "num_kv_heads": 2}, **_FALCON),
        Family("falcon-mqa", "Falcon", per_group, {"multi_query": True}, **_FALCON),
        Family("falcon-alibi", "Falcon", per_head, {"multi_query": False, "alibi": True}, **_FALCON, static=False),
    )
}
