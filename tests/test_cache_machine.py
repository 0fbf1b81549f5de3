"""Random sequences of operations on latent caches, against plain dense tensors that go through the same.

The first machine holds two layers' LatentKVs, which share their positions, beside what they decode to; the second a
compiled model and its cache beside the plain model.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from latent_cases import LAYOUTS, codec_of, codes_of, packed_codec_of

import lorc_fx
from helpers import assert_close, compiled, new_cache
from lorc_fx.errors import EagerWarning
from lorc_fx.latent import LatentKV, extend, in_step
from lorc_fx.rows import Track
from lorc_fx.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::lorc_fx.errors.LorcWarning")

SEEDS, SMALL = st.integers(0, 10**6), st.integers(0, 12)


class Latents(RuleBasedStateMachine):
    """A few caches of two layers: (LatentKVs, dense tensors that are views of one another where those are)."""

    @initialize(layout=st.sampled_from(sorted(LAYOUTS)), packed=st.booleans(), positions=st.booleans())
    def begin(self, layout: str, packed: bool, positions: bool) -> None:
        codec = packed_codec_of(layout, positions) if packed else codec_of(layout, positions)
        self.codec, self.t, self.b = codec, codec.decoder.token_dim, codec.decoder.batch_dim
        self.owner = torch.nn.Linear(1, 1)
        STORE.add(((), True), list(self.owner.parameters()), codec)
        self.known: list[tuple[list[Any], list[torch.Tensor]]] = []
        self.add(self.fresh(5, 2, 1))

    def fresh(self, tokens: int, batch: int, seed: int) -> list[LatentKV]:
        track = None
        if self.codec.decoder.needs_positions:
            at = torch.randint(0, 99, (tokens, batch), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
            track = Track(at, tokens)
        return [LatentKV.born(self.codec, codes_of(self.codec, tokens, batch, seed + i), track) for i in range(2)]

    def add(self, latents: list[Any], dense: list[torch.Tensor] | None = None) -> None:
        self.known.append((latents, [x.dense().clone() for x in latents] if dense is None else dense))
        del self.known[:-6]

    def pick(self, which: int) -> tuple[list[Any], list[torch.Tensor]]:
        return self.known[which % len(self.known)]

    def apply(self, which: int, fn: Any) -> None:
        """A new cache: ``fn`` of each tensor of another."""
        latents, dense = self.pick(which)
        stepping = in_step(*latents) and latents[0].tail is None
        made = [fn(x) for x in latents]
        if all(isinstance(x, LatentKV) for x in made):
            assert not stepping or in_step(*made), "positions are no longer shared"
            self.add(made, [fn(x) for x in dense])
        else:
            assert all(torch.allclose(m, fn(d), atol=1e-4) for m, d in zip(made, dense, strict=True))

    @rule(which=SMALL, tokens=st.integers(1, 70), seed=SEEDS)
    def append(self, which: int, tokens: int, seed: int) -> None:
        """As a compiled step does; dense tokens, as an eager step does, where there are some already."""
        latents, dense = self.pick(which)
        new = self.fresh(tokens, dense[0].shape[self.b], seed)
        values = [x.dense() for x in new]
        if any(x.tail is not None for x in latents):
            made = [torch.cat([x, v], self.t) for x, v in zip(latents, values, strict=True)]
        else:
            for x in latents:
                x.follow()
            together = in_step(*latents)
            made = extend(latents, tokens) if together else [extend([x], tokens)[0] for x in latents]
            for x, n in zip(made, new, strict=True):
                x.codes[-tokens:] = n.codes
                if x.positions is not None:
                    x.positions[-tokens:] = n.positions
        self.add(made, [torch.cat([d, v], self.t) for d, v in zip(dense, values, strict=True)])

    @rule(which=SMALL, a=SMALL, b=SMALL, rows=st.booleans())
    def cut(self, which: int, a: int, b: int, rows: bool) -> None:
        dim = self.b if rows else self.t
        size = self.pick(which)[1][0].shape[dim]
        lo, hi = sorted((a % (size + 1), b % (size + 1)))
        if hi > lo or not rows:
            self.apply(which, lambda x: torch.ops.aten.slice.Tensor(x, dim, lo, hi))

    @rule(which=SMALL, how=st.sampled_from(["clone", "deepcopy", "detach", "to"]))
    def duplicate(self, which: int, how: str) -> None:
        if how == "deepcopy":  # of the whole cache: what is shared stays shared
            latents, dense = self.pick(which)
            self.add(*copy.deepcopy((latents, [d.clone() for d in dense])))
            return
        ways: dict[str, Any] = {"clone": torch.clone, "detach": torch.Tensor.detach}
        self.apply(which, ways.get(how, lambda x: x.to("cpu", copy=True)))

    @rule(which=SMALL, picks=st.lists(SMALL, min_size=1, max_size=3), mask=st.booleans())
    def select(self, which: int, picks: list[int], mask: bool) -> None:
        size = self.pick(which)[1][0].shape[self.b]
        index = torch.tensor([p % size for p in picks])
        if mask:
            keep = torch.zeros(size, dtype=torch.bool)
            keep[index] = True
            self.apply(which, lambda x: x[(slice(None),) * self.b + (keep,)])
        else:
            self.apply(which, lambda x: x.index_select(self.b, index))

    @rule(which=SMALL, times=st.integers(1, 2))
    def repeat(self, which: int, times: int) -> None:
        if self.pick(which)[1][0].shape[self.b] <= 3:
            self.apply(which, lambda x: x.repeat_interleave(times, dim=self.b))

    @rule(which=SMALL, picks=st.lists(SMALL, min_size=1, max_size=4))
    def keep_tokens(self, which: int, picks: list[int]) -> None:
        size = self.pick(which)[1][0].shape[self.t]
        if size:
            index = torch.tensor([p % size for p in picks])
            self.apply(which, lambda x: x.index_select(self.t, index))

    @rule(which=SMALL, shift=st.integers(-3, 3))
    def roll(self, which: int, shift: int) -> None:
        if self.pick(which)[1][0].shape[self.t]:
            self.apply(which, lambda x: x.roll(shift, self.t))

    @rule(which=SMALL)
    def twice(self, which: int) -> None:
        if self.pick(which)[1][0].shape[self.t] < 40:
            self.apply(which, lambda x: torch.cat([x, x], self.t))

    @rule(which=SMALL, row=st.integers(1, 9))
    def beyond(self, which: int, row: int) -> None:
        latents, dense = self.pick(which)
        index = torch.tensor([dense[0].shape[self.b] - 1 + row])
        with pytest.raises(IndexError):
            latents[0].index_select(self.b, index)

    @rule(which=SMALL)
    def zero(self, which: int) -> None:
        for x in (x for pair in self.pick(which) for x in pair):
            x.zero_()

    @rule(which=SMALL, seed=SEEDS)
    def zero_under_a_continuation(self, which: int, seed: int) -> None:
        """The first append makes room, the second goes into it: the third cache shows rows of the second."""
        self.append(which, 1, seed)
        self.append(len(self.known) - 1, 1, seed + 9)
        self.zero(len(self.known) - 2)

    @rule(which=SMALL, token=SMALL, way=st.sampled_from(["token", "from", "add", "heads"]))
    def write(self, which: int, token: int, way: str) -> None:
        latents, dense = self.pick(which)
        size = dense[0].shape[self.t]
        at = token % max(size, 1)
        before = (slice(None),) * self.t
        for x in (*latents, *dense):
            if way == "token" and size:
                x[(*before, at)] = 0.5
            elif way == "from":
                x[(*before, slice(at, None))] = 0.25
            elif way == "add":
                x.add_(1)
            elif way == "heads":
                x[..., :2] = 2.0

    @rule(into=SMALL, source=SMALL)
    def copy_over(self, into: int, source: int) -> None:
        (a, da), (b, db) = self.pick(into), self.pick(source)
        if da[0].shape == db[0].shape and a is not b:
            held = [x.clone() for x in b], [x.clone() for x in db]
            for x, y in (*zip(a, held[0], strict=True), *zip(da, held[1], strict=True)):
                x.copy_(y)

    @rule(which=SMALL)
    def save_and_load(self, which: int) -> None:
        latents, dense = self.pick(which)
        for x in latents:
            x.follow()
        with tempfile.TemporaryDirectory() as folder:
            lorc_fx.save_cache(latents, Path(folder) / "a")
            loaded = lorc_fx.load_cache(Path(folder) / "a", self.owner)
        assert not in_step(*latents) or in_step(*loaded)
        self.add(loaded, [d.clone() for d in dense])

    @rule(which=SMALL)
    def pickled(self, which: int) -> None:
        latents, dense = self.pick(which)
        held = io.BytesIO()
        torch.save(latents, held)
        held.seek(0)
        for x, d in zip(torch.load(held, weights_only=True), dense, strict=True):
            torch.testing.assert_close(x, d, rtol=1e-5, atol=1e-5)

    @invariant()
    def all_hold_what_they_should(self) -> None:
        for latents, dense in getattr(self, "known", ()):
            for x, d in zip(latents, dense, strict=True):
                assert isinstance(x, LatentKV) and x.shape == d.shape
                torch.testing.assert_close(x.dense(), d, rtol=1e-5, atol=1e-5)
                assert x.view_of is None or len(x.rows.codes) >= x.start + x.length


class Model(RuleBasedStateMachine):
    """A compiled model at full rank and its cache, beside the plain model; compilation is switched off and on."""

    models: tuple[Any, Any]
    kind: str = "dynamic"

    @initialize()
    def begin(self) -> None:
        self.caches = [new_cache(m, self.kind) for m in self.models]
        self.rows, self.eager = 2, False
        self.step(5, 0)

    @rule(tokens=st.sampled_from([1, 1, 1, 2]), seed=SEEDS)
    def step(self, tokens: int, seed: int) -> None:
        ids = torch.randint(2, 101, (self.rows, tokens), generator=torch.Generator().manual_seed(seed))
        out = []
        for model, cache, eager in zip(self.models, self.caches, (self.eager, True), strict=True):
            with torch.no_grad(), torch.compiler.set_stance("force_eager" if eager else "default"):
                out.append(model(ids, past_key_values=cache, use_cache=True).logits)
        assert_close("logits", *out)

    @rule(picks=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, picks: list[int]) -> None:
        for cache in self.caches:
            cache.reorder_cache(torch.tensor(picks) % self.rows)

    @precondition(lambda self: self.rows == 2)
    @rule()
    def repeat(self) -> None:
        for cache in self.caches:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))

    @rule(tokens=st.integers(1, 3))
    def crop(self, tokens: int) -> None:
        if self.caches[1].get_seq_length() > tokens:
            for cache in self.caches:
                cache.crop(-tokens)

    @rule()
    def fork(self) -> None:
        left = self.caches
        self.caches = [copy.deepcopy(c) for c in left]
        self.step(1, 7)
        self.caches = left

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            lorc_fx.save_cache(self.caches[0], Path(folder) / "a")
            self.caches[0] = lorc_fx.load_cache(Path(folder) / "a", self.models[0])

    @rule()
    def switch(self) -> None:
        self.eager = not self.eager

    @rule()
    def reset(self) -> None:
        for cache in self.caches:
            cache.reset()
        self.step(4, 1)

    @invariant()
    def what_is_cached(self) -> None:
        for mine, its in zip(*(getattr(c, "layers", []) for c in getattr(self, "caches", ([], []))), strict=True):
            for name in ("keys", "values"):
                got = getattr(mine, name)
                got = got.dense() if isinstance(got, LatentKV) else got
                assert_close(name, got, getattr(its, name), 1e-4)


def run(machine: Any, examples: int, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EagerWarning)
        given = settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck))
        run_state_machine_as_test(machine, settings=given)


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 20), pytest.param(2000, 50, marks=pytest.mark.slow)], ids=["500", "100000"]
)
def test_latents(examples: int, steps: int) -> None:
    run(Latents, examples, steps)


@pytest.mark.parametrize(("examples", "steps"), [(3, 8), pytest.param(60, 25, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_model(examples: int, steps: int, clean: None, many_shapes: None) -> None:
    model = FAMILIES["llama-gqa"].build(layers=1)
    plain = copy.deepcopy(model)

    class Pair(Model):
        models = (compiled(model, ratio=1.0), plain)

    run(Pair, examples, steps)
