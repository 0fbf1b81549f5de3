"""What ``lorc autotune`` does: finds the readers of a model's decode step, and times their configs one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from .console import Show
from .errors import BadOption, QualityWarning
from .evaluate import cache_keyword, compressed
from .kernels import tune, tuned
from .options import FIRST_PROMPT_TOKENS

PROMPT_TOKENS = FIRST_PROMPT_TOKENS + 32
"""Of the example prompt (random ids): enough for statistics, so that codecs are those of use."""


@dataclass
class Result:
    """entries: as the database has them now. file: where. timed, pruned: how many configs were timed in this run, and
    left out by formula."""

    file: Path
    entries: list[tuned.Entry] = field(default_factory=list)
    timed: int = 0
    pruned: int = 0

    def json(self) -> dict[str, Any]:
        rows = [entry.json() for entry in self.entries]
        return {"file": str(self.file), "timed": self.timed, "pruned": self.pruned, "entries": rows}


def readers(model: Any, options: Mapping[str, Any], batches: Sequence[int]) -> dict[str, tune.Problem]:
    """The kinds of readers that a decode step of ``model`` has, by their names: of one row, and where ``batches`` has
    larger ones also of two rows of which one is padded, so that there is a mask. The model is compiled in place with
    ``inner="eager"`` for that, and left as it was. Raises what compiling it raises."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    seen = torch.ones_like(ids)
    seen[1, :8] = 0
    with warnings.catch_warnings(), compressed(model, {**options, "inner": "eager"}):
        warnings.simplefilter("ignore", QualityWarning)
        with torch.no_grad(), tune.watched() as found:
            _step(model, ids[:1], {})
            if any(batch > 1 for batch in batches):
                _step(model, ids, {"attention_mask": seen})
    return found


def _step(model: Any, ids: torch.Tensor, more: dict[str, torch.Tensor]) -> None:
    """A prompt and one token after it."""
    keyword = cache_keyword(model)
    cache = getattr(model(ids, use_cache=True, **more), keyword)
    if more:
        more = {name: torch.cat([mask, mask[:, -1:]], 1) for name, mask in more.items()}
    model(ids[:, -1:], use_cache=True, **{keyword: cache}, **more)


def jobs(
    problems: Mapping[str, tune.Problem], tokens: Sequence[int], batches: Sequence[int]
) -> list[Callable[[], tune.Job]]:
    """One for each reader and size, as functions: rows for all sizes at once could take more memory than there is."""
    return [
        partial(_job, problem, length, batch) for problem in problems.values() for length in tokens for batch in batches
    ]


def _job(problem: tune.Problem, tokens: int, batch: int) -> tune.Job:
    return tune.job_of(tune.side_of(problem.at(tokens, batch)))


def run(
    show: Show, made: Sequence[Callable[[], tune.Job]], path: Path | None, again: bool, timer: tune.Clock = tune.clock
) -> Result | None:
    """All of ``jobs``; each result is in the file (None: the user's own for this device) as soon as it is known. None
    where there is no job. Raises BadOption where the file cannot be written."""
    result: Result | None = None
    database: tuned.Database | None = None
    for i, make in enumerate(made):
        job = make()
        if result is None or database is None:
            target = job.side.target
            path = path or tuned.users_file(target.device)
            result, database = Result(path), tuned.Database.of(target, path)
        problem = job.side.problem
        show.stage(f"{i + 1} of {len(made)}: {problem.tokens} tokens, batch {problem.batch}; {job.side.words}")
        if again:
            database.entries.pop(job.entry.key, None)
        known = database.entries.get(job.entry.key, job.entry)
        result.timed += 0 if known.done else len(job.kept) - len(known.trials)
        result.pruned += job.pruned
        done = 0

        def step(steps: int = job.steps) -> None:
            nonlocal done
            done += 1
            show.progress(done, steps)

        try:
            result.entries.append(tune.run(job, database, path or Path(), step, timer))
        except OSError as error:
            raise BadOption("output", str(path), f"a file that can be written ({error})") from error
    return result


def sizes(option: str, found: Sequence[int], most: int) -> list[int]:
    """Raises BadOption for none, or one out of range."""
    if not found or min(found) < 1 or max(found) > most:
        raise BadOption(option, ",".join(map(str, found)), f"numbers in 1 .. {most} with commas between")
    return list(dict.fromkeys(found))


def table(result: Result) -> Table:
    """What was found, an entry a row."""
    found = Table(title=f"{result.timed} configs timed, {result.pruned} left out by formula", box=box.SIMPLE)
    for name in ("reader", "tokens", "batch", "best", "ms", "default, ms", "gain"):
        found.add_column(name, justify="left" if name in ("reader", "best") else "right")
    for e in result.entries:
        best = ", ".join(f"{k} {v}" for k, v in (e.json()["config"] or {}).items()) or "the default"
        took, usual = e.seconds, e.default_seconds
        times = [f"{1e3 * t:.3f}" if t is not None else "–" for t in (took, usual)]
        gain = f"{1 - took / usual:.1%}" if took and usual else "–"
        found.add_row(e.reader, str(e.tokens), str(e.batch), best, *times, gain)
    return found
