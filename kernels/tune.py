"""Times the configs of a reader and keeps what is best (``tuned``): on a GPU of its kernel, on a CPU of its tiles.

    enumerate    tiles of tokens, chunks of columns, splits, warps, stages, skipping; on a CPU tiles alone
    prune        what cannot run, or surely spills: least shared memory and registers, by formula
    time         each in turns with the default, kept at once, so that an interrupted run goes on where it stopped
    decide       the best few and the default in turns; whatever gains less than ``GAIN`` is no gain

Times are lower quartiles: what disturbs a run only adds to it.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import fallback, launch, tiled, tuned, words
from .attend import Attend, watching
from .config import Config, Given, Kernel, Tile, latent
from .expressions import NotGenerated
from .generator import generate
from .row_source import padded
from .stored import Stored
from .tuned import Database, Entry, Trial

GAIN = 0.05
"""Share of the default's time that a config must save: timings of equal configs differ by as much."""

REPEATS, FINAL_REPEATS = 9, 25
FINALISTS = 3

TOKENS, COLUMNS, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
SPLITS = (0.5, 2.0)
"""Splits that are timed, as multiples of what the launcher would choose (which is timed too)."""

LEAST_TILE = 128
MOST_TILE_BYTES = 1 << 28
"""Of what a tile has in memory on a CPU: more would show beside a model."""

COVER_BYTES, COVERS = 1 << 28, 8
"""Written before each call that is timed on a GPU: some 0.6 ms of an H100's time."""

Call = Callable[[], object]
Clock = Callable[[torch.device, Sequence[Call], int], list[float]]


@dataclass(frozen=True)
class Problem:
    """A call of the op: what is timed."""

    about: Attend
    query: torch.Tensor
    keys: Stored
    values: Stored
    extras: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.keys.rows.shape[0]

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    def at(self, tokens: int, batch: int) -> Problem:
        """The same with its rows (and what masks say of them) repeated, or cut, to ``tokens`` and ``batch``."""
        t = torch.arange(tokens, device=self.query.device) % self.tokens
        b = torch.arange(batch, device=self.query.device) % self.batch
        extras = []
        for i, e in enumerate(self.extras):
            if e.dim() == 4 and e.shape[0] > 1:
                e = e[b]
            if i < len(self.about.extras) and e.dim() and e.shape[-1] == self.tokens > 1:
                e = e[..., t].contiguous()
            extras.append(e)
        keys, values = self.keys.at(t, b, self.about.keys), self.values.at(t, b, self.about.values)
        return Problem(self.about, self.query[b], keys, values, tuple(extras))


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Problem]]:
    """Collects the readers whose ops run inside of the block with one query token: by their name in the database, the
    last call of each."""
    found: dict[str, Problem] = {}

    def watch(about: Attend, query: torch.Tensor, *stored: Any) -> None:
        if query.shape[2] == 1:
            problem = Problem(about, query, *stored)
            with contextlib.suppress(NotGenerated):
                found[side_of(problem).words] = problem

    with watching(watch):
        yield found


