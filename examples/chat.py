"""A chat of several turns that keeps its cache, so that each turn runs its new tokens only.

python examples/chat.py [MODEL]

The conversation is written out anew by the chat template at each turn. Where its tokens are no longer those in the
cache (an answer reads back as other tokens), the cache is cut to what both share.
"""

import sys
from typing import Any

import torch
from transformers import DynamicCache

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = ("where does the river bend", "why there", "and then")


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    model.compile(backend="lorc", options=options)
    template = tokenizer.chat_template or PLAIN

    cache, messages, seen, lengths = DynamicCache(config=model.config), [], torch.empty(1, 0, dtype=torch.long), []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        asked = {"chat_template": template, "return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
        inputs = tokenizer.apply_chat_template(messages, **asked)
        ids, both = inputs["input_ids"], min(seen.shape[1], inputs["input_ids"].shape[1])
        shared = int((ids[0, :both] == seen[0, :both]).int().cumprod(0).sum())
        if shared < cache.get_seq_length():
            cache.crop(shared - cache.get_seq_length())  # a negative number: as many tokens fewer
        lengths.append(cache.get_seq_length())
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **{cache_keyword(model): cache})
        seen, answer = out, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"{turn!r} -> {answer!r}; {lengths[-1]} of {ids.shape[1]} tokens were in the cache")
    print(f"{lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"tokens": seen, "messages": messages, "reused": lengths, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
