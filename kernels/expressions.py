"""Numbered scalar expressions, and what each ATen op does to arrays of their numbers.

An epilogue is run on arrays in which every element is the number of an expression: layout ops move numbers about as
they move values, pointwise ops make new expressions (equal ones once), reductions make one over many.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.fx import Node


class NotGenerated(Exception):
    """This reader gets no kernel: ``node`` (a graph node, or words) and why. Internal: torch does it."""

    def __init__(self, node: object, why: str) -> None:
        self.node, self.why = node, why
        named = f"`{node.name}` ({node.target})" if isinstance(node, Node) else str(node)
        super().__init__(f"{named}: {why}")


LAYOUT = frozenset(
    """_unsafe_view alias broadcast_to cat chunk clone concat concatenate contiguous detach expand flatten flip
    index_select movedim narrow permute repeat repeat_interleave reshape roll select slice split split_with_sizes
    squeeze stack swapaxes swapdims t transpose unbind unflatten unsafe_split unsqueeze view""".split()
)
"""Ops that only move elements: they run on numbers as they are."""

UNARY = {
    "neg": "neg", "cos": "cos", "sin": "sin", "rsqrt": "rsqrt", "sqrt": "sqrt", "exp": "exp", "tanh": "tanh",
    "sigmoid": "sigmoid", "abs": "abs", "reciprocal": "reciprocal", "log": "log", "logical_not": "not",
    "bitwise_not": "not",
}  # fmt: skip
BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "true_divide": "div", "minimum": "minimum",
    "maximum": "maximum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "logical_and": "and",
    "bitwise_and": "and", "logical_or": "or", "bitwise_or": "or",
}  # fmt: skip
SOURCE = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})",
    "cos": "tl.cos({})", "sin": "tl.sin({})", "rsqrt": "tl.rsqrt({})", "sqrt": "tl.sqrt({})", "exp": "tl.exp({})",
    "log": "tl.log({})", "abs": "tl.abs({})", "sigmoid": "tl.sigmoid({})", "reciprocal": "(1.0 / {})",
    "tanh": "tanh({})", "minimum": "tl.minimum({}, {})", "maximum": "tl.maximum({}, {})",
    "where": "tl.where({}, {}, {})", "eq": "({} == {})", "ne": "({} != {})", "lt": "({} < {})", "le": "({} <= {})",
    "gt": "({} > {})", "ge": "({} >= {})", "and": "({} & {})", "or": "({} | {})", "not": "({} == 0)",
    "float": "{}.to(tl.float32)", "int": "{}.to(tl.int32)", "bfloat16": "{}.to(tl.bfloat16).to(tl.float32)",
    "float16": "{}.to(tl.float16).to(tl.float32)",
}  # fmt: skip
"""How a pointwise op is written in Triton, of operands in fp32 (int32 and bool where the graph has them)."""


def op_name(node: Node) -> str:
    """``mul`` of ``aten.mul.Tensor``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def literal(value: float) -> str:
    """A number as it is written in a kernel."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "float('nan')" if math.isnan(value) else "float('inf')" if value > 0 else "float('-inf')"
    return repr(value)


CASTS = {"float": torch.float32, "int": torch.int64, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Ops that change the type of a number."""


