"""A needle in a haystack: is a number that stands somewhere in a long text still found through the cache?

A sentence with a made-up number is put into the text at some depth; the prompt ends with the beginning of the same
sentence, and the number must follow. The text goes into the cache in one call and the question in a second, so the
needle is read from the cache. The form is one that small base models solve: they need only copy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from lorc_fx.errors import BadOption
from lorc_fx.evaluate import Progress, cache_keyword

CITIES = ("Lisbon", "Quito", "Oslo", "Cairo", "Nairobi", "Dresden", "Osaka", "Perth")
QUESTION, ANSWER, END = "\nThe secret number of the city of {city} is", " {number}", ".\n"
LENGTHS, DEPTHS = (256, 512, 1024), (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Prompt:
    """``context`` (int64 [T]) with the needle in it, ``question`` (int64 [Q]), and the tokens that must follow it,
    ``answer`` (int64 [A]); T + Q is ``length``, and ``depth`` (0: beginning, 1: end) says where the needle is."""

    length: int
    depth: float
    number: int
    context: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """How a model answered: mean negative log-likelihood of the answer's tokens in nats, and their worst rank among
    the whole vocabulary, given the right tokens before (0: each is the greedy choice)."""

    length: int
    depth: float
    number: int
    nats: float
    rank: int

    @property
    def right(self) -> bool:
        """Whether greedy decoding gives exactly the number."""
        return self.rank == 0


def prompts(
    beginning: torch.Tensor,
    body: torch.Tensor,
    tokenizer: Any,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    keys: int = 2,
    seed: int = 0,
    limit: int | None = None,
) -> list[Prompt]:
    """``keys`` prompts for each length (tokens) and depth, each with its own city, number and piece of the text.

    ``beginning`` and ``body`` are what ``texts.tokenized`` gives; ``limit``: the positions that the model has. Raises
    BadOption for a length that leaves no room for a haystack or is past the limit, or a text that is shorter than the
    haystack.
    """
    draw = random.Random(seed)
    found = []
    for length in lengths:
        for depth in (depth for depth in depths for _ in range(keys)):
            city, number = draw.choice(CITIES), draw.randrange(10_000, 100_000)
            needle, question, answer = _sentence(tokenizer, city, number)
            room = length - len(beginning) - len(needle) - len(question)
            if room < 1:
                raise BadOption("needle_lengths", length, f"a number of tokens above {length - room}")
            if room > len(body):
                raise BadOption("needle_lengths", length, f"at most {length - room + len(body)} for this text")
            if limit is not None and length + len(answer) > limit:
                raise BadOption("needle_lengths", length, f"at most {limit - len(answer)} for this model", LENGTHS)
            start = draw.randrange(len(body) - room + 1)
            hay = body[start : start + room]
            cut = round(depth * room)
            context = torch.cat([beginning, hay[:cut], needle, hay[cut:]])
            found.append(Prompt(length, depth, number, context, question, answer))
    return found


def _sentence(tokenizer: Any, city: str, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The needle, the question, and the answer as it is tokenised after the question."""

    def ids(text: str) -> list[int]:
        return tokenizer(text.format(city=city, number=number), add_special_tokens=False).input_ids

    question, whole = ids(QUESTION), ids(QUESTION + ANSWER)
    common = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    parts = ids(QUESTION + ANSWER + END), whole[:common], whole[common:]
    return tuple(torch.tensor(part, dtype=torch.int64) for part in parts)  # type: ignore[return-value]


@torch.no_grad()
def retrieve(model: Any, asked: Sequence[Prompt], progress: Progress | None = None) -> list[Trial]:
    """Ask ``model`` as it is, plain or compiled: a fresh ``DynamicCache`` for each prompt, batch 1."""
    from transformers import DynamicCache

    keyword = cache_keyword(model)
    found = []
    for done, prompt in enumerate(asked):
        given: dict[str, Any] = {keyword: DynamicCache(config=model.config), "use_cache": True}
        model(input_ids=prompt.context[None].to(model.device), **given)
        rest = torch.cat([prompt.question, prompt.answer[:-1]])[None].to(model.device)
        logits = model(input_ids=rest, **given).logits[0, len(prompt.question) - 1 :].float().cpu()
        right = logits.gather(1, prompt.answer[:, None])
        nats = torch.nn.functional.cross_entropy(logits, prompt.answer).item()
        # of equal logits greedy decoding takes the first; a NaN is ahead of all, so that it is never right
        first = torch.arange(logits.shape[1]) < prompt.answer[:, None]
        rank = int((~(logits <= right) | (logits == right) & first).sum(1).max())
        found.append(Trial(prompt.length, prompt.depth, prompt.number, nats, rank))
        if progress:
            progress(done + 1, len(asked))
    return found


def summary(dense: Sequence[Trial], trials: Sequence[Trial]) -> dict[str, Any]:
    """Figures for JSON: how many of all and of those that the dense model gets right (the rest says nothing about the
    cache), mean nats, and each trial."""
    kept = [mine.right for base, mine in zip(dense, trials, strict=True) if base.right]
    return {
        "right": sum(trial.right for trial in trials),
        "of": len(trials),
        "right_where_dense_is": sum(kept),
        "dense_right": len(kept),
        "nats": sum(trial.nats for trial in trials) / len(trials),
        "trials": [asdict(trial) | {"right": trial.right} for trial in trials],
    }


def table(results: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Right answers by length and depth: one cell per depth, one line per result (name, ``summary``), dense first."""
    depths = sorted({trial["depth"] for trial in results[0][1]["trials"]})
    lengths = sorted({trial["length"] for trial in results[0][1]["trials"]})
    shown = Table(title="Needle in a haystack: right answers, by depth of the needle", box=box.ROUNDED)
    for name in ("tokens", "cache", *(f"{depth:.0%}" for depth in depths), "all", "of dense's", "nats"):
        shown.add_column(name, justify="left" if name == "cache" else "right")
    for length in lengths:
        base = [trial for trial in results[0][1]["trials"] if trial["length"] == length]
        for i, (name, result) in enumerate(results):
            mine = [trial for trial in result["trials"] if trial["length"] == length]
            cells = [_share([t["right"] for t in mine if t["depth"] == depth]) for depth in depths]
            kept = [t["right"] for b, t in zip(base, mine, strict=True) if b["right"]]
            nats = sum(t["nats"] for t in mine) / len(mine)
            first = f"{length:,}" if i == 0 else ""
            shown.add_row(first, name, *cells, _share([t["right"] for t in mine]), _share(kept), f"{nats:.3f}")
        shown.add_section()
    return shown


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right)}/{len(right)}"
