"""Ops that only move entries about: the op itself on ``each``, and on norms where their axis stays whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .known import Known, known

Op = Callable[[torch.Tensor], Any]


def moved(x: Known, op: Op, value: Any, view: bool) -> Any:
    """``op`` (a move of entries, of one tensor) of x: Known, or a tuple of them for ops with several results.
    ``view``: entries stay in their order."""
    assert x.each is not None
    if isinstance(value, (tuple, list)):
        return tuple(
            known(v, e, x.norm if _features_of(x, v) else None) for v, e in zip(value, op(x.each), strict=True)
        )
    return known(value, op(x.each), *_norm(x, op, value, view))


def _features_of(x: Known, part: torch.Tensor) -> bool:
    """Whether a piece of x has some features of each of its tokens."""
    return x.norm is not None and x.axis == -1 and part.shape[:-1] == x.value.shape[:-1]


def _norm(x: Known, op: Op, value: torch.Tensor, view: bool) -> tuple[torch.Tensor | None, int]:
    if x.norm is None or not value.dim():
        return None, -1
    axis = _followed(x, op, value)
    if axis is not None:
        return op(x.norm), axis
    return (_kept(x, value, x.norm), -1) if view and x.axis == -1 else (None, -1)


def _followed(x: Known, op: Op, value: torch.Tensor) -> int | None:
    """Where the axis goes, for moves that take sizes from their input: tried on a tensor that holds, at each
    entry, its index along the axis. None for ops that name sizes (views), and where it is no axis any more, or one
    that does not have each entry once."""
    assert x.norm is not None
    n = x.value.shape[x.axis]
    shape = [1] * x.value.dim()
    shape[x.axis] = n
    index = torch.arange(n, dtype=torch.float64).reshape(shape).expand(x.value.shape)
    try:
        small, marks = op(x.norm), op(index)
    except (RuntimeError, IndexError):
        return None
    if not isinstance(small, torch.Tensor) or small.dim() != value.dim():
        return None
    for axis in range(-1, -value.dim() - 1, -1):
        whole = value.shape[axis] == n and small.shape[axis] == 1
        others = all(small.shape[i] == value.shape[i] for i in range(value.dim()) if i - value.dim() != axis)
        if whole and others and bool((marks.sort(dim=axis).values == _ramp(marks, axis)).all()):
            return axis
    return None


def _ramp(like: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * like.dim()
    shape[axis] = like.shape[axis]
    return torch.arange(like.shape[axis], dtype=like.dtype).reshape(shape)


def _kept(x: Known, value: torch.Tensor, norm: torch.Tensor) -> torch.Tensor | None:
    """Norms along the last axis after a view that splits it, or joins it with those before it."""
    if not value.numel() or not x.value.dim():
        return None
    old, new = x.value.shape[-1], value.shape[-1]
    if not old % new:
        return norm.expand(x.value.shape).reshape(value.shape)[..., :1]
    if not new % old:
        return norm.reshape(-1, new // old).square().sum(-1).sqrt().reshape(*value.shape[:-1], 1)
    return None


def joined(parts: Sequence[Known], dim: int, value: torch.Tensor) -> Known:
    """cat."""
    parts = [p for p in parts if p.value.dim() == value.dim()]  # an empty [0] goes with anything
    zeros = [torch.zeros_like(p.value, dtype=torch.float64) if p.each is None else p.each for p in parts]
    dim = dim if dim < 0 else dim - value.dim()
    norms = [p.along(-1) for p in parts]
    norm = torch.cat(norms, -1).norm(dim=-1, keepdim=True) if dim == -1 else torch.cat(norms, dim)
    return known(value, torch.cat(zeros, dim), norm)
