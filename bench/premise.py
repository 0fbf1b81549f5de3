"""Does a condition number tell which layer is sensitive? LoRC's schedule (arXiv 2410.03111) supposes that it does.

    python -m bench.premise --handbook FOLDER [--models PATH ...] [--out bench/results/premise.json]

One layer at a time is coded by LoRC at half of its columns (in the model's dtype, fp32; no data is asked), its key
and value projection together and each alone; all others are exact. How much that changes the model is put beside
what may predict it: condition numbers, what LoRC drops of the weights, what the planner predicts, and the layer's
place alone. Text and statistics are those of ``bench.quality``; a model that is named again replaces its part of
the file.

The cumulative condition number of a layer is the product over the layers from it upwards, and no factor is below
1: by rank it always puts layers in the order of their depth. What it has beside the layer's index is in its steps
alone, so the correlation of logarithms (Pearson's) is written too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lorc_fx
from bench.ablation import NOWHERE, Bench, Key
from bench.correlation import spearman
from bench.quality import RESULTS, read_text
from bench.run import command, machine
from bench.scoring import Reference, known
from lorc_fx import models
from lorc_fx.allocate import DROPPED, Columns, predicted
from lorc_fx.calibration import SiteStatistics, basis_of
from lorc_fx.codec import Basis, make_codec, model_segments, prior_basis, through
from lorc_fx.console import write_json
from lorc_fx.factors import Factors, factorise, gram
from lorc_fx.packing import MODEL
from lorc_fx.schedulers.progressive import log_cumulative

SHARE = 0.5
#: what is coded of a layer
PARTS: dict[str, tuple[str, ...]] = {"both": ("key", "value"), "key": ("key",), "value": ("value",)}
#: what may predict -> in words; each is larger where the layer should be the more sensitive
PREDICTORS = {
    "cumulative": "cumulative condition number (LoRC)",
    "kappa": "condition number of the layer",
    "depth": "layers above it",
    "dropped_energy": "energy dropped of the weight",
    "next_singular": "first singular value dropped",
    "planner": "planner's predicted loss, its own columns",
    "second_order": "the same formula, LoRC's columns",
}
#: what is measured: the divergence from the dense model, and the added loss, in nats
MEASURES = ("divergence", "added")


class Layers:
    """The model of ``bench`` with LoRC's factors of each of its sites, and statistics with gradients. Raises
    BadCalibration for statistics of other weights."""

    def __init__(self, bench: Bench, calibration: lorc_fx.Calibration, share: float = SHARE) -> None:
        self.bench, self.share = bench, share
        weights = {site: bench.weight(site) for site in bench.modules}
        self.factors = {site: factorise(w, _name(site)) for site, w in weights.items()}
        self.statistics = {site: calibration.of(_name(site), site[1], w) for site, w in weights.items()}
        self.count = 1 + max(layer for layer, _ in weights)
        conditions = {site: f.condition for site, f in self.factors.items()}
        self.cumulative = log_cumulative([conditions[n, "key"] * conditions[n, "value"] for n in range(self.count)])

    def rank(self, site: Key) -> int:
        """Columns that the site keeps when it is coded."""
        return max(1, int(self.share * len(self.factors[site].singular)))

    def coder(self, site: Key) -> Any:
        """y [N, n] -> y as LoRC reads it back."""
        module, rank = self.bench.modules[site], self.rank(site)
        basis = prior_basis(self.factors[site], module.bias)
        weight, dtype = self.bench.weight(site), module.weight.dtype
        codec = make_codec(weight, module.bias, basis, model_segments(rank), NOWHERE, (), dtype)
        return lambda y: through(codec, basis, y)

    def predictors(self, layer: int, kinds: Sequence[str]) -> dict[str, float]:
        """Every one of ``PREDICTORS`` for these sites of a layer: condition numbers multiplied, all else added up.
        ``cumulative`` is a logarithm, over keys and values whatever ``kinds`` are, as in the paper."""
        sites = [(layer, kind) for kind in kinds]
        found = {
            "cumulative": self.cumulative[layer],
            "kappa": math.prod(self.factors[site].condition for site in sites),
            "depth": float(self.count - 1 - layer),
        }
        of_site = {
            "dropped_energy": lambda s: dropped_energy(self.factors[s], self.rank(s)),
            "next_singular": lambda s: float(self.factors[s].singular[self.rank(s)]),
            "planner": lambda s: planner(self.statistics[s], gram(self.bench.weight(s), _name(s)), self.rank(s)),
            "second_order": lambda s: second_order(
                self.statistics[s], prior_basis(self.factors[s], self.bench.modules[s].bias), self.rank(s)
            ),
        }
        return found | {name: sum(value(site) for site in sites) for name, value in of_site.items()}


def _name(site: Key) -> str:
    return f"layer {site[0]} {site[1]}"


def dropped_energy(factors: Factors, rank: int) -> float:
    """The share of the squared singular values that ``rank`` columns leave out."""
    squares = factors.singular**2
    return float(squares[rank:].sum() / squares.sum())


def planner(site: SiteStatistics, product: torch.Tensor, rank: int) -> float:
    """Nats per token that the planner expects of ``rank`` columns of its own basis; ``product``: W W^T [n, n]."""
    basis = basis_of(site, product)
    columns = Columns(tuple((basis.energy / 2).tolist()), (MODEL, DROPPED), 4, len(basis.means))
    return predicted(columns, model_segments(rank))


def second_order(site: SiteStatistics, basis: Basis, rank: int) -> float:
    """tr(G E[e e^T]) / 2 in nats per token, where e is what the first ``rank`` columns of an orthonormal ``basis``
    leave of y around its one mean: the planner's formula for LoRC's columns. First tokens are not in it."""
    assert site.gradient is not None
    total, outer, mean = site.total / site.tokens, torch.block_diag(*site.outer) / site.tokens, basis.means[0]
    around = outer - torch.outer(total, mean) - torch.outer(mean, total) + torch.outer(mean, mean)
    kept = basis.analysis[:, :rank]
    left = torch.eye(len(total), dtype=outer.dtype) - kept @ kept.T
    return float(torch.trace(torch.block_diag(*site.gradient) / site.gradients @ left @ around @ left)) / 2


def measure(layers: Layers, reference: Reference, layer: int, part: str) -> dict[str, Any]:
    """One row: how far the model is from itself with this part of a layer coded, and what may predict that."""
    sites = [(layer, kind) for kind in PARTS[part]]
    with layers.bench.coded({site: layers.coder(site) for site in sites}):
        scores = reference.scores(layers.bench.model)
    about = {"layer": layer, "part": part, "ranks": [layers.rank(site) for site in sites]}
    return {**about, **scores._asdict(), **layers.predictors(layer, PARTS[part])}


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's for each part, measure and predictor; for the divergence also Pearson's of logarithms."""
    found = []
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        for measured in MEASURES:
            for name in PREDICTORS:
                x, y = [row[name] for row in mine], [row[measured] for row in mine]
                row = {"part": part, "measure": measured, "predictor": name, "spearman": spearman(x, y)}
                if measured == "divergence":
                    row["log_pearson"] = _log_pearson(x if name in ("cumulative", "depth") else _logs(x), _logs(y))
                found.append(row)
    return found


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(max(value, 1e-12)) for value in values]


