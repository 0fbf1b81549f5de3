"""Forms of attention and of rotation that a configuration asks for: each is coded, and right at full rank and, with
weights of low rank, at half the bytes."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench.zoo import randomise
from helpers import assert_close, assert_tokens, compiled, generate, latents, prompt

SMALL = {
    "vocab_size": 103, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SMALL, **more)),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**SMALL, **more)),
    # scores capped, every other layer in a window
    "gemma2": lambda **more: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=16, **more)
    ),
}
#: rope type -> its parameters; prompts of 9 tokens and 8 more cross the lengths that they were made for
ROTATIONS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 12},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 12,
    },
}  # fmt: skip


def build(name, **more):
    torch.manual_seed(0)
    model = MODELS[name](**more).eval().requires_grad_(False)
    randomise(model, 0)
    return model


def halved(model):
    """Key and value projections of rank 8 of 32."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            left, right = torch.randn(32, 8), torch.randn(8, 64)
            linear.weight.copy_(left @ right / 8 / 8**0.5)
    return model


def same(model, how, ratio):
    """``how``: what the compiled model has that the eager one need not have."""
    ids, mask = prompt(pad=2)
    want = generate(model, ids, mask)
    how(model)
    got = generate(compiled(model, ratio=ratio), ids, mask)
    assert_close("logits", got.logits, want.logits)
    assert_tokens("tokens", got.sequences, want.sequences)
    return latents(got.cache)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ratio", [1.0, 0.75])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations(kind, ratio, many_shapes):
    """Dynamic scaling computes its angles in Python between two graphs, and longrope changes frequencies when the
    text grows: what a cached key was turned by is kept with it."""
    model = build("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROTATIONS[kind]})
    keys, _ = same(halved(model) if ratio < 1 else model, lambda model: None, ratio)[0]
    side = keys.codec.decoder.side
    assert (side.width, keys.positions.dtype) == {
        "dynamic": (32, torch.float32), "longrope": (8, torch.float32)
    }.get(kind, (None, torch.int32))  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize(
    ("name", "form"),
    # the library has no SDPA for scores that are capped
    [(n, f) for n in MODELS for f in ("eager", "sdpa", "flex_attention") if (n, f) != ("gemma2", "sdpa")],
)
def test_implementations(name, form, ratio, many_shapes):
    """The eager model computes what all of them do; flex attention itself needs a compiler to run."""
    model = build(name, attn_implementation="eager")
    same(halved(model) if ratio < 1 else model, lambda model: model.set_attn_implementation(form), ratio)


def test_angles_are_counted():
    """What is kept beside codes is part of the budget."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, **ROTATIONS["dynamic"]}
    model = halved(build("llama", rope_parameters=rope))
    ids, mask = prompt()
    cache = generate(compiled(model, ratio=0.75), ids, mask).cache
    pairs = latents(cache)
    assert all(k.positions is pairs[0][0].positions for k, _ in pairs), "layers share what they keep"
    held = pairs[0][0].positions.nbytes + sum(t.codes.nbytes for pair in pairs for t in pair)
    assert held <= 0.75 * sum(t.numel() * 4 for pair in pairs for t in pair)
