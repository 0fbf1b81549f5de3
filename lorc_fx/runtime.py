"""What runs at each call: take LatentKVs apart, look codecs up by the weights at hand, call the inner graph, wrap.

This is the hot path of every decode step, so it is written for few Python operations per cache tensor.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch.fx import GraphModule

from .codec import Codec
from .compat import building, is_fake, size_expr
from .errors import EagerWarning
from .latent import LatentKV, extend, in_step
from .passes.interface import Output, Rewritten, Sharing
from .passes.normalise import placeholders
from .passes.rewrite import writes_to
from .passes.sites import Matched, Site
from .rows import Track, alone
from .store import STORE, WeightState


class Builds(Protocol):
    """What ``Compiled`` needs of a ``builder.Builder``."""

    places: dict[Site, tuple[int, ...]]

    def codecs(self, arguments: Sequence[Any]) -> list[Codec]: ...
    def holds(self, site: Site, arguments: Sequence[Any], codec: Codec) -> bool: ...
    def begins(self) -> bool: ...
    def informs(self) -> bool: ...
    def inform(self, arguments: Sequence[Any]) -> None: ...
    def build(self, codecs: Sequence[Codec], joined: dict[int, int], sharing: Sharing) -> Binding: ...


class Binding:
    """An inner callable with its recipe for inputs and outputs, sorted once so that a call does little.

    ``joined`` maps LatentKV arguments to the site whose codec they must have (checked by the caller), so codec tensors
    are looked up once per set of codecs, not at each call.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        made: Rewritten,
        sizes: Callable[[Sequence[Any]], dict[Any, int]],
        joined: dict[int, int],
    ) -> None:
        self.inner, self.outputs, self.sizes = inner, made.outputs, sizes
        self.attends = made.attends  # the graph's ops look them up as long as they live
        self.plain: list[tuple[int, int]] = []
        self.parts: list[tuple[int, int]] = []
        self.decoded: list[tuple[int, int, str]] = []
        self.foreign: list[tuple[int, int, str]] = []
        self.codec_slots: list[tuple[int, int, str]] = []
        windows: dict[int, int | None] = {}
        extras: dict[int, Any] = {}
        self.tracks: list[tuple[int, tuple[int, ...], bool]] = []
        for slot, spec in enumerate(made.inputs):
            if spec.kind == "argument":
                self.plain.append((slot, spec.index))
            elif spec.name == "positions":
                self.tracks.append((slot, spec.together, spec.kind == "window"))
                extras[spec.index] = spec.extra
            elif spec.kind == "codes":
                self.parts.append((slot, spec.index))
            elif spec.kind in ("dense", "uncompress"):
                self.decoded.append((slot, spec.index, spec.kind))
            elif spec.kind == "window":
                windows[spec.index] = slot
                extras[spec.index] = spec.extra
            elif spec.kind == "site":
                self.codec_slots.append((slot, spec.index, spec.name))
            elif spec.index in joined:
                self.codec_slots.append((slot, joined[spec.index], spec.name))
            else:
                self.foreign.append((slot, spec.index, spec.name))
        leaders = [(together, slot) for slot, together, window in self.tracks if window]
        joint = {i for together, _ in leaders for i in together}
        lone = [((i,), None) for i in windows if i not in joint]
        self.windows = [(g, extras[g[0]], slot, [windows.get(i) for i in g]) for g, slot in (*leaders, *lone)]
        self.kept = [(slot, together) for slot, together, window in self.tracks if not window]
        self.count = len(made.inputs)

    def fixed(self, codecs: Sequence[Codec]) -> list[Any]:
        """The codecs' tensors in their slots, looked up once for all calls until the codecs change."""
        values: list[Any] = [None] * self.count
        for slot, site, name in self.codec_slots:
            codec = codecs[site]
            values[slot] = codec.encode if name == "encode" else codec.tensors()[name]
        return values

    def __call__(self, arguments: Sequence[Any], codecs: Sequence[Codec], fixed: list[Any]) -> tuple[Any, ...]:
        sizes = self.sizes(arguments)
        values = fixed.copy()
        for slot, index in self.plain:
            values[slot] = arguments[index]
        for slot, index in self.parts:
            values[slot] = arguments[index].codes
        for slot, together in self.kept:
            alone([arguments[i].rows for i in together])
            values[slot] = arguments[together[0]].positions
        for slot, index, name in self.decoded:
            latent = arguments[index]
            values[slot] = latent.uncompress_() if name == "uncompress" else latent.dense()
        for slot, index, name in self.foreign:
            values[slot] = arguments[index].codec.tensors()[name]
        windows: dict[int, LatentKV] = {}
        for group, extra, positions, codes in self.windows:
            grown = extend([arguments[i] for i in group], sizes[extra])
            windows.update(zip(group, grown, strict=True))
            if positions is not None:
                values[positions] = grown[0].positions
            for place, window in zip(codes, grown, strict=True):
                if place is not None:
                    values[place] = window.codes
        results = self.inner(*values)
        tracks: dict[int, Track] = {}
        return tuple([self._wrap(o, results, arguments, codecs, windows, sizes, tracks) for o in self.outputs])

    def _wrap(
        self,
        out: Output,
        results: Sequence[Any],
        arguments: Sequence[Any],
        codecs: Sequence[Codec],
        windows: dict[int, LatentKV],
        sizes: dict[Any, int],
        tracks: dict[int, Track],
    ) -> Any:
        if out.kind == "plain":
            return results[out.index]
        if out.kind == "window":
            return windows[out.index].tokens(sizes[out.start], sizes[out.length])
        if out.kind == "born":
            assert out.owner is not None
            codec = arguments[out.owner[1]].codec if out.owner[0] == "latent" else codecs[out.owner[1]]
            if out.positions is None:
                return LatentKV.born(codec, results[out.index], None)
            if out.positions not in tracks:
                positions = results[out.positions]
                tracks[out.positions] = Track(positions, positions.shape[0])
            return LatentKV.born(codec, results[out.index], tracks[out.positions])
        return arguments[out.index] if out.kind == "same" else None


