"""Models to measure: real shapes, random weights, made from configs (nothing is downloaded)."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

VOCAB = 4096
#: more than the longest case, with room for the steps after it
POSITIONS = 16384


def llama_shaped() -> Any:
    """d 1024, 16 heads, 4 kv heads of 64, 8 layers: grouped queries, RoPE between projection and attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        use_cache=True,
    )


def gpt2_shaped() -> Any:
    """d 1024, 16 heads, 8 layers: no positions between projection and attention, so keys and values absorb."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=1024,
        n_head=16,
        n_layer=8,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )


CONFIGS = {"llama": llama_shaped, "gpt2": gpt2_shaped}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of ``CONFIGS`` in eval mode, the same weights each time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype, attn_implementation="sdpa").eval()


def twin(model: Any) -> Any:
    """A second module of the same class that shares every parameter and buffer."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def random_ids(tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))
