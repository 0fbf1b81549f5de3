"""Weights that are tensor subclasses, taken apart: a quantised weight is integers and scales, a shard its local rows.

Dynamo hands such a weight over whole. The graph that the passes read has its plain parts as inputs and puts them
together inside, so that the trace shows what the subclass does with them: the affine chain then ends at plain tensors,
whose changes are seen like those of any weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .compat import copied, example_value, is_module_state
from .latent import LatentKV
from .scalars import with_scalars

Take = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class _Shape:
    """How one subclass is made of its parts, by attribute: a _Shape, None for a plain tensor, else the part itself (a
    shard's device mesh)."""

    kind: type
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    parts: dict[str, Any]

    @classmethod
    def of(cls, value: torch.Tensor) -> _Shape:
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: getattr(value, name) for name in names}
        plain = {name: None if isinstance(part, torch.Tensor) else part for name, part in inner.items()}
        parts = plain | {name: cls.of(part) for name, part in inner.items() if in_several(part)}
        return cls(type(value), context, value.size(), value.stride(), parts)

    def whole(self, leaves: Any) -> torch.Tensor:
        """Put together what ``plain_parts`` took apart; ``leaves`` is an iterator over these."""
        inner = {name: self._part(part, leaves) for name, part in self.parts.items()}
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)  # type: ignore[attr-defined]

    @staticmethod
    def _part(part: Any, leaves: Any) -> Any:
        return next(leaves) if part is None else part.whole(leaves) if isinstance(part, _Shape) else part


class _Whole(torch.nn.Module):
    """A node of the graph: plain parts in, the subclass out."""

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, *leaves: torch.Tensor) -> torch.Tensor:
        return self.shape.whole(iter(leaves))


def in_several(value: Any) -> bool:
    """Whether a tensor is a wrapper around plain ones (a LatentKV is one too, but has a treatment of its own)."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, LatentKV)


def plain_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of: itself, where it is plain."""
    if not in_several(value):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = (getattr(value, name) for name in names)
    return [leaf for part in inner if isinstance(part, torch.Tensor) for leaf in plain_parts(part)]


def all_parts(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The plain tensors that ``weights`` consist of."""
    return [leaf for weight in weights for leaf in plain_parts(weight)]


def in_parts(gm: GraphModule, examples: Sequence[Any]) -> tuple[GraphModule, Take]:
    """``gm`` with the parts of its subclass weights as inputs, and what takes arguments apart in the same way. Python
    numbers that are inputs are those of ``examples`` (``scalars.py``).

    Where no weight is a subclass, a call costs nothing. Dynamo guards the type of a weight and what
    its subclass says of it (``__tensor_flatten__``), so a graph always gets the parts that it was made for.
    """
    gm = with_scalars(gm, examples)
    sources = [n for n in gm.graph.nodes if n.op == "placeholder"]
    state = [is_module_state(n, e) for n, e in zip(sources, examples, strict=True)]
    found = {i for i, n in enumerate(sources) if state[i] and in_several(example_value(n))}
    if not found:
        return gm, lambda arguments: arguments
    made, copies = copied(gm)
    graph, made.meta["in_parts"] = made.graph, True
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for i in sorted(found):
        holder, value = copies[sources[i]], example_value(sources[i])
        leaves = []
        for part, leaf in enumerate(plain_parts(value)):
            with graph.inserting_before(holder):
                leaves.append(graph.placeholder(f"{holder.name}_part{part}"))
            leaves[-1].meta |= {"example_value": leaf, "lorc_module_state": True}
        made.add_submodule(f"lorc_whole{i}", _Whole(_Shape.of(value)))
        with graph.inserting_before(first):
            whole = graph.call_module(f"lorc_whole{i}", tuple(leaves))
        holder.replace_all_uses_with(whole)
        graph.erase_node(holder)
    made.recompile()
    return made, lambda arguments: [p for i, a in enumerate(arguments) for p in (plain_parts(a) if i in found else [a])]
