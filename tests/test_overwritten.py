"""Decoders that write in place, or otherwise do what few do between a projection and its cache: each step is what the
model without a compiler makes, coded where that is understood and dense where it is not."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorc_fx
from helpers import assert_close, options
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("clean")

WIDTH, HEADS, DIM, ROOM = 16, 2, 8, 12
FULL = {"ratio": 1.0, "precision": "model", "basis": "joint"}


def rotate(x, pos):
    angle = pos[..., None].float() * 100.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Plain(nn.Module):
    """Causal attention over a cache that is handed on. ``keys`` and ``values``: of x [B, S, W] and positions [S]."""

    changed = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, y):
        return y.unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    def keys(self, x, pos):
        return self.heads(self.k(x))

    def values(self, x, pos):
        return self.heads(self.v(x))

    def read(self, x, k, v, causal=True):
        causal = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool).tril(k.shape[2] - x.shape[1]) if causal else None
        made = F.scaled_dot_product_attention(self.heads(self.q(x)), k, v, attn_mask=causal)
        return self.o(made.transpose(1, 2).flatten(2))

    def forward(self, x, past, pos):
        k, v = self.keys(x, pos), self.values(x, pos)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.read(x, k, v), (k, v)


class SliceScaled(Plain):
    def keys(self, x, pos):
        y = self.k(x)
        y[..., :4].mul_(3.0)
        return self.heads(y)


class SliceAssigned(Plain):
    def keys(self, x, pos):
        k = self.heads(self.k(x))
        k[..., :4] = k[..., :4] * 2.0
        return F.layer_norm(k, (DIM,))


class PartRotated(Plain):
    """A part of each head is turned and written back."""

    def keys(self, x, pos):
        k = self.k(x).unflatten(-1, (HEADS, DIM))
        k[..., :4] = rotate(k[..., :4], pos[:, None])
        return k.transpose(1, 2).contiguous()


class SeveralAxes(Plain):
    """Angles of three axes of positions [3, S], those of the second and third written over some of the first's."""

    def forward(self, x, past, pos):
        freqs = pos[..., None].float() * 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
        made = []
        for table in (freqs.cos(), freqs.sin()):
            whole = table[0]
            for axis in (1, 2):
                whole[..., axis::3] = table[axis, ..., axis::3]
            made.append(torch.cat([whole, whole], -1))
        turn = lambda y: y * made[0] + torch.cat([-y[..., DIM // 2 :], y[..., : DIM // 2]], -1) * made[1]  # noqa: E731
        k, v = turn(self.heads(self.k(x))), self.heads(self.v(x))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool).tril(k.shape[2] - x.shape[1])
        made = F.scaled_dot_product_attention(turn(self.heads(self.q(x))), k, v, attn_mask=mask)
        return self.o(made.transpose(1, 2).flatten(2)), (k, v)


class InputOverwritten(Plain):
    """What keys are made of is no longer there when they reach the cache."""

    late = True

    def forward(self, x, past, pos):
        x = x * 1.0
        k = self.k(x) if self.late else self.keys(x, pos)
        x.transpose(0, 1)[..., :4].mul_(2.0)
        k, v = self.heads(k) if self.late else k, self.values(x, pos)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.read(x, k, v), (k, v)


class InputOverwrittenLater(InputOverwritten):
    late = False


class InputAccumulated(Plain):
    """As many write their residual stream: in place, before it is projected."""

    def forward(self, x, past, pos):
        x = x * 1.0
        x[..., :4] += 0.5
        return super().forward(x, past, pos)


class BufferOfOnes(Plain):
    """A buffer that reads as something else than zeros before it is written, and no mask."""

    fill = 1.0

    def forward(self, x, past, pos):
        if past is None:
            past = tuple(torch.full((len(x), HEADS, ROOM, DIM), self.fill) for _ in range(2))
        for cache, new in zip(past, (self.keys(x, pos), self.values(x, pos)), strict=True):
            cache.index_copy_(2, pos, new)
        return self.read(x, *past, causal=False), past


class BufferOfZeros(BufferOfOnes):
    fill = 0.0


class TwoPieces(Plain):
    """Two pieces of one cache in one graph, of the same weights."""

    scale = 1.0

    def forward(self, x, past, pos):
        empty = x.new_zeros(len(x), HEADS, 0, DIM)
        past = (empty, empty) if past is None else past
        pieces = [(self.keys(x, pos), self.scale * self.keys(0.5 * x, pos))]
        pieces += [(self.values(x, pos), self.scale * self.values(0.5 * x, pos))]
        k, v = (torch.cat([old, *new], 2) for old, new in zip(past, pieces, strict=True))
        return self.read(x, k, v, causal=False), (k, v)


class TwoPiecesScaled(TwoPieces):
    scale = 3.0


class AlikePieces(Plain):
    def forward(self, x, past, pos):
        empty = x.new_zeros(len(x), HEADS, 0, DIM)
        k, v = (
            torch.cat([empty if past is None else past[i], f(x, pos), f(0.5 * x, pos)], 2)
            for i, f in enumerate((self.keys, self.values))
        )
        return self.read(x, k, v, causal=False), (k, v)


class JoinedAlone(Plain):
    """The first step joins a single tensor."""

    def forward(self, x, past, pos):
        new = self.keys(x, pos), self.values(x, pos)
        k, v = (torch.cat([*([] if past is None else [past[i]]), new[i]], 2) for i in range(2))
        return self.read(x, k, v), (k, v)


class EverySecond(Plain):
    """Keys of every second token, and as many values."""

    def keys(self, x, pos):
        return super().keys(x[:, ::2], pos)

    def values(self, x, pos):
        return super().values(x[:, ::2], pos)

    def read(self, x, k, v, causal=True):
        return super().read(x, k, v, causal=False)


class Rolled(Plain):
    """A window that is rolled by as many tokens as come in."""

    def forward(self, x, past, pos):
        new, made = (self.keys(x, pos), self.values(x, pos)), []
        for i in range(2):
            cache = x.new_zeros(len(x), HEADS, ROOM, DIM) if past is None else past[i].roll(-x.shape[1], 2)
            at = torch.arange(x.shape[1]) if past is None else torch.arange(ROOM - x.shape[1], ROOM)
            cache.index_copy_(2, at, new[i])
            made.append(cache)
        return self.read(x, *made, causal=False), tuple(made)


class TokensFirst(Plain):
    """[S, B, H, D], and one position for all rows of the batch: [S, 1]."""

    def forward(self, x, past, pos):
        x = x.transpose(0, 1)
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)) for f in (self.q, self.k, self.v))
        q, k = (rotate(t, pos[:, None, None]) for t in (q, k))
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        made = F.scaled_dot_product_attention(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=past is None)
        return self.o(made.transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
def run(model, pieces, call=None):
    """Outputs of each piece, and the last cache."""
    past, made, at = None, [], 0
    for x in pieces:
        out, past = (model if call is None else call)(x.clone(), past, torch.arange(at, at + x.shape[1]))
        made, at = [*made, out], at + x.shape[1]
    return made, past


def pieces_of(*tokens):
    return [torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(tokens)]


def check(model, pieces, coded, **given):
    """As without a compiler; ``coded``: whether keys and values are."""
    want, _ = run(copy.deepcopy(model), pieces)
    dynamic = given.pop("dynamic", None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call = torch.compile(model, backend="lorc", options=options(**{**FULL, **given}), dynamic=dynamic)
        got, past = run(model, pieces, call)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(f"step {i}", g, w)
    assert tuple(isinstance(t, LatentKV) for t in past) == coded
    texts = [str(w.message) for w in said if issubclass(w.category, LorcWarning)]
    assert bool(texts) == (coded != (True, True)), texts
    return " ".join(texts)


def test_slices_of_a_projection_that_are_written_in_place():
    """What they are slices of is a new value then, as far as it is known to be nobody else's."""
    check(SliceScaled(), pieces_of(5, 1, 1), (True, True))


@pytest.mark.parametrize("kind", [SliceAssigned, PartRotated], ids=lambda c: c.__name__)
def test_rows_that_are_written_in_place_on_the_way_stay_dense(kind):
    assert "written in place before it reaches the cache" in check(kind(), pieces_of(5, 1, 1), (False, True))


@pytest.mark.parametrize("ratio", [1.0, 0.8])
@pytest.mark.parametrize("same", [True, False], ids=["text", "images"])
def test_angles_that_are_written_piece_by_piece(same, ratio, quiet):
    """Whether the axes have the same positions, as those of text, or their own."""
    model, call = (
        SeveralAxes(),
        torch.compile(SeveralAxes(), backend="lorc", options=options(**FULL | {"ratio": ratio})),
    )
    if ratio < 1:
        for linear in (model.k, model.v):
            linear.weight.data = linear.weight.data[:, :6] @ torch.randn(6, WIDTH) / 4
        call._orig_mod.load_state_dict(model.state_dict())
    past, want_past, at = None, None, 0
    for x in pieces_of(6, 1, 3, 1):
        steps = torch.arange(at, at + x.shape[1])
        pos = torch.stack([steps, steps if same else steps * 2 % 7, steps if same else 9 - steps])
        with torch.no_grad():
            (got, past), (want, want_past) = call(x, past, pos), model(x, want_past, pos)
        assert_close(f"at {at}", got, want)
        assert isinstance(past[0], LatentKV) and isinstance(past[1], LatentKV)
        at += x.shape[1]


def test_an_input_that_is_overwritten_after_it_was_read():
    check(InputOverwritten(), pieces_of(5, 1, 1), (False, True))


@pytest.mark.parametrize("kind", [InputOverwrittenLater, InputAccumulated], ids=lambda c: c.__name__)
def test_an_input_that_is_written_before_it_is_read_or_after_all_of_it(kind):
    check(kind(), pieces_of(5, 1, 1), (True, True))


def test_a_buffer_that_is_filled_with_something_is_no_empty_one():
    check(BufferOfOnes(), pieces_of(5, 1), (False, False))


def test_a_buffer_that_is_filled_with_zeros_is():
    check(BufferOfZeros(), pieces_of(5, 1), (True, True))


@pytest.mark.parametrize("ratio", [1.0, 0.55])
@pytest.mark.parametrize("kind", [TwoPieces, TwoPiecesScaled], ids=lambda c: c.__name__)
def test_a_cache_that_is_written_in_two_ways_stays_dense(kind, ratio):
    assert "by one projection in several ways" in check(kind(), pieces_of(4, 1), (False, False), ratio=ratio)


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.55, 0.47])
@pytest.mark.parametrize("calibration", ["none", "first-prompt"])
def test_pieces_of_one_cache_have_one_codec(ratio, calibration, quiet):
    """Whatever bytes there are, and whoever informs it: columns of both are decoded alike."""
    model = AlikePieces()
    for linear in (model.k, model.v):
        linear.weight.data = linear.weight.data[:, :3] @ torch.randn(3, WIDTH) / 4
    known = {"calibration": calibration} if calibration == "none" else {"calibration": calibration, "precision": "int8"}
    call = torch.compile(model, backend="lorc", options=options(**FULL | {"ratio": ratio} | known))
    pieces = pieces_of(4, 1) if calibration == "none" else pieces_of(200, 1)
    want, _ = run(copy.deepcopy(model), pieces)
    got, past = run(model, pieces, call)
    assert all(isinstance(x, LatentKV) for x in past)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(f"step {i}", g, w, 1e-4 if calibration == "none" else 0.02)


