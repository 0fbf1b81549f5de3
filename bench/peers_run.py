"""Peers in one run: loss, bytes, prefill and decode time and peak memory of each cache, in 16 bits.

    python -m bench.peers_run [--handbook FOLDER] [--models gemma gqa mha] [--contexts 512 2048 8192]
        [--peers dynamic lorc ...] [--no-losses] [--no-steps | --no-times] [--out bench/results/peers-run.json]

Losses and the bytes they belong to are those of ``bench.peers``; groups that its file for a model lacks are measured by
it first (``--no-steps``: nothing else is). Then each peer, model and context has a process of its own
(``bench.peer_steps``). DynamicCache without a compiler comes first and last of each context, and times are given as
shares of the mean of the two; how far they differ is the drift. kvpress's are shares of DynamicCache's in its own
environment, which has an older transformers. ``--no-times``: bytes and peaks only, for a machine that is not idle.

What is in the file is not measured again, unless it has no times and they are wanted. The small Llamas are those of
``bench.models`` if they have been trained, else the same shapes with random weights and without losses. The trained
ones know 1024 positions: what longer contexts show of them is time and memory, not sense.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import kvpress_rows, peers
from bench.environments import environment
from bench.peer_steps import WARMUP, Case
from bench.peers_material import FOLDER, MODELS, Material, material
from bench.run import RESULTS, command, machine, say
from lorc_fx.console import write_json
from lorc_fx.models import cache_root

CONTEXTS = (512, 2048, 8192)
STEPS = 15
#: prefills of a context that are timed: a long one takes many seconds
PREFILLS = {512: 5, 2048: 3}
QUANTIZERS = ("optimum-quanto>=0.2.7", "hqq>=0.2.8")
OWN, QUANT, KVPRESS = "own", "quantizers", "kvpress"
#: of a model without a file of losses
LORC_RATIOS = (0.5, 0.298)
PRESSED = 0.5
Row = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """One way to keep a cache. ``kind`` and ``given`` are those of ``peer_steps.Case``; ``environment`` is where it
    runs; ``loss`` its (peer, setting, protocol) in the file of ``bench.peers``."""

    name: str
    kind: str
    given: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    environment: str = OWN
    loss: tuple[str, str, str] | None = None


BASE = Peer("DynamicCache", "dynamic", loss=("dense", "", "chunks"))
KVPRESS_BASE = Peer("DynamicCache, kvpress's transformers", "press", environment=KVPRESS)
BASES = {OWN: BASE, QUANT: BASE, KVPRESS: KVPRESS_BASE}


def peers_of(losses: Sequence[Row]) -> list[Peer]:
    """All but the base, in the order in which they are measured. lorc gets the bytes of LoRC as published, and those of
    hqq at 4 bits: ``losses`` of a model say how many these are."""
    keys = "int4, keys by channel"
    by_channel = {"backend": "quanto", **peers.QUANTIZED["quanto"][keys]}
    hqq = {"backend": "hqq", **peers.QUANTIZED["hqq"]["int4"]}
    found = [
        Peer("DynamicCache, inductor", "dynamic", compiled=True, loss=BASE.loss),
        Peer("StaticCache, inductor", "static", compiled=True, loss=("static", "", "chunks")),
        Peer(f"quanto, {keys}", "quantized", by_channel, environment=QUANT, loss=("quanto", keys, "chunks")),
        Peer("hqq, int4", "quantized", hqq, environment=QUANT, loss=("hqq", "int4", "chunks")),
    ]
    for press in kvpress_rows.PRESSES:
        given = {"name": press, "compression": PRESSED}
        loss = ("kvpress", f"{press} {PRESSED:g}", "prompt")
        found.append(Peer(f"kvpress, {press} {PRESSED:g}", "press", given, environment=KVPRESS, loss=loss))
    ratio = peers.PUBLISHED
    loss = ("straightforward", f"{ratio:g}", "chunks")
    found.append(Peer(f"LoRC, straightforward, {ratio:g}", "straightforward", {"ratio": ratio}, loss=loss))
    for ratio in lorc_ratios(losses):
        loss = ("lorc", f"{peers.AUTO}, {ratio:g}", "chunks")
        found.append(Peer(f"lorc, {ratio:g}", "lorc", {"ratio": ratio}, compiled=True, loss=loss))
    return found


def lorc_ratios(losses: Sequence[Row]) -> tuple[float, ...]:
    """Those that have a loss with the options that are timed; else ``LORC_RATIOS``."""
    settings = [row["setting"] for row in losses if row["peer"] == "lorc" and row["protocol"] == "chunks"]
    start = f"{peers.AUTO}, "
    return tuple(float(s.removeprefix(start)) for s in settings if s.startswith(start)) or LORC_RATIOS


def losses_of(made: Material, pythons: dict[str, Path], handbook: str | None, missing_too: bool) -> list[Row]:
    """The rows of ``bench.peers`` for a model. ``missing_too``: groups that its file lacks are measured now."""
    if made.losses is None:
        return []
    known = json.loads(made.losses.read_text())["groups"] if made.losses.exists() else {}
    missing = [group for group in peers.GROUPS if group not in known]
    if missing and missing_too:
        own = not made.weights.startswith("pretrained")
        more = ["--model", str(made.checkpoint), "--prompt", "512"] if own else []
        more += ["--handbook", handbook] if handbook else []
        more += ["--kvpress-venv", str(pythons[KVPRESS].parents[1])]
        command = [pythons[QUANT], "-m", "bench.peers", "--only", *missing, "--out", made.losses, *more]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return json.loads(made.losses.read_text())["rows"] if made.losses.exists() else []


def loss_row(peer: Peer, losses: Sequence[Row]) -> Row:
    """What the table says of a peer's loss: ``added`` and ``fraction`` of the bytes, None where it was not measured."""
    for row in losses:
        if (row["peer"], row["setting"], row["protocol"]) == peer.loss:
            return {"peer": peer.name} | {key: row[key] for key in ("protocol", "nats", "added", "fraction")}
    return {"peer": peer.name, "protocol": None, "nats": None, "added": None, "fraction": None}


