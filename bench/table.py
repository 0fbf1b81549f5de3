"""The README's tables, in markdown, from the JSON that bench.run, bench.memory and bench.quality wrote.

python -m bench.table [--write README.md] [bench/results/cpu.json ...]

With ``--write`` the tables replace what stands between ``<!-- bench -->`` and ``<!-- /bench -->`` (times, memory) and
between ``<!-- quality -->`` and ``<!-- /quality -->`` in that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cases

RESULTS = Path(__file__).parent / "results"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and all others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def times(result: dict[str, Any]) -> str:
    """Decode and prefill: milliseconds of inductor, every other variant as a ratio to it."""
    others = [variant.name for variant in cases.VARIANTS if variant != cases.BASE]
    keyed: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["kind"] != "compile":
            keyed.setdefault((row["model"], row["kind"], row["tokens"]), {})[row["variant"]] = row
    lines = []
    for (model, kind, tokens), found in keyed.items():
        base = found[cases.BASE.name]["median_s"]
        ratios = [f"{found[name]['median_s'] / base:.2f}" if name in found else "–" for name in others]
        lorc = [found[v.name] for v in cases.VARIANTS if v.ratio is not None and v.name in found]
        extra = max((row["overhead_s"] - found[cases.BASE.name]["overhead_s"] for row in lorc), default=0.0)
        lines.append([f"{model}, {kind} {tokens}", f"{1e3 * base:.1f} ms", *ratios, f"{100 * extra / base:+.1f} %"])
    return markdown(["case", cases.BASE.name, *others, "guards and wrapping, added"], lines)


def compiles(result: dict[str, Any]) -> str:
    """Cold compile times, where they go, and how many compiles three prompts take."""
    keyed: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["kind"] == "compile":
            keyed.setdefault((row["model"], row["variant"]), []).append(row)
    lines = []
    for (model, variant), rows in keyed.items():
        base = keyed[model, cases.BASE.name]
        seconds, inner = _median(rows, "seconds"), _median(rows, "inner_s")
        passes = [sum(s for k, s in row["passes"].items() if k not in ("inner_s", "factorise_s")) for row in rows]
        factors = [row["passes"].get("factorise_s", 0.0) for row in rows]
        share = statistics.median(passes) / _median(base, "inner_s")
        counted = [" / ".join(map(str, rows[-1][key])) for key in ("backend_calls", "inner_compiles")]
        own = [f"{100 * share:.1f} %", f"{statistics.median(factors):.2f} s"] if rows[0]["passes"] else ["–", "–"]
        name = f"{model}, {variant}"
        lines.append(
            [name, f"{seconds:.1f} s", f"{seconds / _median(base, 'seconds'):.2f}", f"{inner:.1f} s", *own, *counted]
        )
    header = ["prefill and decode, cold", "compile", "ratio", "in inductor", "passes / dense inductor", "factorising"]
    return markdown([*header, "backend calls", "inner compiles"], lines)


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def memory(result: dict[str, Any]) -> str:
    """Peak of a long prefill."""
    base = result["rows"][0]
    lines = [
        [
            f"{row['variant']}, {result['tokens']} tokens",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['peak_bytes'] / base['peak_bytes']:.3f}",
            f"{row['prefill_peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['held_bytes'] / 2**20:,.0f} MiB",
        ]
        for row in result["rows"]
    ]
    return markdown(["peak of a prefill", "resident", "ratio", "above the loaded model", "cache held"], lines)


def quality(result: dict[str, Any]) -> str:
    """Added loss in percent of the dense model's, a row per share of the bytes, a column per method."""
    added = {(row["method"], row["ratio"]): row["added"] for row in result["rows"]}
    methods = list(dict.fromkeys(method for method, _ in added))
    ratios = sorted({ratio for _, ratio in added}, reverse=True)
    lines = [
        [f"{ratio:g}", *(f"{100 * added[m, ratio]:+.2f} %" if (m, ratio) in added else "–" for m in methods)]
        for ratio in ratios
    ]
    return markdown(["bytes kept", *methods], lines)


def rendered(paths: Sequence[Path]) -> str:
    """The tables of all result files, each after a line that says where it was measured."""
    parts = []
    for path in paths:
        result = json.loads(path.read_text())
        where = result["machine"]
        versions = f"torch {where['torch']}, transformers {where['transformers']}"
        parts.append(
            f"`{path.name}`: {where['cpu']}, {where['threads']} threads, {versions}, {result['dtype']}, {where['date']}"
        )
        tables = [quality] if "dense_nats" in result else [memory] if "tokens" in result else [times, compiles]
        parts += [table(result) for table in tables]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--write", type=Path, help="a Markdown file with <!-- bench --> markers")
    given = parser.parse_args(argv)
    sections = {"bench": ("cpu.json", "memory.json"), "quality": ("quality.json",)}
    for name, files in sections.items():
        paths = given.results or [path for file in files if (path := RESULTS / file).exists()]
        text = rendered(paths)
        if given.write is None:
            print(text)
        elif paths:
            _replace(given.write, name, text)
        if given.results:
            return


def _replace(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of that name."""
    before, _, rest = path.read_text().partition(f"<!-- {name} -->")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


if __name__ == "__main__":
    main()
