"""The rank and byte formulas, written once in SymPy: the code evaluates them and the docs print them.

Units: ranks are columns; bytes are bytes per token; FLOPs are per cached token, site and decoding step. Byte formulas
are evaluated on ints and ``Fraction``s only, so they are exact; the rank formula takes logarithms and is a float
until its floor. Source of the rank formula: LoRC, arXiv 2410.03111 (with the sign that its published ranks have).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import sympy

from lorc_fx.errors import BadOption


def _symbols(names: str) -> Any:
    return sympy.symbols(names, real=True)


d_min, d_max, t = _symbols("d_min d_max t_l")
x, x_min, x_max = _symbols(r"\log\tilde{\kappa}_l \log\tilde{\kappa}_{min} \log\tilde{\kappa}_{max}")
fixed, column, r, n = _symbols("b_fixed b_column r n")
ratio, dense = _symbols("rho b_dense")
_l, _j, _L = sympy.symbols("l j L", integer=True)
_k, _v = sympy.IndexedBase(r"\kappa^{K}"), sympy.IndexedBase(r"\kappa^{V}")


@dataclass(frozen=True)
class Formula:
    """One named formula: what it says, its left side (LaTeX), its expression and the order of its arguments."""

    name: str
    says: str
    left: str
    expr: Any
    args: tuple[Any, ...]

    def function(self) -> Callable[..., Any]:
        """A plain Python function of the arguments; exact where they are ints and Fractions."""
        made: Callable[..., Any] = sympy.lambdify(self.args, self.expr, modules="math")
        return made


# apart from the rank, so that it is exactly 1 and 0 at the ends in floats too
_position = (x - x_min) / (x_max - x_min)
_real = d_min + (d_max - d_min) * t

FORMULAS: dict[str, Formula] = {
    f.name: f
    for f in (
        Formula(
            "log_cumulative",
            "log of the cumulative condition number of layer l: its errors pass through all layers above",
            r"\log\tilde{\kappa}_l",
            sympy.Sum(sympy.log(_k[_j]) + sympy.log(_v[_j]), (_j, _l, _L)),
            (),
        ),
        Formula(
            "position",
            "where layer l stands between the last (0) and the first (1)",
            "t_l",
            _position,
            (x, x_min, x_max),
        ),
        Formula("real_rank", "rank of layer l before the floor", r"\hat{d}_l", _real, (d_min, d_max, t)),
        Formula("rank", "progressive rank of layer l", "d_l", sympy.floor(_real), (d_min, d_max, t)),
        Formula("row_bytes", "bytes of one token at one site", "b_{site}", fixed + column * r, (fixed, column, r)),
        Formula("budget", "bytes per token that a ratio allows", "b", sympy.floor(ratio * dense), (ratio, dense)),
    )
}

_position_of = FORMULAS["position"].function()
_real_rank = FORMULAS["real_rank"].function()
_row_bytes = FORMULAS["row_bytes"].function()
_budget = FORMULAS["budget"].function()
_rank = FORMULAS["rank"].function()


def exact_ratio(value: float | int | Fraction | Decimal | str) -> Fraction:
    """The ratio as it was written: 0.45 is 45/100, not the nearest binary float.

    Raises BadOption where ``value`` is no number.
    """
    if isinstance(value, Fraction):
        return value
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise BadOption("ratio", value, "a number in (0, 1]", 0.45) from None


def position(log_kappa: float, log_min: float, log_max: float) -> float:
    """Where a layer's log kappa~ stands in [0, 1]. All kappas equal (``log_min == log_max``): 1."""
    return 1.0 if log_max == log_min else float(_position_of(log_kappa, log_min, log_max))


def real_rank(low: int, high: int, log_kappa: float, log_min: float, log_max: float) -> float:
    """Rank of one layer before the floor, in columns. All kappas equal: ``high``."""
    return float(_real_rank(low, high, position(log_kappa, log_min, log_max)))


def rank(low: int, high: int, log_kappa: float, log_min: float, log_max: float) -> int:
    """Progressive rank d_l of one layer, in columns. All kappas equal: ``high``."""
    return int(_rank(low, high, position(log_kappa, log_min, log_max)))


def row_bytes(fixed_bytes: int, column_bytes: int, columns: int) -> int:
    """Bytes of one token at one site with ``columns`` columns."""
    return int(_row_bytes(fixed_bytes, column_bytes, columns))


def budget_bytes(value: float | int | Fraction | Decimal | str, dense_bytes: int) -> int:
    """``floor(ratio * dense)`` in bytes per token, exact: ``budget_bytes(0.45, 100) == 45``.

    Raises BadOption where ``value`` is no number.
    """
    return int(_budget(exact_ratio(value), dense_bytes))


def latex(name: str) -> str:
    """One formula as LaTeX, ``left = right``. Raises KeyError for a name that is not in ``FORMULAS``."""
    formula = FORMULAS[name]
    return f"{formula.left} = {sympy.latex(formula.expr)}"


def markdown() -> str:
    """All formulas as a Markdown table (name, meaning, formula), for the docs."""
    rows = [f"| `{f.name}` | {f.says} | ${latex(f.name)}$ |" for f in FORMULAS.values()]
    return "\n".join(["| name | meaning | formula |", "| --- | --- | --- |", *rows])
