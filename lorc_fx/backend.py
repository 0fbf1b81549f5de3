"""The backend: ``torch.compile(model, backend="lorc")``. ``compile_graph`` spells the pipeline, step by step."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from . import compat
from .codec import Codec, Factors, factorise, make_codec
from .errors import (
    DenseCacheWarning,
    GradRequired,
    LorcError,
    LorcWarning,
    NoSites,
    NoSitesWarning,
    QualityWarning,
    StrictMiss,
)
from .latent import LatentKV
from .options import Options
from .passes.check import check_canonical, check_rewritten
from .passes.epilogue import effective_weight
from .passes.lower import absorb, readings
from .passes.normalise import logical, normalise, placeholders
from .passes.plan import make_plan
from .passes.rewrite import Sharing, rewrite
from .passes.sites import Matched, Site, match
from .passes.tracks import shared_tracks
from .records import Miss, Plan
from .runtime import Binding, Compiled, size_reader
from .store import STORE

Callee = Callable[..., Any]

_timings: dict[str, float] = {}
_counts = {"backend_calls": 0, "inner_compiles": 0}


def timings() -> dict[str, float]:
    """Seconds spent by each stage since the last ``reset_timings()``: normalise_s, match_s, factorise_s, plan_s,
    rewrite_s, inner_s."""
    return dict(_timings)


def counts() -> dict[str, int]:
    """How often Dynamo called this backend, and how often an inner compiler ran, since ``reset_timings()``."""
    return dict(_counts)


def reset_timings() -> None:
    _timings.clear()
    _counts.update(backend_calls=0, inner_compiles=0)


class _timed:
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        _timings[self.stage] = _timings.get(self.stage, 0.0) + time.perf_counter() - self.begin


def lorc(gm: GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Callee:
    """Dynamo's entry. Errors of ours are raised by the returned callable, so that callers see their own class
    and not torch's wrapper of backend failures."""
    _counts["backend_calls"] += 1
    try:
        parsed = Options.parse(options, mode=mode)
        return compile_graph(gm, example_inputs, parsed)
    except LorcError as error:
        return _raiser(error)


def _raiser(error: LorcError) -> Callee:
    def refuse(*args: Any) -> Any:
        raise error

    return refuse


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callee:
    """One graph of Dynamo's -> a callable over latents, or the inner compiler on the untouched graph."""
    if torch.is_grad_enabled() and any(isinstance(e, torch.Tensor) and e.requires_grad for e in example_inputs):
        return _untouched(gm, example_inputs, options, GradRequired())
    with _timed("normalise_s"):
        canonical = normalise(gm, example_inputs)
        check_canonical(canonical)
    with _timed("match_s"):
        matched = match(canonical)
    _report(matched, options)
    if not matched.sites and not any(n.meta.get("latent") is not None for n in placeholders(canonical)):
        return _plain(gm, options)
    return Compiled(canonical, gm, matched, _Builder(canonical, matched, options)).first(example_inputs)


