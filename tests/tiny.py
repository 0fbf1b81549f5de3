"""A tokenizer and a model small enough to be saved, loaded and compiled in a second."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = {"<unk>": 0} | {chr(97 + i): i + 1 for i in range(26)} | {" ": 27}


def letters() -> PreTrainedTokenizerFast:
    """One token per letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def llama(heads: int = 4, kv_heads: int = 2, seed: int = 0) -> Any:
    """Two layers, heads of 8, a vocabulary of letters, random weights."""
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=8 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()
