"""What one forward pass says about each site: means and cov(y), sinks apart, and bases made from them.

    C = cov(y) + lambda s W W^T        s = tr cov(y) / tr W W^T

The SVD of W A^(1/2), A = E[x x^T], has the eigenvectors of W A W^T = E[y y^T], so n x n statistics of y are enough;
LoRC's own basis (W W^T) is the prior. With the second moment G of the loss gradient at y the basis is taken in that
metric: R = G^(1/2), R C R = U L U^T, P = R U, S = U^T R^-1; dropping column i then costs about L_i / 2 nats per token.
Without gradients of the loss keys have the metric of their attention scores, E[J^T q q^T J], where q is a query that
may read the key and J the Jacobian of what lies between y and the product (norms, rotation): that needs no more than a
forward pass.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from .codec import Basis
from .errors import BadCalibration, QualityWarning
from .groups import by_place, on_diagonal
from .plan_file import checksum, write_tensors

VERSION = 2
PRIOR = 0.3
"""lambda: how much of the weight's own spectrum comes on top of cov(y) in C. A few thousand tokens say too little of
the directions that only rare tokens take, so 0.02 fits them too well; from 0.3 to 1 it is flat (``bench.ablation``)."""

FLATTEN = 0.03
"""The share of tr(G)/n I in the gradient metric: without it, G of few tokens overfits."""

SINK_NEAR = 0.1
"""Tokens this near to their row's first (squared distance, in units of the row's variance) are sinks like it."""

SINK_DISTANCE, SINK_SPREAD = 4.0, 0.05
"""First tokens get a mean of their own where they lie far from the others (squared distance, in units of tr cov(y)), or
where they hardly differ among themselves (a BOS token): attention leans on them, so they must be exact."""

WIDE, GROUP, NARROW = 4096, 2048, 16
"""Sites of ``WIDE`` columns or more keep statistics by groups of whole heads, of ``NARROW`` to ``GROUP`` columns each:
squares of the width would be gigabytes over all layers of such a model."""

TOLERANCE = 0.01
"""Two fingerprints are those of the same weights within this share: bf16 rounding moves them by a few tenths of it."""


def fingerprint(weight: torch.Tensor) -> torch.Tensor:
    """Up to 17 numbers [m] fp64 that tell weights apart and hardly depend on their dtype: W v for a fixed v, its first
    16 entries, and its norm."""
    v = torch.cos(torch.arange(weight.shape[1], dtype=torch.float64) * 0.7391 + 0.3)
    product = weight.detach().to("cpu", torch.float64) @ v
    return torch.cat([product[:16], product.norm()[None]])


def same_weight(mark: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two fingerprints are those of the same weight, in whatever dtypes it was."""
    return mark.shape == other.shape and float((mark - other).norm()) <= TOLERANCE * float(other.norm())


