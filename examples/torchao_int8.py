"""Weights in int8 by torchao, and a compressed cache on top.

python examples/torchao_int8.py [MODEL]     (extra `adapted`)

Quantise first, then compile: what is coded is what the quantised weights make. Configs that quantise activations
to integers too (``Int8DynamicActivationInt8WeightConfig``) leave the cache dense, with a warning that says why.
"""

import sys
from typing import Any

from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    quantize_(model, Int8WeightOnlyConfig())
    model.compile(backend="lorc", options=options)

    inputs = tokenizer("the river bends", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    print(f"{tokenizer.decode(out.sequences[0])!r}, {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"model": model, "inputs": inputs, "tokens": out.sequences, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
