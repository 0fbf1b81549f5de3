"""The figures of ``lorc report``, ready for JSON: what is found in a model, what budgets cost, what was measured."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__, decode_command, needle, plan_command, plan_plot
from ..calibrate import calibrate
from ..calibration import Calibration, covariance
from ..console import can_be_written
from ..device import device_of
from ..errors import BadCalibration, BadOption, BudgetTooSmall, ConflictingOptions, LorcWarning, QualityWarning
from ..evaluate import Show, compressed, sample_text
from ..models import DEMO_TITLE, load_model
from ..options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from ..report import Report, examined
from ..schedulers.progressive import cumulative_logs
from ..texts import positions, read_text, rows_of, tokenized

CONTEXTS = tuple(2**n for n in range(9, 18))
"""Cached tokens for which the time of a decode step is predicted: 512 to 131072."""

PROMPT_TOKENS = 1024
"""Tokens of the first prompt, at most; half of a text that is shorter than twice that."""

DIGITS = 6
"""Significant digits of what is drawn only."""


@dataclass(frozen=True)
class Asked:
    """What the page has beside what the model itself tells. ``ratios`` of the loss curve; ``text`` (None: the sample
    text), and whether to ``measure`` the loss of at most ``tokens`` of it; ``needle_keys`` needles per depth and length
    of ``needle_lengths`` (tokens; empty: none); ``repeats`` timed steps after each of ``time_tokens`` (empty: none),
    compiled by ``inner``."""

    ratios: tuple[float, ...] = ()
    text: Path | None = None
    measure: bool = False
    tokens: int = 4096
    needle_lengths: tuple[int, ...] = ()
    needle_keys: int = 2
    time_tokens: tuple[int, ...] = ()
    repeats: int = 5
    inner: str = "inductor"


@dataclass(frozen=True)
class Material:
    """A text as token ids, int64: ``beginning`` [0 or 1], ``prompt`` [P], which the first prompt is made of, and
    ``rest`` [N], on which losses are measured; and its ``name``."""

    name: str
    tokenizer: Any
    beginning: torch.Tensor
    prompt: torch.Tensor
    rest: torch.Tensor

    @property
    def body(self) -> torch.Tensor:
        return torch.cat([self.prompt, self.rest])


def check(output: Path, json_file: Path | None, asked: Asked, options: Options) -> None:
    """Raises BadOption, ConflictingOptions or MissingExtra before anything slow starts."""
    for name, path in (("output", output), ("json", json_file)):
        if path is not None:
            can_be_written(name, path)
    if asked.measure and asked.text is None:
        raise ConflictingOptions(("--measure", "no --text"), "a loss is measured on a text", "Give --text FILE too")
    used = asked.measure or asked.needle_lengths or options.calibration == FIRST_PROMPT
    if asked.text is not None and not used:
        reason = "with a calibration of its own, and no --measure or --needle, nothing reads the text"
        raise ConflictingOptions(("--text", "--calibration"), reason, "Add --measure or --needle, or leave --text out")
    if asked.text is not None:
        read_text(asked.text)
    for ratio in asked.ratios:
        Options.parse({"ratio": ratio})
    decode_command.ways({"inner": asked.inner}, ())
    plan_plot.require("lorc report")


def gathered(show: Show, path: Path | None, dtype: Any, options: Options, asked: Asked) -> dict[str, Any]:
    """All figures. Raises what ``load_model`` raises, BadOption for a text or lengths that do not fit the model, and
    what planning raises for the budget in ``options``."""
    model, tokenizer = load_model(path, dtype, show.stage)
    with heard() as said:
        material = _material(tokenizer, path, asked)
        options, statistics = _informed(show, model, options, material)
        show.stage("Reading the graph")
        ids = torch.arange(1, plan_command.PROMPT_TOKENS + 1, device=model.device).unsqueeze(0)
        report = examined(model, (ids,), {"use_cache": True}, options)
        found = _described(report)
        found |= {"loss": None, "needles": None, "measured": None}
        if report.sites:
            found["loss"] = _curve(show, model, options, asked, material)
            found["needles"] = _needles(show, model, options, asked, material)
            found["measured"] = _steps(show, model, options, asked)
    chosen = {"ratio": options.ratio} | options.given()
    given = {k: str(v) for k, v in chosen.items() if v is not None and k != "calibration"}
    about = {"model": str(path or DEMO_TITLE), "dtype": str(model.dtype).removeprefix("torch."), "options": given}
    return about | {"statistics": statistics, "warnings": said, "about": _about(model)} | found


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """After this block warnings of ours are in the list, each text once, for the page; others are shown as ever."""
    said: list[str] = []
    caught: list[warnings.WarningMessage] = []
    done = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LorcWarning)
            yield said
        done = True
    finally:  # after an error there is no page: all of them are shown
        ours = [w for w in caught if issubclass(w.category, LorcWarning)] if done else []
        said += dict.fromkeys(str(w.message) for w in ours)
        for other in caught:
            if other not in ours:
                warnings.showwarning(other.message, other.category, other.filename, other.lineno)


def _material(tokenizer: Any, path: Path | None, asked: Asked) -> Material | None:
    """The text, if there is a tokenizer to read it. Raises BadModel where one is needed."""
    if tokenizer is None and asked.text is None and not asked.needle_lengths:
        return None
    written = sample_text() if asked.text is None else read_text(asked.text)
    beginning, body = tokenized(written, tokenizer, path)
    cut = min(PROMPT_TOKENS, len(body) // 2)
    name = "the sample text" if asked.text is None else asked.text.name
    return Material(name, tokenizer, beginning, body[:cut], body[cut:])


def _informed(
    show: Show, model: Any, options: Options, material: Material | None
) -> tuple[Options, dict[str, Any] | None]:
    """Options with what a first prompt would say, where they wait for one; and the statistics, if there are any."""
    if options.calibration == FIRST_PROMPT:
        if material is None or len(material.prompt) < FIRST_PROMPT_TOKENS:
            return options, None
        ids = torch.cat([material.beginning, material.prompt])[: positions(model)]
        show.stage(f"A first prompt of {len(ids)} tokens of {material.name}")
        try:
            known = calibrate(model, [ids], progress=False)
        except BadCalibration as error:
            warnings.warn(f"this report has no first prompt: {error}", QualityWarning, stacklevel=2)
            return options, None
        options = Options.parse(options.given() | {"calibration": known})
        return options, _statistics(known, f"a first prompt, {len(ids)} tokens of {material.name}")
    if isinstance(options.calibration, Calibration):
        return options, _statistics(options.calibration, "a saved calibration")
    return options, None


def _statistics(known: Calibration, source: str) -> dict[str, Any]:
    """Of each site the standard deviations of its keys or values along their principal axes, descending."""
    lines = []
    for site in known.sites:
        values = torch.linalg.eigvalsh(covariance(site)[1]).flatten().clamp_min(0).sqrt()
        spread = _rounded(values.sort(descending=True).values.tolist())
        lines.append({"layer": site.layer, "kind": site.kind, "tokens": site.tokens, "spread": spread})
    gradients = all(site.gradients and not site.local for site in known.sites)
    return {"source": source, "gradients": gradients, "sites": lines}


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _described(report: Report) -> dict[str, Any]:
    """What ``explain`` says, with singular values, cumulative condition numbers and times for many lengths."""
    sites = [s.line() | {"singular": _rounded(s.singular)} for s in report.sites]
    layers = sorted({s.layer for s in report.sites})
    logs = cumulative_logs(report.sites)
    cumulative = [{"layer": n, "log10": log / math.log(10)} for n, log in zip(layers, logs, strict=True)]
    found = report.json() | {"sites": sites, "misses": [asdict(m) for m in report.misses], "cumulative": cumulative}
    if report.sites:
        here = device_of(report.where)
        times = [(t, *report.step_seconds(t, device=here)) for t in CONTEXTS]
        points = [{"tokens": t, "coded_s": coded, "dense_s": dense} for t, coded, dense in times]
        found["steps"] = {"device": here.name, "source": here.source, "points": points}
    return found


# ------------------------------------------------------------------------------------------------ what is asked for


def _curve(show: Show, model: Any, options: Options, asked: Asked, material: Material | None) -> dict[str, Any] | None:
    """Predicted and, where asked for, measured loss of the budget of ``options`` and of each ratio. Ratios that do not
    hold the least row of each site are in ``refused``."""
    if not asked.ratios and not asked.measure:
        return None
    rows = None
    if asked.measure:
        assert material is not None  # checked: there is a text
        rows = rows_of(material.beginning, material.rest, asked.tokens, model)
        if not rows:
            allowed = "a text of at least four tokens: half of it is the first prompt"
            raise BadOption("text", str(asked.text), allowed)
    knobs = {name: getattr(options, name) for name in plan_command.KNOBS}
    budget = {"ratio": options.ratio, "bytes_per_token": options.bytes_per_token}
    ratios, refused = sorted(set(asked.ratios), reverse=True), list[float]()
    while True:
        try:
            many = plan_command.asked(knobs, budget, ratios, True)
            _, result = plan_command.figures(show, model, many, rows)
        except BudgetTooSmall:  # of the smallest ratio, since the budget of ``options`` was planned before
            if not ratios:
                raise
            refused.append(ratios.pop())
            continue
        points = {(p["bytes_per_token"], p["predicted"]): p for p in result["points"]}
        return result | {"points": list(points.values()), "unit": plan_command.unit(result), "refused": refused}


def _needles(
    show: Show, model: Any, options: Options, asked: Asked, material: Material | None
) -> dict[str, Any] | None:
    """Retrieval of both models, as ``needle.summary`` says it."""
    if not asked.needle_lengths:
        return None
    assert material is not None
    made = (material.beginning, material.body, material.tokenizer, asked.needle_lengths)
    prompts = needle.prompts(*made, keys=asked.needle_keys, limit=positions(model))
    show.stage(f"{len(prompts)} needles: dense")
    dense = needle.retrieve(model, prompts, show.progress)
    show.stage(f"{len(prompts)} needles: coded")
    with compressed(model, options.given() | {"inner": "eager"}):
        coded = needle.retrieve(model, prompts, show.progress)
    return {"text": material.name, "dense": needle.summary(dense, dense), "coded": needle.summary(dense, coded)}


def _steps(show: Show, model: Any, options: Options, asked: Asked) -> dict[str, Any] | None:
    """Decode steps of both models in turns: for each length the median of each, in seconds."""
    if not asked.time_tokens:
        return None
    timed = decode_command.Asked(asked.time_tokens, repeats=asked.repeats, inner=asked.inner)
    ways = [None, Options.parse(options.given() | {"inner": asked.inner})]
    result = decode_command.run(show, model, ways, timed)
    points = []
    for tokens in asked.time_tokens:
        dense, coded = (row for row in result["rows"] if row["tokens"] == tokens)
        points.append({"tokens": tokens, "coded_s": coded["median_s"], "dense_s": dense["median_s"]})
    about: Mapping[str, Any] = {"inner": asked.inner, "repeats": asked.repeats, "threads": result["threads"]}
    return {**about, "points": points}


def _about(model: Any) -> dict[str, str]:
    """Versions and machine, for the footer."""
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"lorc_fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return versions | {
        "Python": platform.python_version(),
        "machine": machine,
        "device": str(model.device),
        "made": now,
    }
