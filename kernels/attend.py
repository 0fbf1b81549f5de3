"""Attention of a few queries over stored rows, as one op: what it is made of, its schema and its fake.

    out[b, h, s] = sum_t softmax_t(f(q[b, h, s] . K[b, t, h']))  V[b, t, h']          h' = h // (H_q / heads)

K and V are never there as a whole: ``keys`` and ``values`` are the rows of two caches, ``f`` is what the graph does to
scores before the softmax. An ``Attend`` says all that shapes the computation; the op carries its digest, and what is
called is chosen by the device: ``launch`` (generated kernels) on a GPU, ``tiled`` (torch, and C++ on a CPU) elsewhere.
On a CPU calls like one that was there do without this module (``attend_op.cpp``).
``reference`` is the truth for both.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from torch.fx import GraphModule

from lorc_fx.decoder import Decoder
from lorc_fx.packing import Format

from . import native
from .stored import Stored
from .turned import Turn

CODEC_TENSORS = ("decode", "mean")
"""A codec's tensors that a reader needs, in this order where they are there; the decoder's constants follow."""


@dataclass(frozen=True, eq=False)
class Operand:
    """Keys or values, as stored and as attention sees them.

    format, latent_width: the rows, and the k numbers that they hold per token.
    decoder: latents -> the token's features in the dense cache (and what is stored beside: positions).
    heads, head_dim: cached heads of the operand; query head h reads head h // (H_q / heads).
    columns: which feature (of y where ``absorbed``, else of the dense token) each of heads * head_dim is, None where
    they are in order.
    absorbed: the product is taken with latents. ``decodes``, ``has_mean``: which codec tensors there are.
    turned: rows hold heads times the orthonormal [D, D] that is the last codec tensor; the op turns queries and
    results.
    groups: of features, each decoded from its own part of every segment alone, by a compact matrix
    (``lorc_fx.groups``); where ``absorbed`` as many heads each.
    turn: what its epilogue is, where that is known; the codec's last tensors are then its own.
    """

    format: Format
    latent_width: int
    decoder: Decoder
    heads: int
    head_dim: int
    columns: tuple[int, ...] | None
    absorbed: bool
    decodes: bool
    has_mean: bool
    turned: bool = False
    groups: int = 1
    turn: Turn | None = None

    @cached_property
    def direct(self) -> bool:
        """Whether products are taken with what rows hold: with latents, or with heads as they are stored."""
        form = self.format
        one_kind = form.choices == 1 and len({s.bits for s in form.segments}) == 1
        return self.absorbed and (self.decodes or (one_kind and self.columns is None))

    @property
    def words(self) -> str:
        """In one line, for reports and for the head of what is generated."""
        how = "absorbed" if self.absorbed else f"decoded ({self.decoder.words})"
        return f"{self.heads} heads of {self.head_dim}, rows {self.format.spec}, {how}"


@dataclass(frozen=True)
class Extra:
    """A tensor that scores meet, [.., T] broadcast to [B, H, S, T]; ``tokens``: its last axis is that of the cached
    tokens."""

    tokens: bool


@dataclass(frozen=True, eq=False)
class Attend:
    """One reader of a pair of caches.

    scores: a graph (scores [B, H, S, T] fp32, *extras) -> what the softmax takes, pointwise.
    extras: the tensors that it takes.   sink: whether the last input of the op is a logit per query [.., H, S or 1,
    1] that takes part in the softmax and in nothing else.
    blind: queries that see no token give 0 (SDPA), else what softmax gives (NaN). ``masks``: an extra (by number)
    that says which tokens are out, in every query where it is False or -inf.
    """

    keys: Operand
    values: Operand
    scores: GraphModule
    extras: tuple[Extra, ...]
    sink: bool = False
    blind: bool = True
    masks: int | None = None

    @cached_property
    def digest(self) -> str:
        """Of everything that shapes the computation: equal for equal layers of all models."""
        parts = [self.scores.code, str((self.extras, self.sink, self.blind, self.masks))]
        for x in (self.keys, self.values):
            parts.append(str([getattr(x, f.name) for f in fields(x) if f.name != "decoder"]))
            parts.append(x.decoder.digest)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]


_KNOWN: WeakValueDictionary[str, Attend] = WeakValueDictionary()


def intern(about: Attend) -> Attend:
    """The one ``Attend`` of this digest that is alive; ops find it as long as someone holds it (the compiled graph
    does)."""
    return _KNOWN.setdefault(about.digest, about)


def known(digest: str) -> Attend:
    return _KNOWN[digest]


WATCHERS: list[Callable[[Attend, torch.Tensor, Stored, Stored, tuple[torch.Tensor, ...]], None]] = []
"""Called with the arguments of every call of the op, as its lowering gets them."""


@contextlib.contextmanager
def watching(watch: Callable[..., None]) -> Iterator[None]:
    """Inside of the block ``watch`` is one of ``WATCHERS``, and no call goes by without them."""
    WATCHERS.append(watch)
    native.ask_again()
    try:
        yield
    finally:
        WATCHERS.remove(watch)


def turned_queries(about: Attend, query: torch.Tensor, codec: Sequence[torch.Tensor]) -> torch.Tensor:
    """Queries [.., D] as keys are stored. ``codec``: the keys'."""
    return (query.to(codec[-1].dtype) @ codec[-1]).to(query.dtype) if about.keys.turned else query


