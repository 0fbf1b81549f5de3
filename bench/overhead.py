"""What latents cost a decode step outside of the compiled graph: guards, wrapping, looking codecs up.

    python -m bench.overhead [--tokens 1024] [--repeats 200] [--out bench/results/overhead.json]

The Llama shape of ``bench.run``, fp32, one thread, a cache of ``--tokens``, LoRC's codec. Two kinds of rows:

``whole``: steps under inductor, dense and lorc taking turns; ``outside_s`` is a step less the time inside of what
inductor made.

``stub``: the same, with inner callables that give back what they gave first, so that nothing but the overhead is left:
Dynamo's guards on the model and its inputs, the model's Python that is not compiled, and for lorc what
``runtime.Compiled`` does (``binding_s``). A lorc cache grows all the same, a dense one does not, which favours dense.

``added`` is lorc's less dense's as a share of a whole dense step under inductor: ``outside`` of whole steps, whose
arithmetic has emptied the processor's caches, and of stubs, which find them warm. Medians over repeats of the ratio, as
other work on the machine meets all of one repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import models
from bench.cases import BASE, Variant
from bench.run import RESULTS, Handle, filled, machine
from lorc_fx.console import write_json
from lorc_fx.decode_command import WARMUP, twin
from lorc_fx.runtime import Compiled

VARIANTS = (BASE, Variant("lorc-1.0", 1.0), Variant("lorc-0.45", 0.45))


def stub(gm: Any, examples: Any) -> Callable[..., Any]:
    """An inner compiler: a callable that runs the graph once and gives back the same results ever after."""
    kept: list[Any] = []

    def run(*args: Any) -> Any:
        if not kept:
            kept.append(gm.forward(*args))
        return kept[0]

    return run


class Binding:
    """Seconds spent in ``Compiled.__call__`` (what it calls included), while entered."""

    def __init__(self) -> None:
        self.seconds, plain = 0.0, Compiled.__call__

        def timed(compiled: Compiled, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = plain(compiled, *arguments)
            self.seconds += time.perf_counter() - start
            return result

        self.patch = mock.patch.object(Compiled, "__call__", timed)


def measure(model: Any, tokens: int, repeats: int, stubbed: bool) -> list[dict[str, Any]]:
    """One row per variant, with the times of each repeat; variants take turns."""
    handles = [Handle(variant, twin(model)) for variant in VARIANTS]
    caches, token = filled(handles, tokens, repeats), models.random_ids(1)
    if stubbed:  # the caches were filled by real steps; the steps that are timed come from stubs
        for handle, cache in zip(handles, caches, strict=True):
            handle.inner.lower = stub
            torch._dynamo.reset_code(handle.model.forward.__code__)
            for _ in range(WARMUP):
                handle.call(token, cache)
    binding = Binding()
    rows: list[dict[str, Any]] = [
        {"variant": v.name, "stub": stubbed, "seconds": [], "outside_s": [], "binding_s": []} for v in VARIANTS
    ]
    with binding.patch:
        for repeat in range(repeats):
            for k in range(len(handles)):
                i = (k + repeat) % len(handles)
                before = binding.seconds
                total, inside = handles[i].call(token, caches[i])
                rows[i]["seconds"].append(total)
                rows[i]["outside_s"].append(total - inside)
                rows[i]["binding_s"].append(max(binding.seconds - before - inside, 0.0))
    for row in rows:
        row |= {f"median_{key}": statistics.median(row[key]) for key in ("seconds", "outside_s", "binding_s")}
    return rows


def added(whole: list[dict[str, Any]], stubs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per lorc variant: shares of a dense step that guards and wrapping add, by stubs and by what is outside."""
    step = whole[0]["seconds"]

    def share(rows: list[dict[str, Any]], i: int, key: str) -> float:
        pairs = zip(rows[i][key], rows[0][key], step, strict=True)
        return statistics.median((mine - dense) / whole_step for mine, dense, whole_step in pairs)

    return {
        row["variant"]: {
            "stub": share(stubs, i, "outside_s"),
            "stub_binding": share(stubs, i, "binding_s"),
            "outside": share(whole, i, "outside_s"),
            "seconds": statistics.median(
                a - b for a, b in zip(stubs[i]["outside_s"], stubs[0]["outside_s"], strict=True)
            ),
        }
        for i, row in enumerate(whole)
        if i
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What latents cost a decode step outside of the compiled graph.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = models.build("llama")
    whole = measure(model, args.tokens, args.repeats, stubbed=False)
    stubs = measure(model, args.tokens, args.repeats, stubbed=True)
    found = added(whole, stubs)
    write_json(
        args.out,
        {
            "command": "python -m bench.overhead",
            "machine": machine(),
            "tokens": args.tokens,
            "added": found,
            "rows": whole + stubs,
        },
    )
    for row in whole + stubs:
        kind = "stub" if row["stub"] else "step"
        step, outside, binding = (1e3 * row[f"median_{key}"] for key in ("seconds", "outside_s", "binding_s"))
        print(
            f"{kind} {row['variant']}: {step:.3f} ms, outside {outside:.3f} ms, of it in the binding {binding:.3f} ms"
        )
    for name, shares in found.items():
        print(
            f"{name} adds {shares['outside']:.2%} of a dense step outside of the graph, {shares['stub']:.2%} by stubs"
        )


if __name__ == "__main__":
    main()
