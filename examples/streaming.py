"""Text as it is written: TextStreamer prints it, TextIteratorStreamer hands it to another thread.

python examples/streaming.py [MODEL]
"""

import sys
from threading import Thread
from typing import Any

from transformers import DynamicCache, TextIteratorStreamer, TextStreamer

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    model.compile(backend="lorc", options=options)
    asked = {**tokenizer("the river bends", return_tensors="pt"), "max_new_tokens": 8, "do_sample": False}

    printed = model.generate(**asked, streamer=TextStreamer(tokenizer))

    cache = DynamicCache(config=model.config)
    streamer = TextIteratorStreamer(tokenizer, timeout=600)
    thread = Thread(target=model.generate, kwargs={**asked, "streamer": streamer, cache_keyword(model): cache})
    thread.start()
    pieces = list(streamer)  # one by one, while the other thread goes on
    thread.join()
    print(f"{len(pieces)} pieces, {lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"tokens": printed, "pieces": pieces, "tokenizer": tokenizer, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
