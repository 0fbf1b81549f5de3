"""Checkpoints, texts and calibrations for ``bench.peers_run``, made when they are first needed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import lorc_fx
from bench import models, peers
from bench.quality import Text, read_text
from bench.run import RESULTS
from lorc_fx.models import cache_root, demo_checkpoint, load_model, replaced_whole

MODELS = ("gemma", "gqa", "mha")
#: under ``lorc_fx.models.cache_root()``
FOLDER = "peers-run"


@dataclass(frozen=True)
class Material:
    """What cases of a model need: its checkpoint, what ``weights`` it has, where its losses are (None: it has none),
    ``ids`` of a text, and a saved calibration."""

    checkpoint: Path
    weights: str
    losses: Path | None
    ids: list[int]
    calibration: Path


def material(name: str, handbook: str | None, tokens: int) -> Material:
    """Makes what is not there: a converted or random checkpoint, a calibration. ``tokens``: of the text."""
    folder = cache_root() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    trained = cache_root() / "trained" / name
    if name == "gemma":
        checkpoint, given, weights, losses = demo_checkpoint(), None, "pretrained", RESULTS / "peers.json"
    elif trained.exists():
        about = json.loads((trained / "training.json").read_text())
        checkpoint, given, losses = trained, str(trained), RESULTS / f"peers-{name}.json"
        weights = f"trained, {about['steps']} steps, {about['held_out_nats']:.3f} nats"
    else:
        checkpoint, given, weights, losses = folder / f"{name}-random", None, "random", None
        _random_checkpoint(checkpoint, models.TRAINED[name])
    model, tokenizer = load_model(checkpoint)
    if losses is None:
        rows = [models.random_ids(peers.PROMPT, seed)[0] for seed in range(2, 2 + -(-tokens // peers.PROMPT))]
        text = Text(rows, rows[:4])
    else:
        text = read_text(model, tokenizer, given, handbook, peers.TOKENS)
    ids = torch.cat([text.scored[0][:1], *(row[1:] for row in (*text.scored, *text.calibration))])
    if len(ids) < tokens:
        raise ValueError(f"the text of {name} has {len(ids)} tokens, {tokens} are needed: give fewer --contexts")
    calibration = folder / f"{name}-{weights.partition(',')[0]}.safetensors"
    if not calibration.exists() or calibration.stat().st_mtime < (checkpoint / "config.json").stat().st_mtime:
        print(f"{name}: calibrating on {sum(map(len, text.calibration))} tokens", file=sys.stderr, flush=True)
        lorc_fx.calibrate(model, text.calibration, progress=False).save(calibration)
    return Material(checkpoint, weights, losses, ids[:tokens].tolist(), calibration)


def _random_checkpoint(folder: Path, kv_heads: int) -> None:
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(models.small_llama(kv_heads), dtype=torch.bfloat16)
        with replaced_whole(folder) as new:
            model.save_pretrained(new)
