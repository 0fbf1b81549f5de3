"""The command ``lorc report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorc_fx.cli_options import (
    Basis,
    BytesPerToken,
    Calibrated,
    GroupSize,
    Json,
    ModelPath,
    Objective,
    Precision,
    Ratio,
    RunsIn,
    Scheduler,
    examples,
    numbers,
)
from lorc_fx.console import DType, Show, print_path, reported, write_json

SWEEP, NEEDLES, STEPS = "0.6,0.45,0.35,0.25,0.15", "256,512,1024", "512,2048"


def add_to(app: typer.Typer) -> None:
    """Make this command one of the app's own."""
    app.command(
        epilog=examples(
            "lorc report report.html",
            "lorc report report.html --model ~/models/llama --ratio 0.25 --calibration known.safetensors",
            "lorc report report.html --text book.txt --measure --needle --time --json report.json",
        )
    )(report)


def report(
    output: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    model: ModelPath = None,
    ratio: Ratio = None,
    bytes_per_token: BytesPerToken = None,
    scheduler: Scheduler = None,
    precision: Precision = None,
    basis: Basis = None,
    group_size: GroupSize = None,
    objective: Objective = None,
    calibration: Calibrated = None,
    dtype: RunsIn = DType.bf16,
    sweep: Annotated[str, typer.Option(help="Ratios of the curve of loss against bytes; '' for none.")] = SWEEP,
    text: Annotated[Path | None, typer.Option(help="Text for the first prompt, --measure and --needle.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the curve's losses on the text.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to measure on, at most.")] = 4096,
    needle: Annotated[bool, typer.Option("--needle", help="Also hide numbers in the text and ask for them.")] = False,
    needle_lengths: Annotated[str, typer.Option(help="Tokens of the needles' prompts.")] = NEEDLES,
    needle_keys: Annotated[int, typer.Option(min=1, help="Needles per length and depth.")] = 2,
    time: Annotated[bool, typer.Option("--time", help="Also time decode steps, dense and coded in turns.")] = False,
    time_tokens: Annotated[str, typer.Option(help="Cached tokens before the timed steps.")] = STEPS,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each model; medians are shown.")] = 5,
    inner: Annotated[str, typer.Option(help="The compiler of the timed models.")] = "inductor",
    json_file: Json = None,
) -> None:
    """Write one HTML page about a model's cache: spectra, condition numbers, bytes, loss, retrieval, decode time, and
    what matched and why not. It needs the extra plot, and opens without a network."""
    with reported():
        ratios = tuple(numbers("sweep", sweep, float, SWEEP))
        hidden = tuple(numbers("needle_lengths", needle_lengths, int, NEEDLES)) if needle else ()
        lengths = numbers("time_tokens", time_tokens, int, STEPS) if time else []
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import html_report
            from lorc_fx.autotune import sizes
            from lorc_fx.cli_machine import MOST_TOKENS
            from lorc_fx.options import Options

            timed = tuple(sizes("time_tokens", lengths, MOST_TOKENS)) if time else ()
            knobs: dict[str, Any] = {"precision": precision, "calibration": calibration, "scheduler": scheduler}
            knobs |= {"basis": basis, "group_size": group_size, "objective": objective}
            options = Options.parse({}, ratio=ratio, bytes_per_token=bytes_per_token, **knobs)
            asked = html_report.Asked(
                ratios, text, measure, tokens, hidden, needle_keys, timed, repeats=repeats, inner=inner
            )
            html_report.check(output, json_file, asked, options)
            found = html_report.gathered(show, model, dtype.torch(), options, asked)
            show.stage("Drawing")
            page = html_report.render(found)
            html_report.write(output, page)
        if json_file:
            write_json(json_file, found)
    print_path(output)
