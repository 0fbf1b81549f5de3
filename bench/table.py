"""The tables of the README and the docs, in markdown, from the JSON that the other programs here wrote.

    python -m bench.table [--write README.md docs/*.md]

With ``--write`` the tables of ``bench/results/cpu.json`` replace what stands between ``<!-- cpu -->`` and
``<!-- /cpu -->`` in these files, if it is there; and so for the other results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import cases, summaries
from bench.premise import PARTS, PREDICTORS
from bench.summaries import markdown
from lorc_fx import Options

RESULTS = Path(__file__).parent / "results"


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


def steps(result: dict[str, Any]) -> str:
    """Decode steps: milliseconds under inductor with a dynamic cache; how many times faster every other way is."""
    keyed: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in result["rows"]:
        case = (row["model"], row.get("layers"), row["dtype"], row["batch"], row["tokens"])
        keyed.setdefault(case, {})[row["variant"]] = row["median_s"]
    names = list(dict.fromkeys(name for found in keyed.values() for name in found if name != cases.BASE.name))
    lines = []
    for (model, layers, dtype, batch, tokens), found in keyed.items():
        base = found[cases.BASE.name]
        ratios = [f"{base / found[name]:.2f}" if name in found else "–" for name in names]
        depth = "" if layers is None else f", {layers} layers"
        lines.append([f"{model}{depth}, {dtype}, batch {batch}, {tokens} tokens", f"{1e3 * base:.1f} ms", *ratios])
    return markdown(["decode step", cases.BASE.name, *names], lines)


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


def demo(result: dict[str, Any]) -> str:
    """What ``lorc demo`` found its budgets to cost."""
    base = result["dense"]["loss"]
    points = [("dense", base)]
    known = "first prompt" if result["first_prompt_tokens"] else "no long prompt yet"
    asked = f"{known}, {result['options'].get('ratio', Options().ratio):g}"
    points += [(asked, result["lorc"]["loss"])] + [(f"{known}, {p['ratio']:g}", p) for p in result["sweep"]]
    points += [(f"after `lorc calibrate`, {p['ratio']:g}", p) for p in result["calibrated"]]
    points += [(f"LoRC as published, {p['ratio']:g}", p) for p in result["paper"]]
    lines = [
        [
            name,
            f"{point['per_token']:,.0f}",
            f"{point['per_token'] / base['per_token']:.3f}",
            f"{point['nats']:.3f}",
            f"{100 * (point['nats'] / base['nats'] - 1):+.1f} %",
        ]
        for name, point in points
    ]
    return markdown(["codec, ratio", "bytes per token", "of dense", "loss, nats", "added loss"], lines)


def peers(result: dict[str, Any]) -> str:
    """Loss and bytes of every package, by protocol, most bytes first."""
    lines = []
    for protocol in ("chunks", "prompt"):
        rows = [r for r in result["rows"] if r["protocol"] == protocol and r["peer"] != "dense"]
        for row in sorted(rows, key=lambda r: -r["fraction"]):
            name = f"{row['peer']}: {row['setting']}"
            lines.append([name, protocol, f"{row['fraction']:.3f}", f"{100 * row['added']:+.2f} %"])
    return markdown(["cache", "protocol", "bytes, of 16-bit", "added loss"], lines)


def peers_run(result: dict[str, Any]) -> str:
    """Loss, bytes held, time as a share of DynamicCache's and peak memory, a row per model and cache, by context."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: not row["timed"]):
        if row["when"] != "end":
            found.setdefault((row["model"], row["peer"]), {}).setdefault(row["context"], row)
    contexts = sorted({row["context"] for row in result["rows"]})

    def cell(rows: dict[int, dict[str, Any]], key: str, shape: Callable[[float], str]) -> str:
        values = [rows.get(context, {}).get(key) for context in contexts]
        return " / ".join("–" if value is None else shape(value) for value in values)

    lines = []
    for loss in result["losses"]:
        rows = found.get((loss["model"], loss["peer"]), {})
        base = any(row["when"] for row in rows.values())  # what the others' times are shares of
        known = loss["added"] is not None
        told = [f"{loss['fraction']:.3f}", f"{100 * loss['added']:+.2f} %"] if known else ["–", "–"]
        times = [
            cell(rows, f"{what}_median_s", lambda s: f"{1e3 * s:.0f} ms") if base else cell(rows, key, "{:.2f}".format)
            for what, key in (("prefill", "prefill_ratio"), ("decode", "decode_ratio"))
        ]
        sizes = [cell(rows, key, lambda b: f"{b / 2**20:.1f}") for key in ("held_bytes", "decode_peak_bytes")]
        lines.append([f"{loss['model']}: {loss['peer']}", *told, sizes[0], *times, sizes[1]])
    at = " / ".join(map(str, contexts))
    header = ["cache", "bytes, of 16-bit", "added loss", f"MiB held at {at} tokens", "prefill", "decode step"]
    weights = "; ".join(f"{name}: {about['weights']}" for name, about in result["models"].items())
    table = markdown([*header, "peak while decoding, MiB"], lines)
    said = [f"Weights: {weights}."]
    if drift := result.get("drift"):
        apart = [f"{100 * max(abs(row[what]) for row in drift):.0f} % in {what}" for what in ("prefill", "decode")]
        said.append(f"DynamicCache at the start and at the end of a context differs by at most {' and '.join(apart)}.")
    return f"{table}\n\n{' '.join(said)}"


