"""Does the planner's predicted loss order plans as their measured loss does?

    python -m bench.predicted --handbook FOLDER [--out bench/results/predicted.json]
    python -m bench.predicted --plot docs/figures/predicted.svg

Plans of all sorts for Gemma 3 270M with a 16-bit cache, made of statistics with gradients, so that
``Plan.predicted`` is in nats per token; each is measured on other text (that of ``bench.quality``) through the
compiled model, in fp32: the rounding of 16-bit activations is no part of what a planner can predict. With
``--plot`` nothing is measured, and the points of the file are drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lorc_fx
from bench.correlation import spearman
from bench.plots import panels
from bench.quality import RESULTS, read_text
from bench.run import command, machine
from bench.scoring import Reference, known
from lorc_fx import Options, Plan, models
from lorc_fx.console import write_json
from lorc_fx.evaluate import compressed
from lorc_fx.plan_command import planned
from lorc_fx.records import SiteSpec
from lorc_fx.schedulers.common import round_wishes, site_bytes

SQUEEZED_SHARE = 0.4
#: which sites get ``SQUEEZED_SHARE`` of the others' share of their dense bytes
SQUEEZED: dict[str, Callable[[SiteSpec], bool]] = {
    "shallow": lambda site: not _deep(site),
    "deep": lambda site: _deep(site),
    "odd": lambda site: site.layer % 2 == 1,
    "keys": lambda site: site.kind == "key",
    "values": lambda site: site.kind == "value",
}


def _deep(site: SiteSpec) -> bool:
    """Whether it is in the upper half of the whole model's layers."""
    assert site.depth is not None
    return 2 * site.layer > site.depth.last


def squeezing(chosen: Callable[[SiteSpec], bool]) -> Callable[[Sequence[SiteSpec], int, Options], list[int]]:
    """A scheduler, uniform but for the ``chosen`` sites."""

    def scheduler(sites: Sequence[SiteSpec], budget: int, options: Options) -> list[int]:
        shares = [site.dense_bytes * (SQUEEZED_SHARE if chosen(site) else 1) for site in sites]
        unit = budget / sum(shares)
        wishes = [(unit * a - site.fixed_bytes) / site.column_bytes for a, site in zip(shares, sites, strict=True)]
        return site_bytes(sites, round_wishes(sites, wishes, budget))

    return scheduler


for _name, _chosen in SQUEEZED.items():
    lorc_fx.register_scheduler(f"{_name} squeezed")(squeezing(_chosen))

Basis = str | tuple[str, str]
AS_KEYS: Basis = ("identity", "joint")
AS_VALUES: Basis = ("joint", "identity")


@dataclass(frozen=True)
class Setting:
    """The options of one plan beside the calibration; ``ratio`` is of the 16-bit dense cache."""

    ratio: float
    scheduler: str = "loss"
    precision: str = "auto"
    basis: Basis = "joint"

    def options(self, calibration: lorc_fx.Calibration) -> Options:
        return Options.parse(asdict(self), calibration=calibration)


#: two budgets have many plans, so that the order of plans that cost the same can be looked at by itself
SETTINGS: tuple[Setting, ...] = (
    *(Setting(ratio) for ratio in (0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06)),
    *(Setting(ratio, name) for ratio in (0.25, 0.15) for name in ("uniform", "progressive", "energy")),
    *(Setting(ratio, f"{name} squeezed") for ratio in (0.25, 0.15) for name in SQUEEZED),
    Setting(0.25, "loss", "model"),
    Setting(0.25, "uniform", "model"),
    Setting(0.5, "loss", "model"),
    Setting(0.5, "uniform", "model"),
    Setting(0.25, "loss", "int8"),
    Setting(0.25, "uniform", "int8"),
    Setting(0.25, "loss", "int4"),
    Setting(0.15, "loss", "int4"),
    Setting(0.15, "uniform", "int4"),
    Setting(0.35, basis="identity"),
    Setting(0.3, "uniform", basis="identity"),
    Setting(0.25, basis=AS_KEYS),
    Setting(0.25, basis=AS_VALUES),
)
#: a budget with so many plans has a correlation of its own
ENOUGH = 6


def plans(model: Any, settings: Sequence[Setting], calibration: lorc_fx.Calibration) -> list[Plan]:
    """A plan for each of ``settings``, for ``model`` in the dtype that it has; its weights are factorised once per
    basis. Raises what planning raises."""
    made: dict[Setting, Plan] = {}
    for basis in dict.fromkeys(setting.basis for setting in settings):
        mine = [setting for setting in settings if setting.basis == basis]
        made |= dict(zip(mine, planned(model, [setting.options(calibration) for setting in mine]), strict=True))
    return [made[setting] for setting in settings]


