"""Needles in a haystack: where they are, how answers are judged, and that a model which can copy finds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from lorc_fx import needle
from lorc_fx.errors import BadOption

LETTERS = tiny.LETTERS | {str(i): 28 + i for i in range(10)}


class Characters:
    """A tokenizer of lower-case letters, blanks and digits: anything else is 0."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[LETTERS.get(char, 0) for char in text.lower()])


BEGINNING, BODY = torch.tensor([50]), torch.full((400,), 40)  # neither is in a needle


def made(**kwargs: Any) -> list[needle.Prompt]:
    return needle.prompts(BEGINNING, BODY, Characters(), **kwargs)


@pytest.mark.parametrize("length", [120, 300])
def test_needles_lie_at_their_depth(length: int) -> None:
    for prompt in made(lengths=[length], keys=3):
        whole = prompt.context.tolist()
        assert len(whole) + len(prompt.question) == prompt.length == length
        assert whole[0] == 50
        hay = [i for i, token in enumerate(whole) if token == 40]
        before = sum(1 for i in hay if i < next(i for i, t in enumerate(whole) if t not in (40, 50)))
        assert before == round(prompt.depth * len(hay))
        sentence = [t for t in whole if t not in (40, 50)]
        answer = Characters()(f" {prompt.number}", False).input_ids
        assert prompt.answer.tolist() == answer
        assert sentence[: len(prompt.question)] == prompt.question.tolist()
        assert sentence[len(prompt.question) :][: len(answer)] == answer


def test_prompts_are_seeded() -> None:
    def numbers(seed: int) -> list[int]:
        return [prompt.number for prompt in made(lengths=[120], seed=seed)]

    assert numbers(0) == numbers(0) != numbers(1)
    assert len(set(numbers(0))) == len(numbers(0)) == 10


@pytest.mark.parametrize(("length", "word", "allowed"), [(60, "above", 1), (2000, "at most", 0)])
def test_lengths_without_room_or_text_are_refused(length: int, word: str, allowed: int) -> None:
    """The message names the bound: one side of it is allowed, the other is not."""
    with pytest.raises(BadOption, match=rf"needle_lengths={length} .*{word} (\d+)") as refused:
        made(lengths=[length], depths=[0.0], keys=1)
    bound = int(str(refused.value).split(word)[1].split()[0].rstrip("."))
    (prompt,) = made(lengths=[bound + allowed], depths=[0.0], keys=1)
    assert len(prompt.context) + len(prompt.question) == bound + allowed
    with pytest.raises(BadOption, match=f"needle_lengths={bound + 1 - allowed} "):
        made(lengths=[bound + 1 - allowed], depths=[0.0], keys=1)


def test_no_lengths_no_prompts() -> None:
    assert made(lengths=[]) == []


class Copier(torch.nn.Module):
    """The last seven tokens are searched for in all that was cached, and what followed them there comes next.

    ``forget`` leaves the first call out of the search: a model that does not read its cache. ``wrong`` tokens are
    ahead of the last right one. ``nan``: all logits are NaN.
    """

    def __init__(self, forget: bool = False, wrong: int = 0, nan: bool = False) -> None:
        super().__init__()
        self.forget, self.wrong, self.nan = forget, wrong, nan
        self.config, self.device = tiny.llama().config, torch.device("cpu")
        self.seen: list[int] = []
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool, cache: Any) -> Any:
        self.calls += 1
        if self.calls % 2:
            self.seen = []
        start = len(self.seen)
        self.seen += input_ids[0].tolist()
        logits = torch.zeros(1, input_ids.shape[1], 64)
        for i in range(start, len(self.seen)):
            for j in range(start if self.forget else 0, i - 1):
                if j >= 6 and self.seen[j - 6 : j + 1] == self.seen[i - 6 : i + 1]:
                    logits[0, i - start, self.seen[j + 1]] = 20.0
        if self.wrong:
            logits[0, -1] += torch.arange(64) * 40.0 * (torch.arange(64) > 63 - self.wrong)
        return SimpleNamespace(logits=logits * float("nan") if self.nan else logits)


def test_a_model_that_copies_from_its_cache_is_right() -> None:
    asked = made(lengths=[120], keys=1)
    done: list[tuple[int, int]] = []
    found = needle.retrieve(Copier(), asked, lambda *at: done.append(at))
    assert all(trial.right and trial.rank == 0 for trial in found)
    assert all(trial.nats < 0.01 for trial in found)
    assert [(t.length, t.depth, t.number) for t in found] == [(p.length, p.depth, p.number) for p in asked]
    assert done[-1] == (5, 5)


def test_a_model_that_does_not_read_its_cache_is_wrong() -> None:
    found = needle.retrieve(Copier(forget=True), made(lengths=[120], keys=1))
    assert not any(trial.right for trial in found)
    assert all(trial.nats > 1 for trial in found)


def test_logits_of_nan_are_wrong() -> None:
    assert not any(trial.right for trial in needle.retrieve(Copier(nan=True), made(lengths=[120], keys=1)))


def test_the_rank_is_that_of_the_worst_token() -> None:
    found = needle.retrieve(Copier(wrong=3), made(lengths=[120], keys=1))
    assert [trial.rank for trial in found] == [3] * 5
    assert not any(trial.right for trial in found)


def test_summary_and_table() -> None:
    def trials(*ranks: int) -> list[needle.Trial]:
        return [
            needle.Trial(120, depth, 7, 1.0 + rank, rank) for depth, rank in zip((0.0, 0.5, 1.0), ranks, strict=True)
        ]

    dense, mine = trials(0, 0, 3), trials(0, 2, 0)
    found = needle.summary(dense, mine)
    assert (found["right"], found["of"], found["right_where_dense_is"], found["dense_right"]) == (2, 3, 1, 2)
    assert found["nats"] == pytest.approx(1 + 2 / 3)
    assert [trial["right"] for trial in found["trials"]] == [True, False, True]
    table = needle.table([("dense", needle.summary(dense, dense)), ("ratio 0.5", found)])
    cells = [list(column.cells) for column in table.columns]
    assert [column[0] for column in cells] == ["120", "dense", "1/1", "1/1", "0/1", "2/3", "2/2", "2.000"]
    assert [column[1] for column in cells] == ["", "ratio 0.5", "1/1", "0/1", "1/1", "2/3", "1/2", "1.667"]
