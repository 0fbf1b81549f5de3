"""From a matched graph to codecs and an inner callable, for the weights at hand."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from . import compat
from .bases import BUILT_IN, in_columns_of
from .calibration import Calibration, basis_of, fingerprint
from .codec import Codec, flat_basis, grouped_prior, identity_codec, prior_basis, through
from .errors import BadCalibration, BadPlan, QualityWarning
from .factors import gram, spectrum
from .gather import Sums, Walker
from .groups import head_groups
from .logs import show
from .options import CODEC_OPTIONS, FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from .passes.check import check_rewritten
from .passes.epilogue import effective_weight
from .passes.interface import Rewritten, Sharing
from .passes.normalise import placeholders
from .passes.plan import checked_groups, make_plan
from .passes.rewrite import rewrite, writes_to
from .passes.sites import Matched, Site
from .passes.tracks import shared_tracks
from .plan_data import SiteBasis
from .plan_file import checksum
from .prepared import Prepared
from .ranks import all_agree
from .records import Fidelity, Plan, PlannedSite
from .runtime import Binding, size_reader
from .store import STORE
from .timing import COUNTS, timed

Callee = Callable[..., Any]


def compile_inner(gm: GraphModule, examples: Sequence[Any], options: Options) -> Callee:
    """The inner compiler on a plain graph."""
    COUNTS["inner_compiles"] += 1
    with timed("inner_s"):
        if options.inner == "inductor":
            return compat.compile_with_inductor(gm, examples, options.mode)
        if callable(options.inner):
            return options.inner(gm, list(examples))
        return compat.backend(options.inner)(gm, list(examples))


def _content(constant: torch.Tensor) -> tuple[Any, ...]:
    """A constant of the graph by value: each trace makes its own copy."""
    raw = constant.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return (constant.dtype, tuple(constant.shape), hashlib.sha256(raw).digest())


ENERGY_WARNING = 0.99
"""Share of a site's energy below which a plan is said to cost quality."""


def complete(prepared: dict[Site, Prepared], plan: Plan) -> Plan:
    """``plan`` with what its codecs need of the data, where they need any: it can then be saved and used alone."""
    if not all(p.basis.informed for p in prepared.values()):
        return plan
    parts = zip(prepared.values(), plan.sites, strict=True)
    return replace(plan, bases=tuple(SiteBasis.of(p.weight, p.factors, p.basis, line.rank) for p, line in parts))


def _warn_of_loss(sites: dict[Site, Prepared], plan: Plan) -> None:
    """Codecs that know nothing of the data: say what the plan drops of the weights, and what to do."""
    kept = {s: p.kept(line) for (s, p), line in zip(sites.items(), plan.sites, strict=True) if not p.basis.informed}
    worst = min(kept, key=kept.__getitem__, default=None)
    if worst is not None and kept[worst] < ENERGY_WARNING:
        text = (
            f"this plan keeps {plan.bytes_per_token} of {plan.bytes_per_token_dense} bytes per token and only "
            f"{kept[worst]:.1%} of a projection's energy ({worst.name}); rank-only compression can cost much quality: "
            "measure it with `lorc demo --model PATH`, give a calibration (lorc_fx.calibrate), or raise `ratio`"
        )
        warnings.warn(text, QualityWarning, stacklevel=2)


ERROR_WARNING = 0.15
"""Relative error of a site on the first prompt from which a warning names it. Gemma 3 270M at ratio 0.25 (loss up by
less than 1 %) has none above 0.1, at 0.15 (some per cent) the worst exceed this (``bench.quality``: worst_error)."""


def _warn_of_errors(found: Sequence[Fidelity]) -> None:
    """Codecs made of the first prompt that read it back badly: say which, and what to do."""
    bad = sorted((f for f in found if f.measured > ERROR_WARNING), key=lambda f: -f.measured)
    if bad:
        named = ", ".join(f"{f.name}: {f.measured:.0%} (predicted {f.predicted:.0%})" for f in bad[:3])
        text = (
            f"{len(bad)} of {len(found)} cached projections are read back with more than {ERROR_WARNING:.0%} relative "
            f"error on the first prompt (lorc_fx.fidelity(model) lists all); the worst: {named}. Raise `ratio`, or "
            "calibrate with lorc_fx.calibrate(..., gradients=True), which spends the bytes where the loss is"
        )
        warnings.warn(text, QualityWarning, stacklevel=2)


