"""The bounds that are formulas, as SymPy expressions: for docs/theory.md, and for tests that hold code against
algebra."""

from __future__ import annotations

from functools import cache

import sympy as sp

p, e, n = sp.symbols("p e n", positive=True)
"""Weight of the tokens that gain, largest error of a score, width."""
x = sp.Symbol("x", real=True)
step, columns, length, error = sp.symbols("step columns length error", positive=True)


def gained() -> sp.Expr:
    """p'(A) - p(A) at most, for tokens A of weight p whose scores rise by e while all others fall by e."""
    up, down = p * sp.exp(e), (1 - p) * sp.exp(-e)
    return up / (up + down) - p


def worst_weight() -> sp.Expr:
    """The p at which ``gained`` is largest: 1 / (1 + exp(e)), the root of its derivative in (0, 1)."""
    return 1 / (1 + sp.exp(e))


def total_variation() -> sp.Expr:
    """``gained`` there: tanh(e / 2)."""
    return sp.simplify(gained().subs(p, worst_weight()).rewrite(sp.exp))


def chord() -> sp.Expr:
    """How far x / rms(x) moves at most (``pointwise.unit_vectors``), for |x| = length and |dx| <= error < length."""
    return sp.sqrt(n) * 2 * sp.sin(sp.asin(error / length) / 2)


def quantised() -> sp.Expr:
    """2-norm of what ``columns`` columns of one ``step`` lose at most; uniform errors have 1 / sqrt(3) of it in the
    mean."""
    return sp.sqrt(columns) * step / 2


@cache
def functions() -> dict[str, sp.Expr]:
    """The activations of ``pointwise.ACTIVATIONS`` that are smooth, by name."""
    sigmoid = 1 / (1 + sp.exp(-x))
    gelu = x * (1 + sp.erf(x / sp.sqrt(2))) / 2
    inner = sp.sqrt(2 / sp.pi) * (x + sp.Rational(44715, 10**6) * x**3)
    return {
        "tanh": sp.tanh(x),
        "sigmoid": sigmoid,
        "silu": x * sigmoid,
        "gelu": gelu,
        "gelu_tanh": x * (1 + sp.tanh(inner)) / 2,
        "quick_gelu": x / (1 + sp.exp(-sp.Rational(1702, 1000) * x)),
    }


def derivative(name: str, order: int) -> sp.Expr:
    """The ``order``-th derivative of an activation. Raises KeyError for another name."""
    return sp.diff(functions()[name], x, order)
