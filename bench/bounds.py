"""How tight bounds are: certificates of real and trained models.

    python -m bench.bounds --handbook FOLDER [--model ~/.cache/lorc_fx/trained/mha] [--out bench/results/bounds.json]

A prompt of held-out text, codecs of another text before it (``calibrate``, without gradients). Each model keeps
its rows in the file."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lorc_fx
from bench.quality import read_text
from bench.run import RESULTS, machine
from lorc_fx import models
from lorc_fx.console import write_json

TOKENS = 128
#: name -> options
WAYS: dict[str, dict[str, Any]] = {
    "LoRC, 0.5": {**lorc_fx.PAPER, "ratio": 0.5},
    "calibrated, 0.5": {"basis": "joint", "ratio": 0.5},
    "calibrated, 0.25": {"basis": "joint", "ratio": 0.25},
    "auto, 0.5": {"ratio": 0.5},
    "int8 as it is": {"basis": "identity", "ratio": 0.52},
}


def row(certificate: lorc_fx.Certificate) -> dict[str, Any]:
    """Medians over sites and layers of the slack (bound / measured, itself a median over tokens), the least and the
    largest, and what is said of logits."""
    layers = certificate.layers
    slacks = {
        "site": [s.error.slack for s in certificate.sites],
        "attention": [x.alone.slack for x in layers],
        "attention, errors known": [x.linearised.slack for x in layers if x.linearised is not None],
    }
    found: dict[str, Any] = {
        name: {"median": statistics.median(values), "least": min(values), "largest": max(values)}
        for name, values in slacks.items()
        if values
    }
    network = [x.network.slack for x in layers]
    return {
        **found,
        "network": network,
        "gain": _gain(network),
        "logits": certificate.json()["logits"],
        "sound": certificate.sound,
        "unbounded": list(certificate.unbounded),
    }


def _gain(network: Sequence[float]) -> float:
    """By what factor the slack grows from one layer to the next (geometric mean)."""
    finite = [x for x in network if 0 < x < float("inf")]
    return (finite[-1] / finite[0]) ** (1 / (len(finite) - 1)) if len(finite) > 1 else 1.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--model", default=None, help="a local checkpoint (default: the demo's model)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=RESULTS / "bounds.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(args.model, dtype=torch.bfloat16)
    text = read_text(model, tokenizer, args.model, args.handbook, args.tokens)
    exact, _ = models.load_model(args.model, dtype=torch.float32)  # some CPUs take ten times as long in 16 bits
    statistics_of = lorc_fx.calibrate(exact, text.calibration, progress=False)
    del exact
    name = Path(args.model).name if args.model else models.DEMO_NAME
    old = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = [r for r in old if r["model"] != name or r["way"] not in args.ways]
    for way in args.ways:
        begin = time.perf_counter()
        given = dict(WAYS[way])
        if not way.startswith("LoRC"):
            given["calibration"] = statistics_of
        made = row(lorc_fx.certify(model, text.scored[0][: args.tokens], options=given))
        rows.append({"model": name, "way": way, "tokens": args.tokens, **made})
        print(f"{name}, {way}: {_said(made)} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        command = "python -m bench.bounds, for each --model"
        write_json(args.out, {"machine": machine(), "command": command, "rows": rows})


def _said(made: dict[str, Any]) -> str:
    parts = [f"{k} {made[k]['median']:.2f}" for k in ("site", "attention", "attention, errors known") if k in made]
    ends = f"network {made['network'][0]:.3g} .. {made['network'][-1]:.3g}"
    return ", ".join([*parts, ends, f"sound {made['sound']}"])


if __name__ == "__main__":
    main()