class Builder:
    """Plans, codecs and inner callables for one canonical graph; called again where weights changed."""

    def __init__(self, canonical: GraphModule, matched: Matched, options: Options) -> None:
        self.canonical, self.matched, self.options = canonical, matched, options
        self.attributes = {n: getattr(canonical, str(n.target)) for n in canonical.graph.nodes if n.op == "get_attr"}
        self.index = {n: i for i, n in enumerate(placeholders(canonical))}
        self.places = {
            s: tuple(self.index[n] for n in (*s.weights, *s.consts) if n in self.index) for s in matched.sites
        }
        self.recipes = {s: s.recipe for s in matched.sites}
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
        found = {site: self._find(site, arguments) for site in self.matched.planned}
        missing = [site for site, codec in found.items() if codec is None]
        if missing:
            found |= zip(missing, self._make(missing, arguments), strict=True)
        return [found[self.matched.leads[site]] for site in self.matched.sites]  # type: ignore[misc]

    def holds(self, site: Site, arguments: Sequence[Any], codec: Codec) -> bool:
        """Whether a cache coded by ``codec`` goes on: it was made of these weights, perhaps before statistics."""
        return STORE.holds(self._key(site), self.weights(site, arguments), codec)

    def begins(self) -> bool:
        """Whether this graph begins its caches: none comes in."""
        return all(n.meta.get("latent") is None and not n.meta.get("decode") for n in self.index)

    def informs(self) -> bool:
        """Whether this graph's first call may give the statistics: it begins its caches, and such are asked for."""
        return self.options.calibration == FIRST_PROMPT and self.begins() and bool(self.matched.sites)

    def inform(self, arguments: Sequence[Any]) -> None:
        """Run the prompt once as it is, and make codecs of what was seen, if it is long enough and none are there."""
        if self._too_short(arguments) or self._is_informed(arguments):
            return
        with compat.building(), torch.device("cpu"):  # whatever the user's default is: sums are on the CPU
            if not self._is_informed(arguments):  # by a prompt that another thread had in hand meanwhile
                self._inform(arguments)

    def _is_informed(self, arguments: Sequence[Any]) -> bool:
        return all(self._informed(site, arguments) is not None for site in self.matched.planned)

    def _inform(self, arguments: Sequence[Any]) -> None:
        sums, why = None, "another process has none of it"
        with timed("statistics_s"), torch.inference_mode(False), torch.no_grad():
            try:
                sums = self._seen(arguments)
            except BadCalibration as error:  # the prompt is at fault, not the model: it runs all the same
                why = error.reason
        enough = sums is None or min(s.seen for s in sums.values()) >= FIRST_PROMPT_TOKENS
        # with statistics a process runs no further prompt twice, which the others would wait for: all have them or none
        if all_agree(self.canonical, sums is not None and enough):
            assert sums is not None
            self._inform_by(sums, arguments)
        elif enough:
            warnings.warn(f"this prompt gives no statistics: {why}", QualityWarning, stacklevel=2)

    def _inform_by(self, sums: dict[Site, Sums], arguments: Sequence[Any]) -> None:
        """Make codecs of what was seen, and measure how well they read it back."""
        sites = self.matched.planned
        samples = {site: s.sample for site, s in sums.items()}
        prepared, plan = self.planned(sites, arguments, sums)
        found = []
        for (site, codec), line in zip(self.made(prepared, plan, arguments).items(), plan.sites, strict=True):
            found.append(self._fidelity(site, prepared[site], codec, line, samples[site]))
            STORE.add((self._key(site), True), self.weights(site, arguments), codec, found[-1])
        STORE.turn()
        _warn_of_errors(found)

    def _seen(self, arguments: Sequence[Any], scores: bool = True) -> dict[Site, Sums]:
        """Statistics of one call. Without those of attention scores where there is an op without a derivative."""
        sums = {}
        for site in self.matched.planned:
            weight = self.effective(site, arguments)[0]
            sums[site] = Sums(site.layer, site.kind, fingerprint(weight), weight.shape[0], site.head)
        everywhere = {site: sums[lead] for site, lead in self.matched.leads.items()}
        try:
            Walker(self.canonical, everywhere, scores=scores).walk(self._untouched(arguments))
        except RuntimeError:
            if not scores:
                raise
            return self._seen(arguments, scores=False)
        return sums

    def _fidelity(self, site: Site, made: Prepared, codec: Codec, line: PlannedSite, sample: torch.Tensor) -> Fidelity:
        """In the basis' own metric, which is the one that the prediction is in."""
        with torch.no_grad():
            y, metric = sample.to(made.weight.device), made.basis.analysis
            lost = float(((through(codec, made.basis_for(line), y) - y) @ metric).square().sum())
            size = float(((y - y.mean(0)) @ metric).square().sum())
        measured = math.sqrt(lost / size) if size else 0.0
        return Fidelity(site.name, math.sqrt(line.predicted or 0.0), measured)

    def _too_short(self, arguments: Sequence[Any]) -> bool:
        """Whether no input has an element for each of enough tokens: then the prompt need not run to be counted."""
        inputs = (arguments[i] for n, i in self.index.items() if not n.meta.get("state"))
        return all(a.numel() < FIRST_PROMPT_TOKENS for a in inputs if isinstance(a, torch.Tensor))

    def _untouched(self, arguments: Sequence[Any]) -> list[Any]:
        """Copies of what the graph writes into, so that it can run again."""
        nodes = list(self.canonical.graph.nodes)
        written = {i for n, i in self.index.items() if any(writes_to(node, n) for node in nodes)}
        return [a.clone() if i in written else a for i, a in enumerate(arguments)]

    def _key(self, site: Site) -> tuple[Any, ...]:
        o = self.options
        budget = tuple(getattr(o, name) for name in CODEC_OPTIONS)
        stored = site.group.find().in_place  # such sites store their own positions, which a budget must count
        about = (site.kind, site.ordinal, site.unprojected, stored)
        return (budget, *about, self.constants[site], self.recipes[site])

    def _informed(self, site: Site, arguments: Sequence[Any]) -> Codec | None:
        return STORE.find((self._key(site), True), self.weights(site, arguments))

    def _find(self, site: Site, arguments: Sequence[Any]) -> Codec | None:
        found = self._informed(site, arguments)
        return found or STORE.find((self._key(site), False), self.weights(site, arguments))

    def planned(
        self, sites: Sequence[Site], arguments: Sequence[Any], known: dict[Site, Sums] | None = None
    ) -> tuple[dict[Site, Prepared], Plan]:
        """Effective weights with their factors and bases (of ``known``, else of the plan or the calibration in the
        options), and the plan. Sums are taken out of ``known`` one by one, so that wide sites' do not pile up."""
        prepared = self.prepared(sites, arguments, known)
        return prepared, self.plan(prepared, self.options)

    def prepared(
        self, sites: Sequence[Site], arguments: Sequence[Any], known: dict[Site, Sums] | None = None
    ) -> dict[Site, Prepared]:
        """The first half of ``planned``."""
        given = self.options.plan
        bases = {} if known is not None or given is None or not given.bases else given.places()
        with timed("factorise_s"), torch.no_grad():
            return {
                s: self._given(s, arguments, given, bases[s.layer, s.kind])
                if (s.layer, s.kind) in bases
                else self._prepared(s, arguments, None if known is None else known.pop(s))
                for s in sites
            }

    def plan(self, prepared: dict[Site, Prepared], options: Options) -> Plan:
        """The second half: what each site gets under ``options``. Raises BadPlan where a given plan has other sites."""
        if options.plan is not None:
            lacking = sorted(options.plan.ranks.keys() - {(s.layer, s.kind) for s in self.matched.sites})
            if lacking:
                raise BadPlan(options.plan, f"it has ranks for sites that this model lacks: {lacking[:4]}")
        with timed("plan_s"):
            tracks = shared_tracks(self.canonical, self.matched)
            factors = {s: p.factors for s, p in prepared.items()}
            bases = {s: p.basis for s, p in prepared.items()}
            return make_plan(list(prepared), factors, bases, tracks, options)

    def effective(self, site: Site, arguments: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The site's effective weight [n, d] and bias [n] (None where zero)."""
        return effective_weight(site.rows, {n: self.real(n, arguments) for n in site.weights})

    def _prepared(self, site: Site, arguments: Sequence[Any], sums: Sums | None) -> Prepared:
        weight, bias = self.effective(site, arguments)
        calibration, product = self.options.calibration, gram(weight, site.name)
        factors, statistics = spectrum(product), None
        if sums is not None:
            statistics = sums.statistics()
        elif isinstance(calibration, Calibration):
            statistics = calibration.of(site.name, site.kind, weight)
        name, groups = self.options.basis_for(site.kind), self._groups(site, weight)
        if statistics is not None:
            basis = basis_of(statistics, product, site.name, groups)
        elif groups is not None:
            basis = grouped_prior(product, bias, groups, vectors=False)
        else:
            basis = prior_basis(factors, bias)
        if site.unprojected:
            basis = flat_basis(basis)
        elif name not in BUILT_IN:
            if groups is not None:
                raise BadPlan(self.options.plan, f"it has {site.name} in {groups} groups, which basis {name!r} has not")
            basis = in_columns_of(name, basis, weight, statistics, site.name)
        return Prepared(site.name, weight, bias, factors, basis)

    def _groups(self, site: Site, weight: torch.Tensor) -> int | None:
        """Groups of columns that each have a basis of their own, by the plan or the options; None for a joint one."""
        plan = self.options.plan
        if site.unprojected:
            return None
        if plan is not None:
            at = plan.places().get((site.layer, site.kind))
            found = 1 if at is None else checked_groups(plan, plan.sites[at], len(weight))
            return found if found > 1 else None
        if not site.grouped:
            return None
        return head_groups(weight, site.head, self.options.group_size or 1, site.name)

    def _given(self, site: Site, arguments: Sequence[Any], plan: Plan, index: int) -> Prepared:
        """From the plan itself: nothing is factorised. Raises BadPlan for other weights."""
        weight, bias = self.effective(site, arguments)
        if not plan.bases[index].fits(weight):
            raise BadPlan(plan, f"{site.name} has other weights than the plan was made for")
        return Prepared(site.name, weight, bias, *plan.bases[index].on(weight.device))

    def _make(self, sites: Sequence[Site], arguments: Sequence[Any]) -> list[Codec]:
        with torch.device("cpu"):  # whatever the user's default is
            prepared, plan = self.planned(sites, arguments)
            _warn_of_loss(prepared, plan)
            made = self.made(prepared, plan, arguments)
        for site, codec in made.items():
            STORE.add((self._key(site), False), self.weights(site, arguments), codec)
        return list(made.values())

    def made(self, prepared: dict[Site, Prepared], plan: Plan, arguments: Sequence[Any]) -> dict[Site, Codec]:
        """Codecs as planned."""
        made = {}
        with timed("factorise_s"), torch.no_grad():
            for (site, p), line in zip(prepared.items(), plan.sites, strict=True):
                consts = tuple(STORE.snapshot(self.real(n, arguments)) for n in site.consts)
                if site.unprojected:
                    origin = checksum({"weight": fingerprint(p.weight)})
                    made[site] = identity_codec(p.weight, origin, line.segments, site.decoder, site.decoder.dtype)
                    continue
                dtype = site.rows.y.meta["val"].dtype
                made[site] = p.codec(line, site.decoder, consts, dtype, from_y=site.one_product)
        return made

    def build(self, codecs: Sequence[Codec], joined: dict[int, int], sharing: Sharing) -> Binding:
        """rewrite -> check -> inner compiler, for codecs of one signature and one pattern of sharing."""
        with timed("rewrite_s"):
            made = rewrite(self.canonical, self.matched, dict(zip(self.matched.sites, codecs, strict=True)), sharing)
            check_rewritten(made)
        self._show(made, codecs)
        mode = compat.fake_mode_of([n.meta["val"] for n in placeholders(self.canonical)])
        examples = [compat.to_fake(n.meta["val"], mode) for n in placeholders(made.module)]
        sizes = size_reader(self.canonical, made)
        with compat.tracing_context(mode):
            inner = compile_inner(made.module, compat.apart(examples, mode), self.options)
        return Binding(inner, made, sizes, joined)

    def _show(self, made: Rewritten, codecs: Sequence[Codec]) -> None:
        """The rewritten graph for ``TORCH_LOGS`` and ``LORC_DUMP``, below a head that says what its sites store."""

        def text() -> str:
            lines = [f"# {s.name}: rows {c.format.spec}, {made.lowerings.get(s.name, 'decoding')}" for s, c in named]
            lines += [f"# {a.digest}: keys {a.keys.words}; values {a.values.words}" for a in made.attends]
            return "\n".join([*lines, "", made.module.print_readable(print_output=False)])

        named = list(zip(self.matched.sites, codecs, strict=True))
        about = f"{named[0][0].name} to {named[-1][0].name}" if named else "no new site"
        show("graph", f"{about}, {len(made.inputs)} inputs", text)
