"""Invariants between passes (README.md beside this file): cheap, always on."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from lorc_fx.errors import GraphInvariant

from .interface import Rewritten


def check_canonical(gm: GraphModule) -> None:
    """After normalise: placeholders first, each with a value; only call_function and get_attr in between."""
    seen_op = False
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if seen_op:
                raise GraphInvariant("normalise", "placeholders come first", node.name)
            if "val" not in node.meta and node.users:
                raise GraphInvariant("normalise", "every placeholder has a value", node.name)
        else:
            seen_op = True
            if node.op not in ("call_function", "get_attr", "output"):
                raise GraphInvariant("normalise", "only functions and attributes between inputs and output", node.op)


def check_rewritten(made: Rewritten) -> None:
    """After rewrite: one recipe and an example value per input, results for all outputs."""
    holders = [n for n in made.module.graph.nodes if n.op == "placeholder"]
    if len(holders) != len(made.inputs):
        raise GraphInvariant("rewrite", "one recipe per input", f"{len(holders)} inputs, {len(made.inputs)} recipes")
    results = next(n for n in made.module.graph.nodes if n.op == "output").args[0]
    for out in made.outputs:
        used = [i for i in (out.index, out.positions) if i is not None] if out.kind in ("plain", "born") else []
        if any(not 0 <= i < len(results) for i in used):
            raise GraphInvariant("rewrite", "every output has its results", str(out))
    for holder in holders:
        if not isinstance(holder.meta.get("val"), (torch.Tensor, torch.SymInt, int, float, bool)):
            raise GraphInvariant("rewrite", "every input has an example value", holder.name)
