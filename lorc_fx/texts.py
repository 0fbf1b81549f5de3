"""Text files as token ids: to calibrate on, to score, to hide a needle in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorc_fx.errors import BadModel, BadOption

ROW_TOKENS = 1024
"""Tokens of a row of text, where a text is cut into rows, at most."""


def read_text(path: Path) -> str:
    """A file in UTF-8. Raises BadOption (of the option ``text``)."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption("text", str(path), f"a text file in UTF-8 ({error})") from error


def tokenized(written: str, tokenizer: Any, model: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(beginning, body), int64 [0 or 1] and [N]: the BOS token, where the tokenizer begins a text with it, and the
    tokens of the text. Raises BadModel (of ``model``) without a tokenizer."""
    if tokenizer is None:
        raise BadModel(str(model), "it has no tokenizer to read a text with")
    ids = torch.tensor(tokenizer(written, verbose=False).input_ids, dtype=torch.int64)
    begins = tokenizer.bos_token_id is not None and len(ids) > 0 and int(ids[0]) == tokenizer.bos_token_id
    return ids[: int(begins)], ids[int(begins) :]


def positions(model: Any) -> int | None:
    """The tokens that a text may have at most for ``model``; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def rows_of(beginning: torch.Tensor, body: torch.Tensor, tokens: int, model: Any) -> list[torch.Tensor]:
    """At most ``tokens`` tokens of a text (both parts of it as ``tokenized`` gives them) as rows of ``ROW_TOKENS``, or
    of as many as ``model`` has positions for, at most: int64 [2 or more], each of which begins as a text does."""
    row = min(ROW_TOKENS, positions(model) or ROW_TOKENS)
    parts = body[: max(tokens - len(beginning), 0)].split(row - len(beginning))
    rows = [torch.cat([beginning, part]) for part in parts]
    return [ids for ids in rows if len(ids) > 1]
