"""The catalogue of refusals: one class per reason, so that callers and tests can tell them apart.

Every message gives the value that was refused, what is allowed, and the next step. All byte counts are bytes per
token. Nothing here imports torch, so that the catalogue can be used anywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`` Did you mean 'ratio'?`` (with a leading blank), or ``""`` where no known name is close."""
    close = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted(known)) or "none"


def ratio_for(needed: int, dense: int, fixed: int = 0) -> str:
    """The least ratio, rounded up to six decimals, whose budget ``floor(ratio * dense)`` holds ``needed`` bytes; at
    ratio 1 ``fixed`` bytes (positions) come on top (``Options.budget``)."""
    if dense < needed <= dense + fixed:
        return "1"
    if dense <= 0 or needed > dense:
        return "none: more than the dense cache"
    millionths = -(-needed * 10**6 // dense)
    return f"{float(Fraction(millionths, 10**6)):.6f}".rstrip("0").rstrip(".")


class LorcError(Exception):
    """Base of everything that lorc_fx refuses."""


# ---------------------------------------------------------------------------------------------------- options


class UnknownOption(LorcError, ValueError):
    """An option name that does not exist."""

    def __init__(self, name: object, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"Unknown option {name!r}.{did_you_mean(name, known)} Options are: {_names(known)}.")


class BadOption(LorcError, ValueError):
    """An option whose value is of the wrong type or out of range."""

    def __init__(self, name: str, value: object, allowed: str, default: object = None, hint: str = "") -> None:
        self.name, self.value, self.allowed, self.default = name, value, allowed, default
        super().__init__(f"{name}={value!r} is not allowed: {name} is {allowed} (default {default!r}).{hint}")


class ConflictingOptions(LorcError, ValueError):
    """Options that cannot stand together."""

    def __init__(self, names: Sequence[str], reason: str, next_step: str) -> None:
        self.names = tuple(names)
        super().__init__(f"{' and '.join(self.names)} conflict: {reason}. {next_step}.")


class UnknownBackend(LorcError, ValueError):
    """``inner`` names no backend that torch knows (or names lorc itself)."""

    def __init__(self, value: object, known: Iterable[str]) -> None:
        known = sorted(known)
        self.value = value
        super().__init__(
            f"inner={value!r} is no backend that can compile the rewritten graph.{did_you_mean(value, known)} "
            f"Allowed: a callable, or one of {_names(known)} (default 'inductor')."
        )


class BadPlan(LorcError, ValueError):
    """``plan`` is not a plan, or not one for this model."""

    def __init__(self, plan: object, reason: str) -> None:
        self.plan = plan
        super().__init__(
            f"plan={plan!r} cannot be used: {reason}. Allowed: a Plan or the path of a saved one, made for this "
            "model; make one with lorc_fx.make_plan(model, ...), or leave plan out."
        )


class BadCalibration(LorcError, ValueError):
    """A calibration that cannot be made, read, or used for this model."""

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(
            f"{what} cannot be used to calibrate: {reason}. Allowed: the result of lorc_fx.calibrate(model, batches) "
            "for the same weights, or the path of a saved one; make it anew, or use calibration='none'."
        )


class BadCertificate(LorcError, ValueError):
    """A model that ``certify`` cannot say anything about."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"This model cannot be certified: {reason}. Allowed: a decoder that fills a cache, traced in one graph, "
            "whose logits come from it; lorc_fx.explain(model, ...) says what is found in it, and where graphs break."
        )


# ------------------------------------------------------------------------------------------- budget and schedule


class BudgetTooSmall(LorcError, ValueError):
    """The budget does not hold the least row of each site: one column, or all of them at the lowest precision where
    none may be dropped. Bytes per token; ``dense`` is the dense cache of these sites, ``fixed`` what they store
    beside columns."""

    def __init__(self, budget: int, least: int, dense: int, sites: int, fixed: int = 0) -> None:
        self.budget, self.least, self.dense = budget, least, dense
        super().__init__(
            f"A budget of {budget} bytes per token is too small for {sites} sites: with the fewest columns and bits "
            f"that the options let them have they need {least} bytes (ratio {ratio_for(least, dense, fixed)}; "
            f"dense is {dense}). Raise ratio or bytes_per_token to that, or allow fewer bits (precision) or columns "
            "(basis)."
        )


class KnobsDoNotFit(LorcError, ValueError):
    """The progressive schedule's knobs, as the user gave them, need more than the budget."""

    def __init__(
        self, knobs: Mapping[str, int], needed: int, budget: int, dense: int, would_fit: str, fixed: int = 0
    ) -> None:
        self.knobs, self.needed, self.budget = dict(knobs), needed, budget
        given = ", ".join(f"{name}={value}" for name, value in knobs.items())
        super().__init__(
            f"{given} need {needed} bytes per token, the budget is {budget}. What would fit: {would_fit}; or a budget "
            f"of {needed} bytes (ratio {ratio_for(needed, dense, fixed)}). Or leave the knobs out: they are then "
            "solved."
        )


class UnknownScheduler(LorcError, ValueError):
    """A scheduler name that nobody registered."""

    def __init__(self, name: object, registered: Iterable[str]) -> None:
        registered = sorted(registered)
        self.name, self.registered = name, tuple(registered)
        super().__init__(
            f"Unknown scheduler {name!r}.{did_you_mean(name, registered)} Registered: {_names(registered)}. "
            "Register your own with @lorc_fx.register_scheduler(name)."
        )


class AlreadyRegistered(LorcError, ValueError):
    """A second registration under one name."""

    def __init__(self, what: str, name: str, taken_by: str) -> None:
        self.what, self.name = what, name
        super().__init__(f"{what} {name!r} is already taken by {taken_by}. Choose a name that is not in use.")


class BadSchedule(LorcError, ValueError):
    """A scheduler returned something that is not a schedule."""

    def __init__(self, scheduler: str, reason: str) -> None:
        self.scheduler = scheduler
        super().__init__(
            f"Scheduler {scheduler!r} returned no valid schedule: {reason}. A schedule is one int per site, "
            "fixed_bytes + k * column_bytes with 1 <= k <= width, and together at most the budget."
        )


class BadBasis(LorcError, ValueError):
    """A registered basis returned something that is none."""

    def __init__(self, basis: str, site: str, reason: str) -> None:
        self.basis, self.site = basis, site
        super().__init__(
            f"Basis {basis!r} returned no basis for {site}: {reason}. A basis is (P [n, k], S [k, n], energy [k] >= 0 "
            "and falling) with 1 <= k <= n, n the width of the site."
        )


# ------------------------------------------------------------------------------------------- models and weights


LISTED = 20
"""Misses that a message names."""


def _listed(misses: Iterable[object]) -> str:
    lines = [f"\n  - {miss}" for miss in misses]
    more = f"\n  … and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return "".join(lines[:LISTED]) + more


class StrictMiss(LorcError):
    """``strict=True`` and something in the graph stays dense."""

    def __init__(self, misses: Sequence[object]) -> None:
        self.misses = tuple(misses)
        super().__init__(
            f"strict=True and {len(self.misses)} cached value(s) stay dense, none may:{_listed(self.misses)}\n"
            "Pass strict=False to keep these dense, or see lorc_fx.explain(model, ...)."
        )


class NoSites(LorcError):
    """The model has nothing that could be compressed: an error under ``strict=True``, else the text of a warning."""

    def __init__(self, misses: Sequence[object] = (), strict: bool = True) -> None:
        self.misses = tuple(misses)
        near = f" The nearest misses:{_listed(self.misses)}\n" if self.misses else " "
        refused, else_ = ("; strict allows no such model", ", or pass strict=False to run it unchanged")
        super().__init__(
            "No site found: 0 cached keys or values come from a projection of this graph"
            f"{refused if strict else '; it runs unchanged'}.{near}Check that it runs with use_cache=True and that no "
            "graph break (TORCH_LOGS=graph_breaks names them) lies between a projection and its cache"
            f"{else_ if strict else ''}."
        )


class BadWeight(LorcError, ValueError):
    """A projection whose effective weight cannot be factorised (NaN or inf in it)."""

    def __init__(self, site: object) -> None:
        self.site = site
        super().__init__(
            f"The weight of site {site} cannot be factorised: it holds NaN or inf; only finite values are allowed. "
            "Check the checkpoint (and its dtype), or leave the model uncompressed."
        )


class UnloadedWeights(LorcError, ValueError):
    """Weights on the device ``meta``: they have shapes, and no data yet."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        more = f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        super().__init__(
            f"{len(self.names)} weight(s) are on the device 'meta' and have no data: {', '.join(self.names[:4])}{more}"
            "; only weights with data can be factorised. Load them first (from_pretrained, or load_state_dict(..., "
            "assign=True) on a model made on 'meta'), then call the model again."
        )


class GradRequired(LorcError):
    """The graph is compiled for training: a gradient is required."""

    def __init__(self) -> None:
        super().__init__(
            "A compressed cache has no gradient, and grad mode is on and an input or weight requires grad; allowed is "
            "inference only. Call it under torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)."
        )


class UnreadableGraph(LorcError):
    """A graph that cannot be traced to its canonical form (an op that needs data to know its shape, say)."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"This graph cannot be read: {detail}. Allowed is whatever torch can trace on fake tensors; "
            "lorc_fx.explain(model, ...) shows where. With torch.compile(dynamic=True), leave `dynamic` out: lengths "
            "are dynamic anyway."
        )


