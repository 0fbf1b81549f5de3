"""Dynamo graph -> canonical ATen graph: one spelling for what means the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorc_fx.compat import canonical_trace, example_value, is_module_state
from lorc_fx.latent import LatentKV

aten = torch.ops.aten


def placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def logical(value: Any) -> Any:
    """A fake LatentKV as the dense fake tensor that it stands for; anything else as it is."""
    if isinstance(value, LatentKV):
        return value.codes.new_empty(value.shape, dtype=value.dtype)
    return value


def normalise(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Trace to ATen on Dynamo's own fakes and remove what does nothing.

    1. ``to(x, dtype of x)``, ``type_as`` of the same dtype, ``dropout`` in eval, ``detach``  ->  x
    2. ``type_as(x, y)``  ->  ``to.dtype(x, dtype of y)``

    Each placeholder keeps, in ``meta``: ``val`` (the dense fake of the logical shape), ``latent`` (the fake LatentKV,
    where the input is one) and ``state`` (True for parameters and buffers). In-place writes stay in place.
    """
    sources = placeholders(gm)
    values = [example_value(p) for p in sources]
    canonical = canonical_trace(gm, [logical(v) for v in values])
    for node, source, value, example in zip(placeholders(canonical), sources, values, example_inputs, strict=True):
        node.meta["state"] = is_module_state(source, example)
        node.meta["latent"] = value if isinstance(value, LatentKV) else None
    for node in list(canonical.graph.nodes):
        _simplify(node)
    canonical.graph.lint()
    canonical.recompile()
    return canonical


_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default}
_NOTHING = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default}


def _simplify(node: Node) -> None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return
    same = before.dtype == after.dtype and before.device == after.device
    if node.target is aten.type_as.default and not same:
        with node.graph.inserting_before(node):
            cast = node.graph.call_function(aten.to.dtype, (source, after.dtype))
        cast.meta["val"] = after
        node.replace_all_uses_with(cast)
        node.graph.erase_node(node)
        return
    nothing = node.target in _NOTHING or node.target is aten.type_as.default
    nothing |= node.target in _CASTS and same and node.target is not aten._to_copy.default and not _copies(node)
    nothing |= node.target is aten.dropout.default and (not node.args[2] or node.args[1] == 0)
    if nothing:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _copies(node: Node) -> bool:
    """``to(..., copy=True)``: positional in the overloads that have it, or by name."""
    flags = {aten.to.dtype: 3, aten.to.device: 4}.get(node.target)
    return bool(node.kwargs.get("copy") or (flags is not None and len(node.args) > flags and node.args[flags]))


def is_getitem(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
