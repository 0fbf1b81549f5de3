"""Loss against bytes on a real model: LoRC as published beside calibrated codecs, on held-out text.

    python -m bench.quality --handbook FOLDER [--ratios 0.5 0.25] [--out bench/results/quality.json]
    python -m bench.quality --model ~/.cache/lorc_fx/trained/mha --out bench/results/quality-mha.json

The text is the English pages of the Debian handbook (``bench.texts``), or what a model of ``bench.models`` holds out:
the loss is that of ``--tokens`` tokens, in one piece where the model knows that many positions (results do not depend
on the pieces: tests/test_calibration.py); statistics come from others before and after them. The model runs in bf16
unless ``--dtype`` says otherwise, so ratios are of the 16-bit dense cache. Methods that are not named in ``--methods``
keep their rows in the file.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lorc_fx
from bench.prompted import mean_nats
from bench.run import RESULTS, command, machine, say
from bench.texts import handbook
from bench.training import HELD_OUT
from lorc_fx import models
from lorc_fx.console import write_json
from lorc_fx.evaluate import compressed, first_prompt

RATIOS = (0.5, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)
CALIBRATION_TOKENS, ROW, SKIP = 24_576, 1024, 12_000

FIRST, GRADIENTS = "first prompt", "calibrated with gradients"

#: name -> options beside the ratio and the calibration; the first prompt is the first row to calibrate on
METHODS: dict[str, dict[str, Any]] = {
    "LoRC, uniform": {**lorc_fx.PAPER, "scheduler": "uniform"},
    "LoRC, progressive": dict(lorc_fx.PAPER),
    FIRST: {"basis": "joint"},
    f"{FIRST}, as they are": {"basis": "identity"},
    f"{FIRST}, auto": {},
    "calibrated": {"basis": "joint"},
    "calibrated, auto": {},
    "calibrated, by heads": {"basis": "grouped"},
    "calibrated, by two heads": {"basis": "grouped", "group_size": 2},
    GRADIENTS: {"basis": "joint"},
}
BY_HEADS = [name for name, given in METHODS.items() if given.get("basis") == "grouped"]
"""Not of the default: a model of one cached head has one group."""


class Text(NamedTuple):
    """Token ids of held-out text: rows [N] to score, and other rows to calibrate on; the first token begins each."""

    scored: list[torch.Tensor]
    calibration: list[torch.Tensor]


def read_text(model: Any, tokenizer: Any, checkpoint: str | None, folder: str | None, tokens: int) -> Text:
    """What a checkpoint of ``bench.models`` holds out, else the handbook; no row is longer than the model knows."""
    own = Path(checkpoint or "") / HELD_OUT
    text = own.read_text(encoding="utf-8") if checkpoint and own.exists() else handbook(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    first, body, longest = ids[:1], ids[1:], model.config.max_position_embeddings - 1

    def rows(part: torch.Tensor, length: int) -> list[torch.Tensor]:
        return [torch.cat([first, row]) for row in part.split(min(length, longest))]

    others = rows(body[:SKIP], ROW - 1) + rows(body[SKIP + tokens :], ROW - 1)
    return Text(rows(body[SKIP : SKIP + tokens], tokens), others[: CALIBRATION_TOKENS // ROW])


@torch.no_grad()
def loss_of(model: Any, rows: Sequence[torch.Tensor]) -> float:
    """Mean next-token loss in nats over ``rows`` [N], each in one piece."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None, :-1], use_cache=True).logits[0]
        total += mean_nats(logits, row[1:]) * (len(row) - 1)
    return total / sum(len(row) - 1 for row in rows)


def calibrations(
    model: Any, text: Text, methods: Sequence[str], checkpoint: str | None
) -> dict[str, lorc_fx.Calibration]:
    """One for each of the calibrated ``methods``."""
    made: dict[str, lorc_fx.Calibration] = {}
    asked = [method for method in methods if method.startswith("calibrated")]
    if GRADIENTS in asked:
        exact, _ = models.load_model(checkpoint, dtype=torch.float32)  # gradients in 16 bits lose too much
        made[GRADIENTS] = lorc_fx.calibrate(exact, text.calibration, gradients=True, progress=False)
        asked.remove(GRADIENTS)
    if asked:
        made |= dict.fromkeys(asked, lorc_fx.calibrate(model, text.calibration, progress=False))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Loss against bytes.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--model", default=None, help="a local checkpoint (default: the demo's model)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    usual = [method for method in METHODS if method not in BY_HEADS]
    parser.add_argument("--methods", nargs="+", default=usual, choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(args.model, dtype=getattr(torch, args.dtype))
    text = read_text(model, tokenizer, args.model, args.handbook, args.tokens)
    dense = loss_of(model, text.scored)
    say(f"dense {dense:.4f} nats")
    made = calibrations(model, text, args.methods, args.model)
    measured = {
        "model": args.model or models.DEMO_NAME,
        "dtype": args.dtype,
        "tokens": sum(len(row) - 1 for row in text.scored),
        "calibration_tokens": sum(map(len, text.calibration)),
        "first_prompt_tokens": len(text.calibration[0]),
        "dense_nats": dense,
    }
    rows = _kept(args.out, measured)
    for method in args.methods:
        rows = [row for row in rows if row["method"] != method]
        for ratio in args.ratios:
            given = {**METHODS[method], "ratio": ratio, "inner": "eager"}
            if method in made:
                given["calibration"] = made[method]
            begin = time.perf_counter()
            more = {}
            with compressed(model, given):
                if method.startswith(FIRST):
                    first_prompt(model, text.calibration[0])
                    errors = [site.measured for site in lorc_fx.fidelity(model)]
                    more = {"worst_error": max(errors), "sites_above_0.3": sum(e > 0.3 for e in errors)}
                loss = loss_of(model, text.scored)
            rows.append({"method": method, "ratio": ratio, "nats": loss, "added": loss / dense - 1, **more})
            say(f"{method} at {ratio}: {100 * (loss / dense - 1):+.2f} % ({time.perf_counter() - begin:.0f} s)")
        rows.sort(key=lambda row: list(METHODS).index(row["method"]))
        about = {"machine": machine(), **measured}
        write_json(args.out, about | {"rows": rows, "command": command("quality", argv)})


def _kept(path: Path, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run in ``path``, if it measured the same."""
    old = json.loads(path.read_text()) if path.exists() else {}
    if not old or {name: old.get(name) for name in measured} == measured:
        return list(old.get("rows", ()))
    say(f"{path} was measured otherwise: all its rows are replaced")
    return []


if __name__ == "__main__":
    main()
