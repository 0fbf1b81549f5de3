"""Every decoder of the installed transformers, small: two layers or as few as show each kind, random weights, fp32.

Configurations are the classes' own defaults with what makes a model large replaced (``SMALL``); ``OWN`` has what a
single class needs beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

VOCAB, HIDDEN, HEAD, WINDOW, EOS = 99, 64, 16, 8, 2

#: attribute of a configuration -> a small value, where the class has that attribute
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "dim_head", "v_head_dim", "qk_nope_head_dim"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 96),
    **dict.fromkeys(("n_inner", "dff", "dim_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("is_decoder", "use_cache"), True),
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "query_pre_attn_scalar": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "decoder_start_token_id": 1,
}

_BOTH = ["sliding_attention", "full_attention"]


def _mrope(pairs: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": pairs, **more}}


#: model type -> what its configuration needs beside ``SMALL``; None takes the class's own value
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), _mrope([4, 2, 2])),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text"), _mrope([4, 2, 2])),
    "glm4v_moe_text": _mrope([2, 1, 1], partial_rotary_factor=0.5),
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": _BOTH,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 128,
        "num_key_value_heads": None,
    },
    "dory": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": _BOTH * 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}, "head_dim": 24},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _BOTH * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _BOTH * 2,
        "hidden_size_per_layer_input": 16,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granite_speech_encoder": {"num_layers": 2, "hidden_dim": HIDDEN},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "inkling2_text": {"unpadded_vocab_size": VOCAB, "sliding_window_size": WINDOW},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB, "sliding_window_size": WINDOW},
    "bailing_hybrid": {"num_expert_group": 2},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    # graph breaks cut these into layers, each of which keeps cosines for itself: real ones have heads enough for that
    "jetmoe": {"num_key_value_heads": 4, "num_attention_heads": 8, "kv_channels": HEAD, "num_experts_per_tok": 2},
    "qwen4_exp_text": {
        "num_key_value_heads": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB},
    "fsmt": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7, "hidden_size": 32},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Entry:
    """One class of the library: ``model_type`` of its configuration, ``kind`` the table that names it."""

    kind: str
    model_type: str
    cls: str

    def config(self) -> Any:
        """Where the class models the text alone, that part of the configuration."""
        import transformers

        config, cls = small_config(transformers.CONFIG_MAPPING[self.model_type]), getattr(transformers, self.cls)
        wanted = getattr(cls, "config_class", None)
        if wanted is None or isinstance(config, wanted):
            return config
        return config.get_text_config(decoder=config.is_encoder_decoder or None)

    def build(self, seed: int = 0) -> Any:
        """The model in eval mode, fp32, every weight random. Raises what the class raises."""
        import transformers

        cls = getattr(transformers, self.cls)
        torch.manual_seed(seed)
        model = cls._from_config(self.config(), dtype=torch.float32).eval()
        randomise(model, seed)
        generation = model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
        generation.cache_implementation = None
        return model


def entries() -> Iterator[Entry]:
    """All classes that the library's tables name; a class under two model types comes once for each."""
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "vision": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    seen = set()
    for kind, table in tables.items():
        for model_type, names in table.items():
            for cls in names if isinstance(names, (tuple, list)) else (names,):
                if (model_type, cls) not in seen:
                    seen.add((model_type, cls))
                    yield Entry(kind, model_type, cls)


def small_config(cls: type) -> Any:
    """A configuration of this class with ``SMALL`` and ``OWN`` in place of its defaults, and so for those inside it."""
    from transformers import PreTrainedConfig

    own = OWN.get(cls.model_type, {})
    default = cls()
    has, renamed = default.to_dict(), getattr(default, "attribute_map", {})
    given = {k: v for k, v in SMALL.items() if has.get(k) is not None and k not in renamed and k not in own}
    given |= _kinds_of_layers(has)
    given |= _sections(has)
    if has.get("head_dim") and has["head_dim"] == has.get("qk_rope_head_dim"):
        given["head_dim"] = given["qk_rope_head_dim"]
    if has.get("kv_lora_rank") and has.get("num_key_value_heads") == has.get("num_attention_heads"):
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name in getattr(cls, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in own:
            given[name] = small_config(type(part)).to_dict()
    given |= {k: v for k, v in own.items() if v is not None}
    return cls(**given)


def _kinds_of_layers(has: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the class mixes, where it names them."""
    found: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(has.get(name) or ()))
        if len(kinds) > 1:
            found |= {name: kinds, "num_hidden_layers": len(kinds)}
    return found


def _sections(has: dict[str, Any]) -> dict[str, Any]:
    """Rotary pairs for time, height and width, as many as a small head has."""
    rope = has.get("rope_parameters") or {}
    if not isinstance(rope, dict) or len(rope.get("mrope_section") or ()) != 3:
        return {}
    pairs = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    return {"rope_parameters": {**rope, "mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Everything random and of a size that shows: projections with gain 1, biases 0.3, norm weights 20 % apart."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = any(part in name.lower() for part in ("norm", "ln_", "layernorm"))
            if p.dim() > 1:
                wide = min(p.shape) if "embed" not in name and "wte" not in name and "wpe" not in name else 4
                p.copy_(noise / wide**0.5)
            elif norm and name.endswith("weight"):
                p.add_(0.2 * noise)
            else:
                p.copy_(0.3 * noise)


def encoder_input(model: Any, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Two inputs of an encoder of sound, small, under the name that it asks for; nothing for other models."""
    config, name = model.config, model.main_input_name
    if name in ("input_values", "inputs"):
        return {name: torch.randn(2, 4000, generator=draw)}
    if name != "input_features":
        return {}
    parts = [config, getattr(config, "encoder_config", None), getattr(config, "audio_config", None)]
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((v for c in parts for n in names if (v := getattr(c, n, None))), 80)
    frames = 2 * getattr(config, "max_source_positions", 64)
    size = (2, bins, frames) if config.model_type == "whisper" else (2, min(frames, 128), bins)
    return {name: torch.randn(size, generator=draw)}