def measured(peer: Peer, made: Material, context: int, python: Path, args: argparse.Namespace) -> Row:
    """The row of one process."""
    given = peer.given | ({"calibration": str(made.calibration)} if peer.kind == "lorc" else {})
    case = Case(
        kind=peer.kind,
        given=given,
        compiled=peer.compiled,
        checkpoint=str(made.checkpoint),
        ids=made.ids[: context + WARMUP + args.steps],
        context=context,
        prefills=1 if args.no_times else PREFILLS.get(context, 1),
        steps=args.steps,
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "case.json"), Path(name, "out.json")
        source.write_text(json.dumps(asdict(case)))
        subprocess.run(
            [python, "-m", "bench.peer_steps", source, target],
            check=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_root() / FOLDER / "inductor")},
        )
        found = json.loads(target.read_text())
    if args.no_times:
        found |= dict.fromkeys(("prefill_s", "decode_s", "prefill_median_s", "decode_median_s"))
    return {"peer": peer.name, "environment": peer.environment, "context": context, "timed": not args.no_times} | found


def related(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """``rows`` with ``prefill_ratio`` and ``decode_ratio`` to the mean of their session's bases, and how far the bases
    that began and ended each session are apart."""
    timed = [row for row in rows if row["timed"]]
    found = []
    for row in rows:
        base = BASES[row["environment"]].name
        mine = [r for r in timed if r["session"] == row["session"] and r["peer"] == base]
        ratios: dict[str, float | None] = dict.fromkeys(("prefill_ratio", "decode_ratio"))
        if row["timed"] and mine:
            for what in ("prefill", "decode"):
                ratios[f"{what}_ratio"] = row[f"{what}_median_s"] / statistics.mean(r[f"{what}_median_s"] for r in mine)
        found.append({**row, **ratios})
    drift = []
    for session in dict.fromkeys(row["session"] for row in timed):
        ends = {r["when"]: r for r in timed if r["session"] == session and r["when"]}
        if len(ends) == 2:
            start, end = ends["start"], ends["end"]
            apart = {what: end[f"{what}_median_s"] / start[f"{what}_median_s"] - 1 for what in ("prefill", "decode")}
            drift.append({key: end[key] for key in ("session", "model", "context")} | apart)
    return found, drift


def wanting(chosen: Sequence[Peer], rows: Sequence[Row], model: str, context: int, timed: bool) -> list[Peer]:
    """The peers that have no row of this case, or none with times though they are wanted."""
    known = {r["peer"] for r in rows if (r["model"], r["context"]) == (model, context) and (r["timed"] or not timed)}
    return [peer for peer in chosen if peer.name not in known]


def one_context(name: str, made: Material, context: int, chosen: Sequence[Peer], run: Run) -> None:
    """Measure what is missing of a model and context, the base around it; rows go to the file one by one."""
    todo = wanting(chosen, run.result["rows"], name, context, not run.args.no_times)
    base = wanting([BASE], run.result["rows"], name, context, not run.args.no_times)
    if not todo and not base:
        return
    order = [(BASE, "start"), *((peer, "") for peer in todo if peer.environment != KVPRESS)]
    pressed = [(peer, "") for peer in todo if peer.environment == KVPRESS]
    order += [(KVPRESS_BASE, ""), *pressed] if pressed else []
    order += [] if run.args.no_times else [(BASE, "end")]
    here = machine() | {"threads": run.args.threads}
    session = f"{name}, {context}, {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}"
    for peer, when in order:
        say(f"{name}, {context} tokens: {peer.name}")
        row = {"model": name, "session": session, "when": when, "machine": here}
        try:
            row |= measured(peer, made, context, run.pythons[peer.environment], run.args)
        except subprocess.CalledProcessError as error:
            case = {"model": name, "context": context, "peer": peer.name}
            run.result["failed"].append(case | {"code": error.returncode})
            say(f"  its process ended with {error.returncode}")
            write_json(run.args.out, run.result)
            continue
        same = (name, context, peer.name, when)
        kept = [r for r in run.result["rows"] if (r["model"], r["context"], r["peer"], r["when"]) != same or r["timed"]]
        run.result["rows"], run.result["drift"] = related([*kept, row])
        write_json(run.args.out, run.result)


@dataclass
class Run:
    """The command line, an interpreter for each environment, and what is written."""

    args: argparse.Namespace
    pythons: dict[str, Path]
    result: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Loss, bytes, time and peak memory of caches, in one run.")
    parser.add_argument("--handbook", default=None, help="where the debian-handbook package was unpacked")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--peers", nargs="+", default=[], help="names, or beginnings of names; all if there are none")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-steps", action="store_true", help="environments, checkpoints and losses only")
    parser.add_argument("--no-losses", action="store_true", help="those that were never measured stay open")
    parser.add_argument("--no-times", action="store_true", help="bytes and peaks only")
    parser.add_argument("--venvs", type=Path, default=cache_root(), help="a folder for the two environments")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers-run.json")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    pythons = {
        OWN: Path(sys.executable),
        QUANT: environment(args.venvs / "quantizers-venv", QUANTIZERS, borrow=True),
        KVPRESS: environment(args.venvs / "kvpress-venv", kvpress_rows.REQUIREMENTS),
    }
    result = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}, "losses": [], "rows": []}
    if not args.no_steps or not result["rows"]:
        result |= {"machine": machine() | {"threads": args.threads}, "command": command("peers_run", argv)}
    result |= {"dtype": "bfloat16", "failed": []}
    run = Run(args, pythons, result)
    for name in args.models:
        made = material(name, args.handbook, max(args.contexts) + WARMUP + args.steps)
        losses = losses_of(made, pythons, args.handbook, not args.no_losses)
        chosen = peers_of(losses)
        result["models"][name] = {"weights": made.weights}
        result["losses"] = [row for row in result["losses"] if row["model"] != name]
        result["losses"] += [{"model": name} | loss_row(peer, losses) for peer in (BASE, *chosen)]
        write_json(args.out, result)
        wanted = [peer for peer in chosen if not args.peers or peer.name.startswith(tuple(args.peers))]
        for context in [] if args.no_steps else args.contexts:
            one_context(name, made, context, wanted, run)
    say(f"written to {args.out}")


if __name__ == "__main__":
    main()
