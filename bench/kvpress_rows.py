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


def make_press(name: str, compression: float) -> Any:
    """A press of kvpress that drops this share of a prompt's tokens."""
    import kvpress
    from kvpress.presses import base_press
    from transformers import Gemma3ForCausalLM

    # kvpress leaves sliding layers alone in the one Gemma 3 class that it knows; the text model has the same layers
    base_press.Gemma3ForConditionalGeneration = Gemma3ForCausalLM
    return getattr(kvpress, name)(compression_ratio=compression)


def kinds(config: Any) -> list[str]:
    """Of each layer; a model whose config names none has one kind."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def seen_by(model: Any, cache: Any, seen: int, queries: int) -> dict[str, Any]:
    """Arguments for ``queries`` tokens after ``seen``, of which the cache may have dropped some."""
    where = torch.arange(seen, seen + queries)
    found = masks(model, cache, seen, queries)
    mask = found if getattr(model.config, "layer_types", None) else found["full_attention"]
    return {"position_ids": where[None], "cache_position": where, "attention_mask": mask}


def masks(model: Any, cache: Any, seen_tokens: int, queries: int) -> dict[str, torch.Tensor]:
    """What each kind of layer may see, [1, 1, queries, keys] bool, for ``queries`` tokens after those it has seen.

    transformers would take the prompt's length from the first layer, which keeps a window and counts every token: in a
    layer whose prompt has been pruned, a query would then see tokens after itself.
    """
    shown = {}
    for layer, kind in zip(cache.layers, kinds(model.config), strict=True):
        kept = layer.keys.shape[-2]
        query, key = torch.arange(queries)[:, None], torch.arange(kept + queries)[None] - kept  # 0: the first new token
        seen = key <= query
        if kind == "sliding_attention":
            seen &= key > query - model.config.sliding_window
        elif kept > seen_tokens:
            raise ValueError(f"{kept} tokens in a cache that has seen {seen_tokens}")
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

    found = prompted(
        model,
        ids,
        prompt,
        DynamicCache(config=model.config),
        lambda cache: count(cache, kinds(model.config)),
        compressing=press and press(model),
        more=lambda cache: seen_by(model, cache, prompt, ids.shape[1] - prompt - 1),
    )
    return {"nats": found.nats, **found.prompt_bytes}


def main(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = json.loads(source.read_text())
    torch.set_num_threads(1)
    how = {"dtype": getattr(torch, given["dtype"]), "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(given["checkpoint"], **how).eval()
    ids = torch.tensor(given["ids"])[None]
    rows = [{"peer": "dense", "setting": "in the environment of kvpress"} | measure(model, ids, given["prompt"])]
    for name in PRESSES:
        for compression in given["compressions"]:
            found = measure(model, ids, given["prompt"], make_press(name, compression))
            rows.append({"peer": "kvpress", "setting": f"{name} {compression:g}"} | found)
            print(f"{rows[-1]['setting']}: {rows[-1]['nats']:.4f} nats", file=sys.stderr, flush=True)
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    target.write_text(json.dumps({"rows": rows, "versions": versions}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
