"""Regional compilation: each decoder layer is compiled by itself, and writes its own part of the cache compressed.

python examples/layer_by_layer.py [MODEL]

Dynamo makes graphs for each layer (the cache is told its number), so its limits must be raised. A layer is given
cosines and sines, not positions, and keys that must be decoded need them again: see docs/beside.md. Compiling the
whole model has neither limit.
"""

import sys
from typing import Any

import torch

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    inputs = tokenizer("the river bends", return_tensors="pt")
    layers = model.get_decoder().layers
    for layer in layers:
        layer.compile(backend="lorc", options=options)
    graphs = 8 * len(layers)  # two for each, and a few more where a sliding window fills
    with torch._dynamo.config.patch(recompile_limit=graphs, accumulated_recompile_limit=max(256, graphs)):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    coded = [isinstance(t, lorc_fx.LatentKV) for layer in cache.layers for t in (layer.keys, layer.values)]
    print(f"{tokenizer.decode(out.sequences[0])!r}, {sum(coded)} of {len(coded)} keys and values compressed")
    return {"inputs": inputs, "tokens": out.sequences, "cache": cache, "coded": coded}


if __name__ == "__main__":
    main(*sys.argv[1:])
