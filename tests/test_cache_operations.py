"""Every operation of transformers' caches, after a compiled prompt and some steps, against the same on a dense cache.

A model is compiled once per setup: the tests of one share it. After the operation more tokens are decoded; logits and
the tokens that they choose must be the eager model's, and what was coded must be coded still (``LOST`` names what
cannot be).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, make_low_rank
from transformers import DynamicCache, EncoderDecoderCache

import lorc_fx
from bench.zoo import randomise
from helpers import assert_close, assert_tokens, cache_name, compiled, new_cache, prompt
from lorc_fx.latent import LatentKV, cache_nbytes

pytestmark = pytest.mark.filterwarnings("ignore::lorc_fx.errors.LorcWarning")

_SMALL = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def chunked() -> Any:
    config = transformers.Llama4TextConfig(
        **_SMALL, intermediate_size_mlp=96, attention_chunk_size=6, moe_layers=[], attn_temperature_tuning=False,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def convolutions() -> Any:
    config = transformers.Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3)
    return transformers.Lfm2ForCausalLM(config)


def encoder_decoder() -> Any:
    shape = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0))


MADE = {"chunked": chunked, "convolutions": convolutions, "encoder-decoder": encoder_decoder}

#: (model, cache, share of the rank that the weights of keys and values have, whether it runs by default)
SETUPS = [
    ("llama-gqa", "static", 0.5, True),
    ("gemma3", "dynamic", 1.0, True),
    ("encoder-decoder", "dynamic", 1.0, False),
    ("llama-gqa", "dynamic", 0.5, False),
    ("gemma3", "dynamic", 0.5, False),
    ("gemma3", "static", 1.0, False),
    ("mistral-window", "dynamic", 1.0, False),
    ("gpt2", "dynamic", 0.5, False),
    ("chunked", "dynamic", 1.0, False),
    ("convolutions", "dynamic", 1.0, False),
]


@dataclass
class World:
    """A model of a setup: compiled, or (the reference) plain."""

    model: Any
    kind: str
    ratio: float
    path: Any = None
    recording: bool = False

    def cache(self) -> Any:
        if self.model.config.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(config=self.model.config), DynamicCache(config=self.model.config))
        made = new_cache(self.model, self.kind)
        if self.recording:
            made.activate_past_recording()
        return made

    @torch.no_grad()
    def step(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        """Logits; ``cache`` grows by ids [rows, tokens]."""
        given = {cache_name(self.model): cache, "use_cache": True}
        if not self.model.config.is_encoder_decoder:
            return self.model(ids, **given).logits
        source = prompt(2, 7, seed=9)[0][:1].repeat(len(ids), 1)  # the same for all rows: operations mix them
        encoded = self.model.get_encoder()(source)
        return self.model(encoder_outputs=encoded, decoder_input_ids=ids, **given).logits

    def begun(self) -> Any:
        cache, ids = self.cache(), prompt(2, 11)[0]
        for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:]):
            self.step(cache, part.clone())
        return cache


def layers(cache: Any) -> list[Any]:
    both = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
    return [x for c in both if c is not None for x in c.layers] or list(cache.layers)


def coded(cache: Any) -> list[tuple[bool, bool]]:
    found = []
    for layer in layers(cache):
        pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
        found.append(tuple(isinstance(t, LatentKV) and t.tail is None for t in pair))
    return found


def crop(tokens: int) -> Callable[..., Any]:
    return lambda cache, world: cache.crop(tokens)


def reorder(*rows: int) -> Callable[..., Any]:
    return lambda cache, world: cache.reorder_cache(torch.tensor(rows))


def reset(cache: Any, world: World) -> None:
    cache.reset()
    world.step(cache, prompt(2, 9, seed=3)[0])


def go_on_with_a_copy(cache: Any, world: World) -> Any:
    again = copy.deepcopy(cache)
    for i in range(3):
        world.step(cache, prompt(2, 1, seed=20 + i)[0])
    return again


def offload(cache: Any, world: World) -> None:
    """There and back; between one device and itself ``to`` copies nothing, so that is done too."""
    for layer in layers(cache):
        layer.offload()
        layer.prefetch()
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = (t.to("cpu", copy=True) for t in (layer.keys, layer.values))


def from_parts(cache: Any, world: World) -> Any:
    """The way of DDP, and of what is left of legacy tuples."""
    made = DynamicCache([part[:2] for part in cache], config=world.model.config)
    for new, old in zip(made.layers, cache.layers, strict=True):
        if hasattr(old, "cumulative_length"):
            new.cumulative_length = old.cumulative_length
    return made


def save_and_load(cache: Any, world: World) -> Any:
    lorc_fx.save_cache(cache, world.path / "a.cache")
    return lorc_fx.load_cache(world.path / "a.cache", world.model)


def torch_save(cache: Any, world: World) -> Any:
    torch.save(cache, world.path / "a.pt")
    return torch.load(world.path / "a.pt", weights_only=False)


def read(cache: Any, world: World) -> None:
    for layer in layers(cache):
        if getattr(layer, "keys", None) is not None:
            assert bool(torch.isfinite(layer.keys[:, 0].sum() + layer.values.float().mean()))


def join_two(cache: Any, world: World) -> None:
    """Requests that were begun apart and go on as one batch."""
    other = world.begun()
    other.reorder_cache(torch.tensor([1, 0]))
    for mine, its in zip(layers(cache), layers(other), strict=True):
        mine.keys, mine.values = torch.cat([mine.keys, its.keys]), torch.cat([mine.values, its.values])


def in_inference_mode(cache: Any, world: World) -> None:
    with torch.inference_mode():
        for layer in layers(cache):
            for name in ("keys", "values"):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, getattr(layer, name)[:1].repeat_interleave(2, dim=0))


def overwrite(cache: Any, world: World) -> None:
    layer = next(x for x in layers(cache) if getattr(x, "keys", None) is not None)
    layer.keys[:, 0] = 0.25
    layer.values[:, :, :2] = layer.values[:, :, 1:3].clone()


def uncompiled_step(cache: Any, world: World) -> None:
    with torch.compiler.set_stance("force_eager"):
        world.step(cache, prompt(2, 2, seed=4)[0])


#: name -> (what is done: it returns another cache or None, rows that it has then)
OPERATIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "crop": (crop(-2), 2),
    "crop nothing": (crop(0), 2),
    "crop all": (crop(-11), 2),
    "crop beyond the length": (crop(-50), 2),
    "crop, recorded": (crop(-2), 2),
    "crop nothing, recorded": (crop(0), 2),
    "crop all, recorded": (crop(-11), 2),
    "crop to a length": (crop(5), 2),
    "reorder": (reorder(1, 0), 2),
    "reorder to three rows": (reorder(1, 1, 0), 3),
    "reorder beyond the rows": (reorder(7, 0), 2),
    "reorder by negative rows": (reorder(-1, 0), 2),
    "repeat": (lambda cache, world: cache.batch_repeat_interleave(2), 4),
    "select": (lambda cache, world: cache.batch_select_indices(torch.tensor([1])), 1),
    "select by mask": (lambda cache, world: cache.batch_select_indices(torch.tensor([False, True])), 1),
    "select from the end": (lambda cache, world: cache.batch_select_indices(torch.tensor([-1, -2])), 2),
    "select beyond the rows": (lambda cache, world: cache.batch_select_indices(torch.tensor([5])), 1),
    "reset": (reset, 2),
    "deepcopy": (go_on_with_a_copy, 2),
    "offload": (offload, 2),
    "from its parts": (from_parts, 2),
    "save and load": (save_and_load, 2),
    "torch.save": (torch_save, 2),
    "read": (read, 2),
    "join two": (join_two, 4),
    "in inference mode": (in_inference_mode, 2),
    "overwrite": (overwrite, 2),
    "a step without compilation": (uncompiled_step, 2),
    "another batch size": (lambda cache, world: world.step(cache, prompt(3, 1)[0]), 3),
}
LOST = {"torch.save", "overwrite", "a step without compilation"}
"""What leaves a cache (in part) dense: a pickle, dense values written, tokens that no graph of ours projected."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(s[:3], id=f"{s[0]}-{s[1]}-{s[2]}", marks=[] if s[3] else [pytest.mark.slow]) for s in SETUPS],
)
def worlds(request: Any) -> Any:
    """(compiled, plain)."""
    name, kind, share = request.param
    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=4096):
        torch.manual_seed(0)
        if name in MADE:
            model = MADE[name]().eval()
            randomise(model, 0)
        else:
            model = FAMILIES[name].build(layers=FAMILIES[name].fewest)
            if share < 1:
                make_low_rank(FAMILIES[name], model, share)
        plain = copy.deepcopy(model)
        ratio = min(share + 0.1, 1.0)  # and room for positions
        yield World(compiled(model, ratio=ratio), kind, ratio), World(plain, kind, ratio)
    torch._dynamo.reset()


