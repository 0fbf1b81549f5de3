"""How far a model with codecs is from the same model without: its loss, and the divergence of what it predicts.

The divergence KL(dense | coded) of next-token distributions compares all of both predictions, where the loss looks
at one token of them: on the same text it has a small part of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lorc_fx
from bench.prompted import PIECE, mean_nats


class Scores(NamedTuple):
    """Means over all tokens, in nats: the loss, what is ``added`` to the dense model's, and the divergence from
    it; with the standard errors of the last two (as if tokens were independent of each other)."""

    nats: float
    added: float
    added_error: float
    divergence: float
    divergence_error: float


def compared(exact: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each token, in nats: the loss of both models and KL(exact | coded), fp64 [3, N]. Logits [N, vocabulary]
    are taken in fp32, a piece of the tokens at a time: a large vocabulary's are gigabytes."""
    found = []
    for known, other, want in zip(exact.split(PIECE), coded.split(PIECE), targets.split(PIECE), strict=True):
        known, other = known.float().log_softmax(-1), other.float().log_softmax(-1)
        losses = [-scores.gather(-1, want[:, None])[:, 0] for scores in (known, other)]
        found.append(torch.stack([*losses, (known.exp() * (known - other)).sum(-1)]).double())
    return torch.cat(found, 1)


class Reference:
    """What ``model`` says of ``rows`` (token ids [N] each) as it is now: its logits are kept."""

    def __init__(self, model: Any, rows: Sequence[torch.Tensor]) -> None:
        self.rows = rows
        self.logits = [_logits(model, row) for row in rows]

    @property
    def tokens(self) -> int:
        return sum(len(row) - 1 for row in self.rows)

    @property
    def nats(self) -> float:
        """The mean loss."""
        losses = [mean_nats(e, row[1:]) * (len(row) - 1) for e, row in zip(self.logits, self.rows, strict=True)]
        return sum(losses) / self.tokens

    def scores(self, model: Any) -> Scores:
        """Of the same rows, each in one piece through a new cache, by ``model`` with its codecs."""
        parts = [compared(e, _logits(model, r), r[1:]) for e, r in zip(self.logits, self.rows, strict=True)]
        before, after, divergence = torch.cat(parts, 1)
        added = after - before
        return Scores(
            float(after.mean()), float(added.mean()), _error(added), float(divergence.mean()), _error(divergence)
        )


def _error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    return model(input_ids=row[None, :-1], use_cache=True).logits[0]


def known(model: Any, rows: Sequence[torch.Tensor], folder: Path | None, name: str) -> lorc_fx.Calibration:
    """Statistics with gradients of ``rows``; where there is a ``folder``, read from the file of that model's
    ``name`` and as many tokens, or made and kept there: they are as dear as training on the rows. (Those of other
    weights are refused when they are used.) Raises what ``calibrate`` raises."""
    path = folder / f"{name}-{sum(map(len, rows))}.calibration" if folder is not None else None
    if path is not None and path.exists():
        return lorc_fx.Calibration.load(path)
    made = lorc_fx.calibrate(model, rows, gradients=True, progress=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
    return made
