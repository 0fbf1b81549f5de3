"""What the page says: its parts in order, each with figures, captions made of the numbers, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .pieces import Figure, Part, Table, size

Found = Mapping[str, Any]


def parts(found: Found) -> list[Part]:
    """All sections of what ``gathered`` returned; without a site only what matched and why not."""
    if not found["sites"]:
        return [_matched(found)]
    return [part(found) for part in (_spectra, _conditions, _bytes, _loss, _needles, _time, _matched)]


def tiles(found: Found) -> list[tuple[str, str]]:
    """(figure, what it is) of the summary."""
    if not found["sites"]:
        return [("0", "sites"), (str(len(found["misses"])), "misses")]
    coded, dense = found["bytes_per_token"], found["bytes_per_token_dense"]
    paid, step = found["break_even_tokens"], found["step"]
    return [
        (f"{coded / dense:.1%}", "of the dense cache's bytes"),
        (f"{coded:,}", f"bytes per token, dense {dense:,}"),
        (f"{len(found['sites'])}", f"sites, {len(found['misses'])} misses"),
        (
            size(found["codec_bytes"]),
            f"of codecs, paid for {'at no length' if paid is None else f'after {paid:,} tokens'}",
        ),
        (
            f"{1e3 * step['coded_seconds']:.3g} ms",
            f"attention over {step['tokens']:,} tokens in a decode step at least; dense "
            f"{1e3 * step['dense_seconds']:.3g} ms",
        ),
    ]


# ---------------------------------------------------------------------------------------------- spectra, conditions


def _spectra(found: Found) -> Part:
    shown, absent = [], []
    for kind in _kinds(found["sites"]):
        lines = [(s["layer"], s["singular"]) for s in found["sites"] if s["kind"] == kind]
        name, conds = f"weights-{kind}", [(s["cond"], s["layer"]) for s in found["sites"] if s["kind"] == kind]
        (flat, flattest), (steep, steepest) = min(conds), max(conds)
        what = f"Singular values of the {kind} projections"
        caption = (
            "Each layer relative to its largest, one line per layer from blue (first) to orange (last). "
            f"Layer {flattest} is the flattest: its smallest is 1/{flat:.3g} of its largest; "
            f"layer {steepest} falls furthest, to 1/{steep:.3g}."
        )
        shown.append(Figure(name, what, figures.spectra(name, f"{what}, by layer", lines, "of the largest"), caption))
    statistics = found["statistics"]
    if statistics is None:
        absent.append(
            "No statistics of keys and values: give --calibration FILE (lorc calibrate writes one), or leave "
            "--calibration out with a text of 512 tokens or more, half of which is the first prompt."
        )
    else:
        for kind in _kinds(statistics["sites"]):
            mine = [s for s in statistics["sites"] if s["kind"] == kind]
            name, most = f"statistics-{kind}", [_columns_for(s["spread"], 0.9) for s in mine]
            axes = [len(s["spread"]) for s in mine]
            what = f"Spread of the {kind}s along their principal axes"
            caption = (
                f"Standard deviations, relative to the largest of the layer, from {statistics['source']}. "
                f"90 % of the variance lies in {_range(most)} of {_range(axes)} axes."
            )
            lines = [(s["layer"], s["spread"]) for s in mine]
            shown.append(
                Figure(name, what, figures.spectra(name, f"{what}, by layer", lines, "of the largest"), caption)
            )
    text = (
        "Where a line falls steeply, few columns hold most of what is cached; where it is flat, only lower precision "
        "saves."
    )
    return Part("spectra", "Spectra", (text,), tuple(shown), absent=tuple(absent))


def _kinds(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    return [kind for kind in ("key", "value") if any(s["kind"] == kind for s in sites)]


def _columns_for(spread: Sequence[float], share: float) -> int:
    """The fewest axes that hold ``share`` of the variance."""
    total, seen = sum(s * s for s in spread), 0.0
    for i, s in enumerate(spread):
        seen += s * s
        if seen >= share * total:
            return i + 1
    return len(spread)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _conditions(found: Found) -> Part:
    kinds = {k: [(s["layer"], s["cond"]) for s in found["sites"] if s["kind"] == k] for k in ("key", "value")}
    least, most = (pick(s["cond"] for s in found["sites"]) for pick in (min, max))
    points = found["cumulative"]
    first = points[0]
    caption = (
        f"Largest over smallest singular value of each projection, from {least:.3g} to {most:.3g}. A smallest one "
        "below 1e-7 of the largest counts as that."
    )
    product = (
        "Product of all condition numbers from a layer to the last, as its power of ten: what LoRC's progressive "
        f"schedule gives ranks by. Layer {first['layer']} has 10^{first['log10']:.1f}, and each later layer less."
    )
    what, whole = "Condition numbers by layer", "Cumulative condition numbers by layer"
    shown = (
        Figure("condition", what, figures.conditions("condition", what, kinds), caption),
        Figure("cumulative", whole, figures.cumulative("cumulative", whole, points), product),
    )
    return Part("conditions", "Condition numbers", figures=shown)


# ------------------------------------------------------------------------------------------------------------- bytes


def _bytes(found: Found) -> Part:
    sites = found["sites"]
    parts_of = {k: [s for s in sites if s["kind"] == k] for k in _kinds(sites)}
    shares = [f"{k}s {sum(s['bytes'] for s in m) / sum(s['dense_bytes'] for s in m):.1%}" for k, m in parts_of.items()]
    caption = (
        "Filled as coded, the outline as dense. Of the dense bytes "
        f"{' and '.join(shares)} are kept. Positions count with the site that pays for them."
    )
    what = "Bytes per cached token by layer"
    drawn = figures.bytes_by_layer("bytes", what, sites)
    head = ("layer", *(f"{k}s, {what}" for k in parts_of for what in ("coded", "dense")))
    lines = []
    for layer in sorted({s["layer"] for s in sites}):
        cells = [str(layer)]
        for mine in parts_of.values():
            here = [s for s in mine if s["layer"] == layer]
            cells += [f"{sum(s[what] for s in here):,}" for what in ("bytes", "dense_bytes")]
        lines.append(tuple(cells))
    table = Table("Bytes per token by layer", head, tuple(lines))
    return Part("bytes", "Bytes", (), (Figure("bytes", what, drawn, caption),), (table,))


# -------------------------------------------------------------------------------------------------------------- loss


def _loss(found: Found) -> Part:
    result = found["loss"]
    title = "Loss against bytes"
    if result is None:
        return Part("loss", title, absent=("Not asked for: add --sweep 0.6,0.45,0.35,0.25,0.15.",))
    points, dense = result["points"], result.get("dense_nats")
    shares = [100 * p["bytes_per_token"] / result["dense_bytes"] for p in points]
    here = 100 * found["bytes_per_token"] / result["dense_bytes"]
    predicted = [{"label": "predicted", "loss": [p["predicted"] for p in points], "measured": False}]
    measured, absent = [], []
    if dense is None:
        absent.append("Predicted only: add --text FILE --measure for the loss that each budget has on a text.")
    else:
        words = f"measured, {result['tokens']:,} tokens"
        measured = [{"label": words, "loss": [p["nats"] - dense for p in points], "measured": True}]
    unit, made = result["unit"], f"{result['scheduler']}, {result['precision']}"
    how = "with statistics" if result["calibrated"] else "without statistics"
    about = f"Plans by scheduler and precision {made}, {how}, in {unit}. Dotted: the budget of this page."
    shown = []
    if dense is not None and result["nats"]:
        caption = f"On top of the dense model's {dense:.4f} nats. {about}"
        svg = figures.losses(
            "loss", "Loss against bytes", shares, predicted + measured, "added loss, nats per token", here
        )
        shown.append(Figure("loss", "Predicted and measured loss", svg, caption))
    else:
        label = "nats per token" if result["nats"] else "share of energy, summed"
        svg = figures.losses("predicted", "Predicted loss against bytes", shares, predicted, label, here)
        shown.append(Figure("predicted", "Predicted loss", svg, f"Down is better. {about}"))
    if dense is not None and not result["nats"]:
        caption = f"On top of the dense model's {dense:.4f} nats per token, through the cache."
        svg = figures.losses("measured", "Measured loss against bytes", shares, measured, "added, nats per token", here)
        shown.append(Figure("measured", "Measured loss", svg, caption))
    lines = tuple(f"Ratio {r:g} is left out: it has no room for one column per site." for r in result["refused"])
    return Part("loss", title, lines, tuple(shown), (_loss_table(result),), tuple(absent))


def _loss_table(result: Mapping[str, Any]) -> Table:
    dense, rows = result.get("dense_nats"), []
    head = ["bytes per token", "of dense", f"predicted, {result['unit']}"]
    head += [] if dense is None else ["measured, nats per token added", "in %"]
    for p in result["points"]:
        cells = [f"{p['bytes_per_token']:,}", f"{p['bytes_per_token'] / result['dense_bytes']:.3f}"]
        cells.append(f"{p['predicted']:.4g}")
        if dense is not None:
            added = p["nats"] - dense
            cells += [f"{added:+.4f}", f"{100 * added / dense:+.2f}"]
        rows.append(tuple(cells))
    return Table("Loss of each budget", tuple(head), tuple(rows))


# --------------------------------------------------------------------------------------------------- retrieval, time


def _needles(found: Found) -> Part:
    result, title = found["needles"], "Retrieval"
    if result is None:
        return Part(
            "retrieval", title, absent=("Not asked for: add --needle, and --text FILE for a text of your own.",)
        )
    shown = []
    for which in ("dense", "coded"):
        mine = result[which]
        caption = (
            f"{mine['right']} of {mine['of']} numbers hidden in {result['text']} are "
            f"found, {mine['nats']:.3f} nats per token of the answer."
        )
        if which == "coded":
            caption += (
                f" Of the {mine['dense_right']} that the dense model finds it finds {mine['right_where_dense_is']}."
            )
        name = f"needles-{which}"
        what = f"Needles found with the {which} cache"
        shown.append(Figure(name, what, figures.needles(name, f"{what}, by length and depth", mine["trials"]), caption))
    text = "A sentence with a number is hidden at some depth of a text, and asked for through the cache."
    return Part("retrieval", title, (text,), tuple(shown))


def _time(found: Found) -> Part:
    steps, timed = found["steps"], found["measured"]
    points = steps["points"]
    ahead = next((p["tokens"] for p in points if p["coded_s"] < p["dense_s"]), None)
    where = (
        "is predicted at no length to be faster"
        if ahead is None
        else f"is predicted to be faster from {ahead:,} tokens on"
    )
    caption = (
        f"What it takes at least, batch 1, by the cost model and the figures of "
        f"{steps['device']} ({steps['source']}). The coded cache {where}."
    )
    label = "attention, ms"
    what, whole = "Predicted time of attention in a decode step", "Measured time of whole decode steps"
    shown = [Figure("steps", what, figures.steps("steps", what, points, label, True), caption)]
    tables, absent = [_step_table("Predicted, attention alone", points)], []
    if timed is None:
        absent.append("Predicted only: add --time to time decode steps of both models in turns.")
    else:
        caption = (
            f"Weights included, batch 1: medians of {timed['repeats']} steps of each model in turns, "
            f"{timed['inner']}, {timed['threads']} threads."
        )
        svg = figures.steps("timed", whole, timed["points"], "whole step, ms", False)
        shown.append(Figure("timed", whole, svg, caption))
        tables.append(_step_table("Measured, whole steps", timed["points"]))
    return Part("time", "Decode time by context", (), tuple(shown), tuple(tables), tuple(absent))


def _step_table(about: str, points: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for p in points:
        cells = (f"{1e3 * p['dense_s']:.3g}", f"{1e3 * p['coded_s']:.3g}", f"{p['dense_s'] / p['coded_s']:.2f}")
        rows.append((f"{p['tokens']:,}", *cells))
    return Table(about, ("cached tokens", "dense, ms", "coded, ms", "times faster"), tuple(rows))


# ---------------------------------------------------------------------------------------------------------- matching


def _matched(found: Found) -> Part:
    words = ("layer", "site", "stored columns", "between projection and cache", "read by")
    head = (*words, "width", "condition", "energy kept", "bytes", "of", "tokens kept")
    tables = []
    if sites := sorted(found["sites"], key=lambda s: (s["layer"], s["kind"])):
        tables.append(Table("Sites", head, tuple(map(_site, sites)), words=len(words)))
    if found["misses"]:
        rows = tuple((m["node"], m["kind"], m["reason"], m["source"], m["step"]) for m in found["misses"])
        tables.append(Table("Misses", ("node", "kind", "why", "line of the model", "what to do"), rows, words=5))
    lines = [
        f"{len(found['sites'])} cached projections are understood; {len(found['misses'])} cache writes stay dense."
    ]
    if not found["sites"]:
        lines.append("No cached key or value comes from a projection of this model, so there is nothing else to show.")
    if found["waiting_for_first_prompt"] and found["sites"]:
        lines.append("This is how caches are coded until a first prompt brings statistics.")
    lines += [f"Warning: {text}" for text in found["warnings"]]
    return Part("matched", "What matched, and what did not", tuple(lines), tables=tuple(tables))


def _site(site: Mapping[str, Any]) -> tuple[str, ...]:
    words = (str(site["layer"]), site["kind"], site["segments"], site["epilogue"] or "nothing", site["lowering"])
    numbers = (str(site["width"]), f"{site['cond']:.3g}", f"{site['energy']:.1%}", f"{site['bytes']:,}")
    return (*words, *numbers, f"{site['dense_bytes']:,}", str(site["window"] or "all"))
