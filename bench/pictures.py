"""A graph before and after: one layer of a small Llama in a decode step, from the graphs that the passes work on.

    python -m bench.pictures [--out docs/figures]

``graph-before.svg`` is the canonical graph, ``graph-after-paper.svg`` what becomes of it with LoRC's codec at half the
bytes, ``graph-after.svg`` the default after a first prompt. Shown is what lies between the activation that the
projections read and the product of attention. Ops between those that matter (``MAIN``) are drawn as one box, which
lists them; weights stand in the box of the op that takes them. Lengths in the hundreds are written as T, the tokens
that are cached before the step.
"""

from __future__ import annotations

import argparse
import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from bench.plots import panels
from lorc_fx import PAPER, builder
from lorc_fx.evaluate import cache_keyword

TOKENS = 300
"""Of the prompt: enough for statistics, and no other size of the model."""
MAIN = ("linear", "scaled_dot_product_attention", "matmul", "copy_", "attend", "pack", "unpack", "encode")
"""Ops with a box of their own, by name; so have those that make a cache of a cache (``cat``)."""
CACHED, ROWS = "cached", ("codes", "positions")
"""How the words for what a cache holds begin (before), or end (after)."""
COLOURS = {"kept": "#eeeeee", "input": "#ffffff", "replaced": "#f6c7c0", "made": "#c5e6cd"}
WIDTH, HEIGHT, GAP = 0.088, 0.2, 0.34
"""Inches: of a letter, of a line, between rows of boxes."""
LINE = 26
"""Letters after which a list of ops goes on in the next line."""


@dataclass
class Graph:
    """A graph with the shape of each value, words for its inputs by name, and from where to where it is drawn."""

    module: GraphModule
    shapes: dict[str, tuple[int, ...]]
    words: dict[str, str]
    start: str
    after: str


@dataclass
class Box:
    """Nodes that are drawn together."""

    nodes: list[Node]
    lines: list[str]
    kind: str
    row: int = 0
    at: float = 0.0

    @property
    def width(self) -> float:
        return 0.2 + WIDTH * max(map(len, self.lines))

    @property
    def height(self) -> float:
        return 0.14 + HEIGHT * len(self.lines)


# -- real graphs ------------------------------------------------------------------------------------------------------


