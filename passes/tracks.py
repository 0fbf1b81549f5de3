"""Which groups hold the same tokens at the same positions: they share one track, kept by the first of them.

Two groups share where the same ops in the same order act on their cells, seen from the positions' side, and the same
position value comes in with their rows. Buffers that are written in place keep their own: each layer of a static cache
counts its tokens by itself, so no graph can tell that all write to the same place.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.fx import GraphModule, Node

from lorc_fx.decoder import Decoder

from .axes import shape
from .caches import Group, is_empty
from .sites import Matched, Site

Program = list[tuple[Any, ...]]


def shared_tracks(
    gm: GraphModule,
    matched: Matched,
    leaders: Mapping[int, int] = MappingProxyType({}),
    windows: Mapping[Node, Any] = MappingProxyType({}),
) -> dict[Group, Group]:
    """Each coded group that stores positions -> the group that keeps them (itself, or an earlier one).

    ``leaders``: LatentKV argument -> the first LatentKV argument in step with it. ``windows``: the LatentKV inputs
    that are only appended to, and by how many tokens.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    sites = {site.node: site for site in matched.sites}
    cells: dict[Group, list[Node]] = {}
    for node in gm.graph.nodes:
        group = matched.caches.group(node)
        if group is not None and group in matched.coded and _decoder(group, sites).needs_positions:
            cells.setdefault(group, []).append(node)
    arguments = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    inputs = {n: (leaders.get(i, i), windows.get(n)) for n, i in arguments.items()}
    found: dict[Group, Group] = {}
    known: list[tuple[Program, list[Node], Group]] = []
    for group, nodes in cells.items():
        found[group] = group
        if group.in_place:
            continue
        program = _program(group, nodes, sites, inputs)
        for other, earlier, leader in known:
            if program == other and all(order[a] < order[b] for a, b in zip(earlier, nodes, strict=True)):
                found[group] = leader
                break
        else:
            known.append((program, nodes, group))
    return found


def _decoder(group: Group, sites: Mapping[Node, Site]) -> Decoder:
    decoders = [n.meta["latent"].codec.decoder for n in group.latents]
    return (decoders + [sites[n].decoder for n in group.rows if n in sites])[0]


def _program(group: Group, nodes: list[Node], sites: Mapping[Node, Site], inputs: Mapping[Node, Any]) -> Program:
    """What makes each cell, as far as positions can tell."""
    place = {node: k for k, node in enumerate(nodes)}
    decoder = _decoder(group, sites)

    def seen(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return tuple(seen(a) for a in arg)
        if not isinstance(arg, Node):
            return arg
        return ("cell", place[arg]) if arg in place else "empty" if is_empty(arg) else arg

    program: Program = [(group.window,)]
    for node in nodes:
        if node in inputs:
            program.append(("argument", *inputs[node]))
        elif node in sites:
            batch = shape(node)[decoder.batch_dim] if decoder.batch_dim >= 0 else 1
            program.append(("rows", sites[node].rows.sides, batch))
        else:
            program.append((node.target, seen(node.args), tuple(sorted((k, seen(v)) for k, v in node.kwargs.items()))))
    return program
