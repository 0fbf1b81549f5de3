"""Losses under presses of NVIDIA's kvpress; ``bench.peers`` runs it in an environment of its own.

    python -m bench.kvpress_rows IN.json OUT.json

kvpress 0.5.5 asks for transformers < 5.3, and its ExpectedAttention calls Gemma 3's rotary embedding as transformers 4
has it: ``REQUIREMENTS``. It compresses a prompt that comes in one piece, and of Gemma 3 only the layers with full
attention: one with a sliding window keeps its window.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.prompted import prompted

REQUIREMENTS = ("kvpress==0.5.5", "transformers==4.57.6")
PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "KeyDiffPress")


def masks(model: Any, cache: Any, prompt: int, queries: int) -> dict[str, torch.Tensor]:
    """What each kind of layer may see, [1, 1, queries, keys] bool, for ``queries`` tokens after the prompt.

    transformers would take the prompt's length from the first layer, which keeps a window and counts every token: in a
    layer whose prompt has been pruned, a query would then see tokens after itself.
    """
    shown = {}
    for layer, kind in zip(cache.layers, model.config.layer_types, strict=True):
        kept = layer.keys.shape[-2]
        query, key = torch.arange(queries)[:, None], torch.arange(kept + queries)[None] - kept  # 0: the first new token
        seen = key <= query
        if kind == "sliding_attention":
            seen &= key > query - model.config.sliding_window
        elif kept > prompt:
            raise ValueError(f"{kept} tokens in a cache of a prompt of {prompt}")
        shown[kind] = seen[None, None]
    return shown


def count(cache: Any, layer_types: list[str]) -> dict[str, int]:
    """Bytes of the keys and values shown; in all layers, and in those with full attention."""
    sizes = [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]
    full = [size for size, kind in zip(sizes, layer_types, strict=True) if kind == "full_attention"]
    return {"bytes": sum(sizes), "full_attention_bytes": sum(full)}


def measure(model: Any, ids: torch.Tensor, prompt: int, press: Any = None) -> dict[str, Any]:
    """Loss and bytes of ``ids`` [1, N] with a prompt of so many tokens; dense without a press."""
    from transformers import DynamicCache

    queries = ids.shape[1] - prompt - 1
    where = torch.arange(prompt, prompt + queries)
    found = prompted(
        model,
        ids,
        prompt,
        DynamicCache(config=model.config),
        lambda cache: count(cache, model.config.layer_types),
        compressing=press and press(model),
        more=lambda cache: {
            "position_ids": where[None],
            "cache_position": where,
            "attention_mask": masks(model, cache, prompt, queries),
        },
    )
    return {"nats": found.nats, **found.prompt_bytes}


def main(source: Path, target: Path) -> None:
    import kvpress
    from kvpress.presses import base_press
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

    # kvpress leaves sliding layers alone in the one Gemma 3 class that it knows; the text model has the same layers
    base_press.Gemma3ForConditionalGeneration = Gemma3ForCausalLM
    given = json.loads(source.read_text())
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given["checkpoint"], dtype="auto", local_files_only=True).eval()
    ids = torch.tensor(given["ids"])[None]
    rows = [{"peer": "dense", "setting": "in the environment of kvpress"} | measure(model, ids, given["prompt"])]
    for name in PRESSES:
        for compression in given["compressions"]:
            press = getattr(kvpress, name)(compression_ratio=compression)
            found = measure(model, ids, given["prompt"], press)
            rows.append({"peer": "kvpress", "setting": f"{name} {compression:g}"} | found)
            print(f"{rows[-1]['setting']}: {rows[-1]['nats']:.4f} nats", file=sys.stderr, flush=True)
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    target.write_text(json.dumps({"rows": rows, "versions": versions}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
