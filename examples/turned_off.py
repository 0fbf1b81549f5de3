"""The switch in the environment: the same program with a dense cache.

LORC_DISABLE=1 python examples/turned_off.py [MODEL]

It is read when a graph is compiled, so set it before the process starts. The inner compiler still compiles.
"""

import sys
from typing import Any

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    model.compile(backend="lorc", options=options)
    inputs = tokenizer("the river bends", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    coded = isinstance(cache.layers[0].keys, lorc_fx.LatentKV)
    print(f"{'compressed' if coded else 'dense'}: {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"inputs": inputs, "tokens": out.sequences, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
