"""An epilogue's graph, run on numbers of expressions: which expression each element of the dense cache value is.

The graph runs for one token of one batch row, on zeros (for dtypes and sizes) and on numbers (``expressions.py``)
side by side: a decoder works for any number of tokens, so nothing of what it computes depends on that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from lorc_fx.decoder import Decoder

from .expressions import LAYOUT, Expressions, NotGenerated, op_name, pointwise

LOW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Constant:
    """Of a decoder's constant: what a kernel is generated for."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Complex:
    """Complex values: numbers of their real and imaginary parts."""

    real: torch.Tensor
    imag: torch.Tensor


def dense_value(ex: Expressions, decoder: Decoder, constants: Sequence[Constant]) -> torch.Tensor:
    """The numbers of the features of one token, in the order in which an operand counts them, [features]."""
    if "B" not in decoder.layout:
        raise NotGenerated("epilogue", "its value has no batch axis of its own")
    value = _Run(ex, decoder, constants).numbers_of_output()
    return value.movedim((decoder.batch_dim, decoder.token_dim), (0, 1)).reshape(-1)


class _Run(Interpreter):
    """The two runs at once: values in the interpreter's own environment, numbers in ``ids``."""

    def __init__(self, ex: Expressions, decoder: Decoder, constants: Sequence[Constant]) -> None:
        super().__init__(decoder.module)
        self.ex, self.decoder, self.constants = ex, decoder, constants
        self.ids: dict[Node, Any] = {}
        self.fixed: set[Node] = set()  # what depends on nothing, not even on the number of tokens
        self.found: Any = None

    def numbers_of_output(self) -> torch.Tensor:
        side = self.decoder.side
        where = None if side is None else torch.zeros(1, 1, *side.features, dtype=side.dtype)
        given: list[Any] = [torch.zeros(1, 1, self.decoder.width, dtype=self.decoder.dtype), where]
        given += [torch.zeros(c.shape, dtype=c.dtype) for c in self.constants]
        holders = [n for n in self.decoder.module.graph.nodes if n.op == "placeholder"]
        for i, (node, value) in enumerate(zip(holders, given, strict=False)):
            if value is not None:
                leaf, which = ("y", ()) if i == 0 else ("side", ()) if i == 1 else ("const", (i - 2,))
                self.ids[node] = self.ex.leaves(leaf, tuple(value.shape), *which)
        try:
            with torch.no_grad():
                self.run(*given[: len(holders)])
        except NotGenerated as error:  # without what the interpreter adds to its words
            raise NotGenerated(error.node, error.why) from error.__cause__
        if not isinstance(self.found, torch.Tensor):
            raise NotGenerated("epilogue", "its value is no single real tensor")
        return self.found

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise NotGenerated(n, f"it does not run for one token ({error})") from error
        if n.op == "output":
            self.found = self._use(n.args[0])
        elif n.op in ("get_attr", "call_module"):
            raise NotGenerated(n, "the epilogue has tensors of its own")
        elif n.op != "placeholder":
            try:
                self._number(n, value)
            except (RuntimeError, TypeError, IndexError, ValueError, KeyError, AttributeError) as error:
                raise NotGenerated(n, f"no kernel is made of it in this form ({error})") from error
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, args, {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)

    def _use(self, arg: Any) -> Any:
        """A node's numbers; what is no tensor (a size) as it is."""
        return map_arg(arg, lambda node: self.ids[node] if node in self.ids else self.env[node])

    def _number(self, node: Node, value: Any) -> None:
        if self.fixed.issuperset(node.all_input_nodes):
            self.fixed.add(node)
            if isinstance(value, torch.Tensor):
                real = not value.is_complex()
                self.ids[node] = (
                    self._table(value) if real else _Complex(self._table(value.real), self._table(value.imag))
                )
                return
        several = isinstance(value, (list, tuple))
        if not isinstance(value, torch.Tensor) and not (several and isinstance(value[0], torch.Tensor)):
            return
        args, kwargs = list(self._use(node.args)), dict(self._use(node.kwargs))
        made = self._made(node, op_name(node), args, kwargs, value)
        if isinstance(made, torch.Tensor):
            if made.shape != value.shape:
                made = made.expand(value.shape)
            if value.dtype in LOW and op_name(node) not in LAYOUT:
                made = self._rounded(made, LOW[value.dtype])
        self.ids[node] = made

    def _table(self, value: torch.Tensor) -> torch.Tensor:
        """Numbers of a constant that the graph makes (frequencies, say): a table that the kernel gets as an
        argument."""
        distinct = value.unique()
        if len(distinct) == 1:
            return torch.full(value.shape, self.ex.number(distinct[0].item()))
        which = len(self.constants) + len(self.ex.tables)
        self.ex.tables.append(value.flatten() if not value.is_floating_point() else value.flatten().float())
        return self.ex.leaves("const", tuple(value.shape), which)

    def _rounded(self, numbers: torch.Tensor, kind: str) -> torch.Tensor:
        """What does not depend on y is rounded as in the model: an angle is far off otherwise. What does stays fp32."""
        of_y = torch.tensor([self.ex.of_y[i] for i in numbers.flatten().tolist()]).reshape(numbers.shape)
        return torch.where(of_y, numbers, self.ex.each(kind, numbers))

    def _made(self, node: Node, name: str, args: list[Any], kwargs: dict[str, Any], value: Any) -> Any:
        if any(isinstance(a, _Complex) for a in args):
            return self._complex(node, name, args)
        if name == "bitwise_not" and value.dtype != torch.bool:
            raise NotGenerated(node, "bits of integers")
        if name in LAYOUT or name == "getitem":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if name in ("expand_as", "view_as", "reshape_as"):
            return args[0].expand(value.shape) if name == "expand_as" else args[0].reshape(value.shape)
        if name in ("to", "_to_copy", "type_as"):
            return self._cast(node, args[0], value.dtype)
        if name == "constant_pad_nd":
            return node.target(args[0], args[1], self.ex.number(args[2] if len(args) > 2 else 0.0))  # type: ignore
        if name in ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "scalar_tensor"):
            return torch.full(value.shape, self.ex.number(value.flatten()[0].item()))
        if name in ("view_as_complex", "polar", "complex"):
            return self._made_complex(name, args)
        if name in ("embedding", "index") or (name == "index_select" and isinstance(args[2], torch.Tensor)):
            return self._looked_up(node, name, args)
        found = self._reduced(name, args, kwargs)
        if found is None:
            found = pointwise(self.ex, node, name, args, kwargs)
        if found is None:
            raise NotGenerated(node, "an op of which no kernel is made")
        return found

    def _cast(self, node: Node, numbers: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        source = self.env[node.args[0]].dtype  # type: ignore[index]
        if kind.is_complex or kind == torch.bool:
            raise NotGenerated(node, f"a cast to {kind}")
        if kind.is_floating_point and not source.is_floating_point:
            return self.ex.each("float", numbers)
        if source.is_floating_point and not kind.is_floating_point:
            return self.ex.each("int", numbers)
        return self.ex.each("int", numbers) if source == torch.bool else numbers  # flags add up as numbers

    def _reduced(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
        ex, x = self.ex, args[0]
        if name in ("mean", "sum"):
            dims = kwargs.get("dim", args[1] if len(args) > 1 else [])
            dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
            keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
            return ex.mean(x, dims, keep) if name == "mean" else ex.total(x, dims, keep)
        if name == "linalg_vector_norm" and (args + [2])[1] == 2:
            return ex.each("sqrt", ex.total(ex.each("mul", x, x), list(args[2]), (args + [False])[3]))
        if name in ("rms_norm", "layer_norm"):
            dims = list(range(-len(args[1]), 0))
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            bias = (args[3] if len(args) > 3 else kwargs.get("bias")) if name == "layer_norm" else None
            at = 4 if name == "layer_norm" else 3
            eps = args[at] if len(args) > at else kwargs.get("eps")
            # torch's own eps is that of the dtype it sums in: 32 bits for 16
            usual = torch.promote_types(self.decoder.dtype, torch.float32)
            eps = eps if eps is not None else 1e-5 if name == "layer_norm" else torch.finfo(usual).eps
            x = x if name == "rms_norm" else ex.each("sub", x, ex.mean(x, dims))
            square = ex.mean(ex.each("mul", x, x), dims)
            x = ex.each("mul", x, ex.each("rsqrt", ex.each("add", square, eps)))
            x = x if weight is None else ex.each("mul", x, weight)
            return x if bias is None else ex.each("add", x, bias)
        return None

    # -- complex values -----------------------------------------------------------------------------------------------

    def _made_complex(self, name: str, args: list[Any]) -> _Complex:
        if name == "view_as_complex":
            return _Complex(args[0][..., 0], args[0][..., 1])
        if name == "complex":
            return _Complex(args[0], args[1])
        size, angle = args[:2]
        return _Complex(*(self.ex.each("mul", size, self.ex.each(op, angle)) for op in ("cos", "sin")))

    def _complex(self, node: Node, name: str, args: list[Any]) -> Any:
        ex, x = self.ex, args[0]
        if name == "view_as_real":
            return torch.stack([x.real, x.imag], -1)
        if name in ("real", "imag"):
            return getattr(x, name)
        if name in LAYOUT and name not in ("cat", "stack", "split", "chunk", "unbind"):
            return _Complex(*(node.target(part, *args[1:]) for part in (x.real, x.imag)))  # type: ignore[operator]
        if name == "mul" and not (isinstance(args[1], _Complex) and isinstance(x, _Complex)):
            x, o = (x, args[1]) if isinstance(x, _Complex) else (args[1], x)
            return _Complex(ex.each("mul", x.real, o), ex.each("mul", x.imag, o))
        if name == "mul":
            o = args[1]
            products = [ex.each("mul", a, b) for a, b in ((x.real, o.real), (x.imag, o.imag))]
            others = [ex.each("mul", a, b) for a, b in ((x.real, o.imag), (x.imag, o.real))]
            return _Complex(ex.each("sub", *products), ex.each("add", *others))
        raise NotGenerated(node, "an op on complex numbers of which no kernel is made")

    # -- tables -------------------------------------------------------------------------------------------------------

    def _looked_up(self, node: Node, name: str, args: list[Any]) -> torch.Tensor:
        """Rows of a constant table by a number that the token has: table[places]."""
        table, places = args[0], args[1] if name != "index_select" else args[2]
        if name == "index":
            if len(places) != 1 or places[0] is None:
                raise NotGenerated(node, "a look-up along another axis than the first")
            places = places[0]
        rows = table.reshape(table.shape[0], -1)
        kinds = {self.ex.ops[i] for i in rows.flatten().tolist()}
        if (name == "index_select" and args[1] % table.dim()) or kinds != {"const"}:
            raise NotGenerated(node, "a look-up in what is no constant table")
        at = torch.tensor([self.ex.values[i] for i in rows.flatten().tolist()]).reshape(*rows.shape, 2)
        step = int(at[1, 0, 1] - at[0, 0, 1]) if len(rows) > 1 else 0
        if not torch.equal(at[:, :, 1], at[0, :, 1] + step * torch.arange(len(rows))[:, None]):
            raise NotGenerated(node, "a table that is not stored row by row")
        found = [
            [self.ex.make("table", (int(p),), (c, first, step)) for c, first in at[0].tolist()]
            for p in places.flatten().tolist()
        ]
        return torch.tensor(found, dtype=torch.int64).reshape(*places.shape, *table.shape[1:])
