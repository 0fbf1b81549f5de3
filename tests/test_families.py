"""Every family in every way of running it: at full rank, and at the true rank of low-rank weights, nothing changes.

The full product (``-m matrix``) is long; CI runs a cover in which every pair of values of any two dimensions occurs.
"""

from __future__ import annotations

import copy
import itertools
import random
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, make_low_rank
from transformers import CompileConfig

from helpers import Run, assert_close, assert_tokens, compiled, generate, latents, loop, new_cache, options, prompt
from lorc_fx import backend
from lorc_fx.errors import DenseCacheWarning
from lorc_fx.latent import LatentKV

NEW, LENGTH = 8, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETUPS: dict[str, tuple[str, ...]] = {
    "family": tuple(FAMILIES),
    "dtype": tuple(DTYPES),
    "attn": ("sdpa", "eager"),
    "cache": ("dynamic", "static"),
    "call": ("generate", "loop"),
    "weights": ("full", "lowrank"),
}
WAYS: dict[str, tuple[str, ...]] = {
    "batch": ("b1", "b3"),
    "pad": ("nopad", "leftpad"),
    "prompt": ("p9", "p1"),
    "pieces": ("whole", "chunks"),
    "mode": ("greedy", "sample", "beam"),
}
DIMENSIONS = SETUPS | WAYS


class Setup(NamedTuple):
    """What one compiled model serves."""

    family: str
    dtype: str
    attn: str
    cache: str
    call: str
    weights: str

    def __str__(self) -> str:
        return "-".join(self)


class Way(NamedTuple):
    """One run of it."""

    batch: str
    pad: str
    prompt: str
    pieces: str
    mode: str

    def __str__(self) -> str:
        return "-".join(self)


class Models:
    """The eager model, the same compiled and, for 16 bits, the same (rounded) weights in fp32."""

    def __init__(self, setup: Setup, layers: int | None = None) -> None:
        self.setup = setup
        family = FAMILIES[setup.family]
        self.eager = family.build(DTYPES[setup.dtype], setup.attn, layers=layers)
        self.low = setup.weights == "lowrank"
        if self.low:
            make_low_rank(family, self.eager, 0.25)
        self.exact = None if setup.dtype == "fp32" else copy.deepcopy(self.eager).float()
        self.compiled = copy.deepcopy(self.eager)
        chosen = {"ratio": 0.6, "scheduler": "uniform"} if self.low else {"ratio": 1.0}
        if setup.call == "generate":
            self.wrapper = compiled(self.compiled, **chosen)
        else:
            torch._dynamo.reset()
            self.wrapper = torch.compile(self.compiled, backend="lorc", options=options(**chosen))

    def run(self, which: Any, way: Way, **more: Any) -> Run:
        pad, batch = (3 if way.pad == "leftpad" else 0), (3 if way.batch == "b3" else 1)
        ids, mask = prompt(batch, 9 if way.prompt == "p9" else 1, pad)
        how = {"new": NEW, "mode": way.mode, "chunks": 2 if way.pieces == "chunks" else 1, **more}
        cache = new_cache(which, self.setup.cache, LENGTH)
        if self.setup.call == "generate":
            return generate(which, ids, mask, cache, **how)
        return loop(which, ids, mask, cache, call=self.wrapper if which is self.compiled else None, **how)

    def check(self, way: Way) -> None:
        if self.exact is None:
            want, got = self.run(self.eager, way), self.run(self.compiled, way)
            assert_close("logits", got.logits, want.logits, 1e-4)
            assert_tokens("sequences", got.sequences, want.sequences)
        else:
            forced = self.run(self.exact, way).sequences
            exact, want, got = (self.run(m, way, forced=forced) for m in (self.exact, self.eager, self.compiled))
            own, ours = (float((r.logits.double() - exact.logits.double()).norm()) for r in (want, got))
            assert ours <= 2 * own, f"logits: {ours:.3e} from fp32, while eager's own error is {own:.3e}"
        pairs = latents(got.cache)
        used = sum(x.used_nbytes() for pair in pairs for x in pair)
        dense = sum(x.nbytes for layer in want.cache.layers for x in (layer.keys, layer.values))
        positions = sum(4 * x.positions.numel() for pair in pairs for x in pair if x.positions is not None)
        assert used <= (0.6 * dense if self.low else dense + positions), f"{used} bytes, dense {dense}"


# -- which cases there are -------------------------------------------------------------------------------------------


def possible(values: dict[str, str]) -> bool:
    """Whether a case can have these values (of some dimensions). Left out by construction: padding or chunks of a
    one-token prompt, beam search in a hand-written loop, and what transformers itself cannot run."""
    family = FAMILIES.get(values.get("family", ""))
    has = set(values.values())
    if any(pair <= has for pair in ({"p1", "leftpad"}, {"p1", "chunks"}, {"loop", "beam"})):
        return False
    if family is None:
        return True
    static = not {"static", "loop"} <= has or family.static_loop
    return static and not (("static" in has and not family.static) or ("sdpa" in has and not family.sdpa))


def setups() -> Iterator[Setup]:
    for values in itertools.product(*SETUPS.values()):
        if possible(dict(zip(SETUPS, values, strict=True))):
            yield Setup(*values)


def ways(setup: Setup) -> Iterator[Way]:
    for values in itertools.product(*WAYS.values()):
        if possible({**setup._asdict(), **dict(zip(WAYS, values, strict=True))}):
            yield Way(*values)


