"""The one owner of codecs: they follow the weights, not the graph.

A compiled graph can be called with other weights than it was compiled with, without a recompile (Dynamo does not
guard parameters by identity). So codecs are looked up by the weights at hand: the same tensors, unchanged since.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .codec import Codec, version_of
from .parts import all_parts
from .records import Fidelity

SAMPLE = 256
"""Numbers of a weight that are compared: a write by way of ``.data`` (peft merges adapters so) counts no version."""


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Some ``SAMPLE`` numbers from all over a weight, as bytes. An odd stride: else all were of one column."""
    flat = weight.detach()
    flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True)).reshape(-1)  # a view, if without gaps
    return flat[:: flat.numel() // SAMPLE | 1].clone().view(torch.uint8)


@dataclass(frozen=True)
class WeightState:
    """One weight as it was: the tensor (weakly), its in-place version, its storage and a sample of its content."""

    ref: weakref.ref[torch.Tensor]
    version: int
    pointer: int
    sample: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, gone: Callable[[object], None] | None = None) -> WeightState:
        """``gone`` is called when the weight dies, unless this state died before."""
        return cls(weakref.ref(weight, gone), version_of(weight), weight.data_ptr(), _sample(weight))

    def still(self, weight: torch.Tensor) -> bool:
        """Whether it is the same tensor, not written since, but for writes that count no version: for each call."""
        return self.ref() is weight and version_of(weight) == self.version and weight.data_ptr() == self.pointer

    def same(self, weight: torch.Tensor) -> bool:
        """The same, and the sample of its content is what it was: once for each prompt (a GPU is waited for)."""
        return self.still(weight) and torch.equal(_sample(weight), self.sample)


@dataclass(frozen=True)
class Entry:
    weights: tuple[WeightState, ...]
    codec: Codec
    fidelity: Fidelity | None = None

    def still(self, weights: Sequence[torch.Tensor]) -> bool:
        return len(weights) == len(self.weights) and all(s.same(w) for s, w in zip(self.weights, weights, strict=True))

    def unchanged(self) -> bool:
        """Whether all its weights are alive and as they were."""
        weights = [s.ref() for s in self.weights]
        return all(w is not None and s.same(w) for s, w in zip(self.weights, weights, strict=True))


class CodecStore:
    """Codecs by weights, ``Builder._key`` (options, site, constants) and whether statistics informed them. Entries of
    weights that died are dropped as their ids come up. ``epoch`` changes when codecs did though the weights did not
    (statistics came in, or were forgotten).

    Without a lock: each read and write of a dict is one step, also where a weight that dies takes its entries along,
    and what goes through all entries goes through a copy. Codecs are made under ``compat.building``. Nothing but the
    dicts holds an entry: one that is replaced or forgotten is gone, however long its weights live."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._epochs = itertools.count(1)
        self.epoch = 0
        self._copies: dict[int, tuple[WeightState, torch.Tensor]] = {}

    def find(self, key: tuple[Any, ...], weights: Sequence[torch.Tensor]) -> Codec | None:
        entry = self._entries.get((key, *map(id, weights)))
        return entry.codec if entry is not None and entry.still(weights) else None

    def add(
        self, key: tuple[Any, ...], weights: Sequence[torch.Tensor], codec: Codec, fidelity: Fidelity | None = None
    ) -> None:
        full = (key, *map(id, weights))

        def gone(_: object) -> None:
            self._entries.pop(full, None)

        self._entries[full] = Entry(tuple(WeightState.of(w, gone) for w in weights), codec, fidelity)

    def holds(self, key: tuple[Any, ...], weights: Sequence[torch.Tensor], codec: Codec) -> bool:
        """Whether ``codec`` was made for these weights, unchanged since, under this key: now, or before statistics. One
        of equal content is as good (a cache that was loaded, or written before ``reset`` and the same prompt)."""
        found = (self.find((key, informed), weights) for informed in (True, False))
        return any(f is not None and f.equals(codec) for f in found)

    def turn(self) -> None:
        """Codecs that were made for the same weights have changed: whoever holds some must look again."""
        self.epoch = next(self._epochs)

    def fidelities(self, weights: Iterable[torch.Tensor]) -> tuple[Fidelity, ...]:
        """Of the codecs made from some of these weights, as they are now."""
        mine = [entry for _, entry in self._of(weights)]
        return tuple(e.fidelity for e in mine if e.fidelity is not None and e.unchanged())

    def codecs(self, weights: Iterable[torch.Tensor]) -> list[Codec]:
        """Those made from some of these weights, as they are now; those that know the data first."""
        mine = [(full, e.codec) for full, e in self._of(weights) if e.unchanged()]
        return [codec for _, codec in sorted(mine, key=lambda item: not item[0][0][1])]

    def forget(self, weights: Iterable[torch.Tensor]) -> None:
        """Drop every codec made from one of these weights."""
        for full, _ in self._of(weights):
            self._entries.pop(full, None)
        self.turn()

    def _of(self, weights: Iterable[torch.Tensor]) -> list[tuple[tuple[Any, ...], Entry]]:
        """The entries made from some of these weights, of a copy: others may come and go meanwhile."""
        known = set(map(id, weights))
        return [(full, entry) for full, entry in self._entries.copy().items() if known & set(full[1:])]

    def snapshot(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a small tensor of the model (norm weights, rotary frequencies) as it is now, shared by all codecs
        that read it: what is coded is decoded as it was coded, whatever happens to the model later."""
        name = id(tensor)
        entry = self._copies.get(name)
        if entry is None or not entry[0].same(tensor):

            def gone(_: object) -> None:
                self._copies.pop(name, None)

            entry = (WeightState.of(tensor, gone), tensor.detach().clone())
            self._copies[name] = entry
        return entry[1]

    def __len__(self) -> int:
        return len(self._entries)


STORE = CodecStore()


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The plain tensors that codecs of ``model`` may be made of: of its parameters, and its buffers (where quantised
    weights often are)."""
    return all_parts([*model.parameters(), *model.buffers()])


def reset(model: torch.nn.Module) -> None:
    """Forget the codecs of ``model``, and with them the statistics of its first prompt: the next prompt counts as the
    first again. Caches in use go on decoded: right, dense, and with a warning (coded, where the codecs that are made
    again have the same content)."""
    STORE.forget(tensors_of(model))


def fidelity(model: torch.nn.Module) -> tuple[Fidelity, ...]:
    """How well each codec of ``model`` that the first prompt informed reads that prompt back; () before it has come.
    A model that is compiled under several budgets has codecs, and entries, for each of them."""
    return STORE.fidelities(tensors_of(model))
