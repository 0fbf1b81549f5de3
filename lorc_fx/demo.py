"""The figures of ``lorc demo`` and how they are printed: one model, dense and with a compressed cache."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lorc_fx.calibrate import calibrate
from lorc_fx.calibration import Calibration
from lorc_fx.compat import compile_limits
from lorc_fx.errors import BadModel, QualityWarning
from lorc_fx.evaluate import (
    RECOMPILE_LIMIT,
    Show,
    bytes_per_token,
    cache_bytes,
    chunked_loss,
    decode_speed,
    first_prompt,
    generate_text,
    sample_text,
)
from lorc_fx.latent import cache_nbytes
from lorc_fx.models import DEMO_TITLE, load_model
from lorc_fx.options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, PAPER, Options
from lorc_fx.texts import positions

BACKEND = "lorc"

#: equally long for the demo model's tokenizer (12 tokens), so that they share one compiled prefill
PROMPTS = ("The most important thing to know about rivers is that they", "Most of the water on the planet is salty, so")
CHUNK = 32
#: 15 chunks and the first token: short of the demo model's window of 512, whose filling up would take two more graphs
LOSS_TOKENS = 15 * CHUNK + 1
#: added loss that is called bad
BAD = 0.05
#: what is shown beside the codec that was asked for; the calibrated one if the text has this many tokens left
PAPER_RATIO, CALIBRATED_RATIO, LEAST_CALIBRATION = 0.45, 0.25, FIRST_PROMPT_TOKENS


def run(
    show: Show,
    path: Path | None,
    options: dict[str, Any],
    ratios: Sequence[float] = (),
    dtype: Any = None,
    new_tokens: int = 32,
    loss_tokens: int = LOSS_TOKENS,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:
    """All figures of the demo, ready for JSON. The weights are loaded once; each variant compiles the module anew.

    Losses of compressed models run with ``inner="eager"``: the same function, without inductor's minutes.
    """
    start = time.perf_counter()
    Options.parse(options)  # refuses before anything slow starts
    for ratio in ratios:
        Options.parse({"ratio": ratio})
    model, tokenizer = load_model(path, dtype, show.stage)
    if tokenizer is None:
        raise BadModel(str(path), "it has no tokenizer, and the demo starts from text")
    whole = tokenizer(sample_text()).input_ids
    room = positions(model) or len(whole)
    text = _whole_chunks(whole[: min(loss_tokens, room)])
    inner = options.get("inner", "inductor")
    kept = [name for name in options if name not in ("ratio", "bytes_per_token", "d_min", "d_max", "mode")]
    bare = {name: options[name] for name in kept} | {"inner": "eager"}

    rest = torch.tensor([whole[0], *whole[len(text) :]][:room])  # the first prompt, and what is calibrated on

    dense: dict[str, Any] = {"loss": _loss(show, model, text, "dense")}
    _compile(model, inner)
    dense |= _generations(show, model, tokenizer, prompts, new_tokens, "dense")

    def loss_with(given: dict[str, Any], name: str) -> dict[str, Any]:
        _compile(model, BACKEND, given | {"inner": "eager"})
        if Options.parse(given).calibration == FIRST_PROMPT and len(rest) >= FIRST_PROMPT_TOKENS:
            show.stage(f"First prompt of {len(rest)} other tokens: {name}")
            first_prompt(model, rest)
        return _loss(show, model, text, name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)  # said in the panel, with numbers
        lorc = {"loss": loss_with(options, "lorc")}
        _compile(model, BACKEND, options)  # codecs follow the weights: these are the ones of the first prompt
        lorc |= _generations(show, model, tokenizer, prompts, new_tokens, "lorc")
        sweep = [{"ratio": r} | loss_with(bare | {"ratio": r}, f"lorc at ratio {r:g}") for r in ratios]
        paper = {**PAPER, "ratio": PAPER_RATIO}
        published = [{"ratio": PAPER_RATIO} | loss_with(paper, f"LoRC as published, at ratio {PAPER_RATIO:g}")]
        calibrated = []
        if len(rest) >= LEAST_CALIBRATION:
            known = _calibration(show, model, rest)
            given = {"ratio": CALIBRATED_RATIO, "calibration": known}
            name = f"lorc, calibrated, at ratio {CALIBRATED_RATIO:g}"
            calibrated = [{"ratio": CALIBRATED_RATIO} | loss_with(given, name)]
    torch.compiler.reset()
    seen = len(rest) if len(rest) >= FIRST_PROMPT_TOKENS else 0
    about = {
        "first_prompt_tokens": seen,
        "model": str(path or DEMO_TITLE),
        "dtype": str(model.dtype).removeprefix("torch."),
        "inner": inner,
    }
    about |= {"options": options, "prompts": list(prompts), "new_tokens": new_tokens}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    about |= {"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start, 1)}
    return about | {"dense": dense, "lorc": lorc, "sweep": sweep, "paper": published, "calibrated": calibrated}


def _calibration(show: Show, model: Any, rest: torch.Tensor) -> Calibration:
    show.stage(f"Calibrating on {len(rest)} other tokens")
    torch.compiler.reset()
    model._compiled_call_impl = None
    return calibrate(model, [rest], progress=False)


def _whole_chunks(ids: list[int]) -> list[int]:
    """Without the tail that would be a shorter chunk, and so one more shape to compile."""
    return ids[: (len(ids) - 1) // CHUNK * CHUNK + 1] if len(ids) > CHUNK else ids


def _compile(model: Any, backend: str, options: dict[str, Any] | None = None) -> None:
    """Compile in place, forgetting what was compiled before."""
    torch.compiler.reset()
    extra = {"options": options} if options is not None else {}
    model.compile(backend=backend, **compile_limits(RECOMPILE_LIMIT), **extra)


def _loss(show: Show, model: Any, ids: list[int], name: str) -> dict[str, Any]:
    """Loss of the text in chunks, and the cache that it leaves."""
    show.stage(f"Loss over {len(ids) - 1} tokens in chunks of {CHUNK}: {name}")
    cache = transformers.DynamicCache(config=model.config)
    loss = chunked_loss(model, ids, CHUNK, cache, show.progress)
    return {"nats": loss.nats, "tokens": loss.tokens} | _bytes(cache)


def _bytes(cache: Any) -> dict[str, Any]:
    sizes = {"held": cache_bytes(cache), "used": cache_nbytes(cache, used=True), "per_token": bytes_per_token(cache)}
    return sizes | {"cached_tokens": cache.get_seq_length()}


def _generations(
    show: Show, model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, name: str
) -> dict[str, Any]:
    texts, sizes = [], {}
    for i, prompt in enumerate(prompts):
        show.stage(
            f"Generating {name}, prompt {i + 1} of {len(prompts)}"
            + (" (compiles first: a minute or two)" if i == 0 else "")
        )
        generation = generate_text(model, tokenizer, prompt, new_tokens)
        texts.append(generation.text)
        sizes = _bytes(generation.cache)
    show.stage(f"Timing decode steps: {name}")
    speed = decode_speed(model, tokenizer(prompts[0]).input_ids, max(new_tokens - 1, 1), progress=show.progress)
    return {"texts": texts, "tokens_per_second": speed, "generation": sizes}


# ---------------------------------------------------------------------------------------------------------- printing


def render(result: dict[str, Any], out: Console) -> None:
    """Print what ``run`` returned: texts, figures, and what the budgets cost."""
    dense, lorc = result["dense"], result["lorc"]
    texts = Table(title=f"{result['model']}, greedy, same weights", box=box.ROUNDED, show_lines=True)
    for column in ("prompt", "dense", 'backend="lorc"'):
        texts.add_column(column, ratio=1)
    for cells in zip(result["prompts"], dense["texts"], lorc["texts"], strict=True):
        texts.add_row(*(escape(" ".join(cell.split())) for cell in cells))
    figures = Table(title=f"{result['dtype']}, inner compiler {result['inner']}", box=box.ROUNDED)
    for column in ("", "dense", "lorc", "lorc / dense"):
        figures.add_column(column, justify="left" if column == "" else "right")

    def row(name: str, before: float, after: float, form: str = ",.0f") -> None:
        figures.add_row(name, f"{before:{form}}", f"{after:{form}}", f"{after / before:.3f}" if before else "–")

    row("cache, bytes per token", dense["loss"]["per_token"], lorc["loss"]["per_token"])
    for where, label in (("loss", "the text"), ("generation", "the last prompt")):
        length = dense[where]["cached_tokens"]
        row(f"bytes used after {length} tokens ({label})", dense[where]["used"], lorc[where]["used"])
        row("  bytes held, with spare room", dense[where]["held"], lorc[where]["held"])
    row("decode, tokens/s (batch 1)", dense["tokens_per_second"], lorc["tokens_per_second"], ",.1f")
    row("loss, nats per token", dense["loss"]["nats"], lorc["loss"]["nats"], ".3f")
    figures.add_row("added loss", "", f"{100 * (lorc['loss']['nats'] / dense['loss']['nats'] - 1):+.1f} %", "")
    out.print(texts, figures)
    out.print(_verdict(result))


def _verdict(result: dict[str, Any]) -> Panel:
    """What the budgets cost: added loss, worst news first."""
    base = result["dense"]["loss"]
    points = [result["lorc"]["loss"] | {"codec": "as asked", "ratio": None}]
    points += [point | {"codec": f"ratio {point['ratio']:g}"} for point in result["sweep"]]
    points.sort(key=lambda point: -point["per_token"])
    bad = max(point["nats"] / base["nats"] - 1 for point in points) >= BAD
    points += [point | {"codec": "after `lorc calibrate`"} for point in result["calibrated"]]
    points += [point | {"codec": "LoRC as published"} for point in result["paper"]]
    table = Table(box=box.SIMPLE)
    for column in ("codec", "bytes per token", "of dense", "loss, nats", "added loss"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for point in points:
        added = point["nats"] / base["nats"] - 1
        share = point["per_token"] / base["per_token"]
        cells = [point["codec"], f"{point['per_token']:,.0f}", f"{share:.3f}", f"{point['nats']:.3f}"]
        colour = "green" if added < 0.01 else "yellow" if added < BAD else "red"
        table.add_row(*cells, f"[{colour}]{100 * added:+.1f} %[/{colour}]", style="" if point["ratio"] else "bold")
    title = "Warning: this budget is bad for this model" if bad else "What the budgets cost"
    colour = "red" if bad else "green"
    grid = Table.grid()
    grid.add_row(f"Loss over {base['tokens']} tokens of text, read through the cache in chunks of {CHUNK}.")
    grid.add_row(table)
    grid.add_row(
        "LoRC as published truncates the SVD of the weights, nothing else. Where a model has few kv heads, the energy "
        "of keys and values lies where the data is, not where the weights are: then its row is bad. Others know "
        "the data from one pass over some text: the first prompt, or `lorc calibrate`."
    )
    if bad:
        grid.add_row("Give a calibration, or raise the ratio.")
    return Panel(grid, title=title, border_style=colour)
