"""Times on a device: CUDA events around captured graphs, the L2 cache emptied before each, all ways in turns.

A call is captured where it can be, so that Python's part of it is not timed; what cannot be captured is timed as it is
called. Off CUDA the same code runs by the clock, so that tests see it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]

LEAST_FLUSH = 1 << 28
"""Bytes that are written to empty L2, at least: meanwhile the next call is queued."""

COPIED = 1 << 30
"""Bytes that are copied to measure bandwidth."""


class Clock:
    """Times calls on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        size = 1
        if self.cuda:
            cached = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = max(2 * cached, LEAST_FLUSH)
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def captured(self, call: Call) -> tuple[Call, bool]:
        """``call`` as the replay of a graph, and whether it is one: on a CPU, and where CUDA refuses, it is not."""
        if not self.cuda:
            call()
            return call, False
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and fills what is kept between calls
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return call, False
        return graph.replay, True

    def medians(self, calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
        """Milliseconds of each call, all of them once per repeat, beginning with another one each time."""
        names = list(calls)
        times: dict[str, list[float]] = {name: [] for name in names}
        for call in calls.values():
            call()
        for repeat in range(repeats):
            order = names[repeat % len(names) :] + names[: repeat % len(names)]
            for name, ms in zip(order, self._once([calls[n] for n in order]), strict=True):
                times[name].append(ms)
        return {name: statistics.median(found) for name, found in times.items()}

    def _once(self, calls: list[Call]) -> list[float]:
        if not self.cuda:
            found = []
            for call in calls:
                start = time.perf_counter()
                call()
                found.append(1e3 * (time.perf_counter() - start))
            return found
        events = []
        for call in calls:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events]


def bandwidths(clock: Clock, size: int = COPIED, repeats: int = 9) -> dict[str, float]:
    """Bytes per second of a copy (each byte counts as read and as written) and of a sum (as read)."""
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    ms = clock.medians({"copy": lambda: target.copy_(source), "read": lambda: source.sum()}, repeats)
    return {"copy": 2 * size / ms["copy"] * 1e3, "read": size / ms["read"] * 1e3, "copied_bytes": size}
