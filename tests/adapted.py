"""Weights that are no plain tensors, for the tests of them: a quantised subclass, the model that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from families import FAMILIES
from oracle import oracle, ranks_of
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from helpers import assert_close, assert_tokens, compiled, generate, latents, prompt

FAMILY = FAMILIES["llama-gqa"]
UNIFORM = {"scheduler": "uniform", "precision": "model"}
IDS, MASK = prompt(tokens=9)
aten = torch.ops.aten


class Scaled(torch.Tensor):
    """Integers, a scale per row and a number in Python: as plain a quantised weight as can be, with no more than
    ``__torch_dispatch__``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, times: float) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, times: float) -> None:
        self.codes, self.scale, self.times = codes, scale, times

    @classmethod
    def of(cls, weight: torch.Tensor, times: float = 1.0, per_row: bool = True) -> nn.Parameter:
        scale = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax().reshape(1, 1)
        codes = (weight / scale * 127).round().to(torch.int8)
        return nn.Parameter(cls(codes, scale / 127, times), requires_grad=False)

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], self.times

    @staticmethod
    def __tensor_unflatten__(inner: Any, times: float, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["codes"], inner["scale"], times)

    def dequantize(self) -> torch.Tensor:
        return self.codes.to(self.dtype) * self.scale * self.times

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            given = args[0]
            made = cls(func(given.codes), func(given.scale), given.times)
            return return_and_correct_aliasing(func, args, kwargs, made)
        args, kwargs = pytree.tree_map_only(Scaled, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def projections(model: Any) -> list[nn.Module]:
    """Query, key and value of each layer."""
    found = [layer.self_attn for layer in model.model.layers]
    return [getattr(a, f"{name}_proj") for a in found for name in "qkv"]


def effective(model: Any) -> Any:
    """A copy whose keys and values are projected by plain weights of the same values."""
    plain = copy.deepcopy(model)
    for p in FAMILY.projections(plain):
        if hasattr(p.module.weight, "dequantize") and type(p.module.weight) is not nn.Parameter:
            p.module.weight = nn.Parameter(p.module.weight.dequantize().detach(), requires_grad=False)
    return plain


def check(call: Any, eager: Any, tol: float = 1e-4, plain: Any = None, **given: Any) -> Any:
    """``call`` (compiled here) is ``eager``, in logits and greedy tokens, and coded. At a ratio below one it is
    ``plain`` (the same model with plain weights) with projections onto what the codecs keep. The run comes back."""
    got = generate(compiled(call, **{**UNIFORM, "ratio": 1.0, **given}), IDS, MASK)
    latents(got.cache)
    if given.get("ratio", 1.0) < 1:
        ranks = ranks_of(got.cache)
        assert all(r < 32 for pair in ranks for r in pair), ranks
        eager = oracle(FAMILY, effective(eager) if plain is None else plain, ranks)
    want = generate(eager, IDS, MASK, forced=got.sequences if given.get("ratio", 1.0) < 1 else None)
    assert_close("logits", got.logits, want.logits, tol)
    assert_tokens("greedy", got.sequences, want.sequences)
    return got
