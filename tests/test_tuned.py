"""The database of configs, and that launchers use what is there and nothing else."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from tuning import CASE, CPU, GPU_CASE, LIMITS, entry_for, problem, put, tiles_of

from helpers import assert_close
from lorc_fx.errors import KernelWarning
from lorc_fx.kernels import fallback, fused, launch, reference, tiled, tune, tuned
from lorc_fx.kernels.config import Config, Tile
from lorc_fx.kernels.tuned import Database, Entry, Target

pytestmark = pytest.mark.usefixtures("database", "tile_by_tile")


# -- the database -----------------------------------------------------------------------------------------------------


def test_a_database_is_what_was_written(database):
    target = Target("a device", "1f", "3.7.1")
    trials = (tuned.Trial(Config(tokens=32), 1e-3, 2e-3), tuned.Trial(Config(warps=8), None, None))
    entries = [
        Entry(target, "tiled: x", 2048, 1, True, Tile(1000), 1e-3, 2e-3),
        Entry(target, "kernel: x", 2048, 1, True, Config(splits=3, skips=False), 1e-3, 2e-3),
        Entry(target, "kernel: x", 8192, 1, True, None, 2e-3, 2e-3),
        Entry(target, "kernel: x", 2048, 8, trials=trials),
    ]
    tuned.write(database, entries)
    found, skipped = tuned.read(database, target)
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
def test_a_corrupt_entry_is_skipped_and_said_once(name, database, monkeypatch):
    made = problem()
    good = entry_for(made, Tile(256)).json()
    database.parent.mkdir(parents=True)
    database.write_text(json.dumps({"version": 1, "entries": [BAD[name](good), good]}))
    with pytest.warns(KernelWarning, match="entry 0 is corrupt") as said:
        assert tiles_of(made, monkeypatch)[0] == (0, 256), "the good one is used"
        tiles_of(made, monkeypatch)
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "entries": []}', '{"version": 1}', "\0" * 9])
def test_a_corrupt_file_is_as_none(text, database, monkeypatch):
    database.parent.mkdir(parents=True)
    database.write_text(text)
    with pytest.warns(KernelWarning, match="lorc autotune"):
        assert tiles_of(problem(), monkeypatch) == [(0, 1024)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("device", "an abacus", "an abacus"), ("sources", "0", "other kernel sources"), ("triton", "9.9", "Triton 9.9")],
)
def test_a_foreign_entry_is_skipped_with_a_warning(name, value, why, database, monkeypatch):
    made = problem()
    here = tune.Tiles(made).target
    put(database, entry_for(made, Tile(256), target=replace(here, **{name: value})))
    with pytest.warns(KernelWarning, match=why):
        assert tiles_of(made, monkeypatch) == [(0, 1024)]


def test_what_the_package_ships_is_the_default_and_says_nothing(database, tmp_path, monkeypatch):
    made = problem()
    here = tune.Tiles(made).target
    stale = entry_for(made, Tile(128), target=replace(here, sources="0"), tokens=1 << 19)
    put(tmp_path / "shipped.json", entry_for(made, Tile(256)), stale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles_of(made, monkeypatch)[0] == (0, 256)
        put(database, entry_for(made, Tile(512)))
        assert tiles_of(made, monkeypatch)[-1] == (512, 1024), "what was tuned here wins"


def test_another_process_loses_nothing(database):
    made = problem()
    target = tune.Tiles(made).target
    first, second = Database.of(target, database), Database.of(target, database)
    first.put(database, entry_for(made, Tile(256)))
    second.put(database, entry_for(made, Tile(512), tokens=9000))
    assert {e.tokens for e in tuned.read(database, target)[0]} == {1024, 9000}
    assert not list(database.parent.glob("*.tmp"))


# -- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 7, 100, 256, 1024, 5000])
@pytest.mark.parametrize("scores", ["none", "bool"])
def test_the_tile_of_the_database_is_used_and_changes_no_result(tile, scores, database, monkeypatch):
    made = problem(replace(CASE, tokens=300, scores=scores))
    put(database, entry_for(made, Tile(tile)))
    read = tiles_of(made, monkeypatch)
    every = [(s, min(s + tile, 300)) for s in range(0, 300, tile)]
    assert read == every if scores == "none" else read and set(read) <= set(every), "a mask may hide some"


@pytest.mark.parametrize("chunk", [None, 32, 100, 512])
def test_a_compiled_call_goes_by_the_database_too(chunk, database, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("LORC_CACHE", str(database.parent.parent))
    tuned.forget()
    made = problem(replace(CASE, tokens=700, scores="bool"))
    put(database, entry_for(made, None if chunk is None else Tile(chunk)))
    seen = []
    inner = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *given: seen.append(given[-1]) or inner(*given))
    call = (made.about, made.query, made.keys, made.values, made.extras)
    assert_close("out", tiled.attend(*call).double(), reference.attend(*call), 1e-5)
    assert seen == [chunk]
    side = tune.Tiles(made)
    assert side.default() == Tile(fused.CHUNK)
    assert [tile.tokens for tile in side.candidates()] == [32, 64, 128, 256, 512, 1024]


def test_a_reader_asks_once_for_a_bucket(database, monkeypatch):
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
