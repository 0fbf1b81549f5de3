"""EleutherAI's lm-eval on a model with a compressed cache: model type ``lorc``, any of its tasks (extra ``eval``).

    lorc lm-eval run --model lorc --model_args pretrained=PATH,ratio=0.25,calibration=FILE --tasks boolq

lm-eval finds model types in its own registry only (it reads no entry points), so its plain command does not know
``lorc``: ``lorc lm-eval`` is that command after this module has registered it, and takes the same arguments.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lorc_fx.errors import BadModel, BadOption, MissingExtra, UnknownOption
from lorc_fx.evaluate import cache_keyword, compress, first_prompt, never_dense, sample_text
from lorc_fx.options import FIRST_PROMPT, FIRST_PROMPT_TOKENS, Options
from lorc_fx.texts import read_text, tokenized

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtra("lm-eval", error.name or "lm-eval", "eval") from error

OPTIONS = tuple(field.name for field in fields(Options))
PROMPT_TOKENS = 1024


@register_model("lorc")
class LorcLM(HFLM):
    """lm-eval's ``hf`` model, compiled in place with ``backend="lorc"``.

    Each name of ``lorc_fx.Options`` is an argument, beside all those of ``hf``. ``inner`` is "eager" by default:
    requests have many lengths, and compiling for them takes longer than running them. With calibration="first-prompt"
    that prompt is the first PROMPT_TOKENS tokens of ``prompt`` (a text file; default: the prose that comes with
    lorc_fx), run before any request, so that results depend neither on the order of requests nor on their padding.

    Raises what Options raises, UnknownOption for what looks like a misspelt option, BadOption for a prompt that is too
    short, BadModel for encoder-decoders.
    """

    def __init__(self, pretrained: Any, prompt: str | Path | None = None, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        if "calibration" in options and options["calibration"] is None:
            options["calibration"] = "none"  # lm-eval reads the word as None
        for name in set(kwargs) - set(inspect.signature(HFLM).parameters):
            if difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.7):
                raise UnknownOption(name, OPTIONS)
        parsed = Options.parse({"inner": "eager"} | options)
        written = sample_text() if prompt is None else read_text(Path(prompt))
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(str(pretrained) if isinstance(pretrained, Path) else pretrained, **kwargs)
        if self.backend != "causal":
            raise BadModel(str(pretrained), "lm-eval runs encoder-decoders without a cache")
        compress(self.model, {"inner": "eager"} | options)
        if parsed.calibration == FIRST_PROMPT:
            ids = torch.cat(tokenized(written, self.tokenizer, pretrained))[: min(PROMPT_TOKENS, self.max_length)]
            if len(ids) < FIRST_PROMPT_TOKENS:
                allowed = f"a text of at least {FIRST_PROMPT_TOKENS} tokens, and this one has {len(ids)}"
                raise BadOption("prompt", prompt, allowed)
            first_prompt(self.model, ids)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [B, T, V] of ``inps`` [B, T], every key and value read through the codec.

        With the cache asked for by name: lm-eval leaves it to the model's config, where it may be off.
        """
        from transformers import DynamicCache

        given = {cache_keyword(self.model): DynamicCache(config=self.model.config), "use_cache": True}
        amp = self.mixed_precision_dtype
        with torch.no_grad(), never_dense(), torch.autocast(self.device.type, amp, enabled=amp is not None):
            return self.model(input_ids=inps, **given).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        with never_dense():
            return super()._model_generate(context, max_length, stop, **kwargs)


def evaluate(model: Any, tasks: Sequence[Any], options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """lm-eval's results of ``tasks`` for ``model``, a loaded one or the path of one, compressed with ``options``.

    ``kwargs`` are those of ``lm_eval.simple_evaluate`` (``task_manager``, ``num_fewshot``, ``limit``, ...) and of
    ``LorcLM`` (``tokenizer``, ``prompt``, ``max_length``, ...). A loaded model is left compiled.
    """
    from lm_eval import simple_evaluate

    theirs, known = inspect.signature(simple_evaluate).parameters, inspect.signature(HFLM).parameters
    mine = {name: value for name, value in kwargs.items() if name in known or name not in theirs}
    rest = {name: value for name, value in kwargs.items() if name in theirs}
    return simple_evaluate(model=LorcLM(model, **dict(options or {}), **mine), tasks=list(tasks), **rest)


def main(arguments: Sequence[str]) -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    with mock.patch.object(sys, "argv", ["lorc lm-eval", *arguments]):
        cli_evaluate()
