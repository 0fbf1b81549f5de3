"""transformers' ``pipeline``: compile the model that it is given.

python examples/text_pipeline.py [MODEL]

The pipeline hands what it does not know to ``generate``, a cache too: so it can be looked at afterwards.
"""

import sys
from typing import Any

from transformers import DynamicCache, pipeline

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    model.compile(backend="lorc", options=options)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)

    cache = DynamicCache(config=model.config)
    (out,) = write("the river bends", max_new_tokens=8, do_sample=False, **{cache_keyword(model): cache})
    print(f"{out['generated_text']!r}, {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"text": out["generated_text"], "tokenizer": tokenizer, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
