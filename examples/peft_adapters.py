"""LoRA adapters of peft on keys and values, switched while the cache is compressed.

python examples/peft_adapters.py [MODEL]     (extra `adapted`)

Compile ``get_base_model()``: that is what ``generate`` calls, and the adapters lie inside it. Codecs follow the
adapter that is active; Dynamo compiles once for each set of adapters.
"""

import sys
from typing import Any

from peft import LoraConfig, get_peft_model

import lorc_fx
from lorc_fx.evaluate import cache_keyword
from lorc_fx.models import load_model


def main(path: str | None = None, **options: Any) -> dict[str, Any]:
    model, tokenizer = load_model(path, dtype=None)
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)  # random, for want of others
    wrapped = get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    base = wrapped.get_base_model().eval()
    base.compile(backend="lorc", options=options)

    inputs = tokenizer("the river bends", return_tensors="pt")
    found = {}
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        out = wrapped.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        found[name] = {"tokens": out.sequences, "cache": out[cache_keyword(base)]}
        used = lorc_fx.cache_nbytes(found[name]["cache"], used=True)
        print(f"{name}: {tokenizer.decode(out.sequences[0])!r}, {used:,} bytes of cache")
    return {"model": wrapped, "inputs": inputs, **found}


if __name__ == "__main__":
    main(*sys.argv[1:])
