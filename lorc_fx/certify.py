"""``certify``: how far a compressed model can be from the dense one on a prompt, site by site and layer by layer,
up to the logits; beside how far it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule, Node

from .backend import read_graph
from .builder import Builder
from .calibrate import inputs_of
from .compat import written_nodes
from .errors import BadCalibration, BadCertificate, BadOption, UnreadableGraph
from .options import Options
from .passes.readers import viewed
from .passes.sites import Site
from .propagate import Coding, Known, Track, Walker
from .report import traced


@dataclass(frozen=True)
class Bound:
    """``bound`` and ``measured`` [N] fp64 norms of one value's errors: per token, or per token and head."""

    bound: torch.Tensor
    measured: torch.Tensor

    @property
    def slack(self) -> float:
        """The median of bound / measured over what has an error (1.0 where nothing has one)."""
        there = self.measured > 1e-12
        return float((self.bound[there] / self.measured[there]).median()) if bool(there.any()) else 1.0

    @property
    def holds(self) -> bool:
        """Whether nothing measured is above its bound (by more than fp64 rounds)."""
        return bool((self.measured <= self.bound * (1 + 1e-9) + 1e-10).all())

    def line(self) -> dict[str, float]:
        """Medians over tokens, and what they say of one another."""
        return {
            "bound": float(self.bound.median()),
            "measured": float(self.measured.median()),
            "slack": self.slack,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class SiteBound:
    """What a key or value projection gives (or what is cached, where it is stored as it is), as it is read back,
    per token over all heads; with all that is below dense."""

    layer: int
    kind: str
    error: Bound

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True)
class LayerBound:
    """The result of a layer's attention. ``alone``: with this layer's cache coded and all others dense, from the
    sizes of errors of keys and values; ``linearised``: the same from these errors themselves, to first order and
    with what that leaves out (None where attention is not spelled as a product); ``network``: with all layers
    coded."""

    layer: int
    alone: Bound
    linearised: Bound | None
    network: Bound


