"""The op ``lorc::table``: a value that the inner compiler must store, not compute again for each of its readers."""

from __future__ import annotations

import torch


@torch.library.custom_op("lorc::table", mutates_args=())
def table(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``values`` that the inner compiler must store.

    Cosines and sines of all cached positions are read by every head of every layer; a fusing compiler would compute
    them again for each of these reads (inductor does: on 2 CPU cores that is most of a rotary read).
    """
    return values.clone(memory_format=torch.contiguous_format)


@table.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)