def groups_of(width: int, head: int = 1) -> int:
    """Groups of equal width that a site's columns are in: 1, but for wide sites the fewest that are narrow enough and
    hold whole heads of ``head`` columns. (1 again where ``width`` has no such divisor.)"""
    if width < WIDE:
        return 1
    least = max(head, NARROW)
    fits = [g for g in range(2, width // least + 1) if width % (g * head) == 0 and width // g <= GROUP]
    return fits[0] if fits else 1


def second_moment(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """rows [N, n] -> sum of y y^T within each group of columns, [groups, n / groups, n / groups]."""
    parts = rows.unflatten(1, (groups, -1)).transpose(0, 1)
    return parts.transpose(1, 2) @ parts


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Sums over tokens at one site, fp64; n columns in g groups of w (``groups_of``: nearly always g = 1).

    ``total`` [n] and ``outer`` [g, w, w] = sum y y^T leave out each row's first token, which ``sinks``, ``sink_total``
    [n] and ``sink_square`` (sum |y|^2) hold, and tokens that lie on it; ``gradient`` [g, w, w] = sum g g^T over
    ``gradients`` tokens, the same ones; ``local``: g is the gradient of attention scores (with a query that may read
    the key), not of the loss; ``mark`` is the weight's fingerprint.
    """

    layer: int
    kind: str
    mark: torch.Tensor
    tokens: int
    total: torch.Tensor
    outer: torch.Tensor
    sinks: int
    sink_total: torch.Tensor
    sink_square: float
    gradients: int = 0
    gradient: torch.Tensor | None = None
    local: bool = False

    def merged(self, other: SiteStatistics) -> SiteStatistics:
        """Statistics of both: equal to gathering them together. Gradients of the loss displace those of scores."""
        known = [s for s in (self, other) if s.gradient is not None]
        known = [s for s in known if not s.local] or known
        return SiteStatistics(
            self.layer,
            self.kind,
            self.mark,
            self.tokens + other.tokens,
            self.total + other.total,
            self.outer + other.outer,
            self.sinks + other.sinks,
            self.sink_total + other.sink_total,
            self.sink_square + other.sink_square,
            sum(s.gradients for s in known),
            sum(s.gradient for s in known) if known else None,  # type: ignore[misc, arg-type]
            bool(known) and known[0].local,
        )

    def is_of(self, kind: str, width: int, mark: torch.Tensor) -> bool:
        """Whether these are statistics of the weight with that fingerprint."""
        return self.kind == kind and len(self.total) == width and same_weight(self.mark, mark)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of all sites of a model; give it as ``options={"calibration": ...}``. Compared by content: each graph
    of a model reads a path anew, and all must get the same codecs."""

    sites: tuple[SiteStatistics, ...]

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Calibration) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """Checksum of all statistics."""
        return checksum(self._tensors())

    def merge(self, other: Calibration) -> Calibration:
        """Both together. Raises BadCalibration where they are of different weights."""
        if len(self.sites) != len(other.sites):
            raise BadCalibration("two calibrations", f"they have {len(self.sites)} and {len(other.sites)} sites")
        for a, b in zip(self.sites, other.sites, strict=True):
            if not a.is_of(b.kind, len(b.total), b.mark):
                raise BadCalibration("two calibrations", f"they are of different weights (layer {a.layer} {a.kind})")
        return Calibration(tuple(a.merged(b) for a, b in zip(self.sites, other.sites, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors, replaced whole: fp64 sums, one set of tensors per site. Raises OSError where that
        cannot be."""
        about = {"lorc_fx_calibration": str(VERSION), "sites": str(len(self.sites))}
        write_tensors(Path(path), self._tensors(), about)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for i, s in enumerate(self.sites):
            counts = [s.layer, s.kind == "key", s.tokens, s.sinks, s.gradients, s.local]
            named = {"mark": s.mark, "total": s.total, "outer": s.outer, "sink_total": s.sink_total}
            named["counts"] = torch.tensor(counts, dtype=torch.int64)
            named["sink_square"] = torch.tensor(s.sink_square, dtype=torch.float64)
            if s.gradient is not None:
                named["gradient"] = s.gradient
            tensors.update({f"{i}.{name}": t.contiguous() for name, t in named.items()})
        return tensors

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a saved calibration. Raises BadCalibration where the file is missing or is none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "pt") as file:
                about = file.metadata() or {}
                if about.get("lorc_fx_calibration") != str(VERSION):
                    raise BadCalibration(str(path), f"it is no calibration of version {VERSION}")
                names = set(file.keys())
                sites = []
                for i in range(int(about["sites"])):
                    counts = file.get_tensor(f"{i}.counts").tolist()
                    part = {n: file.get_tensor(f"{i}.{n}") for n in ("mark", "total", "outer", "sink_total")}
                    gradient = file.get_tensor(f"{i}.gradient") if f"{i}.gradient" in names else None
                    sites.append(
                        SiteStatistics(
                            layer=counts[0],
                            kind="key" if counts[1] else "value",
                            tokens=counts[2],
                            sinks=counts[3],
                            sink_square=float(file.get_tensor(f"{i}.sink_square")),
                            gradients=counts[4],
                            gradient=gradient,
                            local=bool(counts[5]),
                            **part,
                        )
                    )
                return cls(tuple(sites))
        except (OSError, SafetensorError, KeyError, ValueError) as why:
            if isinstance(why, BadCalibration):
                raise
            raise BadCalibration(str(path), f"it cannot be read ({why})") from None

    def of(self, name: str, kind: str, weight: torch.Tensor) -> SiteStatistics:
        """The statistics of a site's effective ``weight`` [n, d]. Raises BadCalibration where there are none."""
        mark = fingerprint(weight)
        for site in self.sites:
            if site.is_of(kind, weight.shape[0], mark):
                return site
        raise BadCalibration("this calibration", f"it has no statistics of {name}: it was made for other weights")


def basis_of(site: SiteStatistics, gram: torch.Tensor, name: str = "", groups: int | None = None) -> Basis:
    """C = cov + lambda s W W^T (``gram``, [n, n] fp64), its eigenvectors (in the metric of the gradients, where known),
    and the means.

    ``groups``: of features, each with eigenvectors of its own, columns by place (``groups.py``). Where statistics are
    by groups each group has its own eigenvectors, too; all columns together are put in order.
    """
    n = len(site.total)
    if site.tokens < n:
        text = f"{name}: statistics of {site.tokens} tokens for {n} columns; the weight's own spectrum fills in"
        warnings.warn(f"{text}, more calibration text is better", QualityWarning, stacklevel=2)
    device = gram.device
    mean, cov = covariance(site, device)
    cov = cov if groups is None else on_diagonal(cov, groups)
    prior = on_diagonal(gram, len(cov))
    size, own = float(_trace(cov)), float(_trace(prior))
    scale = size / own if own > 0 and size > 0 else 1.0
    c = cov + PRIOR * scale * prior
    means = torch.stack([mean, *_sink_mean(site, mean, size)])
    if site.gradient is None:
        energy, u = torch.linalg.eigh((c + c.mT) / 2)
        return _joined(u, u.mT, energy, means, False, groups)
    g = (site.gradient / max(site.gradients, 1)).to(device)
    g = g if groups is None else on_diagonal(g, groups)
    g = (1 - FLATTEN) * g + FLATTEN * _trace(g) / n * torch.eye(g.shape[1], dtype=g.dtype, device=device)
    values, vectors = torch.linalg.eigh((g + g.mT) / 2)
    values = values.clamp_min(float(values.max()) * 1e-9 + 1e-300).unsqueeze(1)
    root, inverse = (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT
    weighted = root @ c @ root
    energy, u = torch.linalg.eigh((weighted + weighted.mT) / 2)
    return _joined(root @ u, u.mT @ inverse, energy, means, not site.local, groups)


def covariance(site: SiteStatistics, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [n] and covariance within each group of columns [g, w, w] of the tokens that are no sinks, fp64."""
    count = max(site.tokens, 1)
    mean = (site.total / count).to(device)
    centre = mean.unflatten(0, (len(site.outer), -1))
    return mean, (site.outer / count).to(device) - centre.unsqueeze(2) * centre.unsqueeze(1)


def _trace(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.diagonal(dim1=1, dim2=2).sum()


def _sink_mean(site: SiteStatistics, mean: torch.Tensor, size: float) -> list[torch.Tensor]:
    """The mean of first tokens, if they need one of their own; ``size``: the variance of the others."""
    if not site.sinks:
        return []
    sink = (site.sink_total / site.sinks).to(mean.device)
    spread = site.sink_square / site.sinks - float(sink.square().sum())
    far = float((sink - mean).square().sum()) > SINK_DISTANCE * size
    return [sink] if far or spread < SINK_SPREAD * size else []


def _joined(
    analysis: torch.Tensor,
    synthesis: torch.Tensor,
    energy: torch.Tensor,
    means: torch.Tensor,
    absolute: bool,
    groups: int | None,
) -> Basis:
    """P [g, w, w], S [g, w, w] and energies [g, w] (rising) of all groups as one basis: columns by falling energy, or
    by place where they stay in ``groups``."""
    if groups is None:
        order = energy.flatten().argsort(descending=True, stable=True)
    else:
        order = by_place(energy)
    p, s = torch.block_diag(*analysis)[:, order], torch.block_diag(*synthesis)[order]
    return Basis(p, s, energy.flatten()[order].clamp_min(0), means, True, absolute, groups or 1)
