"""What a planned site's codec must know of the data, so that a plan serves its model without the statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .calibration import fingerprint, same_weight
from .codec import Basis
from .factors import Factors
from .plan_file import checksum

REQUIRED = ("mark", "singular", "energy", "means", "analysis")
"""The tensors of a site; ``synthesis`` comes on top where it is not the transpose of ``analysis``."""


def kept(basis: Basis, columns: int) -> Basis:
    """``basis`` with its first ``columns`` columns only, laid out anew (all energies stay: shares are of their sum).

    Codecs are made of this, saved or not: products of equal numbers in equal layouts are bit-equal.
    """
    analysis = basis.analysis[:, :columns].clone(memory_format=torch.contiguous_format)
    if torch.equal(analysis, basis.synthesis[:columns].T):
        return replace(basis, analysis=analysis, synthesis=analysis.T)
    synthesis = basis.synthesis[:columns].clone(memory_format=torch.contiguous_format)
    return replace(basis, analysis=analysis, synthesis=synthesis)


@dataclass(frozen=True, eq=False)
class SiteBasis:
    """The basis of one planned site. Compared by content, so that a plan is equal to itself after a round trip.

    mark [m] fp64: the fingerprint of the effective weight [n, d].   singular [n] fp64: its singular values, descending.
    basis: the first r columns, P [n, r] and S [r, n] fp64, with all energies (n; a registered basis may have fewer) and
    the means. In fp32 a third of a
    codec's entries would round to other numbers (measured on Gemma 3 270M), and caches would differ.
    """

    mark: torch.Tensor
    singular: torch.Tensor
    basis: Basis

    @classmethod
    def of(cls, weight: torch.Tensor, factors: Factors, basis: Basis, columns: int) -> SiteBasis:
        """What a plan that gives the site ``columns`` columns has to keep, on the CPU."""
        few = kept(basis, columns)
        return cls(fingerprint(weight), factors.singular.cpu(), _moved(few, torch.device("cpu")))

    @property
    def columns(self) -> int:
        """Columns that it can give."""
        return self.basis.analysis.shape[1]

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is the one that it was made for, in whatever dtype."""
        return len(self.singular) == weight.shape[0] and same_weight(self.mark, fingerprint(weight))

    def on(self, device: torch.device) -> tuple[Factors, Basis]:
        """As the planner takes it. The factors have no left singular vectors: only the prior basis is made of them."""
        singular = self.singular.to(device)
        return Factors(singular.new_empty(len(singular), 0), singular), _moved(self.basis, device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All fp64 and contiguous, by name; ``synthesis`` only where it is not the transpose of ``analysis``."""
        b = self.basis
        named = {"mark": self.mark, "singular": self.singular, "energy": b.energy, "means": b.means}
        named["analysis"] = b.analysis
        if not torch.equal(b.analysis.T, b.synthesis):
            named["synthesis"] = b.synthesis
        return {name: t.contiguous() for name, t in named.items()}

    @classmethod
    def of_tensors(cls, given: Mapping[str, torch.Tensor], absolute: bool, groups: int = 1) -> SiteBasis:
        """Inverse of ``tensors``, of a basis in ``groups``. Raises KeyError for one that is missing, ValueError for one
        of a wrong shape."""
        mark, singular, energy, means, analysis = (given[name] for name in REQUIRED)
        synthesis = given.get("synthesis", analysis.T)
        n, r = analysis.shape if analysis.dim() == 2 else (0, 0)
        wanted = {"singular": (n,), "energy": (len(energy),), "means": (len(means), n), "synthesis": (r, n)}
        found = {"singular": singular, "energy": energy, "means": means, "synthesis": synthesis}
        for name, shape in wanted.items():
            if tuple(found[name].shape) != shape or found[name].dtype != torch.float64 or not r:
                raise ValueError(f"{name} is {tuple(found[name].shape)} {found[name].dtype}, not {shape} float64")
        if not r <= len(energy) <= n:
            raise ValueError(f"energy has {len(energy)} entries for {r} columns of a site of width {n}")
        return cls(mark, singular, Basis(analysis, synthesis, energy, means, True, absolute, groups))

    @cached_property
    def digest(self) -> str:
        """Checksum of all tensors."""
        return checksum(self.tensors())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SiteBasis):
            return NotImplemented
        known, others = ((b.absolute, b.groups) for b in (self.basis, other.basis))
        return known == others and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _moved(basis: Basis, device: torch.device) -> Basis:
    analysis, synthesis = basis.analysis.to(device), basis.synthesis.to(device)
    return replace(
        basis, analysis=analysis, synthesis=synthesis, energy=basis.energy.to(device), means=basis.means.to(device)
    )