def pairs_of(case: dict[str, str]) -> Iterator[frozenset[tuple[str, str]]]:
    return (frozenset(two) for two in itertools.combinations(case.items(), 2))


def wanted_pairs() -> list[frozenset[tuple[str, str]]]:
    two = itertools.combinations(DIMENSIONS.items(), 2)
    every = ({a: x, b: y} for (a, first), (b, second) in two for x in first for y in second)
    return [frozenset(pair.items()) for pair in every if possible(pair)]


def pairwise() -> list[tuple[Setup, Way]]:
    """A small list of cases in which every possible pair of values occurs; greedy, the same on every run.

    Every dimension has a value that the exclusions leave alone, so a possible partial case can always be completed.
    """
    rng = random.Random(0)
    todo = dict.fromkeys(wanted_pairs())
    cases = []
    while todo:
        case = dict(next(iter(todo)))
        for name in rng.sample(list(DIMENSIONS), len(DIMENSIONS)):
            if name in case:
                continue
            fitting = [v for v in DIMENSIONS[name] if possible({**case, name: v})]
            rng.shuffle(fitting)
            gains = [sum(frozenset(((name, v), other)) in todo for other in case.items()) for v in fitting]
            case[name] = fitting[gains.index(max(gains))]
        for pair in pairs_of(case):
            todo.pop(pair, None)
        cases.append((Setup(*(case[n] for n in SETUPS)), Way(*(case[n] for n in WAYS))))
    return sorted(cases)


COVER = {f"{setup}-{way}": (setup, way) for setup, way in pairwise()}


def pytest_generate_tests(metafunc: Any) -> None:
    """The product is listed only where it is asked for, shuffled: a run that is cut short has seen every family."""
    if "setup" in metafunc.fixturenames:
        asked = metafunc.config.getoption("-m")
        listed = list(setups()) if "matrix" in asked and "not matrix" not in asked else []
        random.Random(0).shuffle(listed)
        metafunc.parametrize("setup", listed, ids=str)


@pytest.mark.parametrize("case", COVER)
def test_a_pairwise_cover(case, clean):
    """With as few layers as show each layer type."""
    setup, way = COVER[case]
    Models(setup, FAMILIES[setup.family].fewest).check(way)


def test_the_cover_has_every_pair_and_only_possible_cases():
    cases = [{**setup._asdict(), **way._asdict()} for setup, way in COVER.values()]
    assert all(possible(case) for case in cases)
    assert {pair for case in cases for pair in pairs_of(case)} >= set(wanted_pairs())


@pytest.mark.matrix
def test_the_full_product(setup, clean, many_shapes):
    """All ways of running one setup through one compiled model (with as few layers as show each layer type), so graphs
    for other shapes are about as well."""
    models, failed = Models(setup, FAMILIES[setup.family].fewest), []
    for way in ways(setup):
        try:
            models.check(way)
        except Exception:
            failed.append(f"{way}: {traceback.format_exc(limit=-2)}")
    assert not failed, "\n".join(failed)


# -- generate's own ways to compile ----------------------------------------------------------------------------------


def everywhere(**given: Any) -> CompileConfig:
    config = CompileConfig(mode=None, **given)
    config._compile_all_devices = True  # transformers' switch for tests: compile on a CPU too
    return config


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3"])
def test_compile_config_leaves_the_cache_dense_and_right(name, ratio, clean):
    """generate fills a dense static cache before it compiles, so nothing can be saved; a warning per graph says so."""
    model = FAMILIES[name].build()
    ids, mask = prompt(2, 9, 3)
    want = generate(model, ids, mask, cache_implementation="static")
    config = everywhere(backend="lorc", options=options(ratio=ratio))
    backend.reset_timings()
    with pytest.warns(DenseCacheWarning, match="model.compile") as caught:
        got = generate(model, ids, mask, cache_implementation="static", compile_config=config)
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert_tokens("sequences", got.sequences, want.sequences)
    assert not any(isinstance(x, LatentKV) for layer in got.cache.layers for x in (layer.keys, layer.values))
    said = [w for w in caught if issubclass(w.category, DenseCacheWarning)]
    assert len(said) == backend.counts()["backend_calls"] >= 1


@pytest.mark.parametrize("other", ["eager", "inductor"])
def test_model_compile_stays_right_under_generates_own_compile(other, clean):
    model = FAMILIES["llama-gqa"].build()
    ids, mask = prompt(2, 9, 3)
    want = generate(model, ids, mask, cache_implementation="static")
    config = everywhere(backend=other)
    got = generate(compiled(model, ratio=1.0), ids, mask, cache_implementation="static", compile_config=config)
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert_tokens("sequences", got.sequences, want.sequences)
    latents(got.cache)


def test_disable_compile_keeps_model_compile_in_force(clean):
    model = FAMILIES["llama-gqa"].build()
    ids, mask = prompt(2, 9, 3)
    want = generate(model, ids, mask, cache_implementation="static")
    more = {"compile_config": everywhere(backend="eager"), "disable_compile": True}
    got = generate(compiled(model, ratio=1.0), ids, mask, cache_implementation="static", **more)
    assert_close("logits", got.logits, want.logits, 1e-4)
    assert_tokens("sequences", got.sequences, want.sequences)
    latents(got.cache)
