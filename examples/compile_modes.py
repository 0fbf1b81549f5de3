"""torch.compile's own arguments beside backend="lorc": mode, dynamic, fullgraph.

python examples/compile_modes.py [MODEL [MODE]]     (a mode of inductor: reduce-overhead, max-autotune, ...)

torch.compile refuses ``mode`` beside ``options``, so it is an option of ours too; without options both work. It is
the mode of the inner compiler: inductor has modes, inner="eager" has none and refuses one.
"""

import sys
from typing import Any

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(
    path: str | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    if options:
        options = options | ({"mode": mode} if mode else {})
        model.compile(backend="lorc", dynamic=dynamic, fullgraph=fullgraph, options=options)
    else:
        model.compile(backend="lorc", dynamic=dynamic, fullgraph=fullgraph, mode=mode)

    inputs = tokenizer("the river bends", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    print(f"{tokenizer.decode(out.sequences[0])!r}, {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"inputs": inputs, "tokens": out.sequences, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
