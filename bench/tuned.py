"""The database that the package ships for this CPU: configs of readers as common decoders have them.

    python -m bench.tuned [--threads 1 2] [--tokens 2048 8192] [--batch 1 8] [--out kernels/shipped]

Shapes are real, layers few and weights random: readers do not depend on them. On a CPU rotated keys are read as rows
with basis "auto" only. All is timed twice, at another time; where not both times something beats the launcher's own
choice, that stands.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorc_fx import autotune
from lorc_fx.console import Show
from lorc_fx.kernels import tune, tuned, words

#: cached tokens of all rows together
MOST = 16384
#: name -> transformers' model type, query heads, cached heads, head dim
SHAPES = {
    "GPT-2": ("gpt2", 12, 12, 64),
    "GPT-2 medium": ("gpt2", 16, 16, 64),
    "Gemma 3 270M": ("llama", 4, 1, 256),
    "Llama, as in bench.models": ("llama", 16, 4, 64),
    "Llama 3.2 1B": ("llama", 32, 8, 64),
    "Llama 3 8B": ("llama", 32, 8, 128),
}


def model_of(kind: str, heads: int, cached: int, dim: int) -> Any:
    """One layer and a small vocabulary, in eval mode."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=heads * dim, n_head=heads, n_layer=1, n_positions=1024, **tokens)
    else:
        config = LlamaConfig(
            hidden_size=heads * dim,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=cached,
            head_dim=dim,
            **tokens,
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def agreed(first: list[tuned.Entry], second: list[tuned.Entry]) -> list[tuned.Entry]:
    """The second run's entries, with the launcher's own choice where nothing beat it in the first."""
    gained = {e.key for e in first if e.config is not None}
    return [e if e.key in gained else replace(e, config=None, seconds=e.default_seconds) for e in second]


def main() -> None:
    parser = argparse.ArgumentParser(description="The database that the package ships for this CPU.")
    parser.add_argument("--out", type=Path, default=Path(tuned.__file__).resolve().parent / "shipped")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    problems: dict[str, tune.Problem] = {}
    with Show() as show:
        for name, shape in SHAPES.items():
            show.stage(f"Finding the readers of {name}")
            options = {} if shape[0] == "gpt2" else {"basis": "auto"}
            problems |= autotune.readers(model_of(*shape), options, [1])
        for threads in args.threads:
            torch.set_num_threads(threads)
            found = []
            for _ in range(2):
                with tempfile.TemporaryDirectory() as folder:
                    made = [
                        job
                        for batch in args.batch
                        for job in autotune.jobs(problems, [t for t in args.tokens if t * batch <= MOST], [batch])
                    ]
                    result = autotune.run(show, made, Path(folder) / "tuned.json", again=False)
                assert result is not None
                found.append(result.entries)
                for e in result.entries:
                    if e.config is not None:
                        print(f"{e.reader}, {e.tokens} x {e.batch}: {e.config}, {e.seconds} of {e.default_seconds} s")
            path = args.out / f"{tuned.slug(words.device_name(torch.device('cpu')))}.json"
            entries = agreed(*found)
            tuned.write(path, entries)
            path.chmod(0o644)
            gained = sum(e.config is not None for e in entries)
            print(f"{path}: {len(entries)} entries, {gained} of them better than the default")


if __name__ == "__main__":
    main()