@dataclass(frozen=True)
class Certificate:
    """What ``certify`` found. Per position of the prompt [T]: ``bound`` and ``measured``, the largest error of a
    logit; ``margin``, how far the greedy token's logit is above the next; ``proven``, whether no error within the
    bounds changes the greedy token; ``kept``, whether it did not change. All of batch row 0. ``unbounded``: ops
    that have no rule, behind which bounds are infinite."""

    sites: tuple[SiteBound, ...]
    layers: tuple[LayerBound, ...]
    bound: torch.Tensor
    measured: torch.Tensor
    margin: torch.Tensor
    proven: torch.Tensor
    kept: torch.Tensor
    unbounded: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether every bound held. False is a bug in lorc_fx: please report it."""
        each = [s.error for s in self.sites] + [b for x in self.layers for b in (x.alone, x.linearised, x.network)]
        return all(b is None or b.holds for b in each) and bool(
            (self.measured <= self.bound * (1 + 1e-9) + 1e-10).all()
        )

    def __rich__(self) -> Group:
        table = Table(title="bounds and measured errors, medians over tokens")
        for name in ("layer", "value", "bound", "measured", "bound / measured"):
            table.add_column(name, justify="left" if name == "value" else "right")
        for site in self.sites:
            _row(table, site.layer, f"{site.kind} as read", site.error)
        for layer in self.layers:
            _row(table, layer.layer, "attention, this layer coded", layer.alone)
            if layer.linearised is not None:
                _row(table, layer.layer, "the same, errors known", layer.linearised)
            _row(table, layer.layer, "attention, all coded", layer.network)
        return Group(table, Text(self._summary()))

    def _summary(self) -> str:
        lines = [
            f"logits: within {float(self.bound.median()):.3g} of the dense model's, measured "
            f"{float(self.measured.median()):.3g} (medians of the largest per token).",
            f"greedy token: proven unchanged at {int(self.proven.sum())} of {len(self.proven)} positions, unchanged at "
            f"{int(self.kept.sum())}.",
        ]
        if self.unbounded:
            lines.append(f"no bound behind: {', '.join(self.unbounded)} (no rule for these ops).")
        return "\n".join(lines)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue()

    def json(self) -> dict[str, Any]:
        """All of it as plain data, in medians over tokens."""
        return {
            "sites": [{"layer": s.layer, "kind": s.kind, **s.error.line()} for s in self.sites],
            "layers": [
                {
                    "layer": x.layer,
                    "alone": x.alone.line(),
                    "linearised": None if x.linearised is None else x.linearised.line(),
                    "network": x.network.line(),
                }
                for x in self.layers
            ],
            "logits": {
                "bound": float(self.bound.median()),
                "measured": float(self.measured.median()),
                "margin": float(self.margin.median()),
                "positions": len(self.proven),
                "proven": int(self.proven.sum()),
                "kept": int(self.kept.sum()),
            },
            "unbounded": list(self.unbounded),
            "sound": self.sound,
        }

    def plot(self, path: str | Path) -> tuple[Path, Path]:
        """Bounds and errors by layer, as PNG and SVG beside one another. Raises MissingExtra without matplotlib, and
        OSError where nothing can be written."""
        from .certificate_plot import draw

        return draw(self, Path(path))


def _row(table: Table, layer: int, what: str, error: Bound) -> None:
    line = error.line()
    table.add_row(str(layer), what, f"{line['bound']:.3g}", f"{line['measured']:.3g}", f"{line['slack']:.3g}")


def certify(
    model: torch.nn.Module, prompt: Any, *, options: Mapping[str, Any] | None = None, rounding: bool = False
) -> Certificate:
    """Bounds for ``model`` under backend="lorc" with ``options`` on ``prompt``: token ids [T] or [B, T], or a
    mapping of the model's inputs.

    Both models are run side by side in fp64 on the CPU, op by op, so memory is that of the prompt's activations in
    fp64; what is said is of both in exact arithmetic, with the codecs' own rounding. With ``rounding`` the bounds of
    logits and of "all coded" hold for both as a machine computes them in the dtypes that they have
    (``propagate.rounding`` states what is assumed), which is far looser in 16 bits. The codecs are those that the
    compiled model has (with ``calibration="first-prompt"`` and none there yet, this is the first prompt). Raises
    BadCertificate where there is nothing to certify, BadOption for a prompt that is none, and what ``explain``
    raises."""
    parsed, seen = Options.parse(options), list[Certified]()

    def visit(gm: GraphModule, examples: Sequence[Any]) -> None:
        found = Certified.of(gm, examples, parsed, rounding)
        seen.extend([found] if found is not None else [])

    try:
        inputs = inputs_of(prompt, model)
    except BadCalibration as error:
        raise BadOption("prompt", prompt, error.reason) from None
    out = traced(model, (), inputs, visit)
    if len(seen) != 1:
        raise BadCertificate(
            "it is traced in several graphs" if seen else "no cached key or value comes from a projection of it"
        )
    with torch.no_grad():
        return seen[0].certificate(out.logits if hasattr(out, "logits") else out[0])


class Certified:
    """One graph with what is to be coded in it."""

    def __init__(
        self, gm: GraphModule, codings: Sequence[Coding], arguments: Sequence[Any], rounding: bool = False
    ) -> None:
        self.gm, self.codings = gm, codings
        self.walker = Walker(gm, codings, arguments)
        self.main = Track({c.site.node: c for c in codings}, rounds=rounding)
        self.machine = [Track({}, rounds=True)] if rounding else []  # the dense model's own rounding
        order = {n: i for i, n in enumerate(gm.graph.nodes)}.__getitem__
        self.reads = _reads(codings, order)
        by_layer: dict[int, dict[Node, Coding]] = {}
        for c in codings:
            by_layer.setdefault(c.site.layer, {})[c.site.node] = c
        self.alone = {x: Track(own, until=self.reads.get(x) or max(own, key=order)) for x, own in by_layer.items()}
        self.sites: dict[Site, SiteBound] = {}
        self.layers: dict[int, LayerBound] = {}

    @classmethod
    def of(cls, gm: GraphModule, examples: Sequence[Any], options: Options, rounding: bool = False) -> Certified | None:
        """None for a graph without sites."""
        try:
            canonical, matched, arguments = read_graph(gm, examples, options)
        except RuntimeError as error:
            raise UnreadableGraph(f"{type(error).__name__}: {error}") from error
        if not matched.sites:
            return None
        stale = _read_after_write(canonical)
        if stale is not None:
            raise BadCertificate(f"`{stale.name}` is written in place and read again, which bounds do not follow")
        builder = Builder(canonical, matched, options)
        if builder.informs():
            builder.inform(arguments)
        codecs = builder.codecs(arguments)
        pairs = zip(matched.sites, codecs, strict=True)
        codings = [Coding.of(s, c.itself, *builder.effective(s, arguments)) for s, c in pairs]
        numbers = [int(a) if isinstance(a, torch.SymInt) else a for a in arguments]  # of a graph for any length
        return cls(canonical, codings, numbers, rounding)

    def certificate(self, logits: torch.Tensor) -> Certificate:
        """Walk the graph. ``logits`` [B, T, V]: what the model returned, by which they are found in it."""
        outputs = [n for n in self.gm.graph.output_node().all_input_nodes if _like(n, logits)]
        self.walker.run([self.main, *self.machine, *self.alone.values()], self._visit, keep=outputs)
        if not outputs:
            raise BadCertificate("its logits are not an output of its graph")
        here = logits.cpu().double()
        node = min(outputs, key=lambda n: float((self.walker.dense[n] - here).abs().max()))
        dense = self.walker.dense[node][0]
        made = self.main.known.get(node, Known(self.walker.dense[node]))
        each = torch.zeros_like(dense) if made.each is None else made.each[0]
        for track in self.machine:
            own = track.known[node].each
            each = each if own is None else each + own[0]
        moved = self.main.values.get(node, self.walker.dense[node])[0]
        first = dense.argmax(-1, keepdim=True)
        top, floor = dense.gather(-1, first), (dense - each).gather(-1, first)
        others = torch.full_like(top, -torch.inf)
        rest, ceiling = (t.scatter(-1, first, others).amax(-1) for t in (dense, dense + each))
        return Certificate(
            tuple(self.sites[c.site] for c in self.codings if c.site in self.sites),
            tuple(self.layers[layer] for layer in sorted(self.layers)),
            each.amax(-1),
            (moved - dense).abs().amax(-1),
            top[..., 0] - rest,
            floor[..., 0] > ceiling,
            moved.argmax(-1) == first[..., 0],
            tuple(dict.fromkeys(self.main.unbounded)),
        )

    def _visit(self, node: Node, walker: Walker) -> None:
        for layer, track in self.alone.items():
            coding = track.codings.get(node)
            if coding is not None:
                site = coding.site
                self.sites[site] = SiteBound(layer, site.kind, Bound(*track.sites[node]))
            if track.until is node and layer in self.reads:
                alone, sharp = _bound(track, node, walker), walker.linearised(track, node)
                known = None if sharp is None else Bound(sharp.flatten(), alone.measured)
                self.layers[layer] = LayerBound(layer, alone, known, _bound(self.main, node, walker))
            if track.until is node:
                track.known.clear()
                track.values.clear()


def _read_after_write(gm: GraphModule) -> Node | None:
    """A value that is read after a write into it, or into what it shares storage with, other than as the write's own
    result."""
    before: list[Node] = []
    overwritten: set[Node] = set()
    for node in gm.graph.nodes:
        stale = [n for n in node.all_input_nodes if n in overwritten]
        if stale:
            return stale[0]
        bases = {seen for target in written_nodes(node) for seen in viewed(target)}
        if bases:
            overwritten |= {n for n in before if not bases.isdisjoint(viewed(n))}
        before.append(node)
    return None


def _like(node: Node, logits: torch.Tensor) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and tuple(value.shape) == tuple(logits.shape)


def _reads(codings: Sequence[Coding], order: Callable[[Node], int]) -> dict[int, Node]:
    """The node with each layer's attention: the last product that reads its sites. Layers whose attention is not found
    have none, and their sites bounds alone."""
    found: dict[int, Node] = {}
    for c in codings:
        reader = c.site.reader
        if reader is not None:
            last = found.get(c.site.layer, reader.node)
            found[c.site.layer] = max(last, reader.node, key=order)
    return found


def _errors(track: Track, node: Node, walker: Walker) -> torch.Tensor:
    """Measured, along the last axis: [.., 1]."""
    return track.measured(node, walker.dense[node]).norm(dim=-1, keepdim=True)


def _bound(track: Track, node: Node, walker: Walker) -> Bound:
    """Of a node, along its last axis."""
    made, moved = track.known.get(node, Known(walker.dense[node])), _errors(track, node, walker)
    return Bound(made.along(-1).expand(moved.shape).flatten(), moved.flatten())
