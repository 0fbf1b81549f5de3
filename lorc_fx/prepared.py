"""One site between its weight and its codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codec import Basis, Codec, around_bias, grouped_prior, make_codec, prior_basis
from .decoder import Decoder
from .factors import Factors, factorise, gram
from .packing import MODEL
from .plan_data import kept
from .records import PlannedSite


@dataclass(frozen=True)
class Prepared:
    """What is known of a site before it gets its bytes: its effective ``weight`` [n, d] and ``bias`` [n], singular
    values, and the basis. LoRC's own basis has energies only: its columns are made with the codec, for one site at a
    time."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    factors: Factors
    basis: Basis

    def basis_for(self, planned: PlannedSite) -> Basis:
        """What the codec is made of: around the bias alone where the plan gives the site one mean."""
        return self.basis if planned.choices == len(self.basis.means) else around_bias(self.basis, self.bias)

    def codec(
        self,
        planned: PlannedSite,
        decoder: Decoder,
        consts: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        from_y: bool = False,
    ) -> Codec:
        """The codec as planned. ``from_y``: it may encode what the projection gives (``make_codec``)."""
        basis = self.basis_for(planned)
        exact = planned.rank == len(self.weight) and all(s.bits == MODEL for s in planned.segments)
        if not basis.analysis.numel() and not exact:  # a codec that loses nothing is the weight itself
            basis = self._prior()
        basis = kept(basis, planned.rank)
        return make_codec(self.weight, self.bias, basis, planned.segments, decoder, consts, dtype, from_y)

    def _prior(self) -> Basis:
        groups = self.basis.groups
        if groups > 1:
            return grouped_prior(gram(self.weight, self.name), self.bias, groups)
        return prior_basis(factorise(self.weight, self.name), self.bias)

    def kept(self, planned: PlannedSite) -> float:
        """Share of the site's energy in the stored columns (1.0 for an all-zero weight)."""
        total = float(self.basis.energy.sum())
        return float(self.basis.energy[: planned.rank].sum()) / total if total else 1.0
