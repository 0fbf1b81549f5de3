"""The command line: ``lorc demo``, ``explain``, ``calibrate``, ``eval``, ``lm-eval``, ``plan``, ``autotune`` and
``bench device``.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 a model or file that cannot be used, 2 an option that is
refused, 130 Ctrl-C. Typed errors are one red message without a traceback.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lorc_fx.console import DType, Show, out, reported, wide, write_json
from lorc_fx.errors import BadOption

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
SWEEP = "1.0"
Calibrated = Annotated[
    str | None, typer.Option(help="first-prompt (the default), none, or what `lorc calibrate` wrote.")
]


# ------------------------------------------------------------------------------------------------------------- demo


@app.callback()
def lorc() -> None:
    """Compressed KV caches for torch.compile (LoRC, arXiv 2410.03111)."""


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Cache bytes kept, as a fraction of the dense cache.")] = None,
    bytes_per_token: Annotated[int | None, typer.Option(help="The same budget in bytes, instead of --ratio.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="progressive (LoRC), uniform, energy, loss.")] = None,
    d_min: Annotated[int | None, typer.Option(help="Smallest rank of the progressive schedule.")] = None,
    d_max: Annotated[int | None, typer.Option(help="Largest rank of the progressive schedule.")] = None,
    protect_first: Annotated[int | None, typer.Option(help="First layers that stay at full rank.")] = None,
    protect_last: Annotated[int | None, typer.Option(help="Last layers that stay at full rank.")] = None,
    inner: Annotated[str, typer.Option(help="The compiler of both models.")] = "inductor",
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.bf16,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 32,
    loss_tokens: Annotated[int, typer.Option(min=2, help="Tokens of text for the loss, at most.")] = 481,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")] = None,
    sweep: Annotated[str, typer.Option(help="Further ratios whose loss is shown; '' for none.")] = SWEEP,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Run one model dense and with a compressed cache, side by side (the demo model: Gemma 3 270M)."""
    knobs = {"ratio": ratio, "bytes_per_token": bytes_per_token, "scheduler": scheduler, "d_min": d_min, "d_max": d_max}
    knobs |= {"protect_first": protect_first, "protect_last": protect_last, "inner": inner}
    options = {name: value for name, value in knobs.items() if value is not None}
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import demo as figures

            prompts = tuple(prompt or figures.PROMPTS)
            result = figures.run(
                show,
                model,
                options,
                _numbers("sweep", sweep, float, SWEEP),
                dtype.torch(),
                tokens,
                loss_tokens,
                prompts,
            )
        if json_file:
            write_json(json_file, result)
    figures.render(result, out)


