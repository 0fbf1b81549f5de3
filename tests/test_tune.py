"""The tuner: what it times, and what it keeps; and what the package ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import CASE, GPU_CASE, LIMITS, problem, tiles_of

from bench.attention_cases import F32
from helpers import assert_close
from lorc_fx.kernels import reference, tile_readers, tiled, tune, tuned, words
from lorc_fx.kernels.config import Config, Tile
from lorc_fx.kernels.tuned import Database

pytestmark = pytest.mark.usefixtures("database", "tile_by_tile")


# -- the tuner --------------------------------------------------------------------------------------------------------


class Fake:
    """A clock that knows how long each config takes (default: ``usual``), and notes what it was asked for."""

    def __init__(self, seconds: dict[Any, float], usual: float = 1.0, stop: int | None = None) -> None:
        self.seconds, self.usual, self.stop = seconds, usual, stop
        self.rounds: list[list[Any]] = []

    def __call__(self, device: torch.device, calls: Any, repeats: int) -> list[float]:
        if self.stop is not None and len(self.rounds) >= self.stop:
            raise KeyboardInterrupt
        self.runs: list[Any] = []
        for call in calls:
            call()
        self.rounds.append(self.runs)
        return [self.seconds.get(config, self.usual) for config in self.runs]


def job(side: Any, clock: Fake) -> tune.Job:
    side.run = lambda config: clock.runs.append(config)
    return tune.job_of(side)


def test_an_interrupted_run_goes_on_where_it_stopped(database):
    made = problem(replace(CASE, tokens=4096, batch=1))
    target, best = tune.Tiles(made).target, Tile(512)
    first = Fake({best: 0.5, Tile(256): 0.7}, stop=3)
    with pytest.raises(KeyboardInterrupt):
        tune.run(job(tune.Tiles(made), first), Database.of(target, database), database, timer=first)
    assert len(first.rounds) == 3
    assert Database(target, tuned.read(database, target)[0]).find(tune.Tiles(made).words, 4096, 1) is None
    again = Fake(first.seconds)
    whole = job(tune.Tiles(made), again)
    steps: list[int] = []
    found = tune.run(whole, Database.of(target, database), database, lambda: steps.append(1), again)
    timed = [r[1] for r in first.rounds + again.rounds[:-1]]
    assert timed == list(whole.kept) and len(steps) == whole.steps, "each config once, in both runs together"
    assert (found.done, found.config, found.seconds, found.default_seconds, found.trials) == (True, best, 0.5, 1.0, ())
    last = Fake({})
    assert tune.run(job(tune.Tiles(made), last), Database.of(target, database), database, timer=last) == found
    assert last.rounds == [], "what is done is not timed again"


def test_a_small_gain_is_none(database):
    made = problem()
    clock = Fake({Tile(256): 0.98, Tile(128): 3.0})
    found = tune.run(
        job(tune.Tiles(made), clock), Database.of(tune.Tiles(made).target, database), database, timer=clock
    )
    assert found.done and found.config is None and found.seconds == found.default_seconds == 1.0
    assert clock.rounds[-1] == [tune.Tiles(made).default(), Tile(256)], "only what was faster is timed once more"


def test_what_cannot_fit_is_never_timed(database):
    side = tune.Kernels(problem(GPU_CASE), LIMITS)
    clock = Fake({})
    made = job(side, clock)
    assert made.pruned > 0 and made.kept
    tune.run(made, Database.of(side.target, database), database, timer=clock)
    timed = {config for configs in clock.rounds for config in configs}
    latents = 2 * 512 * 2  # keys and values, bytes of a token
    assert timed and all(c.tokens * (c.stages - 1) * latents <= LIMITS.shared for c in timed)
    assert Config(tokens=128, stages=3) not in timed
    assert {c.warps for c in timed} == {4, 8} and {c.stages for c in timed} == {1, 2, 3}
    few = tune.job_of(tune.Kernels(problem(GPU_CASE), replace(LIMITS, shared=48 << 10)))
    assert len(few.kept) < len(made.kept)
    none = tune.job_of(tune.Kernels(problem(GPU_CASE), replace(LIMITS, registers=8)))
    assert not none.kept and none.pruned


#: case, config, bytes of shared memory that Triton 3.7.1 compiles for sm_90 (``ahead.build``)
BUILT = [
    (GPU_CASE, Config(64, 64, 0, 8, 3), 299008),
    (GPU_CASE, Config(64, 64, 0, 8, 2), 167936),
    (GPU_CASE, Config(64, 64, 0, 8, 1), 45056),
    (GPU_CASE, Config(128, 64, 0, 8, 2), 303104),
    (replace(GPU_CASE, scores="bool"), Config(64, 64, 0, 8, 3), 45056),
    (replace(GPU_CASE, scores="bool"), Config(64, 64, 0, 8, 3, False), 299008),
    (replace(GPU_CASE, dtype=F32, keys=((256, 0),), values=((256, 0),)), Config(64, 64, 0, 8, 3), 303104),
    (replace(GPU_CASE, rotary="half"), Config(64, 64, 0, 8, 3), 77824),
    (replace(GPU_CASE, rotary="half", keys=((64, 0),)), Config(64, 64, 0, 8, 3), 184832),
    (replace(GPU_CASE, keys=((256, 0), (256, 8)), values=((256, 0), (256, 8))), Config(64, 64, 0, 8, 3), 49152),
    (replace(GPU_CASE, matrix=False, keys=((1024, 0),), values=((1024, 0),)), Config(64, 64, 0, 8, 3), 88064),
]


@pytest.mark.parametrize("case", range(len(BUILT)))
def test_the_formula_is_a_bound_of_what_compilers_say(case):
    """So nothing that runs is pruned; and where latents are pipelined it is near."""
    given, config, built = BUILT[case]
    made = problem(given)
    side = tune.Kernels(made, LIMITS)
    least = tune.least_shared(made.about, side.given, config)
    assert least <= built
    if built > LIMITS.shared:
        assert not side.fits(config)


def test_what_does_not_compile_is_tried_once_and_never_chosen(database):
    side = tune.Kernels(problem(GPU_CASE), LIMITS)

    class Breaks(Fake):
        def __call__(self, device: torch.device, calls: Any, repeats: int) -> list[float]:
            found = super().__call__(device, calls, repeats)
            if any(c.warps == 4 for c in self.runs):
                raise RuntimeError("PassManager::run failed")
            return found

    clock = Breaks({Config(tokens=64, warps=4): 0.1, Config(tokens=64, warps=8): 0.5})
    found = tune.run(job(side, clock), Database.of(side.target, database), database, timer=clock)
    assert found.config == Config(tokens=64, warps=8)


def test_masks_bring_another_choice_and_splits_differ():
    plain, masked = (
        tune.Kernels(problem(replace(GPU_CASE, scores=s, tokens=4096)), LIMITS).candidates() for s in ("none", "bool")
    )
    assert {c.skips for c in plain} == {True} and {c.skips for c in masked} == {True, False}
    assert {c.stages for c in masked if c.skips} == {1}, "loads behind a condition are not pipelined"
    assert len({c.splits for c in plain}) > 2 and len(set(plain)) == len(plain)


def test_a_cpu_is_tuned_for_real(database, monkeypatch):
    """With the real clock: a default that is made bad is beaten, and the next call uses what was found."""
    monkeypatch.setattr(tile_readers, "TILE_SCORES", 16)
    monkeypatch.setattr(tile_readers, "TILE_NUMBERS", 16)
    monkeypatch.setattr(tiled, "TILE_LEAST", 16)
    made = problem(replace(CASE, tokens=4096))
    side = tune.Tiles(made)
    assert side.default() == Tile(16)
    found = tune.run(tune.job_of(side), Database.of(side.target, database), database)
    assert isinstance(found.config, Tile) and found.config.tokens >= 256
    assert found.seconds is not None and found.default_seconds is not None
    assert found.seconds < 0.8 * found.default_seconds
    assert tiles_of(made, monkeypatch)[0] == (0, min(found.config.tokens, 4096))


def test_problems_of_other_sizes_are_as_good_as_real():
    made = problem(replace(CASE, tokens=100, scores="bool", rotary="half", sink=True))
    other = made.at(333, 5)
    call = (other.about, other.query, other.keys, other.values, other.extras)
    assert (other.tokens, other.batch, other.extras[0].shape[-1]) == (333, 5, 333)
    assert_close("out", tiled.attend(*call).double(), reference.attend(*call), 1e-5)
    same = made.at(100, 2)
    assert torch.equal(same.keys.rows, made.keys.rows) and torch.equal(same.extras[0], made.extras[0])


# -- what the package ships -------------------------------------------------------------------------------------------

SHIPPED = sorted((Path(tuned.__file__).parent / "shipped").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_databases_are_whole(path):
    entries = [tuned.entry_of(e) for e in json.loads(path.read_text())["entries"]]
    assert entries and all(e.done and e.seconds and e.default_seconds for e in entries)
    assert {tuned.slug(e.target.device) for e in entries} == {path.stem}
    assert len({e.key for e in entries}) == len(entries)


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_databases_are_of_these_sources(path):
    """Else nothing reads them: ``python -m bench.tuned`` on that machine makes them anew."""
    sources = {tuned.entry_of(e).target.sources for e in json.loads(path.read_text())["entries"]}
    assert sources == {words.tiled_target().sources}
