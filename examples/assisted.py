"""Assisted decoding: a draft proposes, the model checks, and both keep compressed caches.

python examples/assisted.py [MODEL [DRAFT]]     (default draft: the model itself, which is always right)

Tokens are those of the compressed model alone, whatever the draft says: what is thrown away is cut from both
caches.
"""

import sys
from typing import Any

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, draft_path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    draft, _ = load_model(draft_path or path, dtype=None)
    for each in (model, draft):
        each.compile(backend="lorc", options=options)

    inputs = tokenizer("the river bends", return_tensors="pt")
    asked = {**inputs, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    alone = model.generate(**asked).sequences
    out = model.generate(**asked, assistant_model=draft)
    cache = out[cache_keyword(model)]
    print(f"{tokenizer.decode(out.sequences[0])!r}, {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"inputs": inputs, "tokens": out.sequences, "alone": alone, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
