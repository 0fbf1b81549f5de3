"""Mixed generations for a while: what memory, compiles and results do over time.

    python -m bench.soak [--minutes 30] [--inner inductor] [--out bench/results/soak.json]

Small random models with keys and values of low rank, so that nothing is lost and every result can be compared: each
round is one form of generation on one of them, compiled and eager in turn, drawn at random from a fixed seed. Tokens
must be equal, logits within 1e-3 of the largest. Lengths come from ``SHAPES`` draws per form, tokens are new each time:
warm-up goes through every model, form and draw once, as Dynamo compiles anew for sizes that were equal by chance when
it first saw them, under any backend. After that come rounds at random until the time is up. Resident memory, live
tensors and codecs are sampled every ``EVERY`` rounds; the slope is that of a least-squares line through the samples
after warm-up, and at least after ``WARM`` of the time. ``recompiles`` are Dynamo's frames compiled after warm-up.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._dynamo.utils import counters

from bench.run import RESULTS, machine
from bench.zoo import randomise
from lorc_fx.console import write_json
from lorc_fx.errors import LorcWarning
from lorc_fx.evaluate import cache_keyword
from lorc_fx.store import STORE

VOCAB, WIDTH, WARM = 101, 64, 0.4
TOLERANCE = 1e-3
EVERY = 10
"""Rounds between two samples."""
SHAPES = 8
"""Draws of lengths per form."""

_SHARED = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = _SHARED | {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
_KINDS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24}
#: class of the configuration, its fields, ratio that loses nothing at a quarter of the rank
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "qwen3": ("Qwen3Config", _LLAMA, 0.6),
    "gpt2": ("GPT2Config", _SHARED | {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "n_positions": 512}, 0.3),
    "gemma3": ("Gemma3TextConfig", _LLAMA | _KINDS, 0.6),
}


def build(name: str) -> Any:
    """A random decoder in eval mode whose keys and values have a quarter of their rank."""
    import transformers

    config_class, fields, _ = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**fields)).eval()
    randomise(model, 0)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(("k_proj", "v_proj")):
                rank = module.weight.shape[0] // 4
                module.weight.copy_(module.weight[:rank].repeat(4, 1))
            elif path.endswith("c_attn"):  # [in, queries + keys + values]
                for at in (WIDTH, 2 * WIDTH):
                    part = module.weight[:, at : at + WIDTH]
                    part.copy_(part[:, : WIDTH // 4].repeat(1, 4))
    return model.requires_grad_(False)


# -- forms: model, draw of lengths, draw of tokens -> (tokens, logits or None) -----------------------------------------

Outcome = tuple[torch.Tensor, torch.Tensor | None]
Form = Callable[[Any, random.Random, random.Random], Outcome]


def _ids(rng: random.Random, rows: int, tokens: int) -> torch.Tensor:
    return torch.tensor([[rng.randrange(2, VOCAB) for _ in range(tokens)] for _ in range(rows)])


def generated(rows: Sequence[int], **more: Any) -> Form:
    """One ``generate``, some rows of which are padded on the left."""

    def form(model: Any, rng: random.Random, tokens: random.Random) -> Outcome:
        ids = _ids(tokens, rng.choice(rows), rng.randint(7, 20))
        mask = torch.ones_like(ids)
        if len(ids) > 1:
            mask[0, : rng.randint(1, 4)] = 0
        torch.manual_seed(tokens.randrange(1000))
        given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}
        out = model.generate(ids * mask, attention_mask=mask, max_new_tokens=rng.randint(4, 24), **given)
        return out.sequences, torch.stack(out.logits)

    return form


def looked_up(model: Any, rng: random.Random, tokens: random.Random) -> Outcome:
    """Prompt lookup on a text that repeats itself: drafts are taken and cut off."""
    ids = _ids(tokens, 1, 4).repeat(1, 3)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    return out, None


def reused(model: Any, rng: random.Random, tokens: random.Random) -> Outcome:
    """A prefix continued by a copy, and by three rows made of it."""
    from transformers import DynamicCache

    cache, seen = DynamicCache(config=model.config), []
    given = {cache_keyword(model): cache, "use_cache": True}
    model(_ids(tokens, 1, 5), **given)
    for rows in (1, 3):
        again = copy.deepcopy(cache)
        if rows > 1:
            again.batch_repeat_interleave(rows)
        for _ in range(rng.randint(2, 5)):
            logits = model(_ids(tokens, rows, rng.randint(1, 3)), **(given | {cache_keyword(model): again})).logits
            seen.append(logits[:, -1])
    logits = torch.cat(seen)
    return logits.argmax(-1), logits


FORMS: dict[str, Form] = {
    "greedy": generated((1, 2, 3)),
    "sample": generated((2, 3), do_sample=True, top_p=0.9),
    "beam": generated((2, 3), num_beams=3),
    "pieces": generated((2, 3), prefill_chunk_size=4),
    "static": generated((2,), cache_implementation="static"),
    "lookup": looked_up,
    "prefix": reused,
}


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A model, and the same weights compiled."""

    name: str
    eager: Any
    compiled: Any

    @classmethod
    def of(cls, name: str, inner: str) -> Pair:
        eager = build(name)
        compiled = copy.deepcopy(eager)
        options = {"inner": inner, "calibration": "none", "scheduler": "uniform", "ratio": MODELS[name][2]}
        compiled.compile(backend="lorc", options=options)
        return cls(name, eager, compiled)

    @torch.no_grad()
    def differ(self, form: str, shape: int, seed: int) -> str | None:
        """What is wrong with one round of ``form``; None where both models give the same."""
        (want, expected), (got, logits) = (
            FORMS[form](m, random.Random(shape), random.Random(seed)) for m in (self.eager, self.compiled)
        )
        if not torch.equal(got, want):
            return "tokens"
        if logits is None or expected is None:
            return None
        far = float((logits - expected).abs().max() / expected.abs().max())
        return None if far <= TOLERANCE else f"logits by {far:.1e}"


