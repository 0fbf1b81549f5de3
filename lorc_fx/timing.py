"""How long the stages of the pipeline took, and how often compilers ran."""

from __future__ import annotations

import time

_timings: dict[str, float] = {}
COUNTS = {"backend_calls": 0, "inner_compiles": 0}


def timings() -> dict[str, float]:
    """Seconds spent by each stage since the last ``reset_timings()``: normalise_s, match_s, statistics_s,
    factorise_s, plan_s, rewrite_s, inner_s."""
    return dict(_timings)


def counts() -> dict[str, int]:
    """How often Dynamo called this backend, and how often an inner compiler ran, since ``reset_timings()``."""
    return dict(COUNTS)


def reset_timings() -> None:
    _timings.clear()
    COUNTS.update(backend_calls=0, inner_compiles=0)


class timed:
    """Adds the time of a with-block to a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        _timings[self.stage] = _timings.get(self.stage, 0.0) + time.perf_counter() - self.begin
