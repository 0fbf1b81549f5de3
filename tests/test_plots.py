"""The figures of ``bench.plots`` from the files that are there."""

from __future__ import annotations

import pytest

from bench import plots


@pytest.mark.parametrize("name", plots.FIGURES)
def test_figures_are_drawn(name, tmp_path):
    plots.draw(name, plots.rows(), tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_what_was_measured_is_in_the_figure_of_tokens(tmp_path):
    rows = plots.rows()
    _, _, chosen = plots.FIGURES["tokens"]
    assert {r["model"] for r in rows if chosen(r)} == set(plots.MODELS)
    plots.draw("tokens", rows, tmp_path / "figure.svg")
    assert "lorc-0.25" in (tmp_path / "figure.svg").read_text()
