"""Short tables of long results, for the pages that point to them (``bench.table`` writes them)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.verdicts import summary
from bench.versions import PACKAGES

#: of ``bench.lowerings``: what dense is compared with, as the ways are called there
READ = ("int8", "int8, values half", "half, absorbed", "half, by heads", "half, by heads, keys turned")
#: of ``bench.growth``: cached tokens
LENGTHS = (512, 4096)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and all others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def classes(result: dict[str, Any]) -> str:
    """``bench.decoders``: how many classes of each table are coded as a whole, and how many are wrong."""
    return "\n".join(summary(result["rows"]))


def lowered(result: dict[str, Any]) -> str:
    """``bench.lowerings``: attention of one layer and one step over dense tensors, and how many times faster it is over
    stored rows."""
    lines = []
    for row in result["rows"]:
        ms = {way["name"]: way["ms"] for way in row["ways"]}
        ratios = [f"{ms['dense'] / ms[name]:.2f}" if name in ms else "–" for name in READ]
        name = f"{row['shape']}, batch {row['batch']}, {row['tokens']} tokens"
        lines.append([name, f"{ms['dense']:.2f} ms", *ratios])
    return markdown(["attention of one layer", "dense", *READ], lines)


def grown(result: dict[str, Any]) -> str:
    """``bench.growth``: bytes of a cached token and of what a step writes into the cache, by length."""
    lines = [
        [f"{name}, {at['tokens']} tokens", f"{at['token']:,.0f}", f"{100 * at['spare']:.1f} %", f"{at['copied']:,.0f}"]
        for name, found in result["variants"].items()
        for at in found
        if at["tokens"] in LENGTHS
    ]
    return markdown(["cache", "bytes per token, used", "spare", "bytes written per step"], lines)


def soaked(result: dict[str, Any]) -> str:
    """``bench.soak``: what mixed generations do to results, compiles and memory over time."""
    slope = result["slope_mib_per_minute"]
    forms = ", ".join(f"{count} {name}" for name, count in result["rounds"].items())
    lines = [
        ["generations, those of the warm-up included", f"{sum(result['rounds'].values())} ({forms})"],
        ["results that differ from the eager model's", str(len(result["mismatches"]))],
        ["frames compiled after warm-up", str(result["recompiles"])],
        ["live tensors, more at the end", str(result["tensors_grown"])],
        ["resident memory, slope", "–" if slope is None else f"{slope:+.2f} MiB per minute"],
    ]
    return markdown([f"{result['minutes']:g} minutes", "found"], lines)


def supported(result: dict[str, Any]) -> str:
    """``bench.versions``: what the tests said in each environment, a row per set of versions and tests."""
    lines = []
    for row in result["rows"]:
        skips = sum(row["skipped"].values())
        known = f" ({row['known_failures']} known)" if row["known_failures"] else ""
        counts = [str(row["passed"]), f"{row['failed']}{known}", str(skips), f"{row['seconds'] / 60:.0f} min"]
        lines.append([f"Python {row['python']}", *(row[name] or "–" for name in PACKAGES), row["suite"], *counts])
    return markdown(["versions", *PACKAGES, "tests", "passed", "failed", "skipped", "took"], lines)
