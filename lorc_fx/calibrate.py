"""``calibrate``: run a model once over some text and gather what its codecs need to know, from the matched graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from .builder import Builder
from .calibration import Calibration, fingerprint
from .errors import BadCalibration, QualityWarning
from .gather import Sums, Walker
from .options import Options
from .parts import in_parts
from .passes.check import check_canonical
from .passes.normalise import normalise
from .passes.sites import Site, match

SELF_ROWS, SELF_TOKENS = 8, 256
"""How much text ``batches="self"`` lets the model write: rows, and tokens per row."""


class Gatherer:
    """A backend for torch.compile that runs graphs as they are and notes y at every site on the way."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.sites: dict[tuple[str, tuple[float, ...]], Sums] = {}
        self.real: torch.Tensor | None = None
        self.failed: list[BaseException] = []

    def __call__(self, gm: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            opened, take = in_parts(gm, examples)
            canonical = normalise(opened, take(examples))
            check_canonical(canonical)
            matched = match(canonical)
        except Exception as error:  # raised again by ``calibrate``, as its own class instead of torch's wrapper
            self.failed.append(error)
            return gm.forward
        if not matched.sites:
            return gm.forward
        builder = Builder(canonical, matched, Options())
        walker: list[Walker] = []

        def run(*given: Any) -> Any:
            arguments = take(given)
            with torch.device("cpu"):  # whatever the user's default is: sums are on the CPU
                if not walker:
                    sums = {s: self._sums(builder, s, arguments) for s in matched.sites}
                    walker.append(Walker(canonical, sums, self.gradients))
                return walker[0].walk(arguments, self.real)

        return run

    def _sums(self, builder: Builder, site: Site, arguments: Sequence[Any]) -> Sums:
        """By weights, so that graphs for other lengths add to the same sums."""
        weight = builder.effective(site, arguments)[0]
        mark = fingerprint(weight)
        key = (site.kind, tuple(mark.tolist()))
        if key not in self.sites:
            layer = sum(1 for kind, _ in self.sites if kind == site.kind)
            self.sites[key] = Sums(layer, site.kind, mark, weight.shape[0], site.head)
        return self.sites[key]


def calibrate(
    model: Any, batches: Iterable[Any] | str, *, gradients: bool = False, progress: bool = True
) -> Calibration:
    """Statistics of every cached projection of ``model`` over ``batches``.

    ``batches``: token tensors [T] or [B, T]; or mappings of the model's own inputs (with a 2-d ``attention_mask``,
    padding does not count); or ``"self"``: text that the model writes from its BOS token. Each row is a text from its
    start. ``gradients`` also gathers the second moment of the loss gradient, with labels sampled from the model:
    better, and as dear as training on the text (``grad`` of parameters stays as it is). Raises BadCalibration for no
    text, no sites, or activations that are not finite.
    """
    from .report import check_loaded, uncompiled

    check_loaded(model)
    gatherer = Gatherer(gradients)
    torch.compiler.reset()
    compiled = torch.compile(uncompiled(model), backend=gatherer)
    items = _self_written(model) if isinstance(batches, str) and batches == "self" else batches
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise BadCalibration(repr(batches), "it is neither an iterable of inputs nor 'self'")
    seen = 0
    with _shown(progress) as advance, torch.set_grad_enabled(gradients), _frozen(model):
        for batch in items:
            inputs = inputs_of(batch, model)
            mask = inputs.get("attention_mask")
            gatherer.real = mask.bool().cpu() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            out = compiled(**inputs)
            if gatherer.failed:
                raise gatherer.failed[0]
            if gradients:
                _backward(out, gatherer.real)
            seen += 1
            advance(seen)
    torch.compiler.reset()
    if not seen:
        raise BadCalibration("no batches", "there is no text in them")
    if not gatherer.sites:
        raise BadCalibration("this model", "it has no cached projection that is understood: see lorc_fx.explain")
    found = Calibration(tuple(s.statistics() for s in gatherer.sites.values()))
    short = min(found.sites, key=lambda s: s.tokens / len(s.total))
    if not short.tokens:
        raise BadCalibration("this text", "its rows have no token after the first")
    if short.tokens < len(short.total):
        text = f"{short.tokens} tokens for {len(short.total)} columns: the weight's own spectrum fills in"
        warnings.warn(f"{text}, more calibration text is better", QualityWarning, stacklevel=2)
    return found


def inputs_of(batch: Any, model: Any) -> dict[str, Any]:
    """Keyword arguments of one call. Raises BadCalibration for token ids that the model does not have."""
    if isinstance(batch, torch.Tensor):
        ids = batch.reshape(1, -1) if batch.dim() == 1 else batch
        if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise BadCalibration(f"a tensor of shape {tuple(batch.shape)}", "token ids are ints of shape [T] or [B, T]")
        batch = {"input_ids": ids}
    if not isinstance(batch, Mapping):
        raise BadCalibration(f"a {type(batch).__name__}", "a batch is a tensor of token ids or a mapping of inputs")
    inputs = dict(batch)
    given = inputs.get("input_ids")
    config = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if isinstance(given, torch.Tensor) and vocabulary and given.numel():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= vocabulary:
            raise BadCalibration(f"token id {low if low < 0 else high}", f"the model has 0..{vocabulary - 1}")
    if config is not None:
        inputs.setdefault("use_cache", True)
    device = getattr(model, "device", None)
    return {k: v.to(device) if isinstance(v, torch.Tensor) and device is not None else v for k, v in inputs.items()}


def _backward(out: Any, real: torch.Tensor | None) -> None:
    """Gradients of the loss of labels sampled from the model itself (their second moment is the Fisher metric)."""
    logits = out.logits if hasattr(out, "logits") else out[0]
    flat = logits.float().flatten(0, -2)
    with torch.no_grad():
        labels = torch.distributions.Categorical(logits=flat).sample()
    losses = torch.nn.functional.cross_entropy(flat, labels, reduction="none")
    if real is not None:
        losses = losses * real.flatten().to(losses)
    losses.sum().backward()


def _self_written(model: Any) -> Iterator[torch.Tensor]:
    """Text of the model's own, sampled from its BOS token. Raises BadCalibration for a model that cannot generate."""
    bos = getattr(getattr(model, "generation_config", None), "bos_token_id", None)
    if bos is None or not hasattr(model, "generate"):
        raise BadCalibration("'self'", "this model has no generate() or no BOS token to begin with")
    start = torch.full((SELF_ROWS, 1), bos if isinstance(bos, int) else bos[0], device=model.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(0)
        asked = {"do_sample": True, "max_new_tokens": SELF_TOKENS, "min_new_tokens": SELF_TOKENS}
        with torch.compiler.set_stance("force_eager"):  # a compressed model would write what it is then measured on
            text = model.generate(start, attention_mask=torch.ones_like(start), **asked)
    yield from text.split(1)


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """In this block no parameter gets a gradient: those that are summed up come in at the sites."""
    learned = [p for p in model.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda done: None
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("calibrating"), TextColumn("{task.completed} batches"), TimeElapsedColumn()) as bar:
        task = bar.add_task("calibrate", total=None)
        yield lambda done: bar.update(task, completed=done)