_INTEGERS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
"""torch's own functions in expressions of sizes, by name."""


def size_reader(canonical: GraphModule, made: Rewritten) -> Callable[[Sequence[Any]], dict[Any, int]]:
    """Compile the size expressions that the wrapper needs into one function of the arguments.

    Call it before the inner compiler: that may find symbols equal and rename them.
    """
    wanted = {e for i in made.inputs if i.extra is not None for e in [i.extra]}
    wanted |= {e for o in made.outputs for e in (o.start, o.length) if e is not None}
    constants = {e: int(e) for e in wanted if e.is_number}
    varying = [e for e in wanted if not e.is_number]
    sources: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, node in enumerate(placeholders(canonical)):
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            _note(sources, value, i, None)
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                _note(sources, size, i, dim)
    symbols = sorted({s for e in varying for s in e.free_symbols}, key=str)
    places = [sources[s] for s in symbols]
    evaluate = sympy.lambdify(symbols, varying, modules=[_INTEGERS, "math"], cse=False) if varying else None

    def sizes(arguments: Sequence[Any]) -> dict[Any, int]:
        if evaluate is None:
            return constants
        at = [arguments[i] if dim is None else arguments[i].shape[dim] for i, dim in places]
        return {**constants, **dict(zip(varying, map(int, evaluate(*at)), strict=True))}

    return sizes


def _is_symbolic(example: Any) -> bool:
    """Whether an example input stands for values that are only there at the call."""
    return isinstance(example, torch.SymInt) or (isinstance(example, torch.Tensor) and is_fake(example))


def _note(sources: dict[sympy.Symbol, tuple[int, int | None]], size: Any, argument: int, dim: int | None) -> None:
    expr = size_expr(size)
    if isinstance(expr, sympy.Symbol) and (expr not in sources or dim is None):
        sources[expr] = (argument, dim)


@dataclass(frozen=True)
class Ready:
    """What calls need as long as weights stay the same. It is replaced as a whole, and a call reads it once: calls from
    several threads, of models that share one graph too, never mix the codecs of one with the binding of another."""

    epoch: int
    states: tuple[tuple[int, WeightState], ...]
    codecs: list[Codec]
    binding: Binding | None
    fixed: list[Any]
    steps: tuple[tuple[int, int], ...]

    def foreign(self, arguments: Sequence[Any], joined: Sequence[tuple[int, int]]) -> bool:
        """Whether a cache that comes in was written by other codecs than those in hand."""
        return self.binding is None or any(arguments[a].codec is not self.codecs[s] for a, s in joined)


