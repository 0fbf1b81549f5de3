"""Bases by name: in which columns a site is coded. ``BUILT_IN`` are there, library authors add theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from .errors import AlreadyRegistered, BadBasis, BadOption

if TYPE_CHECKING:
    from .calibration import SiteStatistics
    from .codec import Basis

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class BasisMaker(Protocol):
    """Decides in which columns one site is coded.

    ``weight`` [n, d] fp64 is the effective weight of the site, y = W x; ``statistics`` (None where the codec knows no
    data) hold the sums over tokens of y and y y^T (``lorc_fx.calibration.SiteStatistics``).

    The result is analysis P [n, k], synthesis S [k, n] and energy [k] >= 0, falling, with k <= n: a token's column j is
    P[:, j] . (y - mean), y comes back as columns @ S + mean, and energy is the mean square that column j is expected to
    hold, from which bits are given. For an orthonormal basis S is P^T.
    """

    def __call__(self, weight: torch.Tensor, statistics: SiteStatistics | None) -> Columns: ...


M = TypeVar("M", bound=Callable[..., Columns])

GROUPED = "grouped"
BUILT_IN = ("joint", "auto", GROUPED, "identity")
_REGISTRY: dict[str, BasisMaker] = {}


def register_basis(name: str) -> Callable[[M], M]:
    """Decorator: make a basis known as ``options={"basis": name}``.

    Raises BadOption for a name that is no string or empty, AlreadyRegistered where the name is in use.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadOption("name", name, "a non-empty string")

    def register(function: M) -> M:
        if name in BUILT_IN or name in _REGISTRY:
            raise AlreadyRegistered("basis", name, "lorc_fx" if name in BUILT_IN else repr(_REGISTRY[name]))
        if not callable(function):
            raise BadOption(f"basis {name!r}", function, "a function (weight, statistics) -> (P, S, energy)")
        _REGISTRY[name] = function
        return function

    return register


def registered_bases() -> tuple[str, ...]:
    """The names that were registered, sorted."""
    return tuple(sorted(_REGISTRY))


def in_columns_of(name: str, basis: Basis, weight: torch.Tensor, statistics: SiteStatistics | None, site: str) -> Basis:
    """``basis`` with its columns by the registered ``name``, around the same means. Raises BadBasis where what comes
    back is no basis, and what the function itself raises."""
    n = weight.shape[0]
    made = _REGISTRY[name](weight.detach().double(), statistics)
    if not isinstance(made, tuple) or len(made) != 3 or not all(isinstance(t, torch.Tensor) for t in made):
        raise BadBasis(name, site, f"{type(made).__name__} instead of three tensors")
    analysis, synthesis, energy = (t.to(weight.device, torch.float64) for t in made)
    k = energy.numel()
    if energy.dim() != 1 or analysis.shape != (n, k) or synthesis.shape != (k, n) or not 1 <= k <= n:
        shapes = ", ".join(str(list(t.shape)) for t in made)
        raise BadBasis(name, site, f"shapes {shapes} for a site of width {n}")
    if not all(bool(torch.isfinite(t).all()) for t in (analysis, synthesis, energy)):
        raise BadBasis(name, site, "values that are not finite")
    if bool((energy < 0).any()) or bool((energy.diff() > 0).any()):
        raise BadBasis(name, site, "energies that are negative or do not fall")
    return replace(basis, analysis=analysis, synthesis=synthesis, energy=energy, absolute=False)
