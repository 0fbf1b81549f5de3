"""The commands about the machine: ``lorc doctor``, ``autotune``, ``bench device`` and ``bench decode``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lorc_fx.cli_options import (
    Basis,
    BytesPerToken,
    Calibrated,
    Json,
    ModelPath,
    Precision,
    Ratio,
    Ratios,
    RunsIn,
    Where,
    examples,
    numbers,
)
from lorc_fx.console import DType, Show, out, print_path, reported, wide, write_json
from lorc_fx.errors import BadOption

commands = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure this machine, and models on it.")
commands.add_typer(bench, name="bench")


def add_to(app: typer.Typer) -> None:
    """Make these commands the app's own."""
    app.add_typer(commands)


# ----------------------------------------------------------------------------------------------------------- doctor


@commands.command(epilog=examples("lorc doctor", "lorc doctor --quick --json doctor.json"))
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the run that compiles with inductor.")] = False,
    json_file: Json = None,
) -> None:
    """Versions, compilers, devices, folders and switches: what will work here, and what to do about the rest. Exit code
    1 where something that is needed fails."""
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import doctor as findings

            found = findings.examined(show, not quick)
        if json_file:
            write_json(json_file, findings.plain(found))
    wide().print(findings.table(found))
    if any(f.state == findings.FAIL for f in found):
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------------- autotune


MOST_TOKENS, MOST_BATCH = 1 << 20, 1 << 10


@commands.command(
    epilog=examples(
        "lorc autotune --model ~/models/llama --ratio 0.25 --tokens 2048,8192",
        "lorc autotune --plan plan.json --device cuda --batch 1,8",
    )
)
def autotune(
    model: ModelPath = None,
    plan: Annotated[Path | None, typer.Option(help="The model's plan, from `lorc plan`: tunes what it reads.")] = None,
    ratio: Ratio = None,
    bytes_per_token: BytesPerToken = None,
    calibration: Calibrated = None,
    precision: Precision = None,
    basis: Basis = None,
    dtype: RunsIn = DType.bf16,
    device: Where = "cpu",
    tokens: Annotated[str, typer.Option(help="Cached tokens to tune for, with commas between.")] = "2048,8192",
    batch: Annotated[str, typer.Option(help="Batch rows to tune for, with commas between.")] = "1",
    again: Annotated[bool, typer.Option("--again", help="Also time what is in the database already.")] = False,
    output: Annotated[Path | None, typer.Option(help="The database to write (default: the one that is read).")] = None,
    json_file: Json = None,
) -> None:
    """Time how attention over the model's stored rows runs fastest here; later runs use it. Interrupted, it goes on
    where it stopped."""
    with reported():
        lengths, rows = numbers("tokens", tokens, int, "2048,8192"), numbers("batch", batch, int, "1")
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import autotune as tuner
            from lorc_fx.models import load_model
            from lorc_fx.options import Options

            lengths, rows = tuner.sizes("tokens", lengths, MOST_TOKENS), tuner.sizes("batch", rows, MOST_BATCH)
            where = device_named(device)
            knobs = {"ratio": ratio, "bytes_per_token": bytes_per_token, "calibration": calibration, "basis": basis}
            knobs |= {"precision": precision, "plan": None if plan is None else str(plan)}
            options = {name: value for name, value in knobs.items() if value is not None}
            Options.parse(options)
            loaded, _ = load_model(model, dtype.torch(), show.stage)
            show.stage("Finding what reads stored rows in a decode step")
            problems = tuner.readers(loaded.to(where), options, rows)
            result = tuner.run(show, tuner.jobs(problems, lengths, rows), output, again)
        if json_file and result:
            write_json(json_file, result.json())
    if result is None:
        out.print("Nothing to tune: with these options no attention of a decode step reads stored rows.")
        return
    wide().print(tuner.table(result))
    print_path(result.file)


def device_named(name: str) -> Any:
    """Raises BadOption for a device that is not there."""
    import torch

    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadOption("device", name, "a device that torch has here", "cpu") from error
    return chosen


# ------------------------------------------------------------------------------------------------------------ bench


@bench.command("device", epilog=examples("lorc bench device", "lorc bench device --device cuda --json device.json"))
def bench_device(
    device: Where = "cpu",
    json_file: Json = None,
) -> None:
    """What the device does at best, measured: the figures that predictions of time are made of."""
    with reported():
        with Show() as show:
            show.stage("Importing torch")
            from lorc_fx.device import measured

            chosen = device_named(device)
            show.stage("Measuring")
            found = measured(chosen)
        if json_file:
            write_json(json_file, vars(found))
    out.print(
        f"{found.name}: reads {found.bandwidth / 1e9:.1f} GB/s, multiplies {found.flops / 1e9:.0f} GFLOP/s (fp32)"
        + (f", with stored rows {found.products / 1e9:.0f}" if math.isfinite(found.products) else "")
        + (f", unpacks {found.numbers / 1e9:.1f} billion numbers/s" if math.isfinite(found.numbers) else "")
    )


@bench.command(
    "decode",
    epilog=examples(
        "lorc bench decode --tokens 512,2048",
        "lorc bench decode --model ~/models/llama --ratio 0.45 --ratio 0.25 --batch 4 --device cuda",
    ),
)
def bench_decode(
    model: ModelPath = None,
    ratio: Ratios = None,
    calibration: Calibrated = None,
    precision: Precision = None,
    basis: Basis = None,
    tokens: Annotated[str, typer.Option(help="Cached tokens, with commas between.")] = "512,2048",
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Batch rows.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each model, in turns; medians are shown.")] = 9,
    static: Annotated[bool, typer.Option("--static", help="With static caches instead of dynamic ones.")] = False,
    inner: Annotated[str, typer.Option(help="The compiler of all models.")] = "inductor",
    dtype: RunsIn = DType.bf16,
    device: Where = "cpu",
    json_file: Json = None,
) -> None:
    """Decode steps of a model, dense beside compressed, in turns; and the bytes that both caches hold."""
    with reported():
        lengths = numbers("tokens", tokens, int, "512,2048")
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import decode_command
            from lorc_fx.autotune import sizes
            from lorc_fx.models import DEMO_TITLE, load_model

            lengths, where = sizes("tokens", lengths, MOST_TOKENS), device_named(device)
            knobs = {"calibration": calibration, "precision": precision, "basis": basis, "inner": inner}
            options = {name: value for name, value in knobs.items() if value is not None}
            ways = decode_command.ways(options, ratio or ())
            loaded, _ = load_model(model, dtype.torch(), show.stage)
            asked = decode_command.Asked(tuple(lengths), batch, repeats, static, inner)
            result = decode_command.run(show, loaded.to(where), ways, asked)
        result = {"model": str(model or DEMO_TITLE), "dtype": dtype.value} | result
        if json_file:
            write_json(json_file, result)
    wide().print(decode_command.table(result))
