"""Runs kernels that code new rows, in a process of its own: Triton decides at its import whether it interprets them.

python encode_runs.py values            with TRITON_INTERPRET=1: drawn cases against ``pack``; an assertion fails
python encode_runs.py build TARGET NAME.. compiles some for a device that is not there: bytes that they take
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorc_fx.kernels import encode
from lorc_fx.packing import BITS, MODEL, Format, Segment, unpack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """``segments``: (columns, bits). ``spare``: rows of ``out`` before and after what is written, and batch rows beside
    it; ``turned``: x is batch first in memory; ``on_mean``: every token lies on the second mean."""

    segments: tuple[tuple[int, int], ...]
    tokens: int = 1
    batch: int = 2
    depth: int = 40
    means: int = 1
    dtype: torch.dtype = F32
    shift: bool = False
    spread: bool = False
    spare: int = 0
    turned: bool = False
    on_mean: bool = False
    seed: int = 0


def inputs(case: Case, whole: bool) -> tuple[Any, ...]:
    """The arguments of ``encode.encode``. ``whole``: small whole numbers, whose sums are exact in any order."""
    make = torch.Generator().manual_seed(case.seed)
    form = Format(tuple(Segment(*s) for s in case.segments), case.means, case.dtype)
    exact = case.dtype if form.plain else F32
    width = form.columns + case.means - 1

    def draw(*sizes: int) -> torch.Tensor:
        if whole:
            return torch.randint(-4, 5, sizes, generator=make).float()
        return torch.randn(*sizes, generator=make)

    x = draw(case.batch, case.tokens, case.depth) if case.turned else draw(case.tokens, case.batch, case.depth)
    x = x.transpose(0, 1) if case.turned else x
    shift = draw(width).to(exact) if case.shift else None
    offsets = draw(case.means, form.columns).index_fill(0, torch.tensor([0]), 0.0) if case.means > 1 else None
    spread = None
    if case.spread:
        units = torch.randint(1, 4, (form.columns,), generator=make).float()
        spread = units if whole else draw(form.columns).abs() + 0.1
    matrix = draw(width, case.depth)
    if case.on_mean and offsets is not None:
        matrix[: form.columns] = 0
        matrix[form.columns :] = 0
        shift = torch.cat([offsets[1], torch.ones(case.means - 1) * torch.arange(case.means - 1, 0, -1)])
    return x.to(case.dtype), matrix.to(exact), shift, offsets, spread, form


def read(rows: torch.Tensor, form: Format) -> torch.Tensor:
    return (rows if form.plain else unpack(rows, form.spec, form.choices, form.dtype)).double()


def errors(rows: torch.Tensor, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, B] fp64: how far what is read back lies from the projection, and how long that is, both in the quantiser's
    units."""
    x, matrix, shift, offsets, spread, form = arguments
    codes = torch.nn.functional.linear(x.double(), matrix.double(), None if shift is None else shift.double())
    target = codes[..., : form.columns]
    if offsets is not None:
        target = target - offsets.double()[torch.nn.functional.pad(codes[..., form.columns :], (1, 0)).argmax(-1)]
    unit = 1.0 if spread is None else spread.double()
    away = (read(rows, form)[..., : form.columns] - target) * unit
    return away.norm(dim=-1), (target * unit).norm(dim=-1)


def check(case: Case, ties: bool = True) -> None:
    """Whole numbers: the same bytes, but (``ties``) where two scales are equally good. Any numbers: the same means, and
    what is read back is as near to the projection. No other rows are touched."""
    arguments = inputs(case, whole=True)
    form = arguments[-1]
    want = encode.reference(*arguments)
    out = torch.full((case.tokens + 2 * case.spare, case.batch + case.spare, form.width), 7, dtype=form.storage)
    view = out[:, : case.batch]
    encode.encode(*arguments, out=view, at=case.spare)
    got = view[case.spare : case.spare + case.tokens].clone()
    same = (got == want).all(-1)
    (found, _), (wanted, _) = errors(got, arguments), errors(want, arguments)
    assert bool((same | (ties & ((found - wanted).abs() <= 1e-5 * wanted))).all()), (case, found, wanted)
    view[case.spare : case.spare + case.tokens] = 7
    assert bool((out == 7).all()), case

    arguments = inputs(case, whole=False)
    want, got = encode.reference(*arguments), encode.encode(*arguments)
    assert torch.equal(read(got, form)[..., form.columns :], read(want, form)[..., form.columns :]), case
    (found, size), (wanted, _) = errors(got, arguments), errors(want, arguments)
    rounding = 8 * torch.finfo(case.dtype).eps * size + 1e-6
    assert bool((found <= wanted * (1 + 1e-3) + rounding).all()), (case, found, wanted)


EXAMPLES = (
    Case(((24, MODEL),), dtype=BF16),
    Case(((5, MODEL), (16, 8), (10, 6), (9, 5), (7, 4), (11, 3), (13, 2), (9, 1)), dtype=F16, spare=1),
    Case(((33, 4),), tokens=3, depth=600, means=4, shift=True, spread=True),
    Case(((64, 8),), tokens=3, turned=True),
    Case(((6, MODEL), (20, 2)), means=2, on_mean=True),
    Case(((20, 3),), means=3, on_mean=True, dtype=BF16),
)
"""Without ties."""


@st.composite
def cases(draw: Any) -> Case:
    dtype = draw(st.sampled_from((F32, BF16, F16)))
    bits = sorted(draw(st.lists(st.sampled_from(BITS), max_size=3, unique=True)), reverse=True)
    counts = [(draw(st.integers(1, 33)), b) for b in bits]
    if not counts or draw(st.booleans()):
        counts.insert(0, (draw(st.integers(1, 20)), MODEL))
    return Case(
        tuple(counts),
        tokens=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 3)),
        depth=draw(st.sampled_from((1, 7, 64, 70, 600))),
        means=draw(st.sampled_from((1, 1, 2, 3))),
        dtype=dtype,
        shift=draw(st.booleans()),
        spread=draw(st.booleans()),
        spare=draw(st.integers(0, 2)),
        turned=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(cases())
def drawn(case: Case) -> None:
    check(case)


BUILDS = {
    "plain": Case(((512, MODEL),), tokens=4, batch=16, depth=4096, dtype=BF16),
    "8 and 4 bits": Case(((128, 8), (384, 4)), batch=1, depth=4096, means=2, dtype=BF16, shift=True, spread=True),
    "all bits": Case(
        ((8, MODEL), (256, 8), (100, 6), (90, 5), (70, 4), (110, 3), (130, 2), (90, 1)), depth=4096, means=3, dtype=F16
    ),
}


def build(target: str, names: list[str]) -> dict[str, dict[str, int]]:
    from triton.backends.compiler import GPUTarget

    from bench.kernel_runs import TARGETS
    from lorc_fx.kernels import ahead

    found = {}
    for name in names:
        made = ahead.build_encode(*inputs(BUILDS[name], whole=False), GPUTarget(*TARGETS[target]))
        found[name] = {"shared": made.shared, "bytes": len(made.binary)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "values":
        for each in EXAMPLES:
            check(each, ties=False)
        drawn()
        print(json.dumps({"right": True}))
    else:
        print(json.dumps(build(sys.argv[2], sys.argv[3:])))