def ablation(result: dict[str, Any]) -> str:
    """Divergence and added loss with one part changed, a pair of columns per ratio."""
    found = {(row["change"], row["ratio"]): row for row in result["rows"]}
    ratios = sorted({ratio for _, ratio in found}, reverse=True)
    header = ["change", *(name for r in ratios for name in (f"{r:g}: KL, nats", f"{r:g}: added loss"))]
    lines = []
    for change in dict.fromkeys(change for change, _ in found):
        rows = [found[change, ratio] for ratio in ratios]
        lines.append(
            [change, *(t for row in rows for t in (f"{row['divergence']:.4f}", f"{100 * row['added']:+.2f} %"))]
        )
    return markdown(header, lines)


def certificates(result: dict[str, Any]) -> str:
    """Bound / measured of sites, attention and network; and greedy tokens that are proven."""
    lines = []
    for row in result["rows"]:
        parts = [
            f"{row[k]['median']:.2f}" if k in row else "–" for k in ("site", "attention", "attention, errors known")
        ]
        logits = row["logits"]
        kept = f"{logits['proven']} / {logits['kept']} of {logits['positions']}"
        lines.append([f"{row['model']}, {row['way']}", *parts, f"{row['gain']:.3g}", kept])
    header = ["bound / measured", "site", "attention, sizes", "attention, errors", "per layer", "proven / kept"]
    return markdown(header, lines)


def premise(result: dict[str, Any]) -> str:
    """Rank correlations of each predictor with how far a model is from itself, a column per model and part."""
    found, header = {}, ["rank correlation with KL"]
    for name, model in result["models"].items():
        header += [f"{name}, {model['layers']} layers: {part}" for part in PARTS]
        for row in model["correlations"]:
            if row["measure"] == "divergence":
                found[name, row["part"], row["predictor"]] = row["spearman"]
    lines = [
        [words, *(_signed(found[name, part, predictor]) for name in result["models"] for part in PARTS)]
        for predictor, words in PREDICTORS.items()
    ]
    return markdown(header, lines)


def predicted(result: dict[str, Any]) -> str:
    """Rank correlations of the planner's predicted loss with what was measured, over all plans and at single ratios."""
    header = ["plans", "number", "predicted, KL", "predicted, added loss", "bytes, KL", "bytes, added loss"]
    keys = ("divergence", "added", "bytes_divergence", "bytes_added")
    return markdown(
        header,
        [
            [
                row["plans"] if row["plans"] == "all" else f"ratio {row['plans']}",
                str(row["count"]),
                *(_signed(row[key]) for key in keys),
            ]
            for row in result["correlations"]
        ],
    )


