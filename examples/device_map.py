"""A model that accelerate puts on one device.

python examples/device_map.py [MODEL]

On one device ``device_map`` adds no hooks, so all is as without it. Over several devices, or with parts on disk,
hooks on every module end the graph at each of them: then nothing is compressed, and a warning says so.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import demo_checkpoint


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    path = path or str(demo_checkpoint())
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, device_map={"": device})
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.compile(backend="lorc", options=options)

    inputs = tokenizer("the river bends", return_tensors="pt").to(device)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    print(f"on {model.device}: {tokenizer.decode(out.sequences[0])!r}")
    print(f"{lorc_fx.cache_nbytes(cache, used=True):,} bytes of cache")
    return {"model": model, "inputs": inputs, "tokens": out.sequences, "cache": cache}


if __name__ == "__main__":
    main(*sys.argv[1:])
