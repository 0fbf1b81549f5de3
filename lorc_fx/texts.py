"""Text files as token ids: to calibrate on, to score, to hide a needle in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorc_fx.errors import BadModel, BadOption


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
