"""Python numbers that change between calls (of two models of one class, say): each value has codecs of its own."""

import warnings

import pytest
import torch
from families import FAMILIES

import lorc_fx
from helpers import assert_close, compiled, generate, latents, new_cache, options, prompt
from lorc_fx.errors import LorcWarning

pytestmark = pytest.mark.usefixtures("clean")
IDS, MASK = prompt(pad=2)


def with_epsilon(epsilon, name="qwen3"):
    """A model whose key norm (which lies between projection and cache) has another epsilon than those of the class."""
    model = FAMILIES[name].build()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = epsilon
    return model


def right(model, plain):
    got, want = generate(model, IDS, MASK), generate(plain, IDS, MASK)
    assert_close("logits", got.logits, want.logits)
    return got.cache


def test_models_of_one_class_in_turn(many_shapes):
    """From the second on Dynamo has the number as an input."""
    models = [with_epsilon(e) for e in (1e-6, 1e-2, 1.0)]
    plain = [with_epsilon(e) for e in (1e-6, 1e-2, 1.0)]
    for model in models:
        model.compile(backend="lorc", options=options(ratio=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorcWarning)
        for _ in range(2):
            for model, other in zip(models, plain, strict=True):
                latents(right(model, other))
        report = lorc_fx.explain(models[2], IDS)
    assert len(report.sites) == 2 * len(models[2].model.layers) and not report.misses


def test_a_live_cache_when_the_number_changes(many_shapes):
    """What was cached under the old epsilon stays what it was."""
    model, plain = compiled(with_epsilon(1e-2), ratio=1.0), with_epsilon(1e-2)
    right(model, plain)
    caches = [new_cache(model), new_cache(plain)]
    for epsilon, tokens in ((1.0, IDS[:, 2:8]), (1.0, IDS[:, :1]), (0.1, IDS[:, 1:2]), (0.1, IDS[:, 2:3])):
        found = []
        for each, cache in zip((model, plain), caches, strict=True):
            for module in each.modules():
                if hasattr(module, "variance_epsilon"):
                    module.variance_epsilon = epsilon
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", LorcWarning)
                found.append(each(tokens, past_key_values=cache, use_cache=True).logits)
        assert_close(f"epsilon {epsilon}", *found)


def test_a_number_that_goes_on_changing_is_dense_and_said():
    with torch._dynamo.config.patch(recompile_limit=3):
        model, plain = compiled(with_epsilon(1e-6), ratio=1.0), with_epsilon(1e-6)

        def step(epsilon):
            found = []
            for each in (model, plain):
                for module in each.modules():
                    if hasattr(module, "variance_epsilon"):
                        module.variance_epsilon = epsilon
                with torch.no_grad():
                    found.append(each(IDS, use_cache=True))
            assert_close(f"epsilon {epsilon}", found[0].logits, found[1].logits)
            return found[0].past_key_values

        for epsilon in (1e-6, 1e-5, 1e-4, 1e-3):
            latents(step(epsilon))
        with pytest.warns(LorcWarning, match="have had 3 values"):
            cache = step(1e-2)
        assert not any(isinstance(layer.keys, lorc_fx.LatentKV) for layer in cache.layers)
        latents(step(1e-4))
