"""torch.export of a model that is compiled with lorc: what is exported is the model without it.

python examples/exporting.py [MODEL]

An exported program is one graph of plain tensors, so it cannot make a compressed cache. It can read one: a
compressed cache may be an input of it, and is decoded where it goes in (``strict=False``, which is torch's default).
"""

import sys
from typing import Any

import torch
from transformers import DynamicCache

from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


class Step(torch.nn.Module):
    """Logits of token ids, behind a cache that is given as plain lists."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        cache = DynamicCache(list(zip(keys, values, strict=True)), config=self.model.config)
        return self.model(input_ids=ids, use_cache=True, **{cache_keyword(self.model): cache}).logits


@torch.no_grad()
def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    model.compile(backend="lorc", options=options)
    ids = tokenizer("the river bends", return_tensors="pt").input_ids
    cache = model(input_ids=ids[:, :-1], use_cache=True)[cache_keyword(model)]

    last, keys, values = ids[:, -1:], [x.keys for x in cache.layers], [x.values for x in cache.layers]
    program = torch.export.export(Step(model), (last, keys, values), strict=False)
    logits = program.module()(last, keys, values)
    print(f"next: {tokenizer.decode(logits[0, -1].argmax())!r}, of a graph of {len(program.graph.nodes)} nodes")
    return {"program": program, "ids": ids, "logits": logits, "cache": cache, "step": Step(model)}


if __name__ == "__main__":
    main(*sys.argv[1:])