@pytest.mark.parametrize("kind", [JoinedAlone, TokensFirst], ids=lambda c: c.__name__)
def test_other_ways_to_hand_a_cache_on(kind):
    check(kind(), pieces_of(5, 1, 2), (True, True))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", [EverySecond, Rolled], ids=lambda c: c.__name__)
def test_sizes_that_are_no_sums_of_others(kind, dynamic):
    check(kind(), pieces_of(6, 2, 4), (True, True), dynamic=dynamic)


class Toggled(Plain):
    """One op more between projection and cache, from some moment on."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def keys(self, x, pos):
        k = super().keys(x, pos)
        return self.change(k) if self.changed else k


@pytest.mark.parametrize(
    "change",
    [lambda k: -k, lambda k: k.flip(-1), lambda k: k.roll(1, -1), lambda k: k - k.mean(-1, keepdim=True)],
    ids=["neg", "flip", "roll", "mean"],
)
def test_another_op_makes_other_codecs(change, quiet):
    model, (x,) = Toggled(change), pieces_of(5)
    call = torch.compile(model, backend="lorc", options=options(**FULL))
    for model.changed in (False, True, False):
        want, _ = run(copy.deepcopy(model), [x, x[:, :1]])
        got, past = run(model, [x, x[:, :1]], call)
        for g, w in zip(got, want, strict=True):
            assert_close(f"changed {model.changed}", g, w)
        assert isinstance(past[0], LatentKV)


class Unruly(Plain):
    """Keys that no rule explains."""

    def keys(self, x, pos):
        k = super().keys(x, pos)
        return k + k.cumsum(2)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Unruly(), Plain(), Plain()])

    def forward(self, x, past, pos):
        made = []
        for i, layer in enumerate(self.layers):
            out, kv = layer(x, None if past is None else past[2 * i : 2 * i + 2], pos)
            x, made = x + out, [*made, *kv]
        return x, tuple(made)


def test_layers_are_numbered_by_their_attention(quiet):
    """Whatever stays dense: keys and values of one attention have one number, in all graphs."""
    (x,), pos = pieces_of(5), torch.arange(5)
    model = Layers()
    report = lorc_fx.explain(model, x, None, pos, options=options(**FULL))
    found = {(s.layer, s.kind) for s in report.sites}
    assert found == {(0, "value"), (1, "key"), (1, "value"), (2, "key"), (2, "value")}
    with torch.no_grad():
        past = model(x, None, pos)[1]
        again = lorc_fx.explain(model, x[:, :1], past, pos[:1] + 5, options=options(**FULL))
    assert not again.sites and len(again.misses) >= 5
