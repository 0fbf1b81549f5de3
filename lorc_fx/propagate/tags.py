"""What follows from an earlier value by several ops, and is bounded better as one: norms spelled out (x *
rsqrt(mean(x^2) + eps)), activations spelled out (0.5 x (1 + tanh(..))), and linear maps of a token's features
(rotary embedding).

Tags ride on ``Known`` values; each op passes them on, or ends them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorc_fx import bounds
from lorc_fx.bounds.pointwise import ACTIVATIONS, Activation

from .known import Known, Tag, known

FUNCTION, LINEAR = "function", "linear"
SQUARE, MEAN_SQUARE, RMS, INVERSE_RMS = "square", "mean of squares", "rms", "1 / rms"

MOST = 6
"""Earlier values that a linear map is followed from: those nearest to the projection."""

WIDEST = 512
"""Features of a linear map of one token that is looked at as a matrix."""

_FAR = torch.logspace(1, 6, 200, dtype=torch.float64)
_GRID = torch.cat([-_FAR, torch.linspace(-12, 12, 2401, dtype=torch.float64), _FAR])
_FOUND: dict[tuple[Any, ...], Activation | None] = {}
_GAINS: dict[tuple[Any, ...], tuple[list[Any], torch.Tensor]] = {}


def function_of(x: Known, run: Callable[[torch.Tensor], torch.Tensor], key: tuple[Any, ...]) -> Tag:
    """A tag for an entry-wise ``run`` of x (itself such a function of another, or not)."""
    before = x.tag(FUNCTION)
    if before is None:
        return Tag(FUNCTION, x, run, (key,))
    inner = before.run
    assert inner is not None
    return Tag(FUNCTION, before.of, lambda t: run(inner(t)), (*before.key, key))


def combined(a: Known, b: Known, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str) -> Tag | None:
    """A tag for ``run`` of two functions of one value (or of a value and a function of it)."""
    left, right = a.tag(FUNCTION), b.tag(FUNCTION)
    root = left.of if left is not None else right.of if right is not None else None
    if root is None:
        return None
    sides = []
    for x, tag in ((a, left), (b, right)):
        if tag is not None and tag.of is root:
            sides.append((tag.run, tag.key))
        elif x is root:
            sides.append((lambda t: t, ("itself",)))
        else:
            return None
    (f, key_f), (g, key_g) = sides
    assert f is not None and g is not None
    return Tag(FUNCTION, root, lambda t: run(f(t), g(t)), (name, key_f, key_g))


def named(tag: Tag) -> Activation | None:
    """The known activation that a function is, by its values on a grid (to 1e-9) and far out."""
    if tag.key not in _FOUND:
        assert tag.run is not None
        made = tag.run(_GRID)
        same = (a for a in ACTIVATIONS.values() if torch.allclose(a.function(_GRID), made, rtol=1e-9, atol=1e-9))
        _FOUND[tag.key] = next(same, None)
    return _FOUND[tag.key]


def linear_of(x: Known, run: Callable[[torch.Tensor], torch.Tensor], key: tuple[Any, ...]) -> tuple[Tag, ...]:
    """Tags for a ``run`` that is linear in x, without a constant: of x, and of all that x is a linear map of."""
    before = [t for t in x.tags if t.kind == LINEAR]
    found = [Tag(LINEAR, t.of, _chained(t.run, run), (t.key, key)) for t in before]
    return tuple([*found, Tag(LINEAR, x, run, key)][:MOST])


def _chained(
    first: Callable[[torch.Tensor], torch.Tensor] | None, then: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    assert first is not None
    return lambda t: then(first(t))


def added(
    parts: list[Known], run: Callable[[list[torch.Tensor]], torch.Tensor], key: tuple[Any, ...]
) -> tuple[Tag, ...]:
    """Tags for a linear ``run`` of several linear maps of one value: one for each such value."""
    found = []
    for root in dict.fromkeys(t.of for t in parts[0].tags if t.kind == LINEAR) | {parts[0]: None}:
        sides = [_side(part, root) for part in parts]
        if all(side is not None for side in sides):
            runs, keys = zip(*(side for side in sides if side is not None), strict=True)
            found.append(Tag(LINEAR, root, _together(run, runs), (key, *keys)))
    return tuple(found[:MOST])


def _together(run: Callable[[list[torch.Tensor]], torch.Tensor], sides: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: run([side(t) for side in sides])


def _side(part: Known, root: Known) -> tuple[Any, Any] | None:
    """How ``part`` comes from ``root``, and the key of that."""
    if part is root:
        return (lambda t: t), ("itself",)
    tag = next((t for t in part.tags if t.kind == LINEAR and t.of is root), None)
    return None if tag is None else (tag.run, tag.key)


def as_matrices(made: Known) -> Known:
    """``made`` with the norm that its linear map, as a matrix per token, gives it."""
    if made.value.is_complex() or not made.value.dim() or made.value.shape[-1] > WIDEST:
        return made
    for tag in made.tags:
        if tag.kind == LINEAR and tag.of.value.shape == made.value.shape and tag.of.norm is not None:
            if tag.of.axis != -1 or tag.of.value.is_complex():
                continue
            assert made.each is not None
            return known(made.value, made.each, _gain(tag, made.value.shape[-1]) * tag.of.norm, tags=made.tags)
    return made


def _gain(tag: Tag, width: int) -> torch.Tensor:
    """|M|_2 of the map of each token, [.., 1]. Heads share it where the map does not tell them apart."""
    shape = tag.of.value.shape
    held, key = _identity(tag.key), (_names(tag.key), tuple(shape))
    if key in _GAINS:
        return _GAINS[key][1]
    assert tag.run is not None
    heads = _one_head(tag, shape)
    columns = []
    for j in range(width):
        unit = torch.zeros(heads, dtype=torch.float64)
        unit[..., j] = 1.0
        columns.append(tag.run(unit))
    matrices = torch.stack(columns, -1)
    probe = _probe(heads)
    alike = tag.run(probe)
    # That each token's features come of its own alone: a move of tokens may give the same sizes.
    own = alike.shape == probe.shape and torch.allclose((matrices @ probe[..., None])[..., 0], alike, atol=1e-9)
    made = bounds.isometry(matrices)[..., None] if own else torch.tensor(torch.inf, dtype=torch.float64)
    if len(_GAINS) > 64:
        _GAINS.clear()
    _GAINS[key] = (held, made)
    return made


def _probe(sizes: list[int]) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _one_head(tag: Tag, shape: torch.Size) -> list[int]:
    """Sizes to run the map on: one head of all where that works and gives what all of them would."""
    assert tag.run is not None
    sizes = list(shape)
    if len(sizes) != 4:
        return sizes
    probe = _probe(sizes)
    for axis in (1, 2):
        small = [1 if i == axis else n for i, n in enumerate(sizes)]
        if sizes[axis] == 1:
            continue
        first = probe.narrow(axis, 0, 1)
        try:
            alone, whole = tag.run(first), tag.run(first.expand(sizes))
        except (RuntimeError, IndexError):
            continue
        if alone.shape == first.shape and bool((whole == alone).all()):
            return small
    return sizes


def _names(key: Any) -> Any:
    """A key that compares by the identity of tensors in it."""
    if isinstance(key, tuple):
        return tuple(_names(k) for k in key)
    return ("tensor", id(key)) if isinstance(key, torch.Tensor) else key


def _identity(key: Any) -> list[Any]:
    """The tensors of a key: held, so that their ids stay theirs."""
    if isinstance(key, tuple):
        return [t for k in key for t in _identity(k)]
    return [key] if isinstance(key, torch.Tensor) else []
