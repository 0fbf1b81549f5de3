"""The backend: ``torch.compile(model, backend="lorc")``. ``compile_graph`` spells the pipeline, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import compat
from .builder import Builder, compile_inner, complete
from .codec import Basis
from .errors import (
    DenseCacheWarning,
    GradRequired,
    LorcError,
    LorcWarning,
    NoSites,
    NoSitesWarning,
    StrictMiss,
    TooManyValues,
    UnloadedWeights,
    UnreadableGraph,
)
from .factors import Factors
from .latent import LatentKV
from .options import Options
from .parts import in_parts
from .passes.alternatives import Alternative, alternatives
from .passes.check import check_canonical
from .passes.epilogue import may_project
from .passes.lower import absorb, readings
from .passes.normalise import logical, normalise, placeholders
from .passes.readers import query_heads
from .passes.sites import Matched, Site, match
from .passes.unprojected import without_projection
from .prepared import Prepared
from .records import Miss, Plan
from .runtime import Compiled
from .scalars import ByScalars, scalar_places
from .switch import disabled
from .timing import COUNTS, counts, reset_timings, timed, timings

__all__ = ["compile_graph", "counts", "examine", "lorc", "reset_timings", "timings"]

Callee = Callable[..., Any]


def lorc(gm: GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Callee:
    """Dynamo's entry. Errors of ours are raised by the returned callable, so that callers see their own class
    and not torch's wrapper of backend failures."""
    COUNTS["backend_calls"] += 1
    try:
        if disabled():
            return _stock(gm, options, mode)
        parsed = Options.parse(options, mode=mode)
        return compile_graph(gm, example_inputs, parsed)
    except LorcError as error:
        return _raiser(error)


def _stock(gm: GraphModule, options: Any, mode: str | None) -> Callee:
    """With the backend turned off: the inner compiler, whatever else the options say."""
    given = options.given() if isinstance(options, Options) else options if isinstance(options, Mapping) else {}
    return _plain(gm, Options.parse({name: given[name] for name in ("inner", "mode") if name in given}, mode=mode))


def _raiser(error: LorcError) -> Callee:
    def refuse(*args: Any) -> Any:
        raise error.with_traceback(None)  # else it would keep the frames of every call, and their inputs

    return refuse


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callee:
    """One graph of Dynamo's -> a callable over latents, or the inner compiler on the untouched graph."""
    if not any(map(_may_hold_tokens, map(compat.example_value, placeholders(gm)))):
        return _plain(gm, options)  # a mask, made of lengths and flags: nothing to say about it
    if torch.is_grad_enabled() and any(isinstance(e, torch.Tensor) and e.requires_grad for e in example_inputs):
        return _untouched(gm, options, GradRequired())
    if scalar_places(gm):
        each = ByScalars(gm, lambda fixed, given: compile_graph(fixed, given, options), lambda: _too_many(gm, options))
        return each.first(example_inputs)
    unloaded = [n.name for n, e in zip(placeholders(gm), example_inputs, strict=True) if _unloaded(n, e)]
    if unloaded:
        raise UnloadedWeights(unloaded)
    try:
        with timed("normalise_s"):
            opened, take = in_parts(gm, example_inputs)
            canonical = normalise(opened, take(example_inputs))
            check_canonical(canonical)
        with timed("match_s"):
            matched = without_projection(match(canonical), options)
    except LorcError:
        raise
    except Exception as error:  # whatever torch's tracer says: the graph stays right, and it is said
        return _untouched(gm, options, UnreadableGraph(f"{type(error).__name__}: {error}"))
    if matched.coded or matched.misses or any(map(may_project, canonical.graph.nodes)):
        _report(matched, options)
    if not matched.sites and not any(n.meta.get("latent") is not None for n in placeholders(canonical)):
        return _plain(gm, options)
    compiled = Compiled(canonical, opened, matched, Builder(canonical, matched, options)).first(take(example_inputs))
    return compiled if opened is gm else lambda *arguments: compiled(*take(arguments))


