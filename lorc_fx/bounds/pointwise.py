"""Bounds on norms and activations, at the activations that are there: local Lipschitz constants, not global ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .roundoff import SLACK


def unit_vectors(square: torch.Tensor, error: torch.Tensor, width: int) -> torch.Tensor:
    """How far x / rms(x) moves where x moves by at most ``error`` [..]; ``square`` [..]: |x|^2 + n eps; n =
    ``width``.

    Statement. sqrt(n) 2 sin(a / 2) with sin a = error / sqrt(square), 2 sqrt(n) where the error is larger. Proof.
    With eps, x / rms(x) is sqrt(n) times all but the last entry of the unit vector along (x, sqrt(n eps)); a
    vector that moves by less than its length turns by an angle a at most, and unit vectors at an angle a are 2
    sin(a / 2) apart. Sharp for eps = 0. LayerNorm is the same after the mean is taken off, which is an orthogonal
    projection."""
    turn = (error / square.sqrt().clamp_min(1e-300)).clamp_max(1.0)
    chord = 2 * torch.sin(torch.asin(turn) / 2)
    chord = torch.where(error >= square.sqrt(), 2.0, chord)
    return width**0.5 * chord * (1 + SLACK)


def unit_vector_entries(x: torch.Tensor, each: torch.Tensor, square: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """The same, entry by entry: [.., n] from ``x`` [.., n], |x' - x| entry by entry (``each``), and as above (with
    the last dim kept at 1).

    Statement. sqrt(n) (each / l' + |x| |1 / l' - 1 / l|) with l = sqrt(square), l' >= l - error; sqrt(n) + the entry
    itself where the error is larger. Proof. x' / l' - x / l = (x' - x) / l' + x (1 / l' - 1 / l).
    """
    n, length = x.shape[-1], square.sqrt()
    shortest = length - error
    safe = shortest.clamp_min(1e-300)
    moved = each / safe + x.abs() * (error / (length.clamp_min(1e-300) * safe))
    most = 1 + x.abs() / length.clamp_min(1e-300)
    return n**0.5 * torch.where(shortest > 0, torch.minimum(moved, most), most) * (1 + SLACK)


@dataclass(frozen=True)
class Activation:
    """A function of one number that falls to ``least`` and rises from there (None: it rises everywhere); its slope
    is at most ``slope`` in size, and changes by at most ``bend`` per unit."""

    function: Callable[[torch.Tensor], torch.Tensor]
    least: float | None
    slope: float
    bend: float

    def entries(self, x: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        """|f(x') - f(x)| for |x' - x| <= ``each``, [..]: exact, as f is monotone on either side of ``least``."""
        here = self.function(x)
        ends = [self.function(x - each), self.function(x + each)]
        found = torch.maximum((ends[0] - here).abs(), (ends[1] - here).abs())
        if self.least is not None:
            low = torch.tensor(self.least, dtype=x.dtype)
            inside = (x - each < low) & (x + each > low)
            found = torch.where(inside, torch.maximum(found, here - self.function(low)), found)
        return found * (1 + SLACK) + 1e-15

    def lipschitz(self, x: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        """The slope at most between x - each and x + each, [..]: |f'(x)| + bend * each, and never more than
        ``slope``. f' is by automatic differentiation."""
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.function(at).sum(), at)
        return (slope.abs() + self.bend * each).clamp_max(self.slope) * (1 + SLACK)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


#: Least points, steepest slopes and bends: maxima of |f'| and |f''|, rounded up. A test holds them against the
#: derivatives of ``symbolic``.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, None, 1.0, 1e300),
    "tanh": Activation(torch.tanh, None, 1.0, 0.7699),
    "sigmoid": Activation(torch.sigmoid, None, 0.25, 0.09623),
    "silu": Activation(F.silu, -1.2784645427610738, 1.09984, 0.5),
    "gelu": Activation(F.gelu, -0.7517915246935645, 1.12905, 0.79789),
    "gelu_tanh": Activation(_gelu_tanh, -0.7524614220710162, 1.12905, 0.79789),
    "quick_gelu": Activation(_quick_gelu, -1.2784645427610738 / 1.702, 1.09984, 0.851),
}
