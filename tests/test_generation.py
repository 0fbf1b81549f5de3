"""Every form of ``generate`` that needs no hub: on coded caches the eager model's tokens, and coded to the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, make_low_rank

from bench.zoo import randomise
from helpers import assert_close, assert_tokens, cache_of, compiled, latents, options, prompt, some
from lorc_fx.errors import LorcWarning
from lorc_fx.latent import LatentKV

pytestmark = pytest.mark.usefixtures("many_shapes")

NEW = 6
#: keys and values of rank 1/4 where a ratio below one is asked for, so that nothing is lost
PAIRS = {"qwen3": 1.0, "qwen3-low": 0.6, "gpt2-low": 0.3, "gemma3-low": 0.6}
#: name -> rows of the prompt, what ``generate`` is asked for
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (2, {}),
    "sampling": (2, {"do_sample": True, "top_k": 0}),
    "nucleus": (2, {"do_sample": True, "top_p": 0.8, "temperature": 1.3}),
    "several samples": (2, {"do_sample": True, "num_return_sequences": 2}),
    "beams": (2, {"num_beams": 3}),
    "all beams": (2, {"num_beams": 3, "num_return_sequences": 3}),
    "sampled beams": (2, {"num_beams": 3, "do_sample": True}),
    "no repeats": (2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "guided": (2, {"guidance_scale": 1.5}),
    "prompt in pieces": (2, {"prefill_chunk_size": 4}),
    "a static cache": (2, {"cache_implementation": "static"}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "sampled lookup": (1, {"prompt_lookup_num_tokens": 3, "do_sample": True}),
}


def repetitive(seed: int = 0) -> torch.Tensor:
    """[1, 12]: four tokens three times, for prompt lookup to find."""
    return prompt(1, 4, seed=seed)[0].repeat(1, 3)


def run(model: Any, rows: int, new: int = NEW, ids: torch.Tensor | None = None, **more: Any) -> Any:
    """transformers' output, with ``logits``; the first of several rows is padded on the left."""
    given, mask = prompt(rows, 9, 3) if rows > 1 else (repetitive(), torch.ones(1, 12, dtype=torch.long))
    if ids is not None:
        given, mask = ids, torch.ones_like(ids)
    torch.manual_seed(11)
    more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}
    return model.generate(given, attention_mask=mask, max_new_tokens=new, **more)


def agree(name: str, got: Any, want: Any) -> None:
    assert_tokens(f"{name}: sequences", got.sequences, want.sequences)
    assert_close(f"{name}: logits", torch.stack(got.logits), torch.stack(want.logits), 1e-4)


def coded(run: Any) -> None:
    """Nothing of the cache became dense, nor was anything appended dense."""
    pairs = latents(cache_of(run))
    assert all(x.tail is None for pair in pairs for x in pair)


@pytest.fixture(scope="module")
def pair(request: Any) -> Iterator[tuple[Any, Any]]:
    """(eager, compiled), the same weights; one compiled model for all forms, so shapes vary in it."""
    name = request.param.removesuffix("-low")
    family = FAMILIES[name]
    eager = family.build(layers=family.fewest)
    if name != request.param:
        make_low_rank(family, eager, 0.25)
    yield eager, compiled(copy.deepcopy(eager), ratio=PAIRS[request.param], scheduler="uniform")
    torch._dynamo.reset()


#: what is quick to compile, or differs, in models other than qwen3-low; the rest is slow
QUICK = {
    "gpt2-low": ("greedy", "beams", "a static cache", "prompt lookup"),
    "gemma3-low": ("greedy", "several samples", "prompt lookup"),
    "qwen3": ("greedy", "sampled lookup"),
    "qwen3-low": tuple(FORMS),
}
CASES = [
    pytest.param(name, form, marks=() if form in QUICK[name] else pytest.mark.slow, id=f"{name}-{form}")
    for name in PAIRS
    for form in FORMS
]


@pytest.mark.parametrize(("pair", "form"), CASES, indirect=["pair"], scope="module")
def test_every_form(pair, form):
    rows, more = FORMS[form]
    eager, model = pair
    got = run(model, rows, **more)
    agree(form, got, run(eager, rows, **more))
    coded(got)


# -- a draft model -----------------------------------------------------------------------------------------------------


def drafted(family: str = "qwen3", noise: float = 0.3) -> tuple[Any, Any]:
    """A model and a draft of it, which is right now and then."""
    model = FAMILIES[family].build(layers=FAMILIES[family].fewest)
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(noise * p.std() * torch.randn(p.shape, generator=generator) if p.dim() > 1 else 0.0)
    return model, draft


class Cuts:
    """Calls of ``DynamicLayer.crop``: whether the layer was coded, and minus the tokens to cut."""

    def __init__(self, monkeypatch: Any) -> None:
        from transformers.cache_utils import DynamicLayer

        self.seen: list[tuple[bool, int]] = []
        crop = DynamicLayer.crop

        def noted(layer: Any, n: int) -> None:
            self.seen.append((isinstance(layer.keys, LatentKV), n))
            crop(layer, n)

        monkeypatch.setattr(DynamicLayer, "crop", noted)


