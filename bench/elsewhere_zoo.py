"""Small decoders of torchtune, litgpt and ibm-fms with the caches that these packages have, to be run step by step.

A package is imported when its first model is built, so each may live in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.zoo import HEAD, HIDDEN, VOCAB, WINDOW, randomise

BATCH, ROOM, HEADS = 2, 24, 4

Cache = Any


class Held(nn.Module):
    """A model and how it is run: ``compiled`` is what a user compiles. ``forward`` takes ids [B, S], their positions
    [B, S], who attends to whom [B, S, ROOM] and the cache of the step before (None before the first)."""

    padded = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def compiled(self) -> nn.Module:
        return self.model

    def begin(self) -> None:
        """Before each prompt, uncompiled."""

    def forward(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[Any, Cache]:
        raise NotImplementedError

    def parts(self, cache: Cache) -> Iterator[tuple[str, torch.Tensor]]:
        for i, layer in enumerate(cache):
            for kind, value in zip(("keys", "values"), layer, strict=True):
                yield f"{kind} {i}", value


class Returned(Held):
    """ibm-fms: the cache of a step is returned, and given to the next one."""

    def forward(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[Any, Cache]:
        tokens = ids.shape[1] + (0 if cache is None else self._length(cache))
        seen = torch.where(mask[..., :tokens], 0.0, -torch.inf)  # as the package's own ``pad_input_ids`` has it
        more = {"mask": seen, "position_ids": places}
        return self.model(ids, past_key_value_states=cache, use_cache=True, **more)

    def _length(self, cache: Cache) -> int:
        return max(value.shape[2] for _, value in self.parts(cache))

    def parts(self, cache: Cache) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().parts([layer for layer in cache if isinstance(layer, (tuple, list))])  # others are states


class Buffers(Held):
    """Buffers of modules, written in place: made before the first call, or (``Born``) in it."""

    names = ("k", "v")

    def holders(self) -> list[Any]:
        """The modules that have the buffers ``names``."""
        raise NotImplementedError

    def step(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[Any, Cache]:
        return self.step(ids, places, mask), ()

    def parts(self, cache: Cache) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().parts([[getattr(holder, name) for name in self.names] for holder in self.holders()])


class Born(Buffers):
    """The same buffers, made anew inside of the compiled region where a prompt begins."""

    @property
    def compiled(self) -> nn.Module:
        return self

    def forward(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[Any, Cache]:
        if cache is None:
            for holder in self.holders():
                for name in self.names:
                    setattr(holder, name, torch.zeros_like(getattr(holder, name)))
        return self.step(ids, places, mask), ()


class LitGPT(Buffers):
    """One position for all batch rows, which is the place in the buffer, too; the mask is the model's own."""

    padded = False

    def begin(self) -> None:
        self.model.clear_kv_cache()
        self.model.set_kv_cache(BATCH, ROOM, dtype=self.model.lm_head.weight.dtype)

    def holders(self) -> list[Any]:
        return [block.attn.kv_cache for block in self.model.transformer.h]

    def step(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, places[0])


class LitGPTRows(LitGPT):
    """A position for each batch row: rows are written one by one."""

    def step(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, places)


class LitGPTBorn(LitGPT, Born):
    pass


class LitGPTRowsBorn(LitGPTRows, Born):
    pass


class Torchtune(Buffers):
    """Buffers filled from the start, whatever the positions are."""

    names = ("k_cache", "v_cache")

    def begin(self) -> None:
        for layer in self.model.layers:
            layer.attn.kv_cache = None
        weight = next(self.model.parameters())
        self.model.setup_caches(BATCH, weight.dtype, decoder_max_seq_len=ROOM)

    def holders(self) -> list[Any]:
        return [layer.attn.kv_cache for layer in self.model.layers]

    def step(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, mask=mask, input_pos=places)


class TorchtuneBorn(Torchtune, Born):
    pass


@dataclass(frozen=True)
class Family:
    """One kind of decoder that a package has: ``make`` builds it small, and it takes a prompt in ``pieces``."""

    package: str
    cls: str
    make: Callable[[], Any]
    pieces: tuple[int, ...] = (6, 3)

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = self.make().eval().requires_grad_(False)
        randomise(model, seed)
        return model


WAYS: dict[str, dict[str, type[Held]]] = {
    "ibm-fms": {"use_cache": Returned},
    "litgpt": {
        "set_kv_cache": LitGPT,
        "set_kv_cache, positions per row": LitGPTRows,
        "born in the graph": LitGPTBorn,
        "born in the graph, positions per row": LitGPTRowsBorn,
    },
    "torchtune": {"setup_caches": Torchtune, "born in the graph": TorchtuneBorn},
}


