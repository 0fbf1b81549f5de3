"""Caches that keep tokens in a way of their own: what the model computes with them stays what it was. (Here a
QuantizedLayer of transformers, with quantisers that lose nothing.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers.cache_utils import Cache, QuantizedLayer

from helpers import assert_close, assert_tokens, cache_name, compiled, prompt
from lorc_fx.errors import NoSitesWarning

pytestmark = pytest.mark.usefixtures("clean", "many_shapes")


class Copied(QuantizedLayer):
    """Numbers that a graph can follow."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        return tensor.clone()

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        return q_tensor


class Opaque(Copied):
    """Bits, as packed levels are: no graph knows what they stand for."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        return tensor.contiguous().view(torch.int32) ^ 1

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        return (q_tensor ^ 1).view(torch.float32)


def generated(model: Any, layer: type[QuantizedLayer]) -> Any:
    """Two rows, one padded on the left, of 9 tokens and 8 new ones: every third time all that is kept is quantised."""
    ids, mask = prompt(2, 9, 3)
    layers = [layer(residual_length=3) for _ in range(model.config.num_hidden_layers)]
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, **given, **{cache_name(model): Cache(layers=layers)}
    )


@pytest.mark.parametrize(("family", "layer"), [("llama-gqa", Copied), ("llama-gqa", Opaque), ("gpt2", Copied)])
def test_a_cache_that_quantises_is_what_it_was_and_that_is_said(family, layer):
    """At half the bytes too: nothing is lost twice."""
    model = FAMILIES[family].build()
    want = generated(model, layer)
    with pytest.warns(NoSitesWarning):
        got = generated(compiled(model, ratio=0.5), layer)
    assert_tokens("tokens", got.sequences, want.sequences)
    assert_close("logits", torch.stack(got.logits), torch.stack(want.logits), 1e-5)
