"""Loss against bytes on a real model: LoRC as published beside calibrated codecs, on held-out text.

    python -m bench.quality --handbook FOLDER [--ratios 0.5 0.25] [--gradients] [--out bench/results/quality.json]

The text is the English pages of the Debian handbook (``bench.texts``): statistics come from its first tokens, the loss
from ``--tokens`` others, in one piece (results do not depend on the pieces: tests/test_calibration.py). The model runs
in bf16, so ratios are of the 16-bit dense cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lorc_fx
from bench.run import machine
from bench.texts import handbook
from lorc_fx import models
from lorc_fx.console import write_json

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.5, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)
CALIBRATION_TOKENS, ROW, SKIP = 8192, 1024, 12_000

#: name -> options beside the ratio and the calibration
METHODS: dict[str, dict[str, Any]] = {
    "LoRC, uniform": {**lorc_fx.PAPER, "scheduler": "uniform"},
    "LoRC, progressive": dict(lorc_fx.PAPER),
    "calibrated": {"scheduler": "loss", "precision": "auto"},
    "calibrated with gradients": {"scheduler": "loss", "precision": "auto"},
}


@torch.no_grad()
def loss_of(model: Any, ids: torch.Tensor) -> float:
    """Mean next-token loss in nats over ``ids`` [1, N]; logits in fp32, 512 tokens at a time."""
    hidden = model(input_ids=ids, use_cache=True, output_hidden_states=False, logits_to_keep=0).logits[0]
    total = 0.0
    for start in range(0, ids.shape[1] - 1, 512):
        piece = hidden[start : min(start + 512, ids.shape[1] - 1)].float()
        want = ids[0, start + 1 : start + 1 + len(piece)]
        total += float(torch.nn.functional.cross_entropy(piece, want, reduction="sum"))
    return total / (ids.shape[1] - 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Loss against bytes.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--model", default=None, help="a local checkpoint (default: the demo's model)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    model, tokenizer = models.load_model(args.model)
    ids = tokenizer(handbook(args.handbook), return_tensors="pt").input_ids[0]
    first, body = ids[:1], ids[1:]
    scored = torch.cat([first, body[SKIP : SKIP + args.tokens]])[None]
    rows = [torch.cat([first, part]) for part in body[:CALIBRATION_TOKENS].split(ROW - 1)]
    dense = loss_of(model, scored)
    _say(f"dense {dense:.4f} nats")
    made: dict[str, lorc_fx.Calibration] = {}
    if "calibrated" in args.methods:
        made["calibrated"] = lorc_fx.calibrate(model, rows, progress=False)
    if "calibrated with gradients" in args.methods:
        exact, _ = models.load_model(args.model, dtype=torch.float32)  # gradients in 16 bits lose too much
        made["calibrated with gradients"] = lorc_fx.calibrate(exact, rows, gradients=True, progress=False)
        del exact
    found = []
    for method in args.methods:
        for ratio in args.ratios:
            given = {**METHODS[method], "ratio": ratio, "inner": "eager"}
            if method in made:
                given["calibration"] = made[method]
            torch._dynamo.reset()
            model.compile(backend="lorc", options=given)
            begin = time.perf_counter()
            loss = loss_of(model, scored)
            found.append({"method": method, "ratio": ratio, "nats": loss, "added": loss / dense - 1})
            _say(f"{method} at {ratio}: {100 * (loss / dense - 1):+.2f} % ({time.perf_counter() - begin:.0f} s)")
            model._compiled_call_impl = None
    write_json(
        args.out,
        {
            "machine": machine(),
            "model": args.model or models.DEMO_NAME,
            "dtype": "bfloat16",
            "tokens": args.tokens,
            "calibration_tokens": CALIBRATION_TOKENS,
            "dense_nats": dense,
            "rows": found,
            "command": f"python -m bench.quality {' '.join(argv if argv is not None else sys.argv[1:])}",
        },
    )
    _say(json.dumps({"written": str(args.out)}))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