def make_codecs(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
    """The steps of ``compile_graph`` up to the codecs, which the store then has. Graphs that would run untouched have
    none."""
    if not any(map(_may_hold_tokens, map(compat.example_value, placeholders(gm)))):
        return
    try:
        canonical, matched, arguments = read_graph(gm, example_inputs, options)
    except LorcError:
        raise
    except Exception:
        return
    Builder(canonical, matched, options).codecs(arguments)


def read_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[GraphModule, Matched, Sequence[Any]]:
    """The canonical graph, what matching found in it, and the arguments that it takes."""
    opened, take = in_parts(gm, example_inputs)
    arguments = take(example_inputs)
    canonical = normalise(opened, arguments)
    return canonical, without_projection(match(canonical), options), arguments


def _too_many(gm: GraphModule, options: Options) -> Callee:
    """For graphs whose Python numbers go on changing: dense for all values to come."""
    names = ", ".join(placeholders(gm)[i].name for i in scalar_places(gm)[:4])
    return _untouched(gm, options, TooManyValues(names, compat.recompile_limit()))


def _unloaded(node: Node, example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.is_meta and compat.is_module_state(node, example)


def _may_hold_tokens(value: Any) -> bool:
    """Whether keys and values may come of an input: of integers, flags and sizes alone they do not."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def examine(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, others: bool = False
) -> tuple[list[dict[str, Any]], tuple[Miss, ...], Plan]:
    """The same steps up to the codecs, for reports: one dict per site (fields of ``report.SiteReport``). ``others``:
    with what other bases would cost."""
    canonical, matched, example_inputs = read_graph(gm, example_inputs, options)
    builder = Builder(canonical, matched, options)
    prepared, plan = builder.planned(matched.planned, example_inputs)
    codecs = builder.made(prepared, plan, example_inputs)
    read = readings(absorb(canonical, matched, {s.group.find(): c for s, c in codecs.items()}, step=True))
    costs = _others(canonical, options, plan, example_inputs) if others and options.plan is None else {}
    found = []
    for (site, p), line in zip(prepared.items(), plan.sites, strict=True):
        sigma = p.factors.singular
        found.append(
            dict(  # noqa: C408
                layer=line.layer,
                kind=line.kind,
                width=site.decoder.width,
                rank=line.rank,
                segments=line.segments,
                epilogue=site.decoder.words,
                cond=line.cond,
                sigma_max=float(sigma[0]),
                sigma_min=float(sigma[-1]),
                energy=p.kept(line),
                bytes=line.bytes,
                dense_bytes=line.dense_bytes,
                window=line.window,
                lowering=read.get(site.group.find(), "decoding"),
                codec_bytes=codecs[site].nbytes(example_inputs),
                row_bytes=codecs[site].format.nbytes,
                latent_width=codecs[site].latent_width,
                query_heads=query_heads(site.reader) or site.decoder.width // site.head,
                head_dim=site.head,
                dtype_bytes=site.decoder.dtype.itemsize,
                singular=tuple(sigma.tolist()),
                groups=codecs[site].groups,
                unprojected=site.unprojected,
                predicted=line.predicted,
                nats=line.nats,
                others=costs.get((line.layer, line.kind), ()),
            )
        )
    return found, matched.misses, complete(prepared, plan)


def _others(
    canonical: GraphModule, options: Options, plan: Plan, arguments: Sequence[Any]
) -> dict[tuple[int, str], tuple[Alternative, ...]]:
    def prepare(matched: Matched, asked: Options) -> dict[Site, tuple[Factors, Basis]]:
        made = Builder(canonical, matched, asked).prepared(matched.planned, arguments)
        return {site: (p.factors, p.basis) for site, p in made.items()}

    return alternatives(canonical, match(canonical), options, plan.sites, prepare)


def plans(gm: GraphModule, example_inputs: Sequence[Any], many: Sequence[Options]) -> list[Plan]:
    """A plan for each of ``many`` options that differ in how bytes are given and spent only: weights are factorised
    once for all budgets that keep the same sites as they are. Raises what planning raises."""
    opened, take = in_parts(gm, example_inputs)
    arguments = take(example_inputs)
    canonical = normalise(opened, arguments)
    matched, found = match(canonical), []
    made: dict[tuple[tuple[bool, bool], ...], tuple[Builder, dict[Site, Prepared]]] = {}
    for options in many:
        chosen = without_projection(matched, options)
        kept = tuple((site.unprojected, site.grouped) for site in chosen.sites)
        if kept not in made:
            builder = Builder(canonical, chosen, options)
            made[kept] = builder, builder.prepared(chosen.planned, arguments)
        builder, prepared = made[kept]
        found.append(complete(prepared, builder.plan(prepared, options)))
    return found


def _untouched(gm: GraphModule, options: Options, why: LorcError) -> Callee:
    if options.strict:
        raise why
    warnings.warn(f"{why} This graph runs uncompressed.", LorcWarning, stacklevel=2)
    return _plain(gm, options)


def _plain(gm: GraphModule, options: Options) -> Callee:
    """The inner compiler on the untouched graph. LatentKVs that come in are decoded before; those that it may write
    into become dense in place, so that the writes reach them."""
    holders = placeholders(gm)
    values = [compat.example_value(p) for p in holders]
    inner = compile_inner(gm, [logical(v) for v in values], options)
    into = {i: _may_write(gm, holders[i]) for i, v in enumerate(values) if isinstance(v, LatentKV)}
    if not into:
        return inner

    def decode_first(*arguments: Any) -> Any:
        plain = list(arguments)
        for i, written in into.items():
            plain[i] = plain[i].uncompress_() if written else plain[i].dense()
        return inner(*plain)

    return decode_first


def _may_write(gm: GraphModule, holder: Node) -> bool:
    """Whether a graph of Dynamo's may write into an input, or into anything that is made of it (which may be a view):
    no only where that is sure."""
    made = {holder}
    for node in gm.graph.nodes:
        if node in made or made.isdisjoint(node.all_input_nodes):
            continue
        made.add(node)
        if not made.isdisjoint(compat.may_be_written(node)):
            return True
    return False


def _report(matched: Matched, options: Options) -> None:
    """Nothing silent: a miss is a warning (an error under strict), so is a graph without any site."""
    if options.strict and matched.lost:
        raise StrictMiss(matched.lost)
    if options.strict and not matched.sites and not matched.coded:
        raise NoSites(matched.misses)
    filled = [m for m in matched.lost if m.kind == "preallocated"]
    others = [m for m in matched.lost if m.kind != "preallocated"]
    if filled:
        text = (
            f"{len(filled)} cache writes stay dense (and right): {filled[0].reason}. Compile the model itself with "
            'model.compile(backend="lorc"), so that the prefill is compiled too and a fresh cache is born in it; '
            "buffers of a module must be made anew in it (torch.zeros_like) where a prompt begins."
        )
        warnings.warn(text, DenseCacheWarning, stacklevel=2)
    if others and matched.coded:
        text = "; ".join(str(m) for m in others[:4])
        warnings.warn(f"{len(others)} cache writes stay dense (and right): {text}", DenseCacheWarning, stacklevel=2)
    if not matched.coded and not filled:
        warnings.warn(str(NoSites(others, strict=False)), NoSitesWarning, stacklevel=2)