WHO = [("both", 1.0), ("both", 0.25), ("model", 0.5), ("draft", 0.5)]
MORE = [pytest.param(w, r, marks=pytest.mark.slow) for w in ("both", "model", "draft") for r in (1.0, 0.5, 0.25)]


@pytest.mark.parametrize(("who", "ratio"), [*WHO, *(m for m in MORE if m.values not in WHO)])
def test_assisted_is_greedy(who, ratio, clean, monkeypatch):
    """At every ratio the tokens are those of the same model alone, however many of the draft's are thrown away."""
    cuts = Cuts(monkeypatch)  # after a rejected draft
    model, draft = drafted()
    if who != "draft":
        compiled(model, ratio=ratio)
    alone = run(model, 1, new=12)
    if who != "model":
        draft.compile(backend="lorc", options=options(ratio=ratio))
    got = run(model, 1, new=12, assistant_model=draft)
    assert_tokens("sequences", got.sequences, alone.sequences)
    assert_close("logits", torch.stack(got.logits), torch.stack(alone.logits), 1e-4)
    assert any(n < 0 for latent, n in cuts.seen if latent), "the draft was always right: nothing was cut"
    if who != "draft":
        coded(got)


def test_assisted_sampling(clean):
    """With a draft that is right now and then, the same tokens are drawn as eagerly."""
    model, draft = drafted()
    want = run(model, 1, new=12, do_sample=True, assistant_model=draft)
    for each in (compiled(model, ratio=1.0), draft):
        each.compile(backend="lorc", options=options(ratio=1.0))
    got = run(model, 1, new=12, do_sample=True, assistant_model=draft)
    assert_tokens("sequences", got.sequences, want.sequences)
    coded(got)


@pytest.mark.slow
def test_a_draft_over_sliding_windows(clean):
    """Layers keep what a rejected draft would have pushed out of the window."""
    model, draft = drafted("gemma3")
    want = run(model, 1, new=12)
    for each in (compiled(model, ratio=1.0), draft):
        each.compile(backend="lorc", options=options(ratio=1.0))
    got = run(model, 1, new=12, assistant_model=draft)
    agree("assisted", got, want)
    coded(got)


def test_forms_that_transformers_has_on_the_hub_only(clean):
    """They are refused before the model is called: with the error that an uncompiled model gives."""
    eager = FAMILIES["qwen3"].build(layers=1)
    model = compiled(copy.deepcopy(eager), ratio=0.5)
    for more in (
        {"dola_layers": "low"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "force_words_ids": [[5]]},
    ):
        said = []
        for each in (eager, model):
            with pytest.raises(ValueError, match="trust_remote_code") as raised:
                run(each, 2, **more)
            said.append(str(raised.value))
        assert said[0] == said[1]


# -- an encoder before it ----------------------------------------------------------------------------------------------


def encoder_decoder(name: str) -> Any:
    """Two layers each; keys and values of rank 1/4, in the decoder and of the encoder's output too."""
    shared = {"vocab_size": 101, "d_model": 64, "decoder_start_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if name == "T5":
        more: dict[str, Any] = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    else:
        more = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
        more |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        more |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96) | {"forced_eos_token_id": None}
    config = getattr(transformers, name + "Config")(**shared, **more)
    model = getattr(transformers, name + "ForConditionalGeneration")(config).eval()
    randomise(model, 0)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        for path, module in model.named_modules():
            if "decoder" in path and path.rsplit(".", 1)[-1] in ("k", "v", "k_proj", "v_proj"):
                module.weight.copy_(module.weight[:16].repeat(4, 1))
    return model


@pytest.mark.parametrize("name", some(["T5", "Bart"], ["T5"]))
def test_an_encoder_and_a_decoder(name, clean):
    """Both caches are coded: the decoder's own, and the one of the encoder's output, which is written once."""
    eager = encoder_decoder(name)
    model = compiled(copy.deepcopy(eager), ratio=0.5, scheduler="uniform")
    for form in ("greedy", "beams", "prompt lookup"):
        rows, more = FORMS[form]
        got, want = run(model, rows, **more), run(eager, rows, **more)
        agree(form, got, want)
        cache = cache_of(got)
        latents(cache.self_attention_cache)
        latents(cache.cross_attention_cache)


@pytest.mark.slow
def test_generate_batch(clean):
    """Continuous batching writes into pages of its own, which were allocated before: right, dense, and said."""
    eager = FAMILIES["qwen3"].build(layers=1)
    model = compiled(copy.deepcopy(eager), ratio=0.5)
    requests = [prompt(1, n, seed=n)[0][0].tolist() for n in (5, 8)]
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = eager.generate_batch(requests, generation_config=config)
    with pytest.warns(LorcWarning):
        got = model.generate_batch(requests, generation_config=config)
    assert [r.generated_tokens for r in got.values()] == [r.generated_tokens for r in want.values()]
    assert len(got) == 2
