"""Regions under ``torch.vmap`` in a Dynamo graph -> the ops that they do on whole tensors.

A pre-dispatch trace sees the batched tensors inside of such a region, not what makes them, and so has holes there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lorc_fx.compat import batched_execution, copied, example_value, fake_mode_of


def expand_vmap(gm: GraphModule) -> GraphModule:
    """``gm`` with each outermost vmap region (masks built by index, associative scans) traced after batching.

    ``vmap_increment(n); b = add_batch_dim(x, 0, 1); c = b + 1; remove_batch_dim(c, 1, n, 0); vmap_decrement()``
    ->  ``aten.add(x, 1)``

    A graph without such regions is returned as it is; else a new one, with the same placeholders.
    """
    if not any(_steps(node) for node in gm.graph.nodes):
        return gm
    made, _ = copied(gm)
    for region in _regions(made.graph):
        _expand(made, region)
    made.graph.lint()
    made.recompile()
    return made


def _steps(node: Node) -> int:
    """How many levels of vmap a node opens (negative: closes)."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)


def _regions(graph: Graph) -> list[list[Node]]:
    found: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if depth == 0 and _steps(node) > 0:
            found.append([])
        depth += _steps(node)
        if depth > 0 or _steps(node):
            found[-1].append(node)
    return found


def _expand(gm: GraphModule, region: Sequence[Node]) -> None:
    """Trace one region on the values that Dynamo noted, and put the trace in its place."""
    inside = set(region)
    inputs = [n for n in dict.fromkeys(a for node in region for a in node.all_input_nodes) if n not in inside]
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    alone = Graph()
    env = {node: alone.placeholder(node.name) for node in inputs}
    for node in region:
        env[node] = alone.node_copy(node, env.__getitem__)
    alone.output([env[node] for node in outputs])
    values = [example_value(node) for node in inputs]
    run = GraphModule(gm, alone).forward
    with batched_execution(fake_mode_of(values)), torch.no_grad():
        traced = make_fx(lambda *given: run(*given))(*values)
    places, trace = iter(inputs), region[0].meta.get("stack_trace")
    with gm.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(places)
            elif node.op == "get_attr":
                name = f"_vmapped_{len(gm._buffers)}"
                gm.register_buffer(name, getattr(traced, node.target))
                env[node] = gm.graph.get_attr(name)
            elif node.op == "call_function":
                env[node] = gm.graph.node_copy(node, env.__getitem__)
                env[node].meta = {"example_value": node.meta.get("val"), "stack_trace": trace}
    (results,) = traced.graph.output_node().args
    for old, new in zip(outputs, results, strict=True):
        old.replace_all_uses_with(env[new], delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)
