"""Processes that run one graph together: a run of it that some of them leave out would hang the others or pair their
collectives wrongly, so what decides on one is agreed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from .compat import process_group


def groups(gm: GraphModule) -> tuple[Any, ...]:
    """The process groups (or their names) that the collectives of a graph run in, each once, in their order; () where
    it has none."""
    found = {}
    for node in gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        places = [i for i, a in enumerate(schema.arguments) if a.name == "group_name"] if schema is not None else []
        for i in places:
            found[str(_given(node, i))] = _given(node, i)
    return tuple(found.values())


def _given(node: Any, place: int) -> Any:
    return node.args[place] if place < len(node.args) else node.kwargs.get("group_name")


def all_agree(gm: GraphModule, mine: bool) -> bool:
    """Whether ``mine`` holds in each process that runs ``gm`` with this one, all of which must ask. A graph without
    collectives is one process's own."""
    for name in groups(gm):
        group = process_group(name)
        told = [mine] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(told, mine, group)
        mine = all(told)
    return mine