class Expressions:
    """All expressions of one program: ``ops[i]``, ``args[i]`` (numbers of expressions) and ``values[i]`` of number i.

    Leaves: ``y`` (value: column), ``side`` (feature), ``const`` (constant, place), ``number`` (its value), ``table``
    (constant, place at row 0, step from row to row; its one argument is the row).
    """

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.args: list[tuple[int, ...]] = []
        self.values: list[tuple[Any, ...]] = []
        self.of_y: list[bool] = []
        self.tables: list[torch.Tensor] = []  # constants that the graph itself makes: they come behind a decoder's
        self._known: dict[tuple[Any, ...], int] = {}

    def make(self, op: str, args: tuple[int, ...] = (), value: tuple[Any, ...] = ()) -> int:
        """The number of an expression; what is x * 1, x + 0, x / 1 or of numbers alone is simplified."""
        if op in CASTS and self.ops[args[0]] == "number":
            return self.number(torch.tensor(self.values[args[0]][0]).to(CASTS[op]).item())
        if op in ("mul", "add", "sub", "div"):
            simple = self._simplified(op, *args)
            if simple is not None:
                return simple
        key = (op, args, value, type(value[0]) if value else None)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.ops)
            self.ops.append(op)
            self.args.append(args)
            self.values.append(value)
            self.of_y.append(op == "y" or any(self.of_y[a] for a in args))
        return found

    def number(self, value: float) -> int:
        return self.make("number", (), (value,))

    def _simplified(self, op: str, a: int, b: int) -> int | None:
        x, y = (self.values[i][0] if self.ops[i] == "number" else None for i in (a, b))
        if x is not None and y is not None and (op != "div" or y):
            return self.number({"add": x + y, "sub": x - y, "mul": x * y, "div": x / (y or 1)}[op])
        neutral = 1 if op in ("mul", "div") else 0
        if y == neutral:
            return a
        return b if x == neutral and op in ("mul", "add") else None

    # -- on arrays of numbers -----------------------------------------------------------------------------------------

    def leaves(self, op: str, shape: tuple[int, ...], *which: int) -> torch.Tensor:
        count = math.prod(shape)
        return torch.tensor([self.make(op, (), (*which, i)) for i in range(count)], dtype=torch.int64).reshape(shape)

    def each(self, op: str, *arrays: torch.Tensor | float) -> torch.Tensor:
        """A pointwise op on arrays (broadcast) and Python numbers."""
        numbered = [a if isinstance(a, torch.Tensor) else torch.tensor(self.number(a)) for a in arrays]
        spread = torch.broadcast_tensors(*numbered)
        stacked = np.stack([a.reshape(-1).numpy() for a in spread])
        distinct, back = np.unique(stacked, axis=1, return_inverse=True)
        made = np.array([self.make(op, tuple(column)) for column in distinct.T.tolist()], dtype=np.int64)
        return torch.from_numpy(made[back.reshape(-1)]).reshape(spread[0].shape)

    def total(self, x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
        """Sums along ``dims``."""
        dims = sorted({d % x.dim() for d in dims}) if dims else list(range(x.dim()))
        rest = [d for d in range(x.dim()) if d not in dims]
        flat = x.permute(*rest, *dims).reshape(*[x.shape[d] for d in rest], -1)
        rows = flat.reshape(-1, flat.shape[-1]).tolist()
        made = torch.tensor([r[0] if len(r) == 1 else self.make("sum", tuple(r)) for r in rows], dtype=torch.int64)
        kept = [1 if d in dims else x.shape[d] for d in range(x.dim())] if keep else [x.shape[d] for d in rest]
        return made.reshape(kept)

    def mean(self, x: torch.Tensor, dims: list[int], keep: bool = True) -> torch.Tensor:
        count = math.prod(x.shape[d] for d in dims) if dims else x.numel()
        return self.each("mul", self.total(x, dims, keep), 1.0 / count)


def pointwise(ex: Any, node: Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a pointwise node is, by ``ex.each`` (of ``Expressions``, or of what writes a kernel's scores); None where
    it is none of those known."""
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") or (name in ("add", "sub", "rsub") and len(args) > 2):
        raise NotGenerated(node, "it scales or rounds on the way")
    if name in UNARY:
        return ex.each(UNARY[name], args[0])
    if name in BINARY:
        return ex.each(BINARY[name], args[0], args[1])
    if name == "rsub":
        return ex.each("sub", args[1], args[0])
    if name == "square":
        return ex.each("mul", args[0], args[0])
    if name == "relu":
        return ex.each("maximum", args[0], 0.0)
    if name == "where" and len(args) == 3:
        return ex.each("where", *args)
    if name == "masked_fill":
        return ex.each("where", args[1], args[2], args[0])
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = kwargs.get("min", args[1] if len(args) > 1 and name != "clamp_max" else None)
        high = kwargs.get("max", args[-1] if name == "clamp_max" else args[2] if len(args) > 2 else None)
        x = args[0] if low is None else ex.each("maximum", args[0], low)
        return x if high is None else ex.each("minimum", x, high)
    if name == "pow":
        powers = {2: ("mul", 2), 0.5: ("sqrt", 1), -0.5: ("rsqrt", 1), -1: ("reciprocal", 1), 1: ("", 1)}
        if isinstance(args[1], (int, float)) and args[1] in powers:
            op, count = powers[args[1]]
            return ex.each(op, *[args[0]] * count) if op else args[0]
        raise NotGenerated(node, f"a power of {args[1]}")
    return None