def _numbers(option: str, text: str, kind: Any, default: str | None = None) -> list[Any]:
    """What stands between commas. Raises BadOption."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadOption(option, text, "a list of numbers with commas between", default) from None


# ---------------------------------------------------------------------------------------------------------- explain


@app.command()
def explain(
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Cache bytes kept, as a fraction of the dense cache.")] = None,
    bytes_per_token: Annotated[int | None, typer.Option(help="The same budget in bytes, instead of --ratio.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="progressive (LoRC), uniform, energy, loss.")] = None,
    precision: Annotated[str | None, typer.Option(help="model (LoRC), int8, int4, auto.")] = None,
    calibration: Calibrated = None,
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.bf16,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the example prompt.")] = 16,
) -> None:
    """What backend="lorc" finds in a model: sites, ranks, bytes, and what stays dense and why."""
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            import torch

            from lorc_fx.models import load_model
            from lorc_fx.options import Options
            from lorc_fx.report import examined

            knobs = {"precision": precision, "calibration": calibration}
            options = Options.parse({}, ratio=ratio, bytes_per_token=bytes_per_token, scheduler=scheduler, **knobs)
            loaded, _ = load_model(model, dtype.torch(), show.stage)
            show.stage("Reading the graph")
            report = examined(loaded, (torch.arange(1, tokens + 1).unsqueeze(0),), {}, options)
        wide().print(report)


# -------------------------------------------------------------------------------------------------------- calibrate


@app.command()
def calibrate(
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on (default: the model writes its own).")] = None,
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use, at most.")] = 8192,
    gradients: Annotated[bool, typer.Option(help="Weigh columns by the loss gradient: better, and slow.")] = False,
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.fp32,
) -> None:
    """Gather what codecs need to know of a model from some text; use it as options={"calibration": OUTPUT}."""
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx.calibrate import calibrate as gather
            from lorc_fx.models import load_model

            loaded, tokenizer = load_model(model, dtype.torch(), show.stage)
            show.stage("Calibrating")
            rows = "self" if text is None else _rows(text, model, tokenizer, tokens)
            found = gather(loaded, rows, gradients=gradients, progress=False)
            found.save(output)
        least = min(site.tokens for site in found.sites)
        out.print(f"{output}: {len(found.sites)} sites, {least} tokens", soft_wrap=True)


ROW_TOKENS = 1024


def _rows(path: Path, model: Path | None, tokenizer: Any, tokens: int) -> Any:
    """The text as rows of ROW_TOKENS that begin as the tokenizer begins a text. Raises BadOption, BadModel."""
    import torch

    from lorc_fx.texts import read_text, tokenized

    beginning, body = tokenized(read_text(path), tokenizer, model)
    room = tokens - len(beginning)
    return [torch.cat([beginning, part]) for part in body[:room].split(ROW_TOKENS - len(beginning))]


# ------------------------------------------------------------------------------------------------------------- eval


@app.command("eval")
def evaluate(
    text: Annotated[Path, typer.Option(help="The text to score, in UTF-8.")],
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Cache bytes kept; may be given more than once.")] = None,
    calibration: Calibrated = None,
    scheduler: Annotated[str | None, typer.Option(help="progressive (LoRC), uniform, energy, loss.")] = None,
    precision: Annotated[str | None, typer.Option(help="model (LoRC), int8, int4, auto.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, at most.")] = 2048,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="First tokens that are not scored: the prompt.")] = 1024,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per call of the loss that is read through the cache.")] = 32,
    needle: Annotated[bool, typer.Option(help="Also hide numbers in the text and ask for them.")] = False,
    needle_lengths: Annotated[str, typer.Option(help="Tokens of the needles' prompts.")] = "256,512,1024",
    needle_keys: Annotated[int, typer.Option(min=1, help="Needles per length and depth.")] = 2,
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.bf16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Loss, perplexity and retrieval of a text file, dense beside compressed."""
    knobs = {"calibration": calibration, "scheduler": scheduler, "precision": precision}
    options = {name: value for name, value in knobs.items() if value is not None}
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import perplexity

            lengths = tuple(_numbers("needle_lengths", needle_lengths, int)) if needle else ()
            asked = perplexity.Asked(tokens, prompt_tokens, chunk, lengths, needle_keys)
            result = perplexity.run(show, text, model, options, ratio or (), dtype.torch(), asked)
        if json_file:
            write_json(json_file, result)
    perplexity.render(result, wide())


# ----------------------------------------------------------------------------------------------------------- lm-eval


