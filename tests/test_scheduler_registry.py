"""The registry of schedulers, and the contract that every scheduler is held to."""

import pytest

from lorc_fx import errors
from lorc_fx.options import Options
from lorc_fx.schedulers import get_scheduler, register_scheduler, registered_schedulers, schedule
from lorc_fx.schedulers import registry as registry_module
from scheduling import NAMES, model, run, site


@pytest.mark.parametrize("name", NAMES)
def test_too_small_a_budget_says_the_least(name):
    sites = model(layers=3, width=8, fixed=4)
    with pytest.raises(errors.BudgetTooSmall, match="36 bytes") as caught:
        run(name, sites, 35)
    assert caught.value.least == 36 and run(name, sites, 36) == [1] * 6


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def test_an_own_scheduler(clean_registry):
    @register_scheduler("keys-only")
    def keys_only(sites, budget, options):
        return [s.fixed_bytes + s.column_bytes * (2 if s.kind == "key" else 1) for s in sites]

    assert run("keys-only", model(layers=2), 1000) == [2, 1, 2, 1]
    assert get_scheduler("keys-only") is keys_only and "keys-only" in registered_schedulers()
    with pytest.raises(errors.AlreadyRegistered, match="keys_only"):
        register_scheduler("keys-only")(keys_only)


@pytest.mark.parametrize("name", [*NAMES, "loss"])
def test_taken_names(name):
    with pytest.raises(errors.AlreadyRegistered, match=name):
        register_scheduler(name)(lambda sites, budget, options: [])


def test_names_and_functions_are_checked(clean_registry):
    for name in ("", "  ", 3, None):
        with pytest.raises(errors.BadOption):
            register_scheduler(name)
    with pytest.raises(errors.BadOption, match="function"):
        register_scheduler("no function")(7)
    with pytest.raises(errors.UnknownScheduler, match="Did you mean 'energy'"):
        get_scheduler("enrgy")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "NoneType"),
        ("ab", "str"),
        ([2], "1 entries for 2"),
        ([2.0, 2], "no int"),
        ([True, 2], "no int"),
        ([3, 2], "not 0"),
        ([0, 2], "0 columns"),
        ([18, 2], "9 columns"),
        ([16, 16], "32 bytes"),
    ],
    ids=str,
)
def test_what_a_scheduler_returns_is_checked(result, words):
    with pytest.raises(errors.BadSchedule, match=words):
        schedule(lambda sites, budget, options: result, model(layers=1), 31, Options())


def test_what_a_scheduler_is_given_is_checked():
    with pytest.raises(errors.BadOption, match="one window"):
        schedule("uniform", [site(0), site(1, window=16)], 100, Options())
    for budget in (10.0, True, "10"):
        with pytest.raises(errors.BadOption, match="budget"):
            schedule("uniform", [site(0)], budget, Options())
    assert schedule("uniform", [], 100, Options()) == []
