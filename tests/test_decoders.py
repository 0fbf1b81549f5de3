"""Decoders of transformers, built small: right at full rank and at half the bytes, and wholly coded.

A few here, one for each way that keys and values reach a cache which ``families`` has not; all of them with
``pytest -m decoders`` (two hours), which is what ``python -m bench.decoders`` measures.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import decoders, verdicts, zoo

ENTRIES = {f"{e.kind}-{e.model_type}-{e.cls}": e for e in zoo.entries()}
#: class -> how it is run here
SAMPLE = {
    "AfmoeForCausalLM": "dynamic",  # a gate on attention's result, views of it
    "CohereCompassForCausalLM": "dynamic, chunks",  # three positions per token, all the same
    "DeepseekV3ForCausalLM": "dynamic, chunks",  # multi-head latent attention, keys written through views
    "FalconH1ForCausalLM": "dynamic",  # attention and state-space layers
    "GptOssForCausalLM": "static",  # sinks before the softmax, rotation of chunks
    "Llama4ForCausalLM": "dynamic, chunks",  # complex rotation, norm behind it
    "RoFormerForCausalLM": "dynamic",  # interleaved rotation, shapes taken from other values
    "T5ForConditionalGeneration": "static",  # an encoder: cross-attention
}


@pytest.mark.usefixtures("clean", "many_shapes")
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    row = decoders.check(next(e for e in ENTRIES.values() if e.cls == name), [SAMPLE[name]])
    (way,) = row["ways"].values()
    assert verdicts.verdict(row) == "whole", row
    assert way["half_error"] <= verdicts.TOLERANCE and way["half_tokens"]


@pytest.mark.decoders
@pytest.mark.parametrize("name", ENTRIES)
def test_every_class_is_right(name: str) -> None:
    row = decoders.isolated(ENTRIES[name])
    said = verdicts.verdict(row)
    assert not said.startswith(("WRONG", "DIED")), said


def test_nearly_all_classes_can_be_built() -> None:
    built = [name for name, entry in ENTRIES.items() if _configured(entry)]
    assert len(built) >= 190, f"only {len(built)} of {len(ENTRIES)}"


def _configured(entry: Any) -> bool:
    try:
        entry.config()
    except Exception:
        return False
    return True
