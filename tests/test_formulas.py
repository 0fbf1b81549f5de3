"""The formulas: exact where they claim to be, and the same expressions in code and docs."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorc_fx import formulas
from lorc_fx.errors import BadOption


@pytest.mark.parametrize(
    ("ratio", "dense", "want"),
    [
        (0.45, 100, 45),  # 0.45 as a binary float is 0.450000000000000011
        (0.29, 100, 29),  # 0.29 * 100 == 28.999999999999996
        (0.57, 100, 57),
        (0.07, 100, 7),
        (1, 12345, 12345),
        (1.0, 63, 63),
        (0.1, 2**70, 2**70 // 10),
        (Fraction(1, 3), 768, 256),
        ("0.35", 20, 7),
        (1e-3, 2049, 2),
    ],
)
def test_budget_is_exact(ratio, dense, want):
    got = formulas.budget_bytes(ratio, dense)
    assert got == want and isinstance(got, int)


@given(st.integers(1, 10**6), st.integers(0, 10**9))
def test_budget_of_any_written_ratio(millionths, dense):
    assert formulas.budget_bytes(millionths / 10**6, dense) == millionths * dense // 10**6


@pytest.mark.parametrize("value", ["half", None, [0.5], float("nan"), float("inf")])
def test_budget_refuses_what_is_no_number(value):
    with pytest.raises(BadOption):
        formulas.budget_bytes(value, 100)


@given(st.integers(0, 64), st.integers(1, 64), st.integers(0, 8192))
def test_row_bytes(fixed, column, columns):
    assert formulas.row_bytes(fixed, column, columns) == fixed + column * columns


@pytest.mark.parametrize(("log", "want"), [(10.0, 1024), (0.0, 128), (5.0, 576), (9.999, 1023), (0.001, 128)], ids=str)
def test_rank_by_hand(log, want):
    assert formulas.rank(128, 1024, log, 0.0, 10.0) == want


def test_rank_of_equal_kappas_is_the_maximum():
    assert formulas.rank(1, 77, 3.0, 3.0, 3.0) == 77
    assert formulas.real_rank(1, 77, 3.0, 3.0, 3.0) == 77.0


def test_docs_print_what_the_code_evaluates():
    text = formulas.markdown()
    assert all(f"| `{name}` |" in text for name in formulas.FORMULAS)
    for name, formula in formulas.FORMULAS.items():
        assert formula.left in formulas.latex(name)
        if formula.args:
            numbers = [5, 9, 4, 2, 6][: len(formula.args)]
            by_sympy = formula.expr.subs(dict(zip(formula.args, numbers, strict=True)))
            assert float(by_sympy) == pytest.approx(float(formula.function()(*numbers)))
    with pytest.raises(KeyError):
        formulas.latex("no such formula")