def _fms(module: str, cls: str, **more: Any) -> Callable[[], Any]:
    """A class of ``fms.models`` with what its configuration has of these sizes, and ``more``."""
    sizes = {"src_vocab_size": VOCAB, "emb_dim": HIDDEN, "dim": HIDDEN, "nheads": HEADS, "kvheads": 2, "nlayers": 2}
    sizes |= {"head_dim": HEAD, "max_expected_seq_len": 64, "multiple_of": 8, "hidden_dim": 96, "num_experts": 4}
    sizes |= {"pad_id": -1}

    def make() -> Any:
        import dataclasses
        import importlib

        home = importlib.import_module(f"fms.models.{module}")
        config = getattr(home, f"{cls}Config")
        known = {field.name for field in dataclasses.fields(config)}
        given = {k: v for k, v in sizes.items() if k in known} | more
        model = getattr(home, cls)(config(**given))
        model.reset_parameters()
        if hasattr(model, "post_init"):
            model.post_init()
        return model

    return make


def _litgpt(name: str, **more: Any) -> Callable[[], Any]:
    """A configuration that litgpt has under ``name``, small."""
    sizes = {"block_size": 64, "n_layer": 2, "n_embd": HIDDEN, "n_head": HEADS, "head_size": HEAD}
    sizes |= {"vocab_size": VOCAB, "padded_vocab_size": VOCAB, "intermediate_size": 96}

    def make() -> Any:
        from litgpt import GPT, Config

        return GPT(Config.from_name(name, **{**sizes, **more}))

    return make


def _torchtune(module: str, **more: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": HEADS, "num_kv_heads": 2, "embed_dim": HIDDEN}
    sizes |= {"max_seq_len": 64, "intermediate_dim": 96}

    def make() -> Any:
        import importlib

        home = importlib.import_module(f"torchtune.models.{module}._component_builders")
        return getattr(home, module)(**sizes, **more)

    return make


_MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "n_groups": 2, "state_size": 16}
_GEMMA = {"head_dim": 2 * HEAD}

FAMILIES: tuple[Family, ...] = (
    Family("ibm-fms", "LLaMA", _fms("llama", "LLaMA")),
    Family("ibm-fms", "LLaMA, unfused", _fms("llama", "LLaMA", fused_weights=False, attn_bias=True)),
    Family("ibm-fms", "GPTBigCode", _fms("gpt_bigcode", "GPTBigCode")),
    Family("ibm-fms", "Mixtral", _fms("mixtral", "Mixtral")),
    Family("ibm-fms", "Granite", _fms("granite", "Granite")),
    Family(
        "ibm-fms", "GraniteSWA", _fms("granite_swa", "GraniteSWA", is_swa_layer=[True, False], window_length=WINDOW)
    ),
    Family("ibm-fms", "Mistral", _fms("mistral", "Mistral")),
    Family("ibm-fms", "Qwen3", _fms("qwen3", "Qwen3")),
    Family("ibm-fms", "GptOss", _fms("gpt_oss", "GptOss")),
    Family("ibm-fms", "Bamba", _fms("bamba", "Bamba", **_MAMBA), pieces=(9,)),
    Family("litgpt", "pythia", _litgpt("pythia-14m")),
    Family("litgpt", "Llama-3.1", _litgpt("Llama-3.1-8B", n_query_groups=2)),
    Family("litgpt", "LLaMA-2-32K", _litgpt("LLaMA-2-7B-32K", n_query_groups=HEADS)),
    Family("litgpt", "Gemma", _litgpt("Gemma-2b", n_query_groups=1)),
    Family("litgpt", "Gemma-2", _litgpt("Gemma-2-2b", n_query_groups=2, sliding_window_size=WINDOW)),
    Family("litgpt", "Gemma-3", _litgpt("Gemma-3-1b-it", n_query_groups=1, sliding_window_size=WINDOW)),
    Family("litgpt", "phi-2", _litgpt("phi-2")),
    Family("litgpt", "Phi-3", _litgpt("Phi-3-mini-4k-instruct", sliding_window_size=None)),
    Family("litgpt", "falcon-7b", _litgpt("falcon-7b", n_query_groups=1)),
    Family("litgpt", "falcon-40b", _litgpt("falcon-40b", n_query_groups=2)),
    Family("litgpt", "OLMo-2", _litgpt("OLMo-2-1124-7B", n_query_groups=HEADS)),
    Family("litgpt", "Qwen3", _litgpt("Qwen3-0.6B", n_query_groups=2)),
    Family("litgpt", "stablelm", _litgpt("stablelm-3b-4e1t")),
    Family("torchtune", "llama2", _torchtune("llama2")),
    Family("torchtune", "llama3", _torchtune("llama3")),
    Family("torchtune", "llama3_1", _torchtune("llama3_1")),
    Family("torchtune", "gemma", _torchtune("gemma", **_GEMMA)),
    Family("torchtune", "gemma2", _torchtune("gemma2", **_GEMMA, sliding_window_size=WINDOW)),
    Family("torchtune", "mistral", _torchtune("mistral")),
    Family("torchtune", "phi3", _torchtune("phi3")),
    Family("torchtune", "qwen2", _torchtune("qwen2")),
)