# -- what can be chosen -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Of a device: bytes of shared memory that a block can have, 32-bit registers that a thread can, threads of a
    warp, multiprocessors."""

    shared: int
    registers: int = 255
    warp: int = 32
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        about = torch.cuda.get_device_properties(device)
        shared = getattr(about, "shared_memory_per_block_optin", about.shared_memory_per_block)
        registers = 512 if torch.version.hip else 255
        return cls(shared, registers, about.warp_size, about.multi_processor_count)


class Tiles:
    """A CPU's choice."""

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        self.target, self.words = tiled.problem(p.about, p.query, p.keys, p.values)

    def default(self) -> Tile:
        p = self.problem
        return Tile(tiled.default_tile(p.about, p.query, p.keys, p.values))

    def candidates(self) -> list[Tile]:
        """Powers of two, from half the default (or ``LEAST_TILE``) to 32 times the default or all tokens; a single tile
        only where the default has several."""
        usual = self.default().tokens
        first, last = tuned.bucket(min(LEAST_TILE, usual // 2)), tuned.bucket(self.problem.tokens)
        return [Tile(1 << i) for i in range(first, min(last + (usual < self.problem.tokens), tuned.bucket(usual) + 6))]

    def fits(self, tile: Tile) -> bool:
        """Whether scores and weights of a tile, and decoded numbers, are few enough."""
        a, q = self.problem.about, self.problem.query
        wide = sum(max(o.decoder.width, o.latent_width) for o in (a.keys, a.values))
        return 4 * tile.tokens * q.shape[0] * (2 * q.shape[1] * q.shape[2] + wide) <= MOST_TILE_BYTES

    def run(self, tile: Tile) -> torch.Tensor:
        p = self.problem
        return tiled.attend(p.about, p.query, p.keys, p.values, p.extras, tile.tokens)


class Kernels:
    """A GPU's choice. Raises NotGenerated where the reader has no kernel."""

    def __init__(self, problem: Problem, limits: Limits | None = None) -> None:
        p = self.problem = problem
        self.given = launch.given_of(p.about, p.query, p.keys, p.values, p.extras)
        self.target, self.words = launch.target(p.query.device), words.kernel_words(p.about, self.given)
        self.limits = limits or Limits.of(p.query.device)
        self.kernel = generate(p.about, self.given, Config())  # how many rows and columns: the same for all configs

    def default(self) -> Config:
        return launch.default(self.problem.about, self.given)

    def candidates(self) -> list[Config]:
        p = self.problem
        masked = p.about.masks is not None
        found = []
        for tokens, columns, warps, stages in itertools.product(TOKENS, COLUMNS, WARPS, STAGES):
            usual = launch.splits(p.batch * self.kernel.groups, p.tokens, tokens, self.limits.processors)
            blocks = max(1, p.tokens // tokens)
            splits = sorted({0, *(min(max(1, int(usual * f)), blocks) for f in SPLITS)} - {usual})
            for number, skips in itertools.product(splits, (True, False) if masked else (True,)):
                found.append(Config(tokens, columns, number, warps, stages, skips))
        return [c for c in found if c.stages == 1 or not _hides(p.about, c)]

    def fits(self, config: Config) -> bool:
        about, width = self.limits, self.limits.warp
        shared = least_shared(self.problem.about, self.given, config)
        return shared <= about.shared and least_registers(self.kernel, config, width) <= about.registers

    def run(self, config: Config) -> torch.Tensor:
        p = self.problem
        return launch.exactly(p.about, self.given, config, p.query, p.keys, p.values, p.extras)


def least_shared(about: Attend, given: Given, config: Config) -> int:
    """Bytes of shared memory that a kernel takes at least: where loads are pipelined, the latents of the blocks that
    are on their way while one is used, and a piece of that one. Builds for sm_90 take 20 to 45 KiB more."""
    size = 4 if given.product == "float32" else 2
    ahead = sum(o.latent_width for o in (about.keys, about.values) if latent(o)) * size
    return config.tokens * ((config.stages - 1) * ahead * _pipelined(about, config) + 16 * size)


def _pipelined(about: Attend, config: Config) -> bool:
    """Whether Triton surely loads latents of later blocks while it works: they are plain numbers, loaded without a
    condition (``skips``), and nothing is decoded in a loop within the loop over tokens."""
    both = (about.keys, about.values)
    within = any(o.decodes and not latent(o) and o.format.columns > config.columns for o in both)
    return all(o.format.plain for o in both) and not within and not _hides(about, config)


def _hides(about: Attend, config: Config) -> bool:
    """Whether blocks may be left out: then Triton pipelines no loads, whatever the stages."""
    return config.skips and about.masks is not None


def least_registers(kernel: Kernel, config: Config, warp: int) -> int:
    """Registers of a thread that a kernel takes at least: sums of values and two blocks of scores, in fp32."""
    numbers = padded(kernel.rows) * (padded(kernel.width) + 2 * config.tokens)
    return numbers // (config.warps * warp)


Side = Tiles | Kernels


def side_of(problem: Problem) -> Side:
    """Raises NotGenerated."""
    return Kernels(problem) if problem.query.is_cuda else Tiles(problem)


# -- timing -----------------------------------------------------------------------------------------------------------


def clock(device: torch.device, calls: Sequence[Call], repeats: int) -> list[float]:
    """Seconds of each call: they take turns, so that what else the machine does meets all of them."""
    once = _gpu(device) if device.type == "cuda" else _cpu
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats):
        for i in range(len(calls)):
            at = (i + repeat) % len(calls)
            times[at].append(once(calls[at]))
    return [statistics.quantiles(t, n=4, method="inclusive")[0] if len(t) > 1 else t[0] for t in times]


def _cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu(device: torch.device) -> Callable[[Call], float]:
    """Of the device alone: it is first kept busy with what empties its cache, so that launching, which takes longer
    than most kernels, is done when it comes to them."""
    cover = torch.empty(COVER_BYTES, dtype=torch.uint8, device=device)

    def once(call: Call) -> float:
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(COVERS):
                cover.zero_()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3

    return once


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One problem. ``kept``: the configs to time beside the default; ``pruned``: how many were left out."""

    side: Side
    kept: tuple[Config | Tile, ...]
    pruned: int

    @property
    def entry(self) -> Entry:
        """What the database has for it before anything is timed."""
        problem = self.side.problem
        return Entry(self.side.target, self.side.words, problem.tokens, problem.batch)

    @property
    def steps(self) -> int:
        """How often ``run`` calls ``step``."""
        return len(self.kept) + 1


def job_of(side: Any) -> Job:
    usual = side.default()
    others = [c for c in side.candidates() if c != usual]
    kept = tuple(c for c in others if side.fits(c))
    return Job(side, kept, len(others) - len(kept))


def run(
    job: Job, database: Database, path: Path, step: Callable[[], None] = lambda: None, timer: Clock = clock
) -> Entry:
    """Times what has not been timed yet, and keeps each result in the file at once. Raises OSError where that cannot
    be written."""
    entry = database.entries.get(job.entry.key, job.entry)
    if entry.done:
        for _ in range(job.steps):
            step()
        return entry
    usual = job.side.default()
    known = {t.config for t in entry.trials}
    for config in job.kept:
        if config not in known:
            times = _timed(job.side, [usual, config], REPEATS, timer)
            trial = Trial(config, None, None) if times is None else Trial(config, times[1], times[0])
            entry = replace(entry, trials=(*entry.trials, trial))
            database.put(path, entry)
        step()
    best = sorted(entry.trials, key=_share)[:FINALISTS]
    few = [usual, *(t.config for t in best if _share(t) < 1)]
    times = _timed(job.side, few, FINAL_REPEATS, timer) or []
    done = replace(entry, done=True, trials=())
    if times:
        least, won = min(zip(times, few, strict=True), key=lambda pair: pair[0])
        gains = least < (1 - GAIN) * times[0]
        done = replace(done, config=won if gains else None, default_seconds=times[0])
        done = replace(done, seconds=least if gains else times[0])
    database.put(path, done)
    step()
    return done


def _share(trial: Trial) -> float:
    """Of the default's time."""
    return float("inf") if trial.seconds is None or not trial.default_seconds else trial.seconds / trial.default_seconds


def _timed(side: Side, configs: Sequence[Any], repeats: int, timer: Clock) -> list[float] | None:
    """Seconds of each; None where one does not run on this device."""
    calls = [lambda c=config: side.run(c) for config in configs]
    try:
        return timer(side.problem.query.device, calls, repeats)
    except (NotGenerated, ImportError):
        return None
    except Exception as error:
        if not fallback.of_compiling(error):
            raise
        return None
