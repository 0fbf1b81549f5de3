"""The passes do work in proportion to the graph: counted in Python calls, so that no load on the machine matters."""

import cProfile
import pstats

import pytest

from bench import matching


def calls(work):
    """After one run that fills what is remembered between runs."""
    work()
    profile = cProfile.Profile()
    profile.runcall(work)
    return pstats.Stats(profile).total_calls


@pytest.mark.filterwarnings("ignore")
def test_twice_the_layers_are_twice_the_work(clean):
    found = {layers: matching.measured("llama", layers, calls) for layers in (2, 4, 8)}
    for two, four, eight in zip(*found.values(), strict=True):
        for name in ("nodes", *matching.PASSES):
            first, second = four[name] - two[name], eight[name] - four[name]
            assert 1.9 * first <= second <= 2.1 * first, (two["graph"], name, two[name], four[name], eight[name])


def test_the_exponent():
    rows = [
        {"kind": "k", "graph": "step", "layers": n, "nodes": n, "normalise": 3 * n, "match": n**2, "rewrite": 1}
        for n in (2, 8, 80)
    ]
    (found,) = matching.exponents(rows)
    assert found["between"] == [8, 80]
    assert [found[name] for name in ("nodes", *matching.PASSES)] == pytest.approx([1, 1, 2, 0])