def _log_pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else None


def study(model: Any, text: Any, calibration: lorc_fx.Calibration) -> dict[str, Any]:
    """All layers of one model in fp32: ``rows`` and their ``correlations``."""
    reference = Reference(model, text.scored)
    layers = Layers(Bench(model, text), calibration)
    rows = []
    for layer in range(layers.count):
        for part in PARTS:
            begin = time.perf_counter()
            row = measure(layers, reference, layer, part)
            rows.append(row)
            told = f"layer {layer} {part}: KL {row['divergence']:.4f}, added {row['added']:+.4f}"
            print(f"{told} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
    about = {"layers": layers.count, "tokens": reference.tokens, "dense_nats": reference.nats}
    about["calibration_tokens"] = sum(map(len, text.calibration))
    return {**about, "rows": rows, "correlations": correlations(rows)}


def trained(checkpoint: str | None) -> dict[str, Any]:
    """How a model of ``bench.models`` was trained; nothing for another."""
    about = Path(checkpoint or "") / "training.json"
    made = json.loads(about.read_text()) if checkpoint and about.exists() else {}
    return {name: made[name] for name in ("steps", "tokens_seen", "held_out_nats") if name in made}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Condition numbers beside how sensitive layers are.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--models", nargs="+", default=[models.DEMO_NAME], help="checkpoints (default: the demo's)")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--calibration-rows", type=int, default=12, help="of 1024 tokens each")
    parser.add_argument("--calibrations", type=Path, default=None, help="a folder to keep statistics in")
    parser.add_argument("--out", type=Path, default=RESULTS / "premise.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    for given in args.models:
        path, name = None if given == models.DEMO_NAME else given, Path(given).name
        model, tokenizer = models.load_model(path, dtype=torch.float32)
        text = read_text(model, tokenizer, path, args.handbook, args.tokens)
        text = text._replace(calibration=text.calibration[: args.calibration_rows])
        calibration = known(model, text.calibration, args.calibrations, name)
        made = {"command": command("premise", argv), **trained(path), **study(model, text, calibration)}
        found = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
        found[name] = made
        write_json(args.out, {"machine": machine(), "dtype": "float32", "share": SHARE, "models": found})


if __name__ == "__main__":
    main()
