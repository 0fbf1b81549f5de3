"""Decoders of other packages under backend="lorc", with the caches that these have: right, and what of them is coded.

    python -m bench.elsewhere [--only litgpt torchtune] [--out bench/results/elsewhere.json] [--docs docs/elsewhere.md]

Each package gets an environment of its own, made when it is not there, which borrows torch and transformers from this
one. Each family runs small (``bench.elsewhere_zoo``) in a process of its own: a prompt of two rows (the first padded on
the left where the cache allows that) in a piece of six tokens and one of three (Bamba's whole), then five decode steps,
once for each way in which the package keeps its cache. What is compared is what ``bench.decoders`` compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.decoders import Ran, Seen, apart, compared, is_coded, said
from bench.elsewhere_zoo import FAMILIES, ROOM, WAYS, Family, Held
from bench.environments import environment
from bench.run import RESULTS, machine
from bench.verdicts import TOLERANCE, Row, elsewhere_page, verdict
from lorc_fx import models
from lorc_fx.console import write_json

NEW, PAD = 5, 3


class Needs(NamedTuple):
    """What a package's environment gets: ``alone`` without what they ask for, which would be other versions of what is
    borrowed (litgpt wants an older huggingface-hub)."""

    alone: tuple[str, ...]
    more: tuple[str, ...] = ()


PACKAGES: dict[str, Needs] = {
    "ibm-fms": Needs(("ibm-fms==1.13.1",)),
    "litgpt": Needs(("litgpt==0.5.13",), ("lightning>=2.6.1", "jsonargparse[signatures]>=4.37,<=4.41")),
    "torchtune": Needs(  # the last torchao whose names it imports that works beside it
        ("torchtune==0.6.1", "torchao==0.10.0"),
        ("omegaconf", "tiktoken", "blobfile", "datasets", "torchdata==0.11.0", "kagglehub"),
    ),
}


def made(package: str, folder: Path) -> Path:
    """The Python of a package's environment. Raises CalledProcessError where pip fails."""
    needs = PACKAGES[package]
    return environment(folder / package, needs.more, alone=needs.alone, borrow=True)


# -- inside of a package's environment ---------------------------------------------------------------------------------


@torch.no_grad()
def run(held: Held, pieces: Sequence[int]) -> Ran:
    """Greedy, one piece or token after the other, each with a mask of what it may see."""
    ids = torch.randint(3, 90, (2, sum(pieces)), generator=torch.Generator().manual_seed(3))
    pad = PAD if held.padded else 0
    begins = torch.tensor([pad, 0])
    held.begin()
    cache, at, logits = None, 0, []
    slots = torch.arange(ROOM)
    for tokens in (*pieces, *[1] * NEW):
        here = slots[at : at + tokens]
        places = (here[None] - begins[:, None]).clamp_min(0)
        real = slots[None, None] >= begins[:, None, None]
        mask = (slots <= here[:, None]) & (real | (slots == here[:, None]))  # a padded token sees itself
        out, cache = held(ids[:, at : at + tokens], places, mask, cache)
        at += tokens
        if at >= sum(pieces):
            logits.append(out[:, -1].float())
            ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
        else:
            assert out.shape[:2] == (2, tokens)
    parts = [(name, is_coded(value)) for name, value in held.parts(cache)]
    return Ran(ids, torch.stack(logits), parts)


def check(family: Family) -> Row:
    """All ways of keeping a cache; what was missed and said is noted for each."""
    torch.set_num_threads(1)
    row: Row = {"package": family.package, "class": family.cls, "ways": {}, "sites": {}, "misses": {}}
    begin = time.perf_counter()
    try:
        family.build()
    except Exception as error:
        return {**row, "not_built": said(error)}
    for name, kind in WAYS[family.package].items():
        held, seen = kind(family.build()), Seen()
        way = compared(held.compiled, partial(run, held, family.pieces), seen)
        row["ways"][name] = {**way, "misses": seen.misses, "said": seen.said, "lowered": seen.lowered}
        row["sites"] |= seen.sites
        row["misses"] |= seen.misses
    row["said"] = list(dict.fromkeys(text for way in row["ways"].values() for text in way["said"]))
    return {**row, "seconds": time.perf_counter() - begin}


def rows_of(package: str, families: Sequence[str], out: Path) -> None:
    """What runs in a package's environment: one row a line, as they come."""
    torch.set_num_threads(1)
    with out.open("w") as file:
        for family in FAMILIES:
            if family.package != package or (families and family.cls not in families):
                continue
            died = {"package": package, "class": family.cls, "ways": {}, "misses": {}, "said": []}
            row = apart(partial(check, family), died)
            row["version"] = version(package)
            print(
                f"{package} {family.cls} ({row.get('seconds', 0):.0f} s): {verdict(row)}", file=sys.stderr, flush=True
            )
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()


# -- outside -----------------------------------------------------------------------------------------------------------


def measured(package: str, folder: Path, families: Sequence[str] = ()) -> list[Row]:
    """The rows of one package, from its own environment."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "rows"
        command = [made(package, folder), "-m", "bench.elsewhere", "--rows", package, "--out", out]
        subprocess.run([*command, *(["--families", *families] if families else [])], check=True, cwd=_root())
        return [json.loads(line) for line in out.read_text().splitlines()]


def _root() -> Path:
    return Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decoders of other packages, right and coded.")
    parser.add_argument("--only", nargs="+", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--families", nargs="+", default=[], help="of these packages (default: all)")
    parser.add_argument("--environments", type=Path, default=models.cache_root() / "elsewhere")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "elsewhere.json", help="rows of other packages stay in it"
    )
    parser.add_argument("--docs", type=Path, default=None, help="write a page on the result here")
    parser.add_argument("--rows", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows:
        rows_of(args.rows, args.families, args.out)
        return
    rows: dict[tuple[str, str], Row] = {}
    if args.out.exists():
        rows = {(row["package"], row["class"]): row for row in json.loads(args.out.read_text())["rows"]}
    for package in args.only:
        fresh = measured(package, args.environments, args.families)
        if not args.families:
            rows = {key: row for key, row in rows.items() if key[0] != package}
        date: dict[str, Any] = {"date": machine()["date"]}
        rows |= {(package, row["class"]): row | date for row in fresh}
        result = {"machine": machine(), "tolerance": TOLERANCE, "command": "python -m bench.elsewhere"}
        write_json(args.out, result | {"rows": list(rows.values())})
        if args.docs:
            args.docs.write_text(elsewhere_page(result | {"rows": list(rows.values())}))


if __name__ == "__main__":
    main()