def calibration_curve(result: dict[str, Any]) -> str:
    """Every plan: predicted loss, divergence and added loss in nats per token, by predicted loss."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: row["predicted"]):
        basis = row["basis"] if isinstance(row["basis"], str) else "keys {}, values {}".format(*row["basis"])
        name = f"{row['ratio']:g}, {row['scheduler']}, {row['precision']}, {basis}"
        added = f"{row['added']:+.4f} ± {row['added_error']:.4f}"
        lines.append([name, f"{row['predicted']:.4f}", f"{row['divergence']:.4f}", added])
    return markdown(["plan: ratio, scheduler, precision, basis", "predicted", "KL", "added loss"], lines)


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


TABLES: dict[str, list[Callable[[dict[str, Any]], str]]] = {
    "cpu": [times, compiles],
    **dict.fromkeys(
        ("decode", "decode-batch8", "decode-bf16", "decode-512", "decode-ratios", "decode-layers"), [steps]
    ),
    "memory": [memory],
    "quality": [quality],
    "quality-mha": [quality],
    "quality-gqa": [quality],
    "peers": [peers],
    "peers-run": [peers_run],
    "ablation": [ablation],
    "demo": [demo],
    "bounds": [certificates],
    "premise": [premise],
    "predicted": [predicted, calibration_curve],
    "decoders": [summaries.classes],
    "growth": [summaries.grown],
    "lowerings": [summaries.lowered],
    "lowerings-avx2": [summaries.lowered],
    "soak": [summaries.soaked],
    "versions": [summaries.supported],
}


def machines(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a result, or each group or row of it, was measured."""
    own = result.get("machine", result)
    own = own if isinstance(own, dict) else result  # the demo's own
    parts = [*result.get("groups", {}).values(), *(row for row in result.get("rows", []) if "session" in row)]
    begun = [{"date": part["session"].rpartition(", ")[2]} if "session" in part else {} for part in parts]
    found = [{**own, **when, **part.get("machine", {})} for part, when in zip(parts, begun, strict=True)]
    return found or [own]


def rendered(name: str, result: dict[str, Any]) -> str:
    """The tables of one result file, after a line that says where it was measured, by what and when."""
    found, told = machines(result), []
    for where in found:
        cpu = where.get("cpu", where.get("machine"))
        here = f"{cpu} ({where['instructions']})" if where.get("instructions") else cpu
        here = f"{here}, {where['threads']} threads" if here and "threads" in where else here
        told += [here] if here and here not in told else []
    told = [" and ".join(told)] if told else []
    told += [f"{package} {found[0][package]}" for package in ("torch", "transformers") if package in found[0]]
    told += [result["dtype"]] if "dtype" in result else []
    if "dense_nats" in result:
        told += [f"{result['tokens']} tokens scored, dense {result['dense_nats']:.3f} nats"]
        told += [f"{result['calibration_tokens']} tokens of statistics"]
    dates = sorted(where["date"] for where in found if "date" in where)
    days = list(dict.fromkeys(date[:10] for date in (dates[:1] + dates[-1:])))
    told += [dates[0]] if len(set(dates)) == 1 else [" to ".join(days)] if days else []
    return "\n\n".join([f"`{name}.json`: {', '.join(told)}", *(table(result) for table in TABLES[name])])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", type=Path, nargs="+", default=[], help="Markdown files with markers")
    given = parser.parse_args(argv)
    for name in TABLES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        text = rendered(name, json.loads(path.read_text()))
        if not given.write:
            print(text, end="\n\n")
        for file in given.write:
            _replace(file, name, text)


def _replace(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of that name, where they are. Raises ValueError where the second is missing."""
    whole = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin in whole:
        before, _, rest = whole.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:  # what comes after it would be lost
            raise ValueError(f"{path} has {begin} without {end}")
        path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
