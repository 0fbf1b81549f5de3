"""How long the planner takes on the shape of a 70B model: 80 layers of keys and values, 1024 wide, random spectra.

    python -m bench.planner [--out bench/results/planner.json]

Measured is what comes after the factorisation, the scheduler and the bits (``schedulers``, ``allocate``), and for scale
the factorisation of one of the 160 weights, 1024 x 8192.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.run import RESULTS, machine
from lorc_fx.allocate import BLOCK, DROPPED, Columns, allocate
from lorc_fx.console import write_json
from lorc_fx.factors import factorise
from lorc_fx.options import Options
from lorc_fx.packing import BITS, MODEL
from lorc_fx.records import SiteSpec
from lorc_fx.schedulers import schedule

LAYERS, WIDTH, HIDDEN, ELEMENT, REPEATS = 80, 1024, 8192, 2, 5
RATIO = 0.25
#: precision -> levels, columns that climb together
PRECISIONS = {"auto": ((MODEL, *BITS, DROPPED), BLOCK), "model": ((MODEL, DROPPED), 1)}


def sites(precision: str) -> tuple[list[Columns], list[SiteSpec]]:
    """Spectra that fall exponentially, each at its own random rate, with noise; condition numbers to match."""
    generator = torch.Generator().manual_seed(0)
    levels, block = PRECISIONS[precision]
    columns, specs = [], []
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            rate, noise = torch.rand(2, generator=generator), torch.rand(WIDTH, generator=generator)
            energy = torch.exp(-0.01 * float(rate[0]) * torch.arange(WIDTH)).double() * (0.5 + noise)
            energy = energy.sort(descending=True).values / energy.sum()
            spectrum = energy.sqrt()
            columns.append(Columns(tuple(energy.tolist()), levels, ELEMENT, 2, block))
            dense, cond = ELEMENT * WIDTH, float(spectrum[0] / spectrum[-1])
            specs.append(SiteSpec(layer, kind, WIDTH, ELEMENT, 0, dense, cond, tuple(spectrum.tolist())))
    return columns, specs


def planned(scheduler: str, columns: Sequence[Columns], specs: Sequence[SiteSpec]) -> Any:
    """Segments for each site: all sites together, or each within what the scheduler gives it (as passes/plan.py)."""
    options = Options(ratio=RATIO, scheduler=scheduler)
    budget = options.budget(specs)
    if scheduler == "loss":
        return allocate(columns, budget)
    return [allocate([c], b)[0] for c, b in zip(columns, schedule(scheduler, specs, budget, options), strict=True)]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median of a few runs, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=RESULTS / "planner.json")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args(argv)
    rows = []
    for precision in PRECISIONS:
        columns, specs = sites(precision)
        for scheduler in ("loss", "progressive"):
            took = seconds(lambda s=scheduler, c=columns, p=specs: planned(s, c, p), args.repeats)  # type: ignore[misc]
            rows.append({"scheduler": scheduler, "precision": precision, "seconds": took})
            print(f"{scheduler}, {precision}: {took:.3f} s")
    weight = torch.randn(WIDTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    one = seconds(lambda: factorise(weight, "a site"), min(args.repeats, 3))
    print(f"one factorisation of {2 * LAYERS}: {one:.3f} s")
    about = {"machine": machine(), "layers": LAYERS, "width": WIDTH, "hidden": HIDDEN, "ratio": RATIO}
    write_json(args.out, about | {"rows": rows, "factorise_one_s": one})


if __name__ == "__main__":
    main()
