"""Runs generated kernels in a process of its own: Triton decides at its import whether it interprets kernels, and on a
GPU one bad access ends all that the process does there.

    python -m bench.kernel_runs values DEVICE NAME..       error of each case (of its own dtype, or of NAME@bfloat16)
    python -m bench.kernel_runs build TARGET NAME..        compiles each for a device that is not there: its size
    python -m bench.kernel_runs warm DEVICE WAY:I:BATCH..  compiles configs of bench.gpu_cases, for Triton's own cache

``values cpu`` is meant for TRITON_INTERPRET=1. Prints one JSON object per line: name -> what was found.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch

from bench.attention_cases import BF16, F16, F32, Case, build, moved
from lorc_fx.errors import KernelWarning

TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a block can have."""
TOLERANCE = {F32: 1e-5, BF16: 2e-2, F16: 4e-3}

MIXED = ((64, 8), (64, 4))
SWAPPED = (*range(64, 128), *range(64))
VALUES = {
    "one token": Case(tokens=1),
    "seven tokens, four queries": Case(tokens=7, queries=4, heads=4, scores="bool"),
    "several blocks": Case(tokens=200, heads=7),
    "no batch": Case(batch=1, heads=4, tokens=200),
    "grouped heads": Case(heads=8, cached=2, queries=4, mean=True),
    "seven to one, queries": Case(heads=14, cached=2, queries=4, tokens=200, scores="bool"),
    "bf16": Case(dtype=BF16, heads=4),
    "fp16": Case(dtype=F16, heads=4, mean=True),
    "8 bits": Case(keys=((32, 8),), values=((40, 8),)),
    "8 and 4 bits": Case(keys=MIXED, values=MIXED, tokens=200, heads=7),
    "3 bits": Case(keys=((24, 3),), values=((33, 3),)),
    "2 bits": Case(keys=((64, 2),), values=((50, 2),)),
    "exact columns and all bits": Case(
        keys=((8, 0), (16, 8), (10, 6), (9, 5)), values=((8, 0), (7, 4), (30, 3), (9, 1))
    ),
    "two means": Case(keys=((24, 0), (32, 8)), values=((30, 6), (20, 2)), means=2, mean=True),
    "three plain means": Case(keys=((24, 0),), values=((20, 0),), means=3, mean=True),
    "four means": Case(keys=((24, 4),), values=((20, 2),), means=4, mean=True, rotary="half"),
    "heads of their own columns": Case(
        heads=8, cached=4, groups=4, keys=((32, 8), (16, 4)), values=((8, 0), (32, 5)), means=2, mean=True
    ),
    "rotary, heads of their own columns": Case(
        heads=4, cached=2, groups=2, rotary="half", keys=((16, 0), (32, 8)), values=((16, 3),), dtype=BF16
    ),
    "no projection": Case(matrix=False, keys=((64, 0),), values=((64, 0),)),
    "no projection, 4 bits": Case(matrix=False, keys=((128, 4),), values=((128, 8),), cached=2, mean=True),
    "no projection, mixed": Case(matrix=False, keys=MIXED, values=((128, 3),), cached=2, rotary="half", mean=True),
    "heads swapped": Case(matrix=False, keys=((128, 0),), values=((128, 0),), cached=2, columns=SWAPPED),
    "heads swapped, projected": Case(cached=2, columns=SWAPPED, rotary="half", mean=True),
    "rotary": Case(rotary="half", tokens=7),
    "rotary, 80": Case(rotary="half", cached=2, heads=8, queries=4, dim=80, mean=True),
    "rotary, bf16": Case(
        rotary="half", dim=128, cached=2, heads=8, keys=MIXED, values=MIXED, dtype=BF16, scores="bool"
    ),
    "rotary, mixed": Case(rotary="half", tokens=200, keys=MIXED, values=MIXED, means=2, mean=True),
    "interleaved, 96": Case(rotary="interleaved", cached=2, dim=96),
    "complex pairs": Case(rotary="complex", cached=2),
    "partial": Case(rotary="partial", cached=2, heads=4),
    "table by position": Case(rotary="table", cached=2),
    "angles kept": Case(rotary="kept", cached=2),
    "frequencies of the graph": Case(rotary="own", cached=2),
    "key norm": Case(rotary="half", norm="rms", cached=2, keys=((64, 8), (40, 4)), means=2, mean=True),
    "key norm, 256": Case(dim=256, keys=((128, 8), (100, 4)), values=((200, 4),), rotary="half", norm="rms"),
    "layer norm, interleaved": Case(rotary="interleaved", norm="layer", cached=2),
    "unit keys": Case(norm="l2", cached=2, dim=80),
    "usual eps, bf16": Case(norm="small rms", dtype=BF16, cached=2),
    "flags": Case(norm="flags", cached=2),
    "constants, bf16": Case(norm="constants", dtype=BF16, cached=2),
    "value norm": Case(decoded_values=True, cached=2, scores="bool"),
    "mask": Case(scores="bool", cached=2, heads=4),
    "nothing seen": Case(scores="hidden", queries=4),
    "nothing seen, NaN": Case(scores="hidden", blind=False),
    "free end": Case(scores="free", tokens=200, queries=4),
    "free end, bias": Case(scores="free bias", tokens=200, heads=4, rotary="half"),
    "bias": Case(scores="add", queries=4, tokens=200),
    "bias per head": Case(scores="alibi", heads=4),
    "number per head": Case(scores="head", heads=4),
    "soft cap": Case(scores="cap", cached=2, heads=4),
    "sink": Case(sink=True, mean=True, cached=2, heads=4),
    "sink, soft cap": Case(sink=True, scores="cap", queries=4, rotary="half"),
}
"""What is run by the interpreter."""