def sample(seconds: float) -> dict[str, Any]:
    gc.collect()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    compiles = counters["stats"]["unique_graphs"]
    rss = psutil.Process().memory_info().rss
    return {"seconds": seconds, "rss": rss, "tensors": tensors, "codecs": len(STORE), "compiles": compiles}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the least-squares line; None for fewer than three points."""
    if len(points) < 3:
        return None
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def soak(minutes: float, inner: str, seed: int = 0) -> dict[str, Any]:
    """Rounds until the time is up; memory in bytes, time in seconds."""
    pairs, rng = [Pair.of(name, inner) for name in MODELS], random.Random(seed)
    todo = [(pair, form, shape) for pair in pairs for form in FORMS for shape in range(SHAPES)]
    counters.clear()
    begin, samples, wrong = time.monotonic(), [], []
    counted = dict.fromkeys(FORMS, 0)
    rounds, warm_until = 0, 60 * minutes
    while (passed := time.monotonic() - begin) < 60 * minutes:
        if rounds == len(todo):
            warm_until = max(passed, WARM * 60 * minutes)
        pair, form, shape = todo[rounds] if rounds < len(todo) else rng.choice(todo)  # each once, then at random
        if (bad := pair.differ(form, shape, rounds)) is not None:
            wrong.append({"round": rounds, "model": pair.name, "form": form, "shape": shape, "differs": bad})
            print(f"MISMATCH {wrong[-1]}", flush=True)
        counted[form] += 1
        rounds += 1
        if rounds % EVERY == 0:
            samples.append(sample(time.monotonic() - begin))
            s = samples[-1]
            print(
                f"{passed:7.0f} s {rounds:6} rounds {s['rss'] / 2**20:8.1f} MiB {s['tensors']:7} tensors "
                f"{s['codecs']:4} codecs {s['compiles']:4} graphs",
                flush=True,
            )
    samples.append(sample(time.monotonic() - begin))
    warm = [s for s in samples if s["seconds"] > warm_until] or samples[-1:]
    per_second = slope([(s["seconds"], s["rss"]) for s in warm])
    return {
        "rounds": counted,
        "covered": rounds >= len(todo),
        "warm_up_seconds": warm_until,
        "mismatches": wrong,
        "recompiles": warm[-1]["compiles"] - warm[0]["compiles"],
        "tensors_grown": warm[-1]["tensors"] - warm[0]["tensors"],
        "codecs": [warm[0]["codecs"], warm[-1]["codecs"]],
        "slope_mib_per_minute": None if per_second is None else per_second * 60 / 2**20,
        "samples": samples,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", LorcWarning)
    limits = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
    about = {"machine": machine(), "dtype": "float32", **{n: getattr(args, n) for n in ("minutes", "inner", "seed")}}
    with torch._dynamo.config.patch(**limits):
        found = soak(args.minutes, args.inner, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, about | {"recompile_limits": limits} | found)
    grown = found["slope_mib_per_minute"]
    line = "no slope yet" if grown is None else f"{grown:+.3f} MiB/min"
    rounds, wrong = sum(found["rounds"].values()), len(found["mismatches"])
    print(f"{rounds} rounds, {wrong} mismatches; after warm-up {found['recompiles']} recompiles, {line}; {args.out}")


if __name__ == "__main__":
    main()