def turned_back(about: Attend, out: torch.Tensor, codec: Sequence[torch.Tensor]) -> torch.Tensor:
    """Results [.., D_v] of values as they are stored as the model has them. ``codec``: the values'."""
    return (out.to(codec[-1].dtype) @ codec[-1].T).to(out.dtype) if about.values.turned else out


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    key_side: torch.Tensor | None,
    key_codec: Sequence[torch.Tensor],
    values: torch.Tensor,
    value_side: torch.Tensor | None,
    value_codec: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    about: str,
) -> torch.Tensor:
    """query [B, H, S, D], rows [T, B, width] and what is stored beside them [T, B, ...] -> [B, H, S, D_v] in the
    query's dtype. ``key_codec``: the codec's tensors of ``CODEC_TENSORS`` that are there, then the decoder's constants,
    then a ``Turn``'s own (the norm's weight [D] fp32, if any, and the table [2 pairs, B or 1, T]), then what heads are
    stored times ([D, D]), where an operand is ``turned``. ``about``: the digest of an interned ``Attend``.
    """
    from . import launch, tiled

    made = known(about)
    stored = Stored(keys, key_side, tuple(key_codec)), Stored(values, value_side, tuple(value_codec))
    if WATCHERS:
        seen = turned_queries(made, query, key_codec)
        for watch in WATCHERS:
            watch(made, seen, *stored, tuple(extras))
    if query.device.type != "cuda":
        out = tiled.op(made, query, *stored, tuple(extras))
    else:
        out = launch.attend(made, turned_queries(made, query, key_codec), *stored, tuple(extras))
        out = turned_back(made, out, value_codec)
    return out.contiguous()  # as ``_fake`` says: a product with a matrix per head may come out head by head


def _fake(query, keys, key_side, key_codec, values, value_side, value_codec, extras, about):  # type: ignore[no-untyped-def]
    return query.new_empty((*query.shape[:3], known(about).values.head_dim))


# ``torch.library.custom_op`` would do the same and take 16 us a call instead of 5
LIBRARY = torch.library.Library("lorc", "FRAGMENT")
ARGUMENTS = (
    "(Tensor query, Tensor keys, Tensor? key_side, Tensor[] key_codec, Tensor values, Tensor? value_side, "
    "Tensor[] value_codec, Tensor[] extras, str about) -> Tensor"
)
for name in ("attend", "_attend_by_python"):  # the second one is where ``attend_op.cpp`` asks
    LIBRARY.define(name + ARGUMENTS)
    LIBRARY.impl(name, attend, "CompositeExplicitAutograd")
torch.library.register_fake("lorc::attend", _fake, lib=LIBRARY)
