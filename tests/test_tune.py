"""The tuner and its database: what it times, what it keeps, and that launchers use what is there and nothing else."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.attention_cases import BF16, F32, Case, build
from helpers import assert_close
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import fallback, fused, launch, reference, tile_readers, tiled, tune, tuned, words
from lorc_fx.kernels.config import Config, Tile
from lorc_fx.kernels.tuned import Database, Entry, Target

CPU = torch.device("cpu")
CASE = Case(tokens=1024, heads=4, cached=2, keys=((32, 8),), values=((32, 8),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No database but the test's own is read, and none is remembered."""
    monkeypatch.setenv("LORC_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "shipped_file", lambda device: tmp_path / "shipped.json")
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.fixture(autouse=True)
def tile_by_tile(monkeypatch):
    """Tiles are looked at as the torch ops get them, not in one compiled call."""
    monkeypatch.setattr(fused, "chain", lambda about: None)


@pytest.fixture
def file() -> Path:
    return tuned.users_file(words.device_name(CPU))


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


# -- the database -----------------------------------------------------------------------------------------------------


def test_a_database_is_what_was_written(file):
    target = Target("a device", "1f", "3.7.1")
    trials = (tuned.Trial(Config(tokens=32), 1e-3, 2e-3), tuned.Trial(Config(warps=8), None, None))
    entries = [
        Entry(target, "tiled: x", 2048, 1, True, Tile(1000), 1e-3, 2e-3),
        Entry(target, "kernel: x", 2048, 1, True, Config(splits=3, skips=False), 1e-3, 2e-3),
        Entry(target, "kernel: x", 8192, 1, True, None, 2e-3, 2e-3),
        Entry(target, "kernel: x", 2048, 8, trials=trials),
    ]
    tuned.write(file, entries)
    found, skipped = tuned.read(file, target)
    assert skipped == [] and {e.key: e for e in found} == {e.key: e for e in entries}


def test_sizes_find_the_nearest_entry():
    target = Target("a device", "1f", "")
    sizes = {512: Tile(512), 2048: Tile(256), 8192: None}
    found = Database(target, [Entry(target, "x", n, 1, True, c) for n, c in sizes.items()])
    assert found.find("x", 2048, 1) == found.find("x", 1025, 1) == Tile(256)
    assert found.find("x", 300, 1) == found.find("x", 100, 1) == Tile(512)
    assert found.find("x", 9000, 1) is None, "the default is best there"
    assert found.find("x", 1 << 20, 1) is None and found.find("x", 32, 1) is None, "too far away"
    assert found.find("x", 2048, 2) is None and found.find("y", 2048, 1) is None


BAD = {
    "no object": lambda e: 7,
    "no tokens": lambda e: {k: v for k, v in e.items() if k != "tokens"},
    "tokens of text": lambda e: e | {"tokens": "many"},
    "no tokens at all": lambda e: e | {"tokens": 0},
    "a flag as a number": lambda e: e | {"batch": True},
    "a tile of nothing": lambda e: e | {"config": {"tile": 0}},
    "half a config": lambda e: e | {"config": {"tokens": 64}},
    "48 tokens in a block": lambda e: e | {"config": vars(Config(tokens=48))},
    "a million warps": lambda e: e | {"config": vars(Config(warps=1 << 20))},
    "time that ran backwards": lambda e: e | {"seconds": -1},
    "trials of nothing": lambda e: e | {"trials": [1]},
    "no reader": lambda e: e | {"reader": None},
}


@pytest.mark.parametrize("name", BAD)
def test_a_corrupt_entry_is_skipped_and_said_once(name, file, monkeypatch):
    made = problem()
    good = entry_for(made, Tile(256)).json()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"version": 1, "entries": [BAD[name](good), good]}))
    with pytest.warns(KernelWarning, match="entry 0 is corrupt") as said:
        assert tiles_of(made, monkeypatch)[0] == (0, 256), "the good one is used"
        tiles_of(made, monkeypatch)
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "entries": []}', '{"version": 1}', "\0" * 9])
def test_a_corrupt_file_is_as_none(text, file, monkeypatch):
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(KernelWarning, match="lorc autotune"):
        assert tiles_of(problem(), monkeypatch) == [(0, 1024)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("device", "an abacus", "an abacus"), ("sources", "0", "other kernel sources"), ("triton", "9.9", "Triton 9.9")],
)
def test_a_foreign_entry_is_skipped_with_a_warning(name, value, why, file, monkeypatch):
    made = problem()
    here = tune.Tiles(made).target
    put(file, entry_for(made, Tile(256), target=replace(here, **{name: value})))
    with pytest.warns(KernelWarning, match=why):
        assert tiles_of(made, monkeypatch) == [(0, 1024)]


