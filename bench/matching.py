"""How the time to read and rewrite a graph grows with its layers: two kinds of decoder, small in all but their depth.

    python -m bench.matching [--out bench/results/matching.json]

For the graph of a prompt and that of a decode step, the processor seconds of each pass: ``normalise``, ``match``,
``rewrite``. The exponent is the slope of their logarithms between a model of eight layers or more and the deepest; 1 is
linear.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from bench.run import RESULTS, machine
from lorc_fx import PAPER
from lorc_fx.backend import compile_graph
from lorc_fx.builder import Builder
from lorc_fx.codec import Codec
from lorc_fx.console import write_json
from lorc_fx.errors import QualityWarning
from lorc_fx.options import Options
from lorc_fx.passes.check import check_canonical, check_rewritten
from lorc_fx.passes.interface import Sharing
from lorc_fx.passes.normalise import normalise
from lorc_fx.passes.rewrite import rewrite
from lorc_fx.passes.sites import match

Measure = Callable[[Callable[[], Any]], float]

LAYERS, REPEATS = (2, 8, 32, 80), 3
PASSES = ("normalise", "match", "rewrite")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
#: name -> class of transformers, what its configuration needs beside ``SIZES``
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
}
OPTIONS = Options.parse({**PAPER, "ratio": 0.5, "scheduler": "uniform", "inner": "eager"})


def decoder(kind: str, layers: int) -> Any:
    name, more = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, num_key_value_heads=1, num_hidden_layers=layers, **more)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median over a few runs after one that does not count, in processor time: other work on the machine adds
    nothing to it."""
    found = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found[1:])


def sharing(codecs: Sequence[Codec]) -> Sharing:
    """Constants that several codecs read are one input, as the wrapper finds it (``runtime``)."""
    first: dict[int, tuple[int, str]] = {}
    places = [((s, f"const{i}"), const) for s, codec in enumerate(codecs) for i, const in enumerate(codec.consts)]
    return Sharing((), tuple((here, first.setdefault(id(const), here)) for here, const in places))


def passes(gm: GraphModule, examples: Sequence[Any], measure: Measure) -> dict[str, float]:
    """Nodes of the canonical graph, and what each pass over it takes."""

    def canonical() -> GraphModule:
        made = normalise(gm, examples)
        check_canonical(made)
        return made

    graph = canonical()
    matched = match(graph)
    codecs = Builder(graph, matched, OPTIONS).codecs(examples)
    shared = sharing(codecs)
    by_site = dict(zip(matched.sites, codecs, strict=True))
    work = {
        "normalise": canonical,
        "match": lambda: match(graph),
        "rewrite": lambda: check_rewritten(rewrite(graph, matched, by_site, shared)),
    }
    took = {name: measure(work[name]) for name in PASSES}
    return {"nodes": len(graph.graph.nodes), "sites": len(matched.sites), **took}


def measured(kind: str, layers: int, measure: Measure) -> list[dict[str, Any]]:
    """One row for the prompt's graph and one for a step's, on a cache of latents."""
    rows: list[dict[str, Any]] = []
    stages = iter(("prompt", "step"))

    def backend(gm: GraphModule, examples: Sequence[Any]) -> Any:
        rows.append({"kind": kind, "layers": layers, "graph": next(stages), **passes(gm, examples, measure)})
        return compile_graph(gm, examples, OPTIONS)

    backend.reads_latents = True  # type: ignore[attr-defined]  # so that Dynamo may trace on latents for it
    torch._dynamo.reset()
    call = torch.compile(decoder(kind, layers), backend=backend)
    with torch.no_grad():
        cache = call(torch.arange(7)[None], use_cache=True).past_key_values
        call(torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    assert all(row["sites"] == 2 * layers for row in rows) and len(rows) == 2
    return rows


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of each pass for each kind and graph, between the shallowest and the deepest model of eight layers or
    more, or of all where only one has so many. One depth alone has none."""
    found = []
    for kind, graph in sorted({(r["kind"], r["graph"]) for r in rows}):
        same = sorted((r for r in rows if (r["kind"], r["graph"]) == (kind, graph)), key=lambda r: r["layers"])
        deep = [r for r in same if r["layers"] >= 8]
        low, high = (deep if len(deep) > 1 else same)[0], same[-1]
        if low["layers"] == high["layers"]:
            continue
        steps = math.log(high["layers"] / low["layers"])
        slopes = {name: math.log(high[name] / low[name]) / steps for name in ("nodes", *PASSES)}
        found.append({"kind": kind, "graph": graph, "between": [low["layers"], high["layers"]], **slopes})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=RESULTS / "matching.json")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", QualityWarning)  # random weights, and nothing is generated
    print(f"{'':8}{'':8}{'layers':>8}{'nodes':>8}" + "".join(f"{name + ' s':>14}" for name in PASSES))
    rows = []
    for kind in KINDS:
        for layers in args.layers:
            for row in measured(kind, layers, lambda work: seconds(work, args.repeats)):
                rows.append(row)
                took = "".join(f"{row[name]:14.3f}" for name in PASSES)
                print(f"{kind:8}{row['graph']:8}{layers:8}{row['nodes']:8}{took}", flush=True)
    slopes = exponents(rows)
    for row in slopes:
        print(
            f"{row['kind']:8}{row['graph']:8}exponent{row['nodes']:8.2f}" + "".join(f"{row[n]:14.2f}" for n in PASSES)
        )
    about = {"machine": machine(), "clock": "process_time", "repeats": args.repeats, "sizes": SIZES}
    write_json(args.out, about | {"rows": rows, "exponents": slopes})


if __name__ == "__main__":
    main()