BUILDS = {
    "latents": Case(dtype=BF16, dim=128, heads=32, cached=8, keys=((512, 0),), values=((512, 0),)),
    "mixed bits": Case(dtype=BF16, dim=128, heads=32, cached=8, keys=((128, 8), (256, 4)), values=MIXED, means=2),
    "rotary": Case(
        dtype=BF16, dim=128, heads=32, cached=8, keys=((128, 8), (256, 4)), values=MIXED, rotary="half", scores="bool"
    ),
    "3 bits, key norm": Case(
        dtype=F16,
        dim=256,
        heads=4,
        keys=((128, 3),),
        values=((128, 2),),
        rotary="half",
        norm="rms",
        scores="cap",
        sink=True,
    ),
    "fp32, partial": Case(dim=80, heads=8, cached=8, keys=((320, 0),), values=((320, 0),), rotary="partial", queries=4),
    "heads of their own columns": Case(
        heads=8, cached=4, groups=4, keys=((32, 8), (16, 4)), values=((8, 0), (32, 5)), means=2, mean=True
    ),
    "rotary, heads of their own columns": Case(
        heads=4, cached=2, groups=2, rotary="half", keys=((16, 0), (32, 8)), values=((16, 3),), dtype=BF16
    ),
    "no projection": Case(
        dtype=BF16,
        dim=128,
        heads=8,
        cached=8,
        matrix=False,
        keys=((1024, 4),),
        values=((1024, 8),),
        rotary="interleaved",
    ),
}
"""What is compiled; few tokens, sizes as in models."""


def case_of(name: str) -> Case:
    """A case by its name, or by name@dtype in another dtype than its own."""
    plain, _, dtype = name.partition("@")
    return replace(VALUES[plain], dtype=getattr(torch, dtype)) if dtype else VALUES[plain]


def difference(case: Case, device: torch.device) -> dict[str, Any]:
    """The largest error of a case against fp64 on the CPU, relative to the largest value, whether it is ``right``, and
    the warnings (a kernel that does not compile is one)."""
    from lorc_fx.kernels import launch, reference

    given = build(case)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = launch.attend(*moved(given, device)).cpu()
    want = reference.attend(*given)
    same = torch.equal(got.isnan(), want.isnan())
    error = (got.double() - want).nan_to_num(0.0).abs().max() / want.nan_to_num(0.0).abs().max()
    ours = [str(w.message) for w in said if issubclass(w.category, KernelWarning)]
    right = same and not ours and float(error) < TOLERANCE[case.dtype]
    return {"error": float(error) if same else None, "said": ours, "right": right}


def built(case: Case, target: str) -> dict[str, Any]:
    """Bytes of shared memory and of the binary of a case's kernel for a target."""
    from triton.backends.compiler import GPUTarget

    from lorc_fx.kernels import ahead, launch

    given = build(case)
    config = launch.default(given[0], launch.given_of(*given))
    found = ahead.build(*given, config, GPUTarget(*TARGETS[target]))
    return {"shared": found.shared, "bytes": len(found.binary)}


def run(what: str, where: str, name: str) -> dict[str, Any]:
    """One job; what goes wrong is said in its place."""
    if what == "values":
        return difference(case_of(name), torch.device(where))
    if what == "warm":
        from bench import gpu_cases

        return gpu_cases.warm(name, torch.device(where))
    return built(BUILDS[name], where)


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    what, where, *names = argv
    for name in names:
        try:
            found = run(what, where, name)
        except Exception as error:
            if what == "build":
                raise
            found = {"failed": f"{type(error).__name__}: {error}"[:400], "right": False}
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
