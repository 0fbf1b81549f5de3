"""The command line: ``lorc demo``, ``explain``, ``certify``, ``calibrate``, ``eval``, ``lm-eval`` and ``plan``; with
``report``, of ``cli_report``, and those about the machine, of ``cli_machine``.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 a model that cannot be loaded or something that is
missing, 2 an option that is refused or a file that it names, 130 Ctrl-C. Typed errors are one red
message without a traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lorc_fx import cli_machine, cli_report
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
    Ratios,
    RunsIn,
    Scheduler,
    examples,
    numbers,
)
from lorc_fx.console import DType, Show, can_be_written, out, print_path, reported, wide, write_json
from lorc_fx.errors import BadOption, ConflictingOptions

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
cli_machine.add_to(app)
cli_report.add_to(app)
SWEEP = "1.0"


# ------------------------------------------------------------------------------------------------------------- demo


@app.callback()
def lorc() -> None:
    """Compressed KV caches for torch.compile (LoRC, arXiv 2410.03111)."""


@app.command(
    epilog=examples(
        "lorc demo",
        "lorc demo --model ~/models/llama --ratio 0.25 --json demo.json",
    )
)
def demo(
    model: ModelPath = None,
    ratio: Ratio = None,
    bytes_per_token: BytesPerToken = None,
    scheduler: Scheduler = None,
    d_min: Annotated[int | None, typer.Option(help="Smallest rank of the progressive schedule.")] = None,
    d_max: Annotated[int | None, typer.Option(help="Largest rank of the progressive schedule.")] = None,
    protect_first: Annotated[int | None, typer.Option(help="First layers that stay at full rank.")] = None,
    protect_last: Annotated[int | None, typer.Option(help="Last layers that stay at full rank.")] = None,
    inner: Annotated[str, typer.Option(help="The compiler of both models.")] = "inductor",
    dtype: RunsIn = DType.bf16,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 32,
    loss_tokens: Annotated[int, typer.Option(min=2, help="Tokens of text for the loss, at most.")] = 481,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given more than once.")] = None,
    sweep: Annotated[str, typer.Option(help="Further ratios whose loss is shown; '' for none.")] = SWEEP,
    json_file: Json = None,
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
                numbers("sweep", sweep, float, SWEEP),
                dtype.torch(),
                tokens,
                loss_tokens,
                prompts,
            )
        if json_file:
            write_json(json_file, result)
    figures.render(result, out)


# ---------------------------------------------------------------------------------------------------------- explain


@app.command(
    epilog=examples(
        "lorc explain",
        "lorc explain --model ~/models/llama --ratio 0.25 --json found.json",
    )
)
def explain(
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
    tokens: Annotated[int, typer.Option(min=2, help="Length of the example prompt.")] = 16,
    json_file: Json = None,
) -> None:
    """What backend="lorc" finds in a model: sites, ranks, bytes, and what stays dense and why."""
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            import torch

            from lorc_fx.models import load_model
            from lorc_fx.options import Options
            from lorc_fx.report import examined

            knobs: dict[str, Any] = {"precision": precision, "calibration": calibration}
            knobs |= {"basis": basis, "group_size": group_size, "objective": objective}
            options = Options.parse({}, ratio=ratio, bytes_per_token=bytes_per_token, scheduler=scheduler, **knobs)
            loaded, _ = load_model(model, dtype.torch(), show.stage)
            show.stage("Reading the graph")
            report = examined(loaded, (torch.arange(1, tokens + 1).unsqueeze(0),), {}, options, others=True)
        if json_file:
            write_json(json_file, report.json())
        wide().print(report)


# ---------------------------------------------------------------------------------------------------------- certify


@app.command(
    epilog=examples(
        "lorc certify --prompt 'Most of the water on the planet is salty.'",
        "lorc certify --text book.txt --model ~/models/llama --ratio 0.5 --plot bounds --json bounds.json",
    )
)
def certify(
    prompt: Annotated[str | None, typer.Option(help="The prompt (default: from --text, or a sample text).")] = None,
    text: Annotated[Path | None, typer.Option(help="A text whose beginning is the prompt.")] = None,
    model: ModelPath = None,
    ratio: Ratio = None,
    bytes_per_token: BytesPerToken = None,
    calibration: Calibrated = None,
    scheduler: Scheduler = None,
    precision: Precision = None,
    basis: Basis = None,
    group_size: GroupSize = None,
    objective: Objective = None,
    dtype: RunsIn = DType.bf16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt, at most.")] = 128,
    rounding: Annotated[bool, typer.Option("--rounding", help="Bound what a machine rounds too.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw bounds and errors by layer: PATH.png and PATH.svg.")
    ] = None,
    json_file: Json = None,
) -> None:
    """How far a compressed model can be from the dense one on a prompt, up to the logits, beside how far it is; and
    where the greedy token is proven to stay."""
    with reported():
        if prompt is not None and text is not None:
            raise ConflictingOptions(("--prompt", "--text"), "both are the prompt", "Give one of them")
        with Show() as show:
            show.stage("Importing torch and transformers")
            import torch

            from lorc_fx import plan_plot
            from lorc_fx.certify import certify as certified
            from lorc_fx.evaluate import sample_text
            from lorc_fx.models import load_model
            from lorc_fx.options import Options
            from lorc_fx.texts import read_text, tokenized

            if plot is not None:
                plan_plot.check("plot", plot)
            knobs: dict[str, Any] = {"calibration": calibration, "scheduler": scheduler, "precision": precision}
            knobs |= {"basis": basis, "group_size": group_size, "objective": objective}
            options = Options.parse({}, ratio=ratio, bytes_per_token=bytes_per_token, **knobs)
            given = prompt if text is None else read_text(text)
            loaded, tokenizer = load_model(model, dtype.torch(), show.stage)
            ids = torch.cat(tokenized(sample_text() if given is None else given, tokenizer, model))[:tokens]
            if not len(ids):
                name = "prompt" if text is None else "text"
                raise BadOption(name, prompt if text is None else str(text), "a text of at least one token")
            show.stage(f"Walking both models over {len(ids)} tokens in fp64")
            certificate = certified(loaded, ids, options=options.given(), rounding=rounding)
            try:
                written = certificate.plot(plot) if plot is not None else ()
            except OSError as error:
                raise BadOption("plot", str(plot), f"a path that can be written ({error})") from error
        if json_file:
            write_json(json_file, certificate.json())
    wide().print(certificate)
    for path in written:
        print_path(path)


# -------------------------------------------------------------------------------------------------------- calibrate


@app.command(
    epilog=examples(
        "lorc calibrate known.safetensors --text book.txt --model ~/models/llama",
        "lorc calibrate known.safetensors --gradients --text book.txt",
    )
)
def calibrate(
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on (default: the model writes its own).")] = None,
    model: ModelPath = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use, at most.")] = 8192,
    gradients: Annotated[bool, typer.Option(help="Weigh columns by the loss gradient: better, and slow.")] = False,
    dtype: RunsIn = DType.fp32,
    json_file: Json = None,
) -> None:
    """Gather what codecs need to know of a model from some text; use it as options={"calibration": OUTPUT}."""
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx.calibrate import calibrate as gather
            from lorc_fx.models import load_model

            can_be_written("output", output)
            loaded, tokenizer = load_model(model, dtype.torch(), show.stage)
            show.stage("Calibrating")
            rows = "self" if text is None else _rows(text, model, loaded, tokenizer, tokens)
            found = gather(loaded, rows, gradients=gradients, progress=False)
            try:
                found.save(output)
            except OSError as error:
                raise BadOption("output", str(output), f"a file that can be written ({error})") from error
        least = min(site.tokens for site in found.sites)
        if json_file:
            write_json(json_file, {"file": str(output), "sites": len(found.sites), "tokens": least})
        out.print(f"{escape(str(output))}: {len(found.sites)} sites, {least} tokens", soft_wrap=True)


def _rows(path: Path, model: Path | None, loaded: Any, tokenizer: Any, tokens: int) -> Any:
    """The text as rows that begin as the tokenizer begins a text. Raises BadOption, BadModel."""
    from lorc_fx.texts import read_text, rows_of, tokenized

    rows = rows_of(*tokenized(read_text(path), tokenizer, model), tokens, loaded)
    if not rows:
        raise BadOption("text", str(path), "a text of at least two tokens, and this one has fewer")
    return rows


# ------------------------------------------------------------------------------------------------------------- eval


@app.command(
    "eval",
    epilog=examples(
        "lorc eval --text book.txt --ratio 0.45 --ratio 0.25",
        "lorc eval --text book.txt --model ~/models/llama --needle --json eval.json",
    ),
)
def evaluate(
    text: Annotated[Path, typer.Option(help="The text to score, in UTF-8.")],
    model: ModelPath = None,
    ratio: Ratios = None,
    calibration: Calibrated = None,
    scheduler: Scheduler = None,
    precision: Precision = None,
    basis: Basis = None,
    group_size: GroupSize = None,
    objective: Objective = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, at most.")] = 2048,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="First tokens that are not scored: the prompt.")] = 1024,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per call of the loss that is read through the cache.")] = 32,
    needle: Annotated[bool, typer.Option(help="Also hide numbers in the text and ask for them.")] = False,
    needle_lengths: Annotated[str, typer.Option(help="Tokens of the needles' prompts.")] = cli_report.NEEDLES,
    needle_keys: Annotated[int, typer.Option(min=1, help="Needles per length and depth.")] = 2,
    dtype: RunsIn = DType.bf16,
    json_file: Json = None,
) -> None:
    """Loss, perplexity and retrieval of a text file, dense beside compressed."""
    knobs: dict[str, Any] = {"calibration": calibration, "scheduler": scheduler, "precision": precision}
    knobs |= {"basis": basis, "group_size": group_size, "objective": objective}
    options = {name: value for name, value in knobs.items() if value is not None}
    with reported():
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import perplexity

            lengths = tuple(numbers("needle_lengths", needle_lengths, int, cli_report.NEEDLES)) if needle else ()
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


@app.command(
    epilog=examples(
        "lorc plan plan.json --calibration known.safetensors --ratio 0.25",
        "lorc plan --sweep 0.5,0.35,0.25 --plot loss",
        "lorc plan --sweep 0.5,0.25 --measure --text book.txt",
    )
)
def plan(
    output: Annotated[
        Path | None, typer.Argument(help="The plan to write: NAME.json, NAME.safetensors beside.")
    ] = None,
    model: ModelPath = None,
    ratio: Ratio = None,
    bytes_per_token: BytesPerToken = None,
    calibration: Calibrated = None,
    scheduler: Scheduler = None,
    precision: Precision = None,
    basis: Basis = None,
    group_size: GroupSize = None,
    objective: Objective = None,
    dtype: RunsIn = DType.bf16,
    sweep: Annotated[str, typer.Option(help="Ratios whose predicted loss is shown, with commas between.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Also draw the sweep: PATH.png and PATH.svg.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for --measure; not the one of the calibration.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the loss over the text too.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use, at most.")] = 4096,
    json_file: Json = None,
) -> None:
    """Write a plan, which serves its model alone as options={"plan": OUTPUT}; or show what budgets would cost."""
    with reported():
        ratios = numbers("sweep", sweep, float)
        with Show() as show:
            show.stage("Importing torch and transformers")
            from lorc_fx import plan_command
            from lorc_fx.models import DEMO_TITLE, load_model

            plan_command.check(output, ratios, plot, text, measure)
            knobs: dict[str, Any] = {"calibration": calibration, "scheduler": scheduler, "precision": precision}
            knobs |= {"basis": basis, "group_size": group_size, "objective": objective}
            budget = {"ratio": ratio, "bytes_per_token": bytes_per_token}
            many = plan_command.asked(knobs, budget, ratios, output is not None)
            loaded, tokenizer = load_model(model, dtype.torch(), show.stage)
            rows = _rows(text, model, loaded, tokenizer, tokens) if text is not None else None
            plans, result = plan_command.figures(show, loaded, many, rows)
        result = {"model": str(model or DEMO_TITLE), "dtype": dtype.value} | result
        written = plan_command.write(output, plans[0], plot, result)
        if json_file:
            write_json(json_file, result)
    wide().print(plan_command.table(result))
    for path in written:
        print_path(path)


def main() -> None:
    """The entry point of the ``lorc`` command."""
    app()