def attempt(world: World, name: str) -> tuple[Any, list[torch.Tensor], Any]:
    """The cache after the operation and three steps, their logits, and what was coded before; or the error."""
    operation, rows = OPERATIONS[name]
    before: Any = []
    try:
        cache = world.begun()  # transformers 5.17 itself refuses a second step while it records a window's past
        before = coded(cache)
        cache = operation(cache, world) or cache
        ids = prompt(rows, 4, seed=6)[0]
        return cache, [world.step(cache, ids[:, i : i + 1].clone()) for i in range(4)], before
    except Exception as error:
        return error, [], before


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(worlds: Any, name: str, tmp_path: Any) -> None:
    ours, plain = worlds
    for world in worlds:
        world.path, world.recording = tmp_path, name.endswith("recorded")
    want_cache, want, _ = attempt(plain, name)
    cache, got, before = attempt(ours, name)
    assert any(map(any, before)), "nothing was coded"
    if isinstance(want_cache, Exception):
        assert isinstance(cache, type(want_cache)), f"{cache!r}, where a dense cache raises {want_cache!r}"
        if isinstance(want_cache, (AttributeError, TypeError)):  # these a cache that lacks something would raise, too
            assert str(cache) == str(want_cache)
        return
    if isinstance(cache, Exception):  # transformers 5.17 appends to the cross-attention that it has just reset
        stock = replace(plain, model=copy.deepcopy(plain.model))
        stock.model.compile(backend="eager")
        its, _, _ = attempt(stock, name)
        assert isinstance(its, type(cache)), f"{type(cache)}, which a stock backend does not raise: {cache}"
        return
    for i, (mine, its) in enumerate(zip(got, want, strict=True)):
        assert_close(f"logits {i} after {name}", mine, its)
        assert_tokens(f"token {i} after {name}", mine[:, -1].argmax(-1), its[:, -1].argmax(-1))
    if name not in LOST:
        assert coded(cache) == before
        most = 1.2 if ours.ratio == 1 else ours.ratio  # positions, beside tiny layers
        assert cache_nbytes(cache, used=True) <= most * cache_nbytes(want_cache, used=True)