class TooManyValues(UnreadableGraph):
    """A graph whose Python numbers go on changing: each value would have codecs of its own."""

    def __init__(self, names: str, values: int) -> None:
        LorcError.__init__(
            self,
            f"Python numbers of this graph ({names}) have had {values} values, each with codecs of its own; allowed "
            "are so many as torch compiles a graph for. Make them tensors, or raise recompile_limit.",
        )


class ForeignCache(LorcError):
    """A LatentKV where it cannot be read or written: of another model or plan, or outside of the compiled graphs."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"This cache cannot be used here: {detail}. Only the model and plan that wrote a LatentKV can read it, in "
            "graphs compiled with backend='lorc'. Start with a fresh cache, or decompress this one first."
        )


class BadCacheFile(LorcError, ValueError):
    """A cache that cannot be written to a file, or a file that cannot be read as a cache."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} cannot be used as a saved cache: {reason}. Allowed is what lorc_fx.save_cache(cache, path) writes "
            "of a cache of transformers or a nest of tensors; save it anew, or run the prompt again."
        )


class GraphInvariant(LorcError):
    """An internal check between two passes failed: a defect of lorc_fx, not of the model."""

    def __init__(self, stage: str, invariant: str, found: object) -> None:
        self.stage, self.invariant = stage, invariant
        super().__init__(
            f"After pass {stage!r} the graph breaks the invariant '{invariant}': found {found}. This is a defect in "
            "lorc_fx: please report it with the model's config; backend='inductor' runs the model meanwhile."
        )


