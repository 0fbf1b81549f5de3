"""What ``lorc plan`` does: plans for some budgets, the loss they predict, and the loss that a text really has."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.fx import GraphModule

from . import plan_plot
from .backend import plans
from .console import can_be_written
from .errors import BadModel, BadOption, ConflictingOptions, QualityWarning
from .evaluate import Show, chunked_loss, compressed
from .options import Options
from .plan_file import tensor_path
from .records import Plan
from .report import traced

CHUNK = 256
"""Tokens per call where a loss is measured: all but the first of a row read the cache."""

KNOBS = ("calibration", "scheduler", "precision", "basis", "group_size", "objective")
"""The options of a plan beside its budget."""

PROMPT_TOKENS = 16
"""Of the example that the model is traced with."""


def check(output: Path | None, ratios: Sequence[float], plot: Path | None, text: Path | None, measure: bool) -> None:
    """Raises BadOption, ConflictingOptions or MissingExtra before anything slow starts."""
    if output is None and not ratios:
        raise ConflictingOptions(("no OUTPUT", "no --sweep"), "there is nothing to do", "Give one of them, or both")
    if plot is not None and not ratios:
        raise ConflictingOptions(("--plot", "no --sweep"), "there is nothing to draw", "Give --sweep 0.5,0.35,0.25")
    if measure != (text is not None):
        raise ConflictingOptions(("--text", "--measure"), "each needs the other", "Give both, or none")
    if output is not None:
        can_be_written("output", output)
    if plot is not None:
        plan_plot.check("plot", plot)


def asked(knobs: Mapping[str, Any], budget: Mapping[str, Any], ratios: Sequence[float], single: bool) -> list[Options]:
    """Options of each plan: under ``budget`` first, where one is to be written, then the sweep.
    Raises what ``Options`` raises."""
    fixed = Options.parse({}, **knobs)  # reads a calibration once
    shared = {name: getattr(fixed, name) for name in knobs}
    if not single and any(value is not None for value in budget.values()):
        names = ("--ratio or --bytes-per-token", "no OUTPUT")
        raise ConflictingOptions(names, "only a plan that is written has that budget", "Give OUTPUT, or --sweep alone")
    first = [Options.parse(shared, **budget)] if single else []
    return list(dict.fromkeys(first + [Options.parse(shared, ratio=ratio) for ratio in ratios]))


def planned(model: Any, many: Sequence[Options]) -> list[Plan]:
    """A plan for each of ``many`` options, which differ in their budgets only. Raises BadModel for a model without a
    cached projection, and what planning raises."""
    found: list[list[Plan]] = []

    def visit(gm: GraphModule, examples: Sequence[Any]) -> None:
        found.append(plans(gm, examples, many))

    ids = torch.arange(1, PROMPT_TOKENS + 1, device=model.device).unsqueeze(0)
    torch.compiler.reset()
    traced(model, (ids,), {"use_cache": True}, visit)
    whole = [Plan.joined(parts) for parts in zip(*found, strict=True)]
    if not whole or not whole[0].sites:
        raise BadModel(type(model).__name__, "it has no cached projection that is understood (see `lorc explain`)")
    return whole


def measured(show: Show, model: Any, rows: Sequence[torch.Tensor], plan: Plan | None, options: Options) -> float:
    """Loss in nats per token over ``rows`` ([T] token ids each, a text from its start), read through the cache of
    ``plan`` (None: the dense one). ``options`` made the plan."""
    nats, tokens = 0.0, 0
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        if plan is not None:
            known = {} if plan.bases else {"calibration": options.calibration}
            stack.enter_context(compressed(model, {"plan": plan, "inner": "eager", **known}))
        warnings.simplefilter("ignore", QualityWarning)  # the table says it in numbers
        for i, row in enumerate(rows):
            loss = chunked_loss(model, row, CHUNK)
            nats, tokens = nats + loss.nats * loss.tokens, tokens + loss.tokens
            show.progress(i + 1, len(rows))
    return nats / tokens


def figures(
    show: Show, model: Any, many: Sequence[Options], rows: Sequence[torch.Tensor] | None
) -> tuple[list[Plan], dict[str, Any]]:
    """The plans, and all figures of the table and the plot, ready for JSON. ``rows``: text to measure on, if any."""
    show.stage(f"Planning {len(many)} budgets")
    made = planned(model, many)
    first = made[0]
    about: dict[str, Any] = {"scheduler": many[0].scheduler, "precision": many[0].precision, "sites": len(first.sites)}
    about |= {"nats": first.nats, "calibrated": bool(first.bases), "dense_bytes": first.bytes_per_token_dense}
    points: list[dict[str, Any]] = [{"bytes_per_token": p.bytes_per_token, "predicted": p.predicted} for p in made]
    if rows is not None:
        show.stage("Measuring the loss: dense")
        about |= {"tokens": sum(len(row) - 1 for row in rows), "dense_nats": measured(show, model, rows, None, many[0])}
        for plan, options, point in zip(made, many, points, strict=True):
            show.stage(f"Measuring the loss: {plan.bytes_per_token} bytes per token")
            point["nats"] = measured(show, model, rows, plan, options)
    return made, about | {"points": sorted(points, key=lambda point: -point["bytes_per_token"])}


def write(output: Path | None, plan: Plan, plot: Path | None, result: dict[str, Any]) -> list[Path]:
    """The plan and the plot, where asked for; what was written. Raises BadOption where that cannot be."""
    found: list[Path] = []
    try:
        if output is not None:
            plan.save(output)
            found += [output, *([tensor_path(output)] if plan.bases else [])]
        if plot is not None:
            found += plan_plot.draw(result, plot, unit(result))
    except OSError as error:
        raise BadOption("output", str(error.filename), f"a path that can be written ({error})") from error
    return found


def unit(result: dict[str, Any]) -> str:
    """What ``predicted`` is in."""
    return "nats per token" if result["nats"] else f"share of energy, sum over {result['sites']} sites"


def table(result: dict[str, Any]) -> Table:
    """Predicted and, where there is one, measured loss against bytes."""
    how = f"{result['scheduler']}, {result['precision']}, {'calibrated' if result['calibrated'] else 'no calibration'}"
    found = Table(title=how, box=box.SIMPLE)
    found.add_column("bytes per token", justify="right")
    found.add_column("of dense", justify="right")
    found.add_column(f"predicted loss ({unit(result)})", justify="right")
    dense = result.get("dense_nats")
    if dense is not None:
        found.caption = f"Dense: {dense:.4f} nats per token over {result['tokens']} tokens."
        found.add_column("measured loss added (nats per token)", justify="right")
        found.add_column("in %", justify="right")
    for point in result["points"]:
        size = point["bytes_per_token"]
        cells = [f"{size:,}", f"{size / result['dense_bytes']:.3f}", f"{point['predicted']:.4g}"]
        if dense is not None:
            added = point["nats"] - dense
            cells += [f"{added:+.4f}", f"{100 * added / dense:+.2f}"]
        found.add_row(*cells)
    return found
