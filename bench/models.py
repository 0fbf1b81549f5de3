"""Models to measure: real shapes with random weights, and two small trained Llamas (nothing is downloaded).

    python -m bench.models [--texts FOLDER] [--out ~/.cache/lorc_fx/trained] [--models mha gqa] [--steps 2500]

trains the two on the text of Debian packages (``bench.texts``), one thread, about 20 minutes each, and prints their
loss on held-out pages. The checkpoints are ordinary ones, with their tokenizer and the held-out text beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB = 4096
#: more than the longest case, with room for the steps after it
POSITIONS = 33792


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


def small_llama(kv_heads: int) -> Any:
    """d 256, 8 layers, 8 heads of 32: small enough for a CPU to train."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


CONFIGS = {"llama": llama_shaped, "gpt2": gpt2_shaped}
#: name -> kv heads of the trained models: multi-head attention, and its twin with grouped queries
TRAINED = {"mha": 8, "gqa": 2}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None) -> Any:
    """A model of ``CONFIGS`` in eval mode, the same weights each time. ``layers``: of another depth."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if layers is not None:
        config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def random_ids(tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


def main(argv: Sequence[str] | None = None) -> None:
    from bench import training
    from lorc_fx.models import cache_root

    parser = argparse.ArgumentParser(description="Train two small Llamas.")
    parser.add_argument("--texts", type=Path, default=None, help="where the Debian packages were unpacked")
    parser.add_argument("--out", type=Path, default=cache_root() / "trained", help="a folder for the checkpoints")
    parser.add_argument("--models", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    texts = training.split(args.texts)
    for name in args.models:
        training.make(small_llama(TRAINED[name]), args.out / name, texts, args.steps)


if __name__ == "__main__":
    main()
