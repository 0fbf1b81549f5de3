"""What is known of a value of the compressed model: the dense model's, and how far from it it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorc_fx.bounds.roundoff import SLACK


@dataclass(frozen=True)
class Tag:
    """How a value follows from an earlier one, where that gives a better bound than op by op: ``of`` the earlier
    value, ``kind`` (see ``tags.py``), ``run`` what computes it from that one's tensor, ``key`` equal for equal
    computations. Of means of squares: ``number``, the eps added, and ``lost``, the share that a machine may have
    rounded."""

    kind: str
    of: Known
    run: Callable[[torch.Tensor], torch.Tensor] | None = None
    key: tuple[Any, ...] = ()
    number: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True, eq=False)
class Known:
    """``value``: the dense model's, in fp64 where it is floating. For every value v' that the compressed model can
    have there: |v' - value| <= ``each`` entry by entry (None: it is equal), and the norm of v' - value along
    ``axis`` is at most ``norm`` (size 1 there; None: whatever ``each`` gives). ``varied`` (None: no such): entries
    along the last axis are weights that sum to one in both models, with a total variation of at most this, [..,
    1]."""

    value: torch.Tensor
    each: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    axis: int = -1
    varied: torch.Tensor | None = None
    tags: tuple[Tag, ...] = field(default=(), repr=False)

    @property
    def exact(self) -> bool:
        return self.each is None

    def along(self, axis: int) -> torch.Tensor:
        """The bound of the norm along ``axis`` (negative), keepdim. Zeros where the value is exact."""
        if self.each is None:
            return torch.zeros_like(self.value.select(axis, 0).unsqueeze(axis), dtype=torch.float64)
        if self.norm is not None and self.axis == axis:
            return self.norm
        return self.each.norm(dim=axis, keepdim=True)

    def tag(self, kind: str) -> Tag | None:
        return next((t for t in self.tags if t.kind == kind), None)

    def tagged(self, *tags: Tag) -> Known:
        return replace(self, tags=(*self.tags, *tags))


def known(
    value: torch.Tensor, each: torch.Tensor, norm: torch.Tensor | None = None, axis: int = -1, **more: Any
) -> Known:
    """A value with the better of both bounds in each. What is not a number is no bound: inf."""
    each = torch.nan_to_num(each * (1 + SLACK), nan=torch.inf, posinf=torch.inf)
    if each.shape != value.shape:
        each = each.expand(value.shape)
    if value.dim() == 0:
        return Known(value, each, None, axis, **more)
    whole = each.norm(dim=axis, keepdim=True)
    if norm is None:
        return Known(value, each, whole, axis, **more)
    norm = torch.nan_to_num(norm * (1 + SLACK), nan=torch.inf, posinf=torch.inf).expand(whole.shape)
    norm = torch.minimum(norm, whole)
    return Known(value, torch.minimum(each, norm), norm, axis, **more)


def summed(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that are there."""
    total: torch.Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


ULPS = 8
"""Units in the last place that libraries' exp, tanh, erf and the like may be off (documented errors are 1 to 4)."""


def size(x: Any) -> torch.Tensor:
    """|x| at most, in both models."""
    if not isinstance(x, Known):
        return torch.as_tensor(x, dtype=torch.float64).abs()
    return x.value.abs() if x.each is None else x.value.abs() + x.each
