"""Columns in groups of heads (basis ``"grouped"``): each group of ``group_size`` cached heads has a basis of its own,
as in Palu's group-head decomposition (arXiv 2407.21118), so that a head is read from its group's columns alone.

    joint      every column may hold something of every head      a query meets all k columns
    grouped    column c is of one group of heads                  a query meets k / G columns

A basis has its columns *by place*: the first column of every group, then the second ones (column i G + g is the i-th of
group g), so that bits fall along it for all groups alike. A row has the columns of each segment *by group* (all of the
first group's, then the second's), so that a group's are beside one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .errors import BadOption

if TYPE_CHECKING:
    from .codec import Basis
    from .packing import Segment


def head_groups(weight: torch.Tensor, head: int, size: int, name: str) -> int:
    """Groups of ``size`` heads of ``head`` rows each in the effective ``weight`` [n, d] of a site; heads that are there
    several times over (a model that repeats them before it caches them) count once. 1 where it has no more heads than
    that, or its layout does not tell heads apart (``head`` 1). Raises BadOption where heads do not fill groups."""
    heads = len(weight) // head if head > 1 else 1
    each = repeats(weight.unflatten(0, (heads, -1)))
    heads //= each
    if heads <= size:
        return 1
    if heads % size:
        raise BadOption("group_size", size, f"a divisor of the {heads} cached heads of {name}", 1)
    return heads // size


def repeats(heads: torch.Tensor) -> int:
    """How many times over each head of [H, D, d] is there, one after the other."""
    count = len(heads)
    for each in sorted((n for n in range(2, count + 1) if count % n == 0), reverse=True):
        runs = heads.unflatten(0, (-1, each))
        if torch.equal(runs, runs[:, :1].expand_as(runs)):
            return each
    return 1


def on_diagonal(blocks: torch.Tensor, groups: int) -> torch.Tensor:
    """The ``groups`` blocks on the diagonal [groups, n / groups, n / groups] of a matrix [n, n], or of one that is
    known by the blocks on its diagonal [g, n / g, n / g] (zero outside of them)."""
    blocks = blocks.unsqueeze(0) if blocks.dim() == 2 else blocks
    if groups % len(blocks):
        blocks = torch.block_diag(*blocks).unsqueeze(0)
    each = groups // len(blocks)
    parts = blocks.unflatten(1, (each, -1)).unflatten(3, (each, -1)).diagonal(dim1=1, dim2=3)
    return parts.movedim(-1, 1).flatten(0, 1)


def by_place(energy: torch.Tensor) -> torch.Tensor:
    """Energies [groups, c] of each group's columns, rising -> which of the groups * c columns, one group after the
    other, comes at each place of a basis, [groups * c]."""
    groups, count = energy.shape
    return torch.arange(groups * count, device=energy.device).view(groups, count).flip(1).T.flatten()


def own_bases(gram: torch.Tensor, groups: int, vectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRC's basis of each group: of W W^T [n, n] the left singular vectors of each group's rows of W as one matrix
    [n, n] (without ``vectors`` [n, 0]), and their squared singular values [n]; columns by place."""
    blocks = on_diagonal(gram, groups)
    if vectors:
        energy, u = torch.linalg.eigh(blocks)
        order = by_place(energy)
        left = torch.block_diag(*u)[:, order]
    else:
        energy = torch.linalg.eigvalsh(blocks)
        order, left = by_place(energy), gram.new_empty((len(gram), 0))
    return left, energy.flatten()[order].clamp_min(0)


def in_rows(basis: Basis, segments: Sequence[Segment]) -> Basis:
    """``basis`` with the columns that ``segments`` store in the order of a row: segment by segment, group by group."""
    if basis.groups == 1:
        return basis
    order, at = [], 0
    for columns, _ in segments:
        order.append(torch.arange(at, at + columns).view(-1, basis.groups).T.flatten())
        at += columns
    rows = torch.cat(order).to(basis.energy.device)
    energy = torch.cat([basis.energy[rows], basis.energy[at:]])
    return replace(basis, analysis=basis.analysis[:, rows], synthesis=basis.synthesis[rows], energy=energy)


def compact(synthesis: torch.Tensor, segments: Sequence[tuple[int, int]], groups: int) -> torch.Tensor:
    """S [r, n] of columns in the order of a row -> [r / groups, n]: what each feature has of its own group's columns.
    The rest of S is zero."""
    own = split(synthesis.T, segments, groups).unflatten(0, (groups, -1))  # [G, n / G, G, r / G]
    return own.diagonal(dim1=0, dim2=2).permute(1, 2, 0).flatten(1, 2)


def expanded(compacted: torch.Tensor, segments: Sequence[tuple[int, int]], groups: int) -> torch.Tensor:
    """The inverse of ``compact``: S [r, n]. Rows behind those of the columns (of further means) stay what they are."""
    if groups == 1:
        return compacted
    n, at, parts = compacted.shape[1], 0, []
    own = torch.eye(groups, dtype=compacted.dtype, device=compacted.device).repeat_interleave(n // groups, 1)  # [G, n]
    for count, _ in segments:
        parts.append((own[:, None] * compacted[at : at + count // groups]).flatten(0, 1))
        at += count // groups
    return torch.cat([*parts, compacted[at:]])


def split(columns: torch.Tensor, segments: Sequence[tuple[int, int]], groups: int) -> torch.Tensor:
    """What columns have, [.., r] in the order of a row -> [.., groups, r / groups]."""
    if groups == 1:
        return columns.unsqueeze(-2)
    parts, at = [], 0
    for count, _ in segments:
        parts.append(columns[..., at : at + count].unflatten(-1, (groups, -1)))
        at += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def joined(own: torch.Tensor, segments: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The inverse of ``split``: [.., groups, r / groups] -> [.., r]."""
    groups, at, parts = own.shape[-2], 0, []
    for count, _ in segments:
        parts.append(own[..., at : at + count // groups].flatten(-2))
        at += count // groups
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def projected(
    y: torch.Tensor,
    matrix: torch.Tensor,
    shift: torch.Tensor | None,
    segments: Sequence[tuple[int, int]],
    groups: int,
) -> torch.Tensor:
    """y [.., n] times what ``compact`` has of P^T, and further rows behind it -> [.., k], in the matrix's dtype. A
    matrix [k / G, n / G] is one for all groups, whose columns come group by group."""
    y = y.to(matrix.dtype)
    if matrix.shape[1] < y.shape[-1]:
        latent = (y.unflatten(-1, (groups, -1)) @ matrix.T).flatten(-2)
        return latent if shift is None else latent + shift
    if groups == 1:
        return F.linear(y, matrix, shift)
    each = sum(count for count, _ in segments) // groups
    blocks = matrix[:each].unflatten(1, (groups, -1)).transpose(0, 1)  # [G, r / G, n / G]
    flat = y.flatten(0, -2).unflatten(-1, (groups, -1)).transpose(0, 1)  # [G, tokens, n / G]
    own = torch.bmm(flat, blocks.transpose(1, 2)).transpose(0, 1).unflatten(0, y.shape[:-1])
    latent = joined(own, segments)
    latent = latent if len(matrix) == each else torch.cat([latent, F.linear(y, matrix[each:])], -1)
    return latent if shift is None else latent + shift
