"""Problems for the tuner and entries of its database, for tests of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.attention_cases import BF16, Case, build
from helpers import assert_close
from lorc_fx.kernels import reference, tiled, tune, tuned
from lorc_fx.kernels.config import Config, Tile
from lorc_fx.kernels.tuned import Entry

CPU = torch.device("cpu")
CASE = Case(tokens=1024, heads=4, cached=2, keys=((32, 8),), values=((32, 8),))

GPU_CASE = Case(dtype=BF16, dim=128, heads=32, cached=8, keys=((512, 0),), values=((512, 0),), tokens=600, batch=1)
LIMITS = tune.Limits(shared=227 << 10)


def problem(case: Case = CASE) -> tune.Problem:
    return tune.Problem(*build(case))


def entry_for(made: tune.Problem, config: Config | Tile | None, **more: Any) -> Entry:
    side = tune.Tiles(made)
    given = Entry(side.target, side.words, made.tokens, made.batch, True, config, 1e-3, 2e-3)
    return replace(given, **more)


def put(path: Path, *entries: Entry) -> None:
    tuned.write(path, entries)
    tuned.forget()


def tiles_of(made: tune.Problem, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tiles that a call of the op reads; its result is checked against the reference (a mean of many random values
    is small, so rounding counts for more than elsewhere)."""
    seen: list[tuple[int, int]] = []
    inner = tiled._tiles

    def spy(*given):
        found = list(inner(*given))
        seen.extend(found)
        return iter(found)

    monkeypatch.setattr(tiled, "_tiles", spy)
    call = (made.about, made.query, made.keys, made.values, made.extras)
    assert_close("out", tiled.attend(*call).double(), reference.attend(*call), 2e-4)
    return seen