def measure(model: Any, reference: Reference, setting: Setting, plan: Plan) -> dict[str, Any]:
    """One row: what the plan predicts, and what it does."""
    assert plan.nats and plan.predicted is not None
    with compressed(model, {"plan": plan, "inner": "eager"}):
        scores = reference.scores(model)
    size = {"bytes": plan.bytes_per_token, "of_dense": plan.bytes_per_token / plan.bytes_per_token_dense}
    return {**asdict(setting), **size, "predicted": plan.predicted, **scores._asdict()}


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's of the predicted loss with added loss and divergence: over all plans, and over those of each
    ratio that has ``ENOUGH``. ``bytes_...``: the same where the order is that of bytes saved."""
    groups: dict[str, list[dict[str, Any]]] = {"all": list(rows)}
    for row in rows:
        groups.setdefault(f"{row['ratio']:g}", []).append(row)
    found = []
    for name, mine in groups.items():
        if name == "all" or len(mine) >= ENOUGH:
            line: dict[str, Any] = {"plans": name, "count": len(mine)}
            for measured in ("added", "divergence"):
                values = [row[measured] for row in mine]
                line[measured] = spearman([row["predicted"] for row in mine], values)
                line[f"bytes_{measured}"] = spearman([-row["bytes"] for row in mine], values)
            found.append(line)
    return found


def label(row: dict[str, Any]) -> str:
    """What sort of plan it is, for a legend."""
    if row["basis"] != "joint":
        return "some or all as they are"
    if row["precision"] != "auto":
        return "one precision for all columns"
    if row["scheduler"].endswith("squeezed"):
        return "half of the sites squeezed"
    return "least predicted loss" if row["scheduler"] == "loss" else "other schedulers"


def draw(result: dict[str, Any], path: Path) -> None:
    """Measured against predicted loss, one point per plan, and the diagonal where they are equal, as SVG."""
    with panels(2, path, figsize=(10, 4.4), sharex=True, sharey=True) as axes:
        for axis, measured, words in zip(axes, ("divergence", "added"), ("KL divergence", "added loss"), strict=True):
            for name in dict.fromkeys(map(label, result["rows"])):
                mine = [r for r in result["rows"] if label(r) == name and r[measured] > 0]
                x, y = [r["predicted"] for r in mine], [r[measured] for r in mine]
                low = [min(r[f"{measured}_error"], 0.9 * r[measured]) for r in mine]  # above 0, for a logarithmic axis
                high = [r[f"{measured}_error"] for r in mine]
                axis.errorbar(x, y, (low, high), fmt="o", markersize=4, linewidth=0.8, label=name)
            ends = [min(r["predicted"] for r in result["rows"]), max(r["predicted"] for r in result["rows"])]
            axis.plot(ends, ends, color="#999999", linewidth=1, zorder=0)
            axis.set(xscale="log", yscale="log", xlabel="predicted loss, nats per token", title=f"measured {words}")
            axis.grid(True, color="#dddddd", linewidth=0.6)
        axes[0].set_ylabel("nats per token")
        axes[0].legend(frameon=False, fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration-rows", type=int, default=12, help="of 1024 tokens each")
    parser.add_argument("--calibrations", type=Path, default=None, help="a folder to keep statistics in")
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted.json")
    parser.add_argument("--plot", type=Path, default=None, help="draw the points of --out here, and measure nothing")
    args = parser.parse_args(argv)
    if args.plot is not None:
        draw(json.loads(args.out.read_text()), args.plot)
        return
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(None, dtype=torch.float32)
    text = read_text(model, tokenizer, None, args.handbook, args.tokens)
    text = text._replace(calibration=text.calibration[: args.calibration_rows])
    calibration = known(model, text.calibration, args.calibrations, models.DEMO_NAME)
    made = plans(models.load_model(None, dtype=torch.bfloat16)[0], SETTINGS, calibration)
    reference = Reference(model, text.scored)
    about = {"model": models.DEMO_NAME, "dtype": "float32", "tokens": reference.tokens, "dense_nats": reference.nats}
    about |= {"calibration_tokens": sum(map(len, text.calibration))}
    rows: list[dict[str, Any]] = []
    for setting, plan in zip(SETTINGS, made, strict=True):
        begin = time.perf_counter()
        rows.append(measure(model, reference, setting, plan))
        told = f"predicted {rows[-1]['predicted']:.4f}, KL {rows[-1]['divergence']:.4f}, added {rows[-1]['added']:+.4f}"
        print(f"{setting}: {told} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        written = {"rows": rows, "correlations": correlations(rows), "command": command("predicted", argv)}
        write_json(args.out, {"machine": machine(), **about, **written})


if __name__ == "__main__":
    main()