class BadModel(LorcError, ValueError):
    """A model or path that cannot be loaded or compiled at all."""

    def __init__(self, model: object, reason: str) -> None:
        self.model = model
        super().__init__(
            f"Model {model!r} cannot be used: {reason}. Allowed: a decoder as torch.nn.Module, the path of a local "
            "checkpoint (safetensors, sharded or not, or GGUF), or a name of the hub (owner/name)."
        )


class MissingExtra(LorcError, ImportError):
    """Something that needs a package of one of lorc_fx's extras, which is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{what} needs {package}, which is not installed here. Install what the extra {extra!r} names: "
            f"pip install 'lorc-fx[{extra}]'; or leave {what} out."
        )


# ---------------------------------------------------------------------------------------------------- warnings


class LorcWarning(UserWarning):
    """Base of every warning of lorc_fx."""


class NoSitesWarning(LorcWarning):
    """Nothing to compress was found: the model runs as it is."""


class DenseCacheWarning(LorcWarning):
    """A cache stays dense (for example preallocated or filled by an eager prefill) and is right, but not smaller."""


class KernelWarning(LorcWarning):
    """An attention gets no generated kernel or compiled code (plain torch computes it, as right but slower), or a
    database of tuned configs does not fit."""


class QualityWarning(LorcWarning):
    """The compression is expected or measured to cost quality."""


class EagerWarning(LorcWarning):
    """A LatentKV met eager code, or other weights or another plan than wrote it: right, but slow, or dense from there
    on."""