def examine(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[list[dict[str, Any]], tuple[Miss, ...], Plan]:
    """The same steps up to the codecs, for reports: one dict per site (fields of ``report.SiteReport``)."""
    canonical = normalise(gm, example_inputs)
    matched = match(canonical)
    builder = _Builder(canonical, matched, options)
    effective, factors, plan = builder.planned(matched.sites, example_inputs)
    ranks = zip(matched.sites, plan.sites, strict=True)
    codecs = {s: builder.codec(s, p.rank, effective[s], factors[s], example_inputs) for s, p in ranks}
    absorbed = readings(absorb(canonical, matched, {s.group.find(): c for s, c in codecs.items()}, step=True))
    found = []
    for site, line in zip(matched.sites, plan.sites, strict=True):
        sigma = factors[site].singular
        found.append(
            dict(  # noqa: C408
                layer=line.layer,
                kind=line.kind,
                width=site.decoder.width,
                rank=line.rank,
                epilogue=site.decoder.words,
                cond=line.cond,
                sigma_max=float(sigma[0]),
                sigma_min=float(sigma[-1]),
                energy=energy_kept(factors[site], line.rank),
                bytes=line.bytes,
                dense_bytes=line.dense_bytes,
                window=line.window,
                lowering="latent" if site.group.find() in absorbed else "decoding",
                codec_bytes=codecs[site].nbytes(),
            )
        )
    return found, matched.misses, plan


def _untouched(gm: GraphModule, example_inputs: Sequence[Any], options: Options, why: LorcError) -> Callee:
    if options.strict:
        raise why
    warnings.warn(f"{why} This graph runs uncompressed.", LorcWarning, stacklevel=2)
    return _plain(gm, options)


def _plain(gm: GraphModule, options: Options) -> Callee:
    """The inner compiler on the untouched graph; LatentKVs that come in are decoded before."""
    values = [compat.example_value(p) for p in placeholders(gm)]
    inner = _inner(gm, [logical(v) for v in values], options)
    coded = [i for i, v in enumerate(values) if isinstance(v, LatentKV)]
    if not coded:
        return inner

    def decode_first(*arguments: Any) -> Any:
        plain = list(arguments)
        for i in coded:
            plain[i] = plain[i].dense()
        return inner(*plain)

    return decode_first


def _report(matched: Matched, options: Options) -> None:
    """Nothing silent: a miss is a warning (an error under strict), so is a graph without any site."""
    if options.strict and matched.misses:
        raise StrictMiss(matched.misses)
    if options.strict and not matched.sites and not matched.coded:
        raise NoSites(matched.misses)
    filled = [m for m in matched.misses if m.kind == "preallocated"]
    others = [m for m in matched.misses if m.kind != "preallocated"]
    if filled:
        text = (
            f"{len(filled)} cache writes stay dense (and right): {filled[0].reason}. Compile the model itself with "
            'model.compile(backend="lorc"), so that the prefill is compiled too and a fresh cache is born in it.'
        )
        warnings.warn(text, DenseCacheWarning, stacklevel=2)
    if others and matched.coded:
        text = "; ".join(str(m) for m in others[:4])
        warnings.warn(f"{len(others)} cache writes stay dense (and right): {text}", DenseCacheWarning, stacklevel=2)
    if not matched.coded and not filled:
        warnings.warn(str(NoSites(others)), NoSitesWarning, stacklevel=2)


def _inner(gm: GraphModule, examples: Sequence[Any], options: Options) -> Callee:
    """The inner compiler on a plain graph."""
    _counts["inner_compiles"] += 1
    with _timed("inner_s"):
        if options.inner == "inductor":
            return compat.compile_with_inductor(gm, examples, options.mode)
        if callable(options.inner):
            return options.inner(gm, list(examples))
        return torch._dynamo.lookup_backend(options.inner)(gm, list(examples))


def _content(constant: torch.Tensor) -> tuple[Any, ...]:
    """A constant of the graph by value: each trace makes its own copy."""
    raw = constant.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return (constant.dtype, tuple(constant.shape), hashlib.sha256(raw).digest())


ENERGY_WARNING = 0.99
"""Share of a weight's squared singular values below which a plan is said to cost quality."""


def energy_kept(factors: Factors, rank: int) -> float:
    """Share of the weight's squared singular values that ``rank`` columns keep (1.0 for an all-zero weight)."""
    squares = factors.singular**2
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0


def _warn_of_loss(sites: Sequence[Site], factors: dict[Site, Factors], plan: Plan) -> None:
    """Rank-only codecs know nothing of the data: say what the plan drops of the weights, and what to do."""
    kept = {s.name: energy_kept(factors[s], p.rank) for s, p in zip(sites, plan.sites, strict=True)}
    worst = min(kept, key=kept.__getitem__)
    if kept[worst] < ENERGY_WARNING:
        text = (
            f"this plan keeps {plan.bytes_per_token} of {plan.bytes_per_token_dense} bytes per token and only "
            f"{kept[worst]:.1%} of a projection's energy ({worst}); rank-only compression can cost much quality: "
            "measure it with `lorc demo --model PATH`, or raise `ratio`"
        )
        warnings.warn(text, QualityWarning, stacklevel=2)


class _Builder:
    """Plans, codecs and inner callables for one canonical graph; called again where weights changed."""

    def __init__(self, canonical: GraphModule, matched: Matched, options: Options) -> None:
        self.canonical, self.matched, self.options = canonical, matched, options
        self.attributes = {n: getattr(canonical, str(n.target)) for n in canonical.graph.nodes if n.op == "get_attr"}
        self.index = {n: i for i, n in enumerate(placeholders(canonical))}
        self.places = {
            s: tuple(self.index[n] for n in (*s.weights, *s.consts) if n in self.index) for s in matched.sites
        }
        self.constants = {
            s: tuple(_content(self.attributes[n]) for n in (*s.weights, *s.consts) if n in self.attributes)
            for s in matched.sites
        }

    def weights(self, site: Site, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The model's tensors that a site's codec is made from: chain weights, then the epilogue's constants."""
        return [arguments[i] for i in self.places[site]]

    def real(self, node: Any, arguments: Sequence[Any]) -> torch.Tensor:
        return self.attributes[node] if node in self.attributes else arguments[self.index[node]]

    def codecs(self, arguments: Sequence[Any]) -> list[Codec]:
        """A codec for each site, from the store or made now (all that are missing are planned together)."""
        found = [self._find(site, arguments) for site in self.matched.sites]
        missing = [s for s, c in zip(self.matched.sites, found, strict=True) if c is None]
        if missing:
            made = dict(zip(missing, self._make(missing, arguments), strict=True))
            found = [c or made[s] for s, c in zip(self.matched.sites, found, strict=True)]
        return found  # type: ignore[return-value]

    def _key(self, site: Site) -> tuple[Any, ...]:
        o = self.options
        budget = (o.ratio, o.bytes_per_token, o.scheduler, o.d_min, o.d_max, o.protect_first, o.protect_last, o.plan)
        stored = site.group.find().in_place  # such sites store their own positions, which a budget must count
        return (budget, site.kind, site.ordinal, stored, self.constants[site])

    def _find(self, site: Site, arguments: Sequence[Any]) -> Codec | None:
        return STORE.find(self._key(site), self.weights(site, arguments))

    def planned(
        self, sites: Sequence[Site], arguments: Sequence[Any]
    ) -> tuple[dict[Site, Any], dict[Site, Factors], Plan]:
        """Effective weights, their factors, and the plan."""
        with _timed("factorise_s"), torch.no_grad():
            effective = {s: effective_weight(s.rows, {n: self.real(n, arguments) for n in s.weights}) for s in sites}
            factors = {s: factorise(effective[s][0], s.name) for s in sites}
        with _timed("plan_s"):
            tracks = shared_tracks(self.canonical, self.matched)
            return effective, factors, make_plan(sites, factors, tracks, self.options)

    def _make(self, sites: Sequence[Site], arguments: Sequence[Any]) -> list[Codec]:
        effective, factors, plan = self.planned(sites, arguments)
        _warn_of_loss(sites, factors, plan)
        ranks = zip(sites, plan.sites, strict=True)
        with _timed("factorise_s"), torch.no_grad():
            made = [self.codec(s, p.rank, effective[s], factors[s], arguments) for s, p in ranks]
        for site, codec in zip(sites, made, strict=True):
            STORE.add(self._key(site), self.weights(site, arguments), codec)
        return made

    def codec(
        self,
        site: Site,
        rank: int,
        effective: tuple[torch.Tensor, torch.Tensor | None],
        factors: Factors,
        arguments: Sequence[Any],
    ) -> Codec:
        consts = tuple(STORE.snapshot(self.real(n, arguments)) for n in site.consts)
        return make_codec(
            effective[0], effective[1], factors, rank, site.decoder, consts, site.rows.y.meta["val"].dtype
        )

    def build(self, codecs: Sequence[Codec], joined: dict[int, int], sharing: Sharing) -> Binding:
        """rewrite -> check -> inner compiler, for codecs of one signature and one pattern of sharing."""
        with _timed("rewrite_s"):
            made = rewrite(self.canonical, self.matched, dict(zip(self.matched.sites, codecs, strict=True)), sharing)
            check_rewritten(made)
        mode = compat.fake_mode_of([n.meta["val"] for n in placeholders(self.canonical)])
        examples = [compat.to_fake(n.meta["val"], mode) for n in placeholders(made.module)]
        sizes = size_reader(self.canonical, made)
        with compat.tracing_context(mode):
            inner = _inner(made.module, examples, self.options)
        return Binding(inner, made, sizes, joined)
