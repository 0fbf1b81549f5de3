"""What the device at hand does at best: measured, or by name from its datasheet."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch.fx import symbolic_trace

from .passes.cost import Device

DATASHEETS = (
    Device("A100-SXM4-80GB", 2.0e12, 312e12, "NVIDIA A100 80GB SXM datasheet: HBM2e 2039 GB/s, BF16 dense 312 TFLOP/s"),
    Device("H100 80GB HBM3", 3.35e12, 989e12, "NVIDIA H100 SXM datasheet: HBM3 3.35 TB/s, BF16 dense 989 TFLOP/s"),
    Device("H200", 4.8e12, 989e12, "NVIDIA H200 SXM datasheet: HBM3e 4.8 TB/s, BF16 dense 989 TFLOP/s"),
    Device("B200", 8.0e12, 2250e12, "NVIDIA B200 datasheet: HBM3e 8 TB/s, BF16 dense 2.25 PFLOP/s"),
    Device("MI300X", 5.3e12, 1307e12, "AMD MI300X datasheet: HBM3 5.3 TB/s, BF16 dense 1307 TFLOP/s"),
)
"""Peak figures by what a device's name ends with, as whole words: cards of one family with other memory have other
names (an H100 PCIe, a GH200), and what is in no table is measured."""

BYTES = 1 << 28
"""What is read to measure bandwidth: more than any cache holds."""

PRODUCT = (256, 1024, 4096)
"""The product that is timed, [256, 1024] x [1024, 4096]: as those of tiles and of latents, whose rows stay in a
cache."""

ROWS = (65536, 16, 64)
"""Tokens, heads and head dim of the int8 rows whose reading is timed: more than any cache holds, as a step that has
read all weights finds them; one query for each head, so that products are few beside what is unpacked."""

LATENTS = (8192, 16, 64, 512)
"""Tokens, heads, head dim and columns of the latents that are multiplied with: each column meets every head, so that
products are many beside what is read."""

PASSED = 1 << 18
"""Numbers that an op reads and writes: a tile's, which stay in a core's cache."""


@functools.cache
def device_of(device: torch.device) -> Device:
    """The figures of ``device``: of a datasheet where it is known by name, else measured now (under a second)."""
    known = datasheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or measured(device)


def datasheet(name: str) -> Device | None:
    """The published figures of a GPU by the name that torch has for it."""
    return next((known for known in DATASHEETS if f" {name}".endswith(f" {known.name}")), None)


def measured(device: torch.device, repeats: int = 5) -> Device:
    """Bandwidth of reading ``BYTES`` once, FLOP/s of ``PRODUCT`` in fp32 and of attention over ``LATENTS``, numbers/s
    that bytes become and that an op passes on, and seconds of a call, the best of ``repeats``, with as many threads as
    torch uses."""
    data = torch.ones(BYTES // 4, device=device)
    m, inner, columns = PRODUCT
    left, right = torch.ones(m, inner, device=device), torch.ones(columns, inner, device=device)
    read = _best(lambda: data.sum(), device, repeats)
    product = _best(lambda: left @ right.T, device, repeats)
    rate = 2 * m * inner * columns / product
    if device.type == "cuda":
        return Device(torch.cuda.get_device_name(device), BYTES / read, rate, "measured")
    tokens, heads, dim = ROWS
    took, call = (_attention(some, heads, dim, None, device, repeats) for some in (tokens, 1))
    numbers = 2 * math.prod(ROWS) / max(took - call, 1e-9)
    tokens, heads, dim, width = LATENTS
    took = _attention(tokens, heads, dim, width, device, repeats)
    products = 2 * 2 * tokens * heads * width / max(took - call, 1e-9)
    few = data[:PASSED]
    passed = PASSED / _best(lambda: few * 2, device, repeats)
    name = f"{device.type}, {torch.get_num_threads()} threads"
    return Device(
        name, BYTES / read, rate, "measured", numbers, call, device.type != "cpu", products=products, passed=passed
    )


def _attention(tokens: int, heads: int, dim: int, width: int | None, device: torch.device, repeats: int) -> float:
    """Seconds of one attention over so many tokens of int8 keys and values: as they are, or ``width`` columns of a
    joint basis."""
    from .kernels import tiled
    from .kernels.attend import Attend, Operand
    from .kernels.stored import Stored
    from .packing import Format, Segment
    from .passes.unprojected import as_it_is

    form = Format((Segment(width or heads * dim, 8),), 1, torch.float32)
    codec = () if width is None else (torch.randn(width, heads * dim, device=device) / heads**0.5,)
    # rows of their own for each: values that lie where the keys do are still in a core's cache
    keys, values = (
        Stored(torch.ones(tokens, 1, form.width, dtype=torch.uint8, device=device), None, codec) for _ in range(2)
    )
    decoder = as_it_is(("B", heads, "T", dim), torch.float32)
    operand = Operand(form, form.columns, decoder, heads, dim, None, True, width is not None, False)
    query = torch.randn(1, heads, 1, dim, device=device)
    about = Attend(operand, operand, symbolic_trace(lambda scores: scores * 0.125), ())
    return _best(lambda: tiled.attend(about, query, keys, values, ()), device, repeats)


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
