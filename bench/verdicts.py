"""What ``bench.decoders`` and ``bench.elsewhere`` found, in words: one verdict per class, and a page of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

KINDS = ("causal", "seq2seq", "speech", "vision")

#: relative to the largest logit
TOLERANCE = 1e-3


def right(way: Row) -> bool:
    """Whether a way that eager can run is right at full rank and, where it was checked, at half the bytes."""
    if "eager_fails" in way:
        return True
    if "fails" in way or not (way["error"] <= TOLERANCE and way["tokens"]):
        return False
    if "half_error" not in way or (way["half_error"] <= TOLERANCE and way["half_tokens"]):
        return True
    return way["half_error"] <= 4 * way.get("half_rounding", 0.0)  # so far is fp32 from fp64 in that eager model


def whole(row: Row) -> bool:
    """Whether every key and value cache of the class is coded, however it is run."""
    ran = [way for way in row["ways"].values() if "cached" in way]
    return caches(row) and all(way["coded"] == way["cached"] for way in ran)


def caches(row: Row) -> bool:
    """Whether the class caches keys and values at all, in some way that eager can run."""
    return any(way.get("cached") for way in row["ways"].values())


def verdict(row: Row) -> str:
    """One word, or one and a reason."""
    if "not_built" in row:
        return f"not built: {row['not_built']}"
    if "died" in row:
        return f"DIED: {row['died']}"
    wrong = [name for name, way in row["ways"].items() if not right(way)]
    if wrong:
        ways = {name: row["ways"][name] for name in wrong}
        return "WRONG: " + "; ".join(f"{name}: {way.get('fails') or way}" for name, way in ways.items())
    if all("eager_fails" in way for way in row["ways"].values()):
        return f"eager fails: {next(iter(row['ways'].values()))['eager_fails']}"
    if not caches(row):
        return "no cache of keys and values"
    if whole(row):
        return "whole"
    counts = {n: f"{w['coded']}/{w['cached']}" for n, w in row["ways"].items() if "cached" in w}
    return f"part {counts}: {list(row['misses'])[:3] or row['said'][:2]}"


def summary(rows: Sequence[Row]) -> list[str]:
    """A table of how many classes of each kind are coded and right, in lines of markdown."""
    lines = [
        "| table | classes | run in eager and cache keys and values | wholly coded | half the bytes checked | wrong |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        here = [row for row in rows if row["kind"] == kind]
        cached = [row for row in here if caches(row)]
        coded, checked = sum(map(whole, cached)), sum(map(_halved, cached))
        wrong = sum(verdict(row).startswith(("WRONG", "DIED")) for row in here)
        share = f"{coded} ({coded / max(len(cached), 1):.1%})"
        lines.append(f"| {kind} | {len(here)} | {len(cached)} | {share} | {checked} | {wrong} |")
    return lines


def page(result: dict[str, Any]) -> str:
    """The result as a page of documentation."""
    rows = sorted(result["rows"], key=lambda row: (KINDS.index(row["kind"]), row["class"]))
    where = result["machine"]
    quiet = sorted(
        {r["class"] for r in rows if any(map(silent, r["ways"].values())) and not (r.get("sites") or r.get("misses"))}
    )
    days = sorted({row["date"][:10] for row in rows if "date" in row})
    lines = [
        "# Decoders",
        "",
        f"`{result['command']}` on transformers {where['transformers']}, torch {where['torch']}: every class of the "
        "library's tables of causal, sequence-to-sequence, speech and (with text alone) vision-language models, small, "
        "with random weights. Each is compared with its eager self at full rank and, at half the bytes, with its eager "
        "self on projected weights: a prompt of two rows, one padded on the left, whole and in chunks, and five decode "
        f"steps, with a dynamic and a static cache; logits within {result['tolerance']:g} of the largest, tokens "
        "equal. Vision runs with a dynamic cache and the prompt whole. "
        + (f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}." if days else ""),
        "",
        *summary(rows),
    ]
    lines += [
        "",
        '*Lowering*: how decode steps read the cache: the latent, the rows as they are, decoded ("decoding"), or in '
        "other ways of [kernels](kernels.md). *Coded*: key and value tensors of the cache that are coded, of all. "
        f"In {len(quiet)} of these something stays dense and nothing says so"
        + (
            f" ({', '.join(quiet)}: `generate` there calls a model inside of the compiled one; compile that one)."
            if quiet
            else "."
        ),
        "",
        "| class | coded | between projection and cache | lowering | the rest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        said = verdict(row)
        ran = [way for way in row["ways"].values() if way.get("cached")]
        counts = " / ".join(dict.fromkeys(f"{way['coded']} of {way['cached']}" for way in ran))
        between = ", ".join(dict.fromkeys(row.get("sites", {}).values()))
        lowered = ", ".join(sorted(set(row.get("lowered", {}).values())))
        rest = "" if said == "whole" else said if not ran else "; ".join(row["misses"]) or said
        lines.append(f"| {row['class']} | {counts} | {between} | {lowered} | {rest.replace('|', '/')[:400]} |")
    return "\n".join(lines) + "\n"


def _halved(row: Row) -> bool:
    """Whether the class was compared at half the bytes, in some way."""
    return any("half_error" in way for way in row["ways"].values())


def silent(way: Row) -> bool:
    """Whether something stayed dense and nothing was said about it."""
    return bool(way.get("dense")) and not way.get("said")


def elsewhere_page(result: dict[str, Any]) -> str:
    """What ``bench.elsewhere`` found, as a page of documentation."""
    where, rows = result["machine"], result["rows"]
    packages = ", ".join(dict.fromkeys(f"{row['package']} {row['version']}" for row in rows))
    wrong = [row for row in rows if verdict(row).startswith(("WRONG", "DIED"))]
    quiet = [row for row in rows if any(map(silent, row["ways"].values()))]
    lines = [
        "# Decoders from elsewhere",
        "",
        f"`{result['command']}`, {packages}, torch {where['torch']}: small models with random weights and the cache "
        "that the package itself has. Each is compared with its eager self at full rank and, where something is coded, "
        "at half the bytes with its eager self on projected weights: a prompt of two rows in two pieces (the first row "
        f"padded on the left, but for litgpt), and five decode steps; logits within {result['tolerance']:g} of the "
        "largest, tokens equal.",
        "",
        f"{len(rows)} models; {len(wrong)} are wrong; in {len(quiet)} something stays dense in silence.",
        "",
        "A cache that was allocated before the compiled region ran stays dense, and a warning says so; the same "
        "buffers made in it are coded. litgpt's sliding windows ask for a number in the middle of attention, where the "
        "graph breaks: no graph has both the write and what reads it.",
        "",
        "| package | model | cache | coded | error | error at half | the rest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row["ways"]:
            lines.append(f"| {row['package']} | {row['class']} | | | | | {verdict(row)[:300]} |")
        for name, way in row["ways"].items():
            lines.append(f"| {row['package']} | {row['class']} | {name} | {_outcome(way)} |")
    return "\n".join(lines) + "\n"


def _outcome(way: Row) -> str:
    if "cached" not in way:
        text = f"eager fails: {way['eager_fails']}" if "eager_fails" in way else f"FAILS: {way.get('fails')}"
        return f"| | | {text.replace('|', '/')[:200]}"
    half = f"{way['half_error']:.0e}" if "half_error" in way else ""
    rest = "; ".join([*(way["misses"] or way["said"]), *(["not checked at half"] if "half_not_checked" in way else [])])
    wrong = "" if right(way) else "WRONG; "
    return f"{way['coded']} of {way['cached']} | {way['error']:.0e} | {half} | {wrong}{rest.replace('|', '/')[:300]}"