def model() -> Any:
    """A Llama of one layer, 4 query heads and 2 key-value heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**small, **heads, bos_token_id=None, eos_token_id=None)).eval()


@torch.no_grad()
def graphs(options: dict[str, Any]) -> tuple[Graph, Graph, set[str], set[str]]:
    """The decode step's graph before and after, and the names of projections and of cells of the cache in the first."""
    from transformers import DynamicCache

    seen: list[tuple[Any, ...]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    rewrite = builder.rewrite

    def rewriting(canonical: GraphModule, matched: Any, *rest: Any) -> Any:
        made = rewrite(canonical, matched, *rest)
        seen.append((canonical, matched, made))
        return made

    def inner(gm: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            shapes.clear()
            out = ShapeProp(gm).propagate(*arguments)
            shapes.update((n.name, found) for n in gm.graph.nodes if (found := _measured(n)) is not None)
            return out

        return run

    torch._dynamo.reset()
    lm = model()
    with mock.patch.object(builder, "rewrite", rewriting):
        lm.compile(backend="lorc", options={**options, "inner": inner})
        cache, ids = DynamicCache(config=lm.config), torch.randint(64, (1, TOKENS + 1))
        for piece in ids.split([TOKENS, 1], 1):
            lm(piece, use_cache=True, **{cache_keyword(lm): cache})
    torch._dynamo.reset()
    canonical, matched, made = seen[-1]
    chains = {n.name for site in matched.sites for n, _ in site.rows.chain.nodes}
    cells = {cell.name for site in matched.sites for cell in matched.caches.groups()[site.group.find()]}
    end = next(n for n in canonical.graph.nodes if op(n) == "scaled_dot_product_attention")
    ends = str(matched.sites[0].rows.x), str(next(iter(end.users)))
    before = Graph(canonical, _symbolic(canonical), _weights(matched), *ends)
    return before, Graph(made.module, shapes, _sources(canonical, matched, made), *ends), chains, cells


def _weights(matched: Any) -> dict[str, str]:
    """Words for the inputs of the sites of a canonical graph."""
    words = {w.name: f"{site.kind} weight" for site in matched.sites for w in site.weights}
    return words | {n.name: f"cached {site.kind}s" for site in matched.sites for n in site.group.find().latents}


def _sources(canonical: GraphModule, matched: Any, made: Any) -> dict[str, str]:
    """Words for what the wrapper gives each input that is no argument as it is."""
    kinds = {n.name: site.kind for site in matched.sites for n in site.group.find().latents}
    arguments = [n.name for n in canonical.graph.nodes if n.op == "placeholder"]
    words = {}
    for node, spec in zip((n for n in made.module.graph.nodes if n.op == "placeholder"), made.inputs, strict=True):
        if spec.kind != "argument":
            site = matched.sites[spec.index].kind if spec.kind == "site" else kinds[arguments[spec.index]]
            words[node.name] = f"{site} {spec.name}"
    return _weights(matched) | words


def _measured(node: Node) -> tuple[int, ...] | None:
    about = node.meta.get("tensor_meta")
    return tuple(about.shape) if hasattr(about, "shape") else None


def _symbolic(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    """Shapes of fakes: the one length that is a symbol is that of the cache."""
    from lorc_fx.compat import size_expr

    found = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = [size_expr(size) for size in value.shape]
            found[node.name] = tuple(int(e.subs(dict.fromkeys(e.free_symbols, TOKENS))) for e in sizes)
    return found


# -- boxes ------------------------------------------------------------------------------------------------------------


def op(node: Node) -> str:
    """The op's name without library and overload."""
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.removeprefix("aten.").removeprefix("lorc.").split(".")[0].removeprefix("_safe_")


def boxes(graph: Graph, kinds: Callable[[Node], str]) -> tuple[list[Box], set[tuple[int, int]]]:
    """What lies between the activation and attention, as boxes in graph order, and arrows between them."""
    nodes = {n.name: n for n in graph.module.graph.nodes}
    start, end = nodes[graph.start], nodes[graph.after].all_input_nodes[0]
    shown = _before([end, *(n for n in nodes.values() if op(n) == "copy_")], start)
    below = _after(start, shown)
    mark = {n: _place(n, below, graph) for n in shown}
    owner: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while owner.get(node, node) is not node:
            node = owner[node]
        return node

    for node in shown:
        for source in node.all_input_nodes:
            if source in mark and mark[source] == mark[node] and mark[node][0] == "between":
                owner[root(source)] = root(node)
    members: dict[Node, list[Node]] = {}
    for node in shown:
        if mark[node][0] != "inside":
            members.setdefault(root(node), []).append(node)
    made = [_box(graph, group, start, kinds) for group in members.values()]
    index = {n: i for i, box in enumerate(made) for n in box.nodes}
    arrows = {
        (index[s], index[n])
        for n in index
        for s in n.all_input_nodes
        if s in index and index[s] != index[n] and n is not start
    }
    for write in (n for n in index if op(n) == "copy_"):  # what reads the rows after it reads what it wrote
        rows = write.args[0].args[0]
        for reader in rows.users:
            if reader in index and reader is not write.args[0] and reader > write:
                arrows.discard((index[rows], index[reader]))
                arrows.add((index[write], index[reader]))
    return made, arrows


def _before(ends: Iterable[Node], start: Node) -> list[Node]:
    """All that ``ends`` are made of, back to ``start``, in graph order. Sizes are left out."""
    found, queue = set(), list(ends)
    while queue:
        node = queue.pop()
        if node in found or op(node).startswith("sym_"):
            continue
        found.add(node)
        queue += [] if node is start else node.all_input_nodes
    return [n for n in start.graph.nodes if n in found]


def _after(start: Node, shown: Sequence[Node]) -> set[Node]:
    found = {start}
    for node in shown:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _place(node: Node, below: set[Node], graph: Graph) -> tuple[Any, ...]:
    """Nodes of one place that feed one another are one box. Tensors of weights are shown inside of what takes them."""
    if node.op in ("placeholder", "get_attr"):
        name = _called(graph, node)
        return ("input", node) if name.startswith(CACHED) or name.endswith(ROWS) else ("inside",)
    grows = op(node) == "cat" and any(_called(graph, s).startswith(CACHED) for s in node.all_input_nodes)
    if op(node) in MAIN or grows:
        return ("main", node)
    return ("between", node in below)


def _box(graph: Graph, group: list[Node], start: Node, kinds: Callable[[Node], str]) -> Box:
    last = group[-1]
    counted = collections.Counter(map(kinds, group))
    kind = max(counted, key=lambda name: (counted[name], name in ("replaced", "made")))
    shape = _shape(graph.shapes.get(last.name))
    if last is start:
        return Box(group, ["activation x", shape], "input")
    if last.op == "placeholder":
        return Box(group, [_called(graph, last), shape], kind)
    counts = collections.Counter(op(n) for n in group)
    words = [name if count == 1 else f"{name} ×{count}" for name, count in counts.items()]
    if len(group) == 1:
        taken = [_called(graph, s) for s in last.all_input_nodes if s.op in ("placeholder", "get_attr")]
        words += [name for name in taken if not name.startswith(CACHED) and not name.endswith(ROWS)]
    return Box(group, [*_wrapped(words), shape], kind)


def _wrapped(words: Sequence[str]) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 2 > LINE:
            lines.append(word)
        else:
            lines[-1] += f", {word}"
    return lines


def _called(graph: Graph, node: Node) -> str:
    """Words for an input; a weight of the model that nothing is done to is but a weight."""
    return graph.words.get(node.name, "weight")


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return ""
    names = {TOKENS: "T", TOKENS + 1: "T + 1"}
    return "[" + ", ".join(names.get(size, str(size)) for size in shape) + "]"


# -- drawing ----------------------------------------------------------------------------------------------------------


def laid_out(made: list[Box], arrows: set[tuple[int, int]]) -> None:
    """Rows by the longest way from an input; within a row by where a box's sources are, so that few arrows cross."""
    into: dict[int, list[int]] = collections.defaultdict(list)
    for a, b in sorted(arrows):
        into[b].append(a)
    for _ in made:
        for i, box in enumerate(made):
            box.row = max([made[a].row + 1 for a in into[i]], default=0)
    out: dict[int, list[int]] = collections.defaultdict(list)
    for a, b in arrows:
        out[a].append(b)
    for i, box in enumerate(made):  # an input stands just above what takes it first
        if not into[i] and out[i]:
            box.row = min(made[b].row for b in out[i]) - 1
    rows = collections.defaultdict(list)
    for i, box in enumerate(made):
        rows[box.row].append(i)
    for number in sorted(rows):
        here = rows[number]
        wanted = {i: _mean([made[a].at for a in into[i]], i) for i in here}
        here.sort(key=lambda i: (wanted[i], i))
        total = sum(made[i].width for i in here) + GAP * (len(here) - 1)
        left = _mean([wanted[i] for i in here if into[i]], 0) - total / 2
        for i in here:
            made[i].at = left + made[i].width / 2
            left += made[i].width + GAP


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else float(default)


def draw(made: list[Box], arrows: set[tuple[int, int]], path: Path) -> None:
    """Boxes and arrows as SVG, one box below what it is made of."""
    from matplotlib.patches import FancyBboxPatch

    laid_out(made, arrows)
    numbers = sorted({box.row for box in made})
    tall = {n: max(box.height for box in made if box.row == n) for n in numbers}
    top = dict(zip(numbers, itertools.accumulate((tall[n] + GAP for n in numbers), initial=0.0), strict=False))
    left = min(box.at - box.width / 2 for box in made)
    right = max(box.at + box.width / 2 for box in made)
    bottom = top[numbers[-1]] + tall[numbers[-1]]
    with panels(1, path, figsize=(right - left + 0.3, bottom + 0.3)) as (axis,):
        axis.set_axis_off()
        axis.set_xlim(left - 0.1, right + 0.1)
        axis.set_ylim(bottom + 0.1, -0.1)
        for a, b in sorted(arrows):
            source, target = made[a], made[b]
            begin = (source.at, top[source.row] + source.height)
            end = (target.at, top[target.row])
            axis.annotate("", end, begin, arrowprops={"arrowstyle": "-|>", "color": "#777777", "linewidth": 0.8})
        for box in made:
            y = top[box.row]
            corner = (box.at - box.width / 2, y)
            style = {"facecolor": COLOURS[box.kind], "edgecolor": "#555555", "linewidth": 0.8}
            axis.add_patch(FancyBboxPatch(corner, box.width, box.height, "round,pad=0,rounding_size=0.05", **style))
            for i, line in enumerate(box.lines):
                given = {"ha": "center", "va": "center", "fontsize": 8, "family": "monospace"}
                axis.text(box.at, y + 0.07 + HEIGHT * (i + 0.5), line, **given)


def pictures(folder: Path) -> list[Path]:
    """Draw all three; the files."""
    written = []
    for name, options in (("-paper", {**PAPER, "ratio": 0.5}), ("", {})):
        before, after, chains, cells = graphs(options)
        if name:
            written.append(folder / "graph-before.svg")
            draw(*boxes(before, partial(_kind, colour="replaced", marked=chains | cells)), written[-1])
        kept = {n.name for n in before.module.graph.nodes} - cells
        fresh = {n.name for n in after.module.graph.nodes} - kept
        written.append(folder / f"graph-after{name}.svg")
        draw(*boxes(after, partial(_kind, colour="made", marked=fresh)), written[-1])
    return written


def _kind(node: Node, colour: str, marked: set[str]) -> str:
    return colour if node.name in marked else "input" if node.op == "placeholder" else "kept"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    for path in pictures(parser.parse_args(argv).out):
        print(path)


if __name__ == "__main__":
    main()
