"""Tensor parallel by transformers itself: each process codes the heads that it has.

torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL

A model is needed with at least as many key-value heads as processes (the demo's has one, which cannot be split).
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorc_fx
from lorc_fx.evaluate import cache_keyword


def main(path: str, **options: Any) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.compile(backend="lorc", options=options)

    inputs = tokenizer("the river bends", return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out[cache_keyword(model)]
    coded = sum(isinstance(t, lorc_fx.LatentKV) for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        "rank": dist.get_rank(),
        "tokens": out.sequences.tolist(),
        "heads": cache.layers[0].keys.shape[1],
        "coded": coded,
        "bytes": lorc_fx.cache_nbytes(cache, used=True),
    }


if __name__ == "__main__":
    if len(sys.argv) < 2 or not dist.is_torchelastic_launched():
        sys.exit("usage: torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL [OPTIONS AS JSON]")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, main(sys.argv[1], **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")))
    if dist.get_rank() == 0:
        print("\n".join(map(json.dumps, found)))
    dist.destroy_process_group()