def test_what_the_package_ships_is_the_default_and_says_nothing(own_cache, file, monkeypatch):
    made = problem()
    here = tune.Tiles(made).target
    stale = entry_for(made, Tile(128), target=replace(here, sources="0"), tokens=1 << 19)
    put(own_cache / "shipped.json", entry_for(made, Tile(256)), stale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles_of(made, monkeypatch)[0] == (0, 256)
        put(file, entry_for(made, Tile(512)))
        assert tiles_of(made, monkeypatch)[-1] == (512, 1024), "what was tuned here wins"


def test_another_process_loses_nothing(file):
    made = problem()
    target = tune.Tiles(made).target
    first, second = Database.of(target, file), Database.of(target, file)
    first.put(file, entry_for(made, Tile(256)))
    second.put(file, entry_for(made, Tile(512), tokens=9000))
    assert {e.tokens for e in tuned.read(file, target)[0]} == {1024, 9000}
    assert not list(file.parent.glob("*.tmp"))


# -- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 7, 100, 256, 1024, 5000])
@pytest.mark.parametrize("scores", ["none", "bool"])
def test_the_tile_of_the_database_is_used_and_changes_no_result(tile, scores, file, monkeypatch):
    made = problem(replace(CASE, tokens=300, scores=scores))
    put(file, entry_for(made, Tile(tile)))
    read = tiles_of(made, monkeypatch)
    every = [(s, min(s + tile, 300)) for s in range(0, 300, tile)]
    assert read == every if scores == "none" else read and set(read) <= set(every), "a mask may hide some"


@pytest.mark.parametrize("chunk", [None, 32, 100, 512])
def test_a_compiled_call_goes_by_the_database_too(chunk, file, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("LORC_CACHE", str(file.parent.parent))
    tuned.forget()
    made = problem(replace(CASE, tokens=700, scores="bool"))
    put(file, entry_for(made, None if chunk is None else Tile(chunk)))
    seen = []
    inner = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *given: seen.append(given[-1]) or inner(*given))
    call = (made.about, made.query, made.keys, made.values, made.extras)
    assert_close("out", tiled.attend(*call).double(), reference.attend(*call), 1e-5)
    assert seen == [chunk]
    side = tune.Tiles(made)
    assert side.default() == Tile(fused.CHUNK)
    assert [tile.tokens for tile in side.candidates()] == [32, 64, 128, 256, 512, 1024]


def test_a_reader_asks_once_for_a_bucket(file, monkeypatch):
    made = problem()
    asked = []
    inner = tiled.problem
    monkeypatch.setattr(tiled, "problem", lambda *given: asked.append(1) or inner(*given))
    for tokens in (1024, 1024, 700, 513, 1025, 2000):
        tiles_of(made.at(tokens, 2), monkeypatch)
    assert len(asked) == 2


def test_readers_of_one_kind_share_entries_though_their_bits_differ():
    one, other = (tune.Tiles(problem(replace(CASE, keys=keys))).words for keys in (((30, 8),), ((20, 8), (12, 4))))
    assert one == other
    assert one != tune.Tiles(problem(replace(CASE, keys=((70, 8),)))).words
    assert one != tune.Tiles(problem(replace(CASE, heads=8))).words
    assert one != tune.Tiles(problem(replace(CASE, scores="bool"))).words


GPU_CASE = Case(dtype=BF16, dim=128, heads=32, cached=8, keys=((512, 0),), values=((512, 0),), tokens=600, batch=1)
LIMITS = tune.Limits(shared=227 << 10)


@pytest.fixture
def ran(monkeypatch):
    """The configs whose kernels would have been launched."""
    seen: list[Config] = []

    def launched(about, given, config, made, query, *rest):
        seen.append(config)
        return query.new_zeros((*query.shape[:3], about.values.head_dim))

    monkeypatch.setattr(launch, "_made", {})
    monkeypatch.setattr(fallback, "_said", set())
    monkeypatch.setattr(launch, "_make", lambda *given: ("a kernel", launch))
    monkeypatch.setattr(launch, "_run", launched)
    return seen


def test_the_launcher_uses_the_config_of_the_database(ran):
    made = problem(GPU_CASE)
    call = (made.about, made.query, made.keys, made.values, made.extras)
    side = tune.Kernels(made, LIMITS)
    launch.attend(*call)
    assert ran == [side.default()]
    best = Config(tokens=32, splits=3, warps=4)
    put(tuned.users_file(side.target.device), Entry(side.target, side.words, 600, 1, True, best))
    launch.attend(*call)
    launch.attend(*call, config=Config(stages=1))
    assert ran[1:] == [best, Config(stages=1)]


def test_a_config_that_does_not_compile_here_gives_way_to_the_default(ran, monkeypatch):
    made = problem(GPU_CASE)
    call = (made.about, made.query, made.keys, made.values, made.extras)
    side = tune.Kernels(made, LIMITS)
    best, inner = Config(tokens=128, warps=4), launch._run
    put(tuned.users_file(side.target.device), Entry(side.target, side.words, 600, 1, True, best))

    def tight(about, given, config, *rest):
        if config.tokens > 64:
            raise RuntimeError("PassManager::run failed")
        return inner(about, given, config, *rest)

    monkeypatch.setattr(launch, "_run", tight)
    with pytest.warns(KernelWarning, match="tuned config is not used, but the default") as said:
        launch.attend(*call)
        launch.attend(*call)
    assert ran == [side.default()] * 2 and len(said) == 1


def test_splits_are_no_part_of_a_kernel_and_none_is_empty():
    assert launch._source_of(Config(splits=9)) == launch._source_of(Config(splits=2))
    for total, splits in ((1, 64), (63, 8), (64, 8), (65, 64), (1000, 7), (3185, 200)):
        parts = launch._splits(1, total, Config(tokens=16, splits=splits), CPU)
        assert 1 <= parts <= splits and (parts - 1) * -(-total // parts) < total


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


def test_an_interrupted_run_goes_on_where_it_stopped(file):
    made = problem(replace(CASE, tokens=4096, batch=1))
    target, best = tune.Tiles(made).target, Tile(512)
    first = Fake({best: 0.5, Tile(256): 0.7}, stop=3)
    with pytest.raises(KeyboardInterrupt):
        tune.run(job(tune.Tiles(made), first), Database.of(target, file), file, timer=first)
    assert len(first.rounds) == 3
    assert Database(target, tuned.read(file, target)[0]).find(tune.Tiles(made).words, 4096, 1) is None
    again = Fake(first.seconds)
    whole = job(tune.Tiles(made), again)
    steps: list[int] = []
    found = tune.run(whole, Database.of(target, file), file, lambda: steps.append(1), again)
    timed = [r[1] for r in first.rounds + again.rounds[:-1]]
    assert timed == list(whole.kept) and len(steps) == whole.steps, "each config once, in both runs together"
    assert (found.done, found.config, found.seconds, found.default_seconds, found.trials) == (True, best, 0.5, 1.0, ())
    last = Fake({})
    assert tune.run(job(tune.Tiles(made), last), Database.of(target, file), file, timer=last) == found
    assert last.rounds == [], "what is done is not timed again"


def test_a_small_gain_is_none(file):
    made = problem()
    clock = Fake({Tile(256): 0.98, Tile(128): 3.0})
    found = tune.run(job(tune.Tiles(made), clock), Database.of(tune.Tiles(made).target, file), file, timer=clock)
    assert found.done and found.config is None and found.seconds == found.default_seconds == 1.0
    assert clock.rounds[-1] == [tune.Tiles(made).default(), Tile(256)], "only what was faster is timed once more"


def test_what_cannot_fit_is_never_timed(file):
    side = tune.Kernels(problem(GPU_CASE), LIMITS)
    clock = Fake({})
    made = job(side, clock)
    assert made.pruned > 0 and made.kept
    tune.run(made, Database.of(side.target, file), file, timer=clock)
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


def test_what_does_not_compile_is_tried_once_and_never_chosen(file):
    side = tune.Kernels(problem(GPU_CASE), LIMITS)

    class Breaks(Fake):
        def __call__(self, device: torch.device, calls: Any, repeats: int) -> list[float]:
            found = super().__call__(device, calls, repeats)
            if any(c.warps == 4 for c in self.runs):
                raise RuntimeError("PassManager::run failed")
            return found

    clock = Breaks({Config(tokens=64, warps=4): 0.1, Config(tokens=64, warps=8): 0.5})
    found = tune.run(job(side, clock), Database.of(side.target, file), file, timer=clock)
    assert found.config == Config(tokens=64, warps=8)


def test_masks_bring_another_choice_and_splits_differ():
    plain, masked = (
        tune.Kernels(problem(replace(GPU_CASE, scores=s, tokens=4096)), LIMITS).candidates() for s in ("none", "bool")
    )
    assert {c.skips for c in plain} == {True} and {c.skips for c in masked} == {True, False}
    assert {c.stages for c in masked if c.skips} == {1}, "loads behind a condition are not pipelined"
    assert len({c.splits for c in plain}) > 2 and len(set(plain)) == len(plain)


def test_a_cpu_is_tuned_for_real(file, monkeypatch):
    """With the real clock: a default that is made bad is beaten, and the next call uses what was found."""
    monkeypatch.setattr(tile_readers, "TILE_SCORES", 16)
    monkeypatch.setattr(tile_readers, "TILE_NUMBERS", 16)
    monkeypatch.setattr(tiled, "TILE_LEAST", 16)
    made = problem(replace(CASE, tokens=4096))
    side = tune.Tiles(made)
    assert side.default() == Tile(16)
    found = tune.run(tune.job_of(side), Database.of(side.target, file), file)
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
