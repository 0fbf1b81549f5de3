"""Adapters of peft and quantised weights of torchao: what is coded is the weight that the model computes with now."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from adapted import FAMILY, IDS, MASK, UNIFORM, check
from oracle import oracle, ranks_of
from torch import nn

from hand_written import check as check_hand_written
from hand_written import decoder
from helpers import assert_close, compiled, generate, latents
from lorc_fx.errors import EagerWarning, NoSitesWarning
from lorc_fx.latent import LatentKV

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.filterwarnings("ignore:Adapter name")]


# -- peft -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="the extra `adapted` is not installed")


@pytest.fixture
def many_adapters():
    """Dynamo compiles once for each set of adapters, and gives up after eight; a scale that changes becomes an input
    of the graph."""
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 256}
    with torch._dynamo.config.patch(limits):
        yield


def adapted(peft: Any, dora: bool = False) -> Any:
    """Two adapters, of two ranks and scales, on what projects keys and values; ``one`` is active."""
    model = FAMILY.build()
    for seed, (name, rank) in enumerate((("one", 4), ("two", 3))):
        config = peft.LoraConfig(r=rank, lora_alpha=3 * rank - 1, target_modules=["k_proj", "v_proj"], use_dora=dora)
        if seed == 0:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, weight in wrapped.named_parameters():
                if ".lora_" in path and f".{name}" in path:
                    weight.normal_(0, 0.2)
    return wrapped.eval()


def chosen(model: Any, names: Any) -> None:
    model.base_model.set_adapter(names)


def inner(model: Any) -> Any:
    """What ``generate`` calls: compile this, not the wrapper around it."""
    return model.get_base_model()


def merged(model: Any) -> Any:
    """The plain model that a set of adapters amounts to."""
    return copy.deepcopy(model).merge_and_unload().requires_grad_(False)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_an_active_adapter(peft, ratio):
    eager = adapted(peft)
    base = generate(FAMILY.build(), IDS, MASK)
    assert not torch.equal(generate(inner(eager), IDS, MASK).logits, base.logits), "the adapter has no effect"
    check(inner(adapted(peft)), inner(eager), plain=merged(eager), ratio=ratio)


def test_an_adapter_that_breaks_the_graph(peft):
    """DoRA's norm of the weight runs outside of any graph: a miss that is said, and right."""
    with pytest.warns(NoSitesWarning):
        got = generate(compiled(inner(adapted(peft, dora=True)), **UNIFORM, ratio=0.5), IDS, MASK)
    want = generate(inner(adapted(peft, dora=True)), IDS, MASK)
    assert_close("logits", got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


def test_the_wrapper_called_directly(peft):
    model, eager = adapted(peft), adapted(peft)
    compiled(model, **UNIFORM, ratio=1.0)
    with torch.no_grad():
        got, want = model(IDS, use_cache=True), eager(IDS, use_cache=True)
    assert_close("logits", got.logits, want.logits)
    assert isinstance(got.past_key_values.layers[0].keys, LatentKV)


def test_merged_and_not(peft, many_adapters):
    model, eager = adapted(peft), adapted(peft)
    check(inner(model), inner(eager), plain=merged(eager), ratio=0.5)
    want = generate(inner(eager), IDS, MASK)
    compiled(inner(model), **UNIFORM, ratio=1.0)
    for change in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        getattr(model, change)()
        got = generate(inner(model), IDS, MASK)
        latents(got.cache)
        assert_close(change, got.logits, want.logits)


def rescale(model: Any) -> None:
    """Of the active adapter: a number in Python, no tensor."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "one" in module.scaling:
            module.scaling["one"] *= 2


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_switches_after_compile(peft, many_adapters, ratio):
    model, eager = adapted(peft), adapted(peft)
    compiled(inner(model), **UNIFORM, ratio=ratio)
    seen = []

    def holds(name: str) -> None:
        plain = merged(eager) if active else FAMILY.build()
        got = generate(inner(model), IDS, MASK)
        latents(got.cache)
        plain = plain if ratio == 1 else oracle(FAMILY, plain, ranks_of(got.cache))
        want = generate(plain, IDS, MASK)
        assert_close(name, got.logits, want.logits, 2e-4)
        assert torch.equal(got.sequences, want.sequences)
        seen.append(want.logits)

    active = True
    for names in ("one", "two", ["one", "two"], "one"):
        for changed in (model, eager):
            chosen(changed, names)
        holds(str(names))
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[3])
    active = False
    with model.disable_adapter():
        holds("disabled")
    active = True
    holds("enabled again")
    for changed in (model, eager):
        rescale(changed)
    holds("rescaled")


def test_a_scale_that_changes(peft):
    """Dynamo makes it an input of the graph; each value has codecs of its own."""
    model, eager = adapted(peft), adapted(peft)
    check(inner(model), inner(eager))
    for changed in (model, eager):
        rescale(changed)
    got = generate(inner(model), IDS, MASK)
    assert_close("logits", got.logits, generate(inner(eager), IDS, MASK).logits)
    latents(got.cache)


@pytest.mark.parametrize("how", ["two", "disabled", "merged", "rescaled"])
def test_a_live_cache_across_a_switch(peft, many_adapters, how):
    """What was cached by one adapter stays what it was; the next tokens are the other's."""
    model, eager = adapted(peft), adapted(peft)
    call = compiled(inner(model), **UNIFORM, ratio=1.0)

    @torch.no_grad()
    def both(at: slice, caches: Any) -> Any:
        found = [
            m(IDS[:, at], past_key_values=c, use_cache=True) for m, c in zip((call, inner(eager)), caches, strict=True)
        ]
        assert_close(str(at), found[0].logits, found[1].logits)
        return [f.past_key_values for f in found]

    caches = both(slice(7, 8), both(slice(0, 7), (None, None)))
    latents(caches[0])
    with contextlib.ExitStack() as stack:
        for changed in (model, eager):
            if how == "two":
                chosen(changed, "two")
            elif how == "disabled":
                stack.enter_context(changed.disable_adapter())
            elif how == "merged":
                changed.merge_adapter()
            else:
                rescale(changed)
        if how == "merged":  # the effective weight is what it was, perhaps to the bit, and then the cache goes on coded
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                caches = both(slice(8, 9), caches)
            said = any("goes on uncompressed" in str(w.message) for w in caught)
            kept = [isinstance(x, LatentKV) for layer in caches[0].layers for x in (layer.keys, layer.values)]
            assert not any(kept) if said else all(kept)
        else:
            with pytest.warns(EagerWarning, match="goes on uncompressed"):
                caches = both(slice(8, 9), caches)
            assert not any(isinstance(layer.keys, LatentKV) for layer in caches[0].layers)
        latents(both(slice(0, 7), (None, None))[0])


# -- torchao ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ao():
    pytest.importorskip("torchao", reason="the extra `adapted` is not installed")
    import torchao.quantization as quantization

    return quantization


CONFIGS = {
    "int8": lambda ao: ao.Int8WeightOnlyConfig(),
    "int8 groups": lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=ao.granularity.PerGroup(32)),
    "int4 groups": lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.granularity.PerGroup(32)),
    "float8": lambda ao: ao.Float8WeightOnlyConfig(),
    "int4, activations too": lambda ao: ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=ao.granularity.PerGroup(32)
    ),
}


