"""What the device at hand does at best: measured, or by name from its datasheet."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from .passes.cost import Device

DATASHEETS = (
    Device("A100", 2.0e12, 312e12, "NVIDIA A100 80GB SXM datasheet: HBM2e 2039 GB/s, BF16 dense 312 TFLOP/s"),
    Device("H100", 3.35e12, 989e12, "NVIDIA H100 SXM datasheet: HBM3 3.35 TB/s, BF16 dense 989 TFLOP/s"),
    Device("H200", 4.8e12, 989e12, "NVIDIA H200 SXM datasheet: HBM3e 4.8 TB/s, BF16 dense 989 TFLOP/s"),
    Device("B200", 8.0e12, 2250e12, "NVIDIA B200 datasheet: HBM3e 8 TB/s, BF16 dense 2.25 PFLOP/s"),
    Device("MI300X", 5.3e12, 1307e12, "AMD MI300X datasheet: HBM3 5.3 TB/s, BF16 dense 1307 TFLOP/s"),
)
"""Peak figures by a part of the device's name; where it is in no table it is measured."""

BYTES = 1 << 28
"""What is read to measure bandwidth: more than any cache holds."""

PRODUCT = (16, 1024, 8192)
"""The product that is timed, [16, 1024] x [1024, 8192]: as narrow as those of a decode step."""


@functools.cache
def device_of(device: torch.device) -> Device:
    """The figures of ``device``: of a datasheet where it is known by name, else measured now (under a second)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known in DATASHEETS:
            if known.name in name:
                return known
    return measured(device)


def measured(device: torch.device, repeats: int = 5) -> Device:
    """Bandwidth of reading ``BYTES`` once and FLOP/s of ``PRODUCT`` in fp32, the best of ``repeats``, with as many
    threads as torch uses."""
    data = torch.ones(BYTES // 4, device=device)
    m, inner, columns = PRODUCT
    left, right = torch.ones(m, inner, device=device), torch.ones(columns, inner, device=device)
    read = _best(lambda: data.sum(), device, repeats)
    product = _best(lambda: left @ right.T, device, repeats)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    return Device(name, BYTES / read, 2 * m * inner * columns / product, "measured")


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
