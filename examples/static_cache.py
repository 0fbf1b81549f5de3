"""``generate`` with a static cache: compile the model, not ``generate``'s own decode step.

python examples/static_cache.py [MODEL]

``CompileConfig(backend="lorc")`` compiles decode steps only, after an uncompiled prefill has filled a dense cache:
that cache stays dense and right, with a warning (on a CPU transformers compiles under a private switch alone).
"""

import sys
from typing import Any

from transformers import CompileConfig

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    inputs = tokenizer("the river bends", return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}

    config = CompileConfig(backend="lorc", mode=None, options=options)
    config._compile_all_devices = True
    found = {"config": model.generate(**asked, compile_config=config, return_dict_in_generate=True)}

    model.compile(backend="lorc", options=options)
    found["model"] = model.generate(**asked, return_dict_in_generate=True)

    result = {}
    for name, out in found.items():
        cache = out[cache_keyword(model)]
        coded = isinstance(cache.layers[0].keys, lorc_fx.LatentKV)
        print(f"{name}: {tokenizer.decode(out.sequences[0])!r}, {'compressed' if coded else 'dense'}")
        result[name] = {"tokens": out.sequences, "cache": cache}
    return {"inputs": inputs, **result}


if __name__ == "__main__":
    main(*sys.argv[1:])
