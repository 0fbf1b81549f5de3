"""Buffers whose batch rows are written one by one, as caches do where each row has a length of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hand_written import DIM, KV, ROOM, VOCAB, WIDTH, N, check, decoder, rotate, run, turns
from helpers import assert_close, options
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore::lorc_fx.errors.EagerWarning")]


@pytest.mark.parametrize(
    "kind",
    [{"rope": None}, {"rope": "after"}, {"rope": None, "layout": "BTHD"}, {"rope": "after", "layout": "BHDT"}],
    ids=str,
)
def test_rows_written_one_by_one_are_coded(kind):
    values, _, said = check(decoder(form="rows", **kind))
    assert all(isinstance(v, LatentKV) and v.tail is None for v in values), said
    assert not said


def test_they_hold_what_one_write_of_all_rows_holds():
    logits = []
    for form in ("rows", "index"):
        got, _ = run(torch.compile(decoder(form=form, rope="after"), backend="lorc", options=options(ratio=0.5)))
        logits.append(got)
    assert_close("logits", *logits, 1e-5)


def test_one_position_for_all_rows_is_not_that_of_each():
    """Angles come once for the batch: of keys they would be read where row 0 has them, and rows may lie elsewhere."""
    values, _, said = check(decoder(form="rows"))
    assert type(values[0]) is torch.Tensor and isinstance(values[1], LatentKV)
    assert any("share their positions" in text for text in said), said


class Ragged(nn.Module):
    """Every row has positions of its own, which are also its places in the buffer. ``way``: "rows"; "put" spells the
    write as an index; "heads" writes single heads; "crossed" writes each row where another belongs, and reads it back
    from there; "used" goes on with the value of the write."""

    def __init__(self, way="rows"):
        super().__init__()
        self.way, self.embed = way, nn.Embedding(VOCAB, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, N) for _ in range(3))
        self.o = nn.Linear(N, WIDTH)

    def store(self, buffer, new, places):
        """[B, H, T, D] with the new rows in it; what attention reads is in their order."""
        rows = range(len(new))
        if self.way == "heads":
            for head in range(KV):
                buffer[:, head].index_copy_(1, places[0], new[:, head])
            return buffer, buffer
        if self.way == "crossed":
            other = [*rows[1:], 0]
            for row in rows:
                buffer[other[row]].index_copy_(1, places[row], new[row])
            return buffer, buffer[other]
        parts = []
        for row in rows:
            if self.way == "put":
                buffer[row][:, places[row]] = new[row]
            else:
                parts.append(buffer[row].index_copy_(1, places[row], new[row]))
        return buffer, torch.stack(parts) if self.way == "used" else buffer

    def forward(self, ids, cache, places, angles=None):
        x = self.embed(ids)
        q, k, v = (p(x).unflatten(-1, (KV, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if angles is None:
            cos, sin = (t.view(*places.shape, DIM)[:, None] for t in turns(places.flatten()))
        else:
            cos, sin = turns(angles)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            cache = [k.new_zeros(len(ids), KV, ROOM, DIM) for _ in range(2)]
        (keys, k), (values, v) = (self.store(b, n, places) for b, n in zip(cache, (k, v), strict=True))
        mask = torch.arange(ROOM) <= places[..., None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(2)
        return (x + self.o(out)) @ self.embed.weight.T, [keys, values]


def ragged(way):
    torch.manual_seed(0)
    return Ragged(way).eval().requires_grad_(False)


def steps(call, begins, shared=False):
    """A prompt of nine tokens and three more, which in row b are ``begins[b]`` places further on."""
    ids = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    logits, cache = [], None
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        places = begins[:, None] + torch.arange(begin, end)
        if begin == 0:
            places = torch.arange(9) + 0 * begins[:, None]
        out, cache = call(ids[:, begin:end], cache, places, *([torch.arange(begin, end)] if shared else []))
        logits.append(out)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("way", ["rows", "put"])
def test_rows_of_different_lengths_are_coded(way):
    """Row 1 goes on at its fourth place and row 2 at its seventh: each over tokens that it had."""
    model, begins = ragged(way), -torch.tensor([0, 5, 2])
    want, dense = steps(model, begins)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0, strict=True))
    got, cache = steps(call, begins)
    assert_close("logits", got, want, 1e-5)
    for coded, plain in zip(cache, dense, strict=True):
        assert isinstance(coded, LatentKV) and coded.tail is None
        assert_close("cache", coded.dense(), plain, 1e-5)


def test_shared_angles_of_rows_of_different_lengths_are_right():
    model, begins = ragged("rows"), -torch.tensor([0, 5, 2])
    want, _ = steps(model, begins, shared=True)
    call = torch.compile(model, backend="lorc", options=options(ratio=1.0))
    with pytest.warns(LorcWarning, match="share their positions"):
        got, (keys, values) = steps(call, begins, shared=True)
    assert_close("logits", got, want, 1e-5)
    assert type(keys) is torch.Tensor and isinstance(values, LatentKV)


@pytest.mark.parametrize(("way", "reason"), [
    ("heads", "along another axis than the batch"),
    ("crossed", "writes to it in place"),
    ("used", "writes to it in place"),
])  # fmt: skip
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_other_pieces_stay_dense_and_right(way, reason, ratio):
    model, begins = ragged(way), torch.zeros(3, dtype=torch.long)
    want, _ = steps(copy.deepcopy(model), begins)
    call = torch.compile(model, backend="lorc", options=options(ratio=ratio))
    with pytest.warns(LorcWarning, match=reason):
        got, cache = steps(call, begins)
    assert_close("logits", got, want, 1e-5)
    assert all(type(t) is torch.Tensor for t in cache)
