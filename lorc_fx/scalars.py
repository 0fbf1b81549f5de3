"""Python numbers that Dynamo made inputs of a graph, because they changed between two calls.

A norm's epsilon, an adapter's scale: with the second value (of a second model of the class, perhaps) Dynamo stops
compiling for the value. What it then hands over, ``item = number.item()`` of an input of no dimensions, cannot be
traced on fakes, and codecs depend on the value. So each value gets a graph of its own after all, here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .compat import building, copied, example_value, recompile_limit

Callee = Callable[..., Any]


def scalar_places(gm: GraphModule) -> tuple[int, ...]:
    """Which inputs of a Dynamo graph are Python numbers."""
    holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return tuple(i for i, holder in enumerate(holders) if _items(holder))


def _items(holder: Node) -> list[Node]:
    """The ``item()`` calls of an input that is a number and nothing else."""
    value = example_value(holder)
    number = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64
    reads = [user for user in holder.users if user.op == "call_method" and user.target == "item"]
    return reads if number and len(reads) == len(holder.users) else []


def with_scalars(gm: GraphModule, examples: Sequence[Any]) -> GraphModule:
    """``gm`` with the numbers of ``examples`` written into it; ``gm`` itself where it has none."""
    places = scalar_places(gm)
    if not places:
        return gm
    made, _ = copied(gm)
    holders = [n for n in made.graph.nodes if n.op == "placeholder"]
    for place in places:
        for item in _items(holders[place]):
            item.replace_all_uses_with(float(examples[place]))  # type: ignore[arg-type]
            made.graph.erase_node(item)
    made.recompile()
    return made


class ByScalars:
    """A callable for each combination of numbers that comes up, made when it does; ``otherwise`` makes the one for all
    that come after Dynamo's own limit of recompiles."""

    def __init__(
        self,
        gm: GraphModule,
        compile_one: Callable[[GraphModule, Sequence[Any]], Callee],
        otherwise: Callable[[], Callee],
    ) -> None:
        self.gm, self.compile_one, self.otherwise = gm, compile_one, otherwise
        self.places, self.limit = scalar_places(gm), recompile_limit()
        self.made: dict[tuple[float, ...], Callee] = {}
        self.rest: Callee | None = None

    def first(self, examples: Sequence[Any]) -> ByScalars:
        """Compile for the numbers at hand."""
        self._for(examples)
        return self

    def _for(self, arguments: Sequence[Any]) -> Callee:
        values = tuple([float(arguments[i]) for i in self.places])
        found = self.made.get(values) or self.rest
        if found is not None:
            return found
        with building():
            if values not in self.made and len(self.made) >= self.limit:
                self.rest = self.rest or self.otherwise()
                return self.rest
            if values not in self.made:
                self.made[values] = self.compile_one(with_scalars(self.gm, arguments), arguments)
            return self.made[values]

    def __call__(self, *arguments: Any) -> Any:
        return self._for(arguments)(*arguments)
