"""Writes into preallocated caches: pieces of a prompt at batch one, and writes that no program understands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import nn

from helpers import assert_close, compiled, latents, new_cache, options, piecewise, prompt, some
from lorc_fx import compat
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV

VOCAB, WIDTH, HEADS, DIM, ROOM = 40, 24, 2, 8, 16
pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("name", some(["mistral-window", "gemma3"], ["mistral-window"]))
def test_pieces_of_one_batch_row(name: str, many_shapes: None) -> None:
    """setitem drops leading axes of one, so at batch one the write has fewer axes than the buffer."""
    model = FAMILIES[name].build(layers=FAMILIES[name].fewest)
    plain, ids = copy.deepcopy(model), prompt(1, 12)[0]
    compiled(model, ratio=1.0)
    for ends in ([9, 10, 11, 12], [5, 9, 10, 11]):
        cache = new_cache(model, "static", 12)
        got = piecewise(model, ids[:, : ends[-1]], cache, ends)
        want = piecewise(plain, ids[:, : ends[-1]], new_cache(plain, "static", 12), ends)
        assert_close(f"logits in pieces to {ends}", got, want, 1e-4)
        latents(cache)


def two_indices(buffer: Any, new: Any, past: int) -> None:
    rows = torch.arange(buffer.shape[0])[:, None]
    buffer[rows, :, torch.arange(past, past + new.shape[2])] = new.transpose(1, 2)


def row_by_row(buffer: Any, new: Any, past: int) -> None:
    for i in range(2):
        buffer[i, :, past : past + new.shape[2]] = new[i]


def head_by_head(buffer: Any, new: Any, past: int) -> None:
    for i in range(HEADS):
        buffer[:, i, past : past + new.shape[2]] = new[:, i]


def by_adding(buffer: Any, new: Any, past: int) -> None:
    buffer[:, :, past : past + new.shape[2]].add_(new)


def by_mask(buffer: Any, new: Any, past: int) -> None:
    here = (torch.arange(ROOM) == past)[:, None]
    buffer.copy_(torch.where(here, new, buffer))


ODD: dict[str, Callable[[Any, Any, int], None]] = {
    f.__name__: f for f in (two_indices, row_by_row, head_by_head, by_adding, by_mask)
}


class Decoder(nn.Module):
    """One layer over two buffers; ``odd`` writes where it is given, else ``index_copy_``."""

    def __init__(self) -> None:
        super().__init__()
        n = HEADS * DIM
        self.embed, self.qkv, self.o = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * n), nn.Linear(n, WIDTH)

    def forward(self, ids: Any, cache: Any, past: int, odd: Any = None) -> Any:
        x = self.embed(ids)
        q, k, v = (p.unflatten(2, (HEADS, DIM)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if cache is None:
            cache = tuple(new.new_zeros(new.shape[0], HEADS, ROOM, DIM) for new in (k, v))
        for buffer, new in zip(cache, (k, v), strict=True):
            if odd is None:
                buffer.index_copy_(2, torch.arange(past, past + new.shape[2]), new)
            else:
                odd(buffer, new, past)
        mask = torch.arange(ROOM)[None] <= torch.arange(past, past + ids.shape[1])[:, None]
        out = F.scaled_dot_product_attention(q, *cache, attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(2)), cache


@pytest.mark.parametrize("name", ODD)
def test_a_write_that_is_not_understood_is_right_and_said(name: str) -> None:
    """A coded buffer becomes dense in place, and whoever else holds it sees the write."""
    torch.manual_seed(0)
    model = Decoder().eval().requires_grad_(False)
    ids = torch.randint(0, VOCAB, (2, 9))
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0))
    want, dense = model(ids[:, :6], None, 0)
    got, cache = call(ids[:, :6], None, 0)
    assert all(isinstance(t, LatentKV) and t.tail is None for t in cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for past in (6, 7, 8):
            want, dense = model(ids[:, past : past + 1], dense, past, ODD[name])
            got, cache = call(ids[:, past : past + 1], cache, past, ODD[name])
            assert_close(f"logits of token {past}", got, want, 1e-5)
    for kind, found, truth in zip(("keys", "values"), cache, dense, strict=True):
        whole = found.dense() if isinstance(found, LatentKV) else found
        assert_close(kind, whole[:, :, :9], truth[:, :, :9], 1e-5)  # rows that nothing has written are masked
    coded = all(isinstance(t, LatentKV) and t.tail is None for t in cache)
    assert coded or [w for w in caught if issubclass(w.category, LorcWarning)], "it became dense in silence"


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["joint", "identity"])
def test_caches_of_several_lengths_under_inductor(basis: str) -> None:
    """A length that varies is a symbol, found to be equal to others; none of those may be in the rewritten graph."""
    model = FAMILIES["llama-gqa"].build(layers=1)
    plain, ids = copy.deepcopy(model), prompt(1, 12)[0]
    compiled(model, ratio=1.0, precision="model", basis=basis, calibration="none", inner="inductor")
    with torch._inductor.config.patch(force_disable_caches=True):
        for room in (20, 33, 47):
            cache = new_cache(model, "static", room)
            got = piecewise(model, ids, cache, [9, 10, 12])
            assert_close(
                f"room for {room}", got, piecewise(plain, ids, new_cache(plain, "static", room), [9, 10, 12]), 1e-4
            )
            latents(cache)


def test_tensors_that_were_one_when_a_graph_was_traced_are_inputs_of_their_own() -> None:
    """AOTAutograd takes two inputs of one fake for one, and refuses calls in which they are not: positions that layers
    share are copied before a step writes into them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    one, other = (mode.from_tensor(torch.zeros(7, 2)[:, ::2], static_shapes=True) for _ in range(2))
    found = compat.apart([one, 3, other, one], mode)
    assert found[0] is one
    assert found[2] is other
    assert found[1] == 3
    assert found[3] is not one
    assert (found[3].shape, found[3].stride(), found[3].dtype) == (one.shape, one.stride(), one.dtype)