@app.command(
    "lm-eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """The command line of EleutherAI's lm-eval, where --model lorc is a model with a compressed cache (extra: eval)."""
    with reported():
        from lorc_fx import lm_eval_adapter

        lm_eval_adapter.main(context.args)


# ------------------------------------------------------------------------------------------------------------- plan


@app.command()
def plan(
    output: Annotated[
        Path | None, typer.Argument(help="The plan to write: NAME.json, NAME.safetensors beside.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Cache bytes kept, as a fraction of the dense cache.")] = None,
    bytes_per_token: Annotated[int | None, typer.Option(help="The same budget in bytes, instead of --ratio.")] = None,
    calibration: Calibrated = None,
    scheduler: Annotated[str | None, typer.Option(help="progressive (LoRC), uniform, energy, loss.")] = None,
    precision: Annotated[str | None, typer.Option(help="model (LoRC), int8, int4, auto.")] = None,
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.bf16,
    sweep: Annotated[str, typer.Option(help="Ratios whose predicted loss is shown, with commas between.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Also draw the sweep: PATH.png and PATH.svg.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for --measure; not the one of the calibration.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the loss over the text too.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use, at most.")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Write a plan, which serves its model alone as options={"plan": OUTPUT}; or show what budgets would cost."""
    with reported():
        ratios = _numbers("sweep", sweep, float)
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import plan_command
            from lorc_fx.models import load_model

            plan_command.check(output, ratios, plot, text, measure)
            knobs = {"calibration": calibration, "scheduler": scheduler, "precision": precision}
            budget = {"ratio": ratio, "bytes_per_token": bytes_per_token}
            many = plan_command.asked(knobs, budget, ratios, output is not None)
            loaded, tokenizer = load_model(model, dtype.torch(), show.stage)
            rows = _rows(text, model, tokenizer, tokens) if text is not None else None
            plans, result = plan_command.figures(show, loaded, many, rows)
        result = {"model": str(model or "Gemma 3 270M"), "dtype": dtype.value} | result
        written = plan_command.write(output, plans[0], plot, result)
        if json_file:
            write_json(json_file, result)
    wide().print(plan_command.table(result))
    for path in written:
        out.print(str(path), soft_wrap=True)


# --------------------------------------------------------------------------------------------------------- autotune


MOST_TOKENS, MOST_BATCH = 1 << 20, 1 << 10


@app.command()
def autotune(
    model: Annotated[Path | None, typer.Option(help="Local checkpoint: a folder, or a GGUF file.")] = None,
    plan: Annotated[Path | None, typer.Option(help="The model's plan, from `lorc plan`: tunes what it reads.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Cache bytes kept, as a fraction of the dense cache.")] = None,
    bytes_per_token: Annotated[int | None, typer.Option(help="The same budget in bytes, instead of --ratio.")] = None,
    calibration: Calibrated = None,
    precision: Annotated[str | None, typer.Option(help="model (LoRC), int8, int4, auto.")] = None,
    basis: Annotated[str | None, typer.Option(help="joint, identity, auto.")] = None,
    dtype: Annotated[DType, typer.Option(help="What the model runs in.")] = DType.bf16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    tokens: Annotated[str, typer.Option(help="Cached tokens to tune for, with commas between.")] = "2048,8192",
    batch: Annotated[str, typer.Option(help="Batch rows to tune for, with commas between.")] = "1",
    again: Annotated[bool, typer.Option("--again", help="Also time what is in the database already.")] = False,
    output: Annotated[Path | None, typer.Option(help="The database to write (default: the one that is read).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Time how attention over the model's stored rows runs fastest here; later runs use it. Interrupted, it goes on
    where it stopped."""
    with reported():
        lengths, rows = _numbers("tokens", tokens, int, "2048,8192"), _numbers("batch", batch, int, "1")
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import autotune as tuner
            from lorc_fx.models import load_model
            from lorc_fx.options import Options

            lengths, rows = tuner.sizes("tokens", lengths, MOST_TOKENS), tuner.sizes("batch", rows, MOST_BATCH)
            where = _device(device)
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
    out.print(str(result.file), soft_wrap=True)


def _device(name: str) -> Any:
    """Raises BadOption for a device that is not there."""
    import torch

    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadOption("device", name, "a device that torch has here", "cpu") from error
    return chosen


# ------------------------------------------------------------------------------------------------------------ bench


bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")
app.add_typer(bench, name="bench")


@bench.command("device")
def bench_device(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """What the device does at best, measured: the figures that predictions of time are made of."""
    with reported():
        with Show() as show:
            show.stage("Importing torch")
            from lorc_fx.device import measured

            chosen = _device(device)
            show.stage("Measuring")
            found = measured(chosen)
        if json_file:
            write_json(json_file, vars(found))
    out.print(
        f"{found.name}: reads {found.bandwidth / 1e9:.1f} GB/s, multiplies {found.flops / 1e9:.0f} GFLOP/s (fp32)"
        + (f", unpacks {found.numbers / 1e9:.1f} billion numbers/s" if math.isfinite(found.numbers) else "")
    )


def main() -> None:
    """The entry point of the ``lorc`` command."""
    app()
