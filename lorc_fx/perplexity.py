"""The figures of ``lorc eval`` and how they are printed: loss of a text and needles found, dense beside compressed."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from lorc_fx import needle
from lorc_fx.errors import BadOption, QualityWarning
from lorc_fx.evaluate import Scores, Show, bytes_per_token, compressed, first_prompt, token_scores
from lorc_fx.models import DEMO_TITLE, load_model
from lorc_fx.options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from lorc_fx.texts import positions, read_text, tokenized

PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Asked:
    """What to measure: at most ``tokens`` tokens of the text after its first ``prompt_tokens``, in one pass and in
    chunks of ``chunk``; ``needle_keys`` needles per depth and length of ``needle_lengths`` (tokens; empty: none).

    The first tokens are the unscored prompt of a codec that learns from one; they are left out of all rows, so that
    runs with different calibrations score the same tokens.
    """

    tokens: int = 2048
    prompt_tokens: int = PROMPT_TOKENS
    chunk: int = 32
    needle_lengths: tuple[int, ...] = ()
    needle_keys: int = 2


@dataclass(frozen=True)
class Material:
    """``asked`` of one text, as token ids: ``prompt`` [P], ``scored`` [N + 1], and the needles' prompts."""

    prompt: torch.Tensor
    scored: torch.Tensor
    chunk: int
    needles: list[needle.Prompt]


@dataclass(frozen=True)
class Measured:
    """Of one model: bytes per cached token, scores in one pass and in chunks, needles."""

    per_token: float
    whole: Scores
    chunked: Scores
    trials: list[needle.Trial]


def run(
    show: Show,
    text: Path,
    path: Path | None,
    options: dict[str, Any],
    ratios: Sequence[float] = (),
    dtype: Any = None,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """All figures, ready for JSON: ``rows`` has the dense model first, then one per ratio (none: the default ratio).

    Compressed models run with ``inner="eager"``: the same function, without inductor's minutes. Raises what
    ``Options`` raises (before anything is loaded), BadOption for a text that cannot be read or is too short, BadModel.
    """
    start = time.perf_counter()
    asked = asked or Asked()
    given = [options | {"ratio": ratio} for ratio in ratios] or [options]
    variants = [Options.parse(variant, inner="eager") for variant in given]
    learning = [variant.calibration == FIRST_PROMPT for variant in variants]
    if any(learning) and asked.prompt_tokens < FIRST_PROMPT_TOKENS:
        allowed = f"at least {FIRST_PROMPT_TOKENS} with calibration={FIRST_PROMPT!r}"
        raise BadOption("prompt_tokens", asked.prompt_tokens, allowed, PROMPT_TOKENS)
    written = read_text(text)
    model, tokenizer = load_model(path, dtype, show.stage)
    material = _material(*tokenized(written, tokenizer, path), model, tokenizer, text, asked)
    dense = _measured(show, model, material, "dense")
    rows = [{"name": "dense", "ratio": None} | _figures(dense, dense)]
    for variant, learns in zip(variants, learning, strict=True):
        assert variant.ratio is not None  # the command has no other budget
        name = f"ratio {float(variant.ratio):g}"
        with compressed(model, variant.given()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this plan keeps", QualityWarning)  # the table says it, with numbers
            if learns:
                show.stage(f"First prompt of {len(material.prompt)} tokens: {name}")
                first_prompt(model, material.prompt)
            found = _measured(show, model, material, name)
        rows.append({"name": name, "ratio": float(variant.ratio)} | _figures(found, dense))
    name = str(path or DEMO_TITLE)
    about: dict[str, Any] = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "text": text.name}
    about |= {"options": {name: str(value) for name, value in options.items()}, "tokens": len(material.scored) - 1}
    about |= {"prompt_tokens": asked.prompt_tokens, "chunk": asked.chunk}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    return about | {"seconds": round(time.perf_counter() - start, 1), "rows": rows}


def _material(
    beginning: torch.Tensor, body: torch.Tensor, model: Any, tokenizer: Any, text: Path, asked: Asked
) -> Material:
    """Raises BadOption for a text or lengths that do not fit each other or the model's positions."""
    cut, limit = asked.prompt_tokens, positions(model) or len(beginning) + len(body)
    if len(body) < cut + 2:
        allowed = f"a text of at least {cut + 2} tokens, and this one has {len(body)}"
        raise BadOption("text", str(text), allowed, hint=" Give a longer text, or a smaller --prompt-tokens.")
    # one token more than are scored or read: the first is not scored, and the last is not read
    scored = torch.cat([beginning, body[cut:]])[: min(asked.tokens, limit) + 1]
    needles = needle.prompts(beginning, body, tokenizer, asked.needle_lengths, keys=asked.needle_keys, limit=limit)
    return Material(torch.cat([beginning, body[:cut]])[:limit], scored, asked.chunk, needles)


def _measured(show: Show, model: Any, material: Material, name: str) -> Measured:
    scored = material.scored
    show.stage(f"Loss over {len(scored) - 1} tokens in one pass: {name}")
    whole = token_scores(model, scored, len(scored), progress=show.progress)
    show.stage(f"Loss over {len(scored) - 1} tokens in chunks of {material.chunk}: {name}")
    cache = transformers.DynamicCache(config=model.config)
    chunked = token_scores(model, scored, material.chunk, cache, show.progress)
    trials = []
    if material.needles:
        show.stage(f"{len(material.needles)} needles: {name}")
        trials = needle.retrieve(model, material.needles, show.progress)
    return Measured(bytes_per_token(cache), whole, chunked, trials)


def _figures(found: Measured, dense: Measured) -> dict[str, Any]:
    """Losses in nats per token; ``added`` is a fraction of the dense loss; ``agreement`` the share of positions where
    both models' greedy tokens are the same. All of the one pass but ``nats_chunked``."""
    nats, base = found.whole.mean, dense.whole.mean
    figures = {"per_token": found.per_token, "of_dense": found.per_token / dense.per_token}
    figures |= {"nats": nats, "nats_chunked": found.chunked.mean, "difference": found.chunked.mean - nats}
    figures |= {"perplexity": math.exp(nats), "added": nats / base - 1}
    figures["agreement"] = (found.whole.greedy == dense.whole.greedy).double().mean().item()
    needles = {"needles": needle.summary(dense.trials, found.trials)} if found.trials else {}
    return figures | needles


# ---------------------------------------------------------------------------------------------------------- printing


def render(result: dict[str, Any], out: Console) -> None:
    """Print what ``run`` returned."""
    title = f"{result['model']}, {result['dtype']}: {result['tokens']} tokens of {result['text']}"
    table = Table(title=title, box=box.ROUNDED)
    for name in ("cache", "bytes per token", "of dense", "loss, nats", f"in chunks of {result['chunk']}", "difference"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for name in ("perplexity", "added loss", "same greedy token"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        colour = "green" if row["added"] < 0.01 else "yellow" if row["added"] < 0.05 else "red"
        cells = [row["name"], f"{row['per_token']:,.0f}", f"{row['of_dense']:.3f}", f"{row['nats']:.4f}"]
        cells += [f"{row['nats_chunked']:.4f}", f"{row['difference']:+.4f}", f"{row['perplexity']:,.2f}"]
        table.add_row(*cells, f"[{colour}]{100 * row['added']:+.2f} %[/{colour}]", f"{row['agreement']:.1%}")
    out.print(table)
    if "needles" in result["rows"][0]:
        out.print(needle.table([(row["name"], row["needles"]) for row in result["rows"]]))