class Compiled:
    """The callable that Dynamo keeps for one graph.

    Codecs follow the weights: each call checks that the weights are those the codecs were made from, unchanged, and
    looks others up (or makes them) where not; a call that begins its caches looks at their content too. A LatentKV
    written by other codecs is decoded, and the call goes on dense: right, and said once.
    """

    ready: Ready

    def __init__(self, canonical: GraphModule, original: GraphModule, matched: Matched, builder: Builds) -> None:
        self.canonical, self.original, self.matched, self.builder = canonical, original, matched, builder
        self.bindings: dict[tuple[Any, ...], Binding] = {}
        self.begins, self.informs = builder.begins(), builder.informs()
        arguments = placeholders(canonical)
        latents = {n: i for i, n in enumerate(arguments) if n.meta.get("latent") is not None}
        self.templates = {i: n.meta["latent"].codec.itself for n, i in latents.items()}  # fakes do not keep them
        self.joined = [
            (latents[n], s) for s, site in enumerate(matched.sites) for n in site.group.find().latents if n in latents
        ]

    def first(self, examples: Sequence[Any]) -> Compiled:
        """Make codecs and the inner callable at compile time, on the real weights (and of the prompt in hand)."""
        if self.informs and not any(_is_symbolic(e) for e in examples):
            self.builder.inform(examples)
        self._prepare(examples)
        return self

    def _prepare(self, arguments: Sequence[Any]) -> Ready:
        """Codecs and an inner callable for these weights and caches, kept for the calls to come."""
        with building():
            self.ready = self._made(arguments)
            return self.ready

    def _made(self, arguments: Sequence[Any]) -> Ready:
        sites, epoch = self.matched.sites, STORE.epoch
        codecs = self.builder.codecs(arguments)
        for a, s in self.joined:  # a cache goes on with the codec that it began with
            codec = arguments[a].codec
            if codec is not codecs[s] and self.builder.holds(sites[s], arguments, codec):
                codecs[s] = codec
        places = sorted({place for site in sites for place in self.builder.places[site]})
        states = tuple((place, WeightState.of(arguments[place])) for place in places)
        if any(self.templates[a].signature != codecs[s].signature for a, s in self.joined):
            return Ready(epoch, states, codecs, None, [], ())
        sharing = self._sharing(arguments, codecs)
        signature = (sharing, *(c.signature for c in codecs))
        if signature not in self.bindings:
            self.bindings[signature] = self.builder.build(codecs, dict(self.joined), sharing)
        binding = self.bindings[signature]
        return Ready(epoch, states, codecs, binding, binding.fixed(codecs), sharing.tracks)

    def _sharing(self, arguments: Sequence[Any], codecs: Sequence[Codec]) -> Sharing:
        tracks = []
        for i in self.templates:
            for j in self.templates:
                if j < i and in_step(arguments[i], arguments[j]):
                    tracks.append((i, j))
                    break
        first: dict[int, tuple[int, str]] = {}
        consts = []
        for site, codec in enumerate(codecs):
            for at, const in enumerate(codec.consts):
                here = (site, f"const{at}")
                consts.append((here, first.setdefault(id(const), here)))
        return Sharing(tuple(tracks), tuple(consts))

    def __call__(self, *arguments: Any) -> Any:
        if self.informs:
            self.builder.inform(arguments)
        ready = self.ready
        if ready.epoch != STORE.epoch or not all(state.still(arguments[place]) for place, state in ready.states):
            ready = self._prepare(arguments)
        elif self.begins and not all(state.same(arguments[place]) for place, state in ready.states):
            ready = self._prepare(arguments)
        if ready.foreign(arguments, self.joined):
            ready = self._prepare(arguments)
            if ready.foreign(arguments, self.joined):
                return self._dense(arguments)
        for i, j in ready.steps:
            if not in_step(arguments[i], arguments[j]):
                ready = self._prepare(arguments)
                break
        assert ready.binding is not None
        return ready.binding(arguments, ready.codecs, ready.fixed)

    def _dense(self, arguments: Sequence[Any]) -> Any:
        """Run the untouched graph on decoded caches: the cache in hand was written by other weights or another plan.
        What the graph writes into becomes dense in place, so that the writes reach it."""
        warnings.warn(
            "a cache written by other weights or another plan goes on uncompressed (decoded, right, but dense); "
            "start with a fresh cache to compress again",
            EagerWarning,
            stacklevel=3,
        )
        plain = list(arguments)
        for i, holder in enumerate(placeholders(self.canonical)):
            latent = arguments[i]
            if isinstance(latent, LatentKV):
                into = any(writes_to(node, holder) for node in self.canonical.graph.nodes)
                plain[i] = latent.uncompress_() if into else latent.dense()
        return self.original.forward(*plain)
