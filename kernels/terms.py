"""Triton source of terms: what an epilogue makes of tiles of y, and what a graph makes of scores."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from .expressions import SOURCE, NotGenerated, literal, op_name, pointwise
from .row_source import padded
from .symbolic import Places, Term


class TermWriter:
    """Writes the terms of one operand, each once. ``ahead``: lines before the loop over tokens; ``lines``: those in it.

    Values of tokens are [tokens, 1], of items [1, items], of both [tokens, items]. Names begin with ``name``;
    ``tiles`` says what tiles of y are called, ``integers`` whether what is kept of each token is, ``floats`` which
    constants are none.
    """

    def __init__(self, name: str, tiles: dict[Places, str], integers: bool, floats: list[bool]) -> None:
        self.name, self.tiles, self.integers, self.floats = name, tiles, integers, floats
        self.ahead: list[str] = []
        self.lines: list[str] = []
        self._known: dict[Term, str] = {}

    def write(self, term: Term) -> str:
        """The name (or number) of a term."""
        if term.op == "number":
            assert term.number is not None
            return literal(term.number)
        if term.op == "y":
            assert term.places is not None
            return self.tiles[term.places]
        if term not in self._known:
            text = self._leaf(term) if term.places is not None else self._made(term)
            self._known[term] = made = f"{self.name}_x{len(self._known)}"
            (self.lines if term.of_tokens else self.ahead).append(f"{made} = {text}")
        return self._known[term]

    def _made(self, term: Term) -> str:
        if term.op != "sum":
            return SOURCE[term.op].format(*(self.write(a) for a in term.args))
        parts = []
        for part in term.args:
            live, x = f"tl.arange(0, {padded(part.items)})[None, :] < {part.items}", self.write(part)
            full = padded(part.items) == part.items
            parts.append(f"tl.sum({x if full else f'tl.where({live}, {x}, 0.0)'}, 1)[:, None]")
        return " + ".join(parts)

    def _leaf(self, term: Term) -> str:
        p = term.places
        assert p is not None
        at = f"{p.base}" + (f" + {self.name}_head * {p.head}" if p.head else "")
        mask = ""
        if p.items:
            size = padded(p.items)
            at += f" + (tl.arange(0, {size}) * {p.step})[None, :]"
            mask = f"(tl.arange(0, {size}) < {p.items})[None, :]" if size != p.items else ""
        if term.op == "side":
            mask = f"seen[:, None] & {mask}" if mask else "seen[:, None]"
            where = f"{self.name}_side_at + (i * {self.name}_side_t)[:, None] + {at}"
            text = f"tl.load({where}, mask={mask}, other=0)"
            return text if self.integers else f"{text}.to(tl.float32)"
        where = f"{self.name}_const{term.which} + {at}"
        if term.op == "table":
            where += f" + {self.write(term.args[0])}.to(tl.int64) * {term.stride}"
        text = f"tl.load({where}, mask={mask}, other=0)" if mask else f"tl.load({where})"
        return f"{text}.to(tl.float32)" if self.floats[term.which] else text


class ScoreWriter:
    """Writes what a graph makes of scores: ``extras`` are the names of what it meets."""

    def __init__(self, program: GraphModule, extras: list[str]) -> None:
        self.lines: list[str] = []
        self.names: dict[Node, Any] = {}
        holders = iter(["s", *extras])
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = next(holders)
            elif node.op == "output":
                self.lines.append(f"s = {self._use(node.args[0])}")
            elif node.op == "call_function":
                self.names[node] = self._write(node)
            else:
                raise NotGenerated(node, "scores meet a tensor of the graph's own")

    def _use(self, arg: Any) -> Any:
        return self.names[arg] if isinstance(arg, Node) else arg

    def _write(self, node: Node) -> str:
        name = op_name(node)
        args = [self._use(a) for a in node.args]
        if name in ("to", "_to_copy", "clone", "contiguous", "expand"):
            return str(args[0])
        made = pointwise(self, node, name, args, {k: self._use(v) for k, v in node.kwargs.items()})
        if made is None:
            raise NotGenerated(node, "an op on scores of which no kernel is made")
        return str(made)

    def each(self, op: str, *operands: Any) -> str:
        """One line of a kernel. Called by ``pointwise``."""
        text = SOURCE[op].format(*(o if isinstance(o, str) else literal(o) for o in operands))
        name = f"s{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name
