"""Every node of a graph held against its bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorc_fx.certify import Certified
from lorc_fx.options import Options
from lorc_fx.propagate import Known
from lorc_fx.report import traced


@dataclass
class Held:
    """``over``: nodes with something above its bound; ``nodes``: how many had an error; ``ops``: without a rule."""

    over: list[str]
    nodes: int
    ops: tuple[str, ...]
    largest: float
    states: dict[str, Known]


def hold(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Held:
    """Walk ``model`` on ``inputs`` with ``options``."""
    held = Held([], 0, (), 0.0, {})

    def visit(gm: Any, examples: Any) -> None:
        certified = Certified.of(gm, examples, Options.parse(options))
        if certified is None:
            return
        main = certified.main

        def look(node: Any, walker: Any) -> None:
            made = main.known.get(node)
            if not isinstance(made, Known) or not (made.value.is_floating_point() or made.value.is_complex()):
                return
            assert made.each is not None
            if not made.value.numel():
                return
            error = main.measured(node, walker.dense[node])
            scale = 1e-9 * (1 + float(walker.dense[node].abs().nan_to_num(0, 0, 0).clamp_max(1e6).max()))
            over = bool((error > made.each + scale).any())
            if made.norm is not None and error.dim():
                over |= bool((error.norm(dim=made.axis, keepdim=True) > made.norm + scale).any())
                held.largest = max(
                    held.largest, float((error.norm(dim=made.axis, keepdim=True) / (made.norm + 1e-9)).max())
                )
            held.over += [f"{node.name} ({node.target})"] if over else []
            held.nodes += 1
            held.states[node.name] = made

        certified.walker.run([main], look)
        held.ops = tuple(dict.fromkeys(main.unbounded))

    traced(model, (), inputs, visit)
    assert held.nodes, "no node was held against a bound"
    return held