def quantised(ao: Any, what: str) -> Any:
    model = FAMILY.build()
    ao.quantize_(model, CONFIGS[what](ao))
    plain = nn.Parameter
    assert all(type(p.module.weight) is not plain for p in FAMILY.projections(model))
    return model


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("what", CONFIGS)
def test_a_quantised_model(ao, what, ratio):
    """Where activations are quantised too, it is before the product: y is affine in what comes out of that."""
    if what != "int4, activations too" or ratio == 1:
        check(quantised(ao, what), quantised(ao, what), tol=1e-3, ratio=ratio)
        return
    got = generate(compiled(quantised(ao, what), **UNIFORM, ratio=ratio), IDS, MASK)
    want = generate(onto_leading(quantised(ao, what), ranks_of(got.cache)), IDS, MASK, forced=got.sequences)
    assert_close("logits", got.logits, want.logits, 1e-3)


def onto_leading(model: Any, ranks: Any) -> Any:
    """``model`` with y -> y U U^T after each projection, as ``oracle`` has it: U of the dequantised weight."""
    for p in FAMILY.projections(model):
        u = torch.linalg.svd(p.module.weight.dequantize().double())[0][:, : ranks[p.layer][p.kind == "value"]]
        p.module.register_forward_hook(lambda module, args, y, u=u: (y.double() @ u @ u.T).to(y.dtype))
    return model


def test_integer_products_are_a_miss(ao):
    """The product itself is of integers, rounded per token: not affine in anything that the graph holds as floats."""
    CONFIGS["int8 products"] = lambda ao: ao.Int8DynamicActivationInt8WeightConfig()
    with pytest.warns(NoSitesWarning, match="No site found"):
        got = generate(compiled(quantised(ao, "int8 products"), **UNIFORM, ratio=0.5), IDS, MASK)
    want = generate(quantised(ao, "int8 products"), IDS, MASK)
    assert_close("logits", got.logits, want.logits, 1e-3)
    assert torch.equal(got.sequences, want.sequences)


def test_adapters_on_a_quantised_model(ao, peft):
    def made() -> Any:
        model = quantised(ao, "int8")
        config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()

    check(inner(made()), inner(made()), tol=1e-3)


def test_a_table_of_angles_beside_quantised_weights(ao):
    """What Dynamo knows of an input (that a module holds the table) is not lost where weights are taken apart."""
    model = decoder(angles="table")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = None
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, torch.nn.Linear))
    values, _, said = check_hand_written(model)
    assert all(isinstance(v, LatentKV) for v in values) and not said
