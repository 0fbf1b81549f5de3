"""``calibrate``: run a model once over some text and gather what its codecs need to know, from the matched graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from .builder import Builder
from .calibration import Calibration, SiteStatistics, fingerprint
from .errors import BadCalibration, QualityWarning
from .options import Options
from .passes.check import check_canonical
from .passes.normalise import normalise
from .passes.sites import Site, match

SELF_ROWS, SELF_TOKENS = 8, 256
"""How much text ``batches="self"`` lets the model write: rows, and tokens per row."""


class Gatherer:
    """A backend for torch.compile that runs graphs as they are and notes y at every site on the way."""

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self.sites: dict[tuple[str, tuple[float, ...]], _Sums] = {}
        self.real: torch.Tensor | None = None
        self.misses: list[str] = []
        self.failed: list[BaseException] = []

    def __call__(self, gm: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            canonical = normalise(gm, examples)
            check_canonical(canonical)
            matched = match(canonical)
        except Exception as error:  # raised again by ``calibrate``, as its own class instead of torch's wrapper
            self.failed.append(error)
            return gm.forward
        self.misses += [str(m) for m in matched.misses]
        if not matched.sites:
            return gm.forward
        builder = Builder(canonical, matched, Options())
        walker = _Walker(canonical, matched.sites, builder, self)
        return walker.call


class _Walker(Interpreter):
    """Runs one canonical graph; ``watched`` y nodes are looked at as they come up, so memory does not grow."""

    def __init__(self, gm: GraphModule, sites: Sequence[Site], builder: Builder, owner: Gatherer) -> None:
        super().__init__(gm)
        self.owner, self.builder, self.sites = owner, builder, sites
        self.watched: dict[Node, list[Site]] = {}
        for site in sites:
            self.watched.setdefault(site.rows.y, []).append(site)
        self.slots: dict[Site, _Sums] = {}

    def call(self, *arguments: Any) -> Any:
        for site in self.sites:  # by weights, so that graphs for other lengths add to the same sums
            weight = self.builder.effective(site, arguments)[0]
            mark = fingerprint(weight)
            key = (site.kind, tuple(mark.tolist()))
            if key not in self.owner.sites:
                layer = sum(1 for kind, _ in self.owner.sites if kind == site.kind)
                self.owner.sites[key] = _Sums(layer, site.kind, mark, weight.shape[0])
            self.slots[site] = self.owner.sites[key]
        return self.run(*arguments)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for site in self.watched.get(n, ()):
            if self.owner.gradients:
                probe = torch.zeros_like(value, requires_grad=True)
                value = value + probe
                probe.register_hook(lambda g, s=site: self._gradient(s, g))
            self.slots[site].add(_tokens(value.detach(), site), self.owner.real, site.name)
        return value

    def _gradient(self, site: Site, gradient: torch.Tensor) -> None:
        self.slots[site].add_gradient(_tokens(gradient, site), self.owner.real)


def _tokens(value: torch.Tensor, site: Site) -> torch.Tensor:
    """y in its own layout -> [B, T, n]."""
    axes = site.rows.y_axes
    assert axes.token is not None
    if axes.batch is None or axes.batch == axes.token:
        return value.movedim(axes.token, 0).flatten(1)[None]
    return value.movedim((axes.batch, axes.token), (0, 1)).flatten(2)


class _Sums:
    """Running sums of one site, in fp64 on the CPU."""

    def __init__(self, layer: int, kind: str, mark: torch.Tensor, width: int) -> None:
        self.layer, self.kind, self.mark = layer, kind, mark
        self.tokens = self.sinks = self.gradients = 0
        self.total, self.sink_total = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        self.sink_square = 0.0
        self.outer = torch.zeros(width, width, dtype=torch.float64)
        self.gradient: torch.Tensor | None = None

    def add(self, y: torch.Tensor, real: torch.Tensor | None, name: str) -> None:
        """``y`` [B, T, n]; ``real`` [B, T] bool, None where all tokens are. Each row's first real token is a sink."""
        if not bool(torch.isfinite(y).all()):
            raise BadCalibration(name, "its activations are not finite on this text")
        first, rest = _parted(y, real)
        self.sinks += len(first)
        self.sink_total += first.sum(0)
        self.sink_square += float(first.square().sum())
        self.tokens += len(rest)
        self.total += rest.sum(0)
        self.outer += rest.T @ rest

    def add_gradient(self, gradient: torch.Tensor, real: torch.Tensor | None) -> None:
        _, rest = _parted(gradient, real)
        outer = rest.T @ rest
        self.gradients += len(rest)
        self.gradient = outer if self.gradient is None else self.gradient + outer

    def statistics(self) -> SiteStatistics:
        return SiteStatistics(
            layer=self.layer,
            kind=self.kind,
            mark=self.mark,
            tokens=self.tokens,
            total=self.total,
            outer=self.outer,
            sinks=self.sinks,
            sink_total=self.sink_total,
            sink_square=self.sink_square,
            gradients=self.gradients,
            gradient=self.gradient,
        )


def _parted(values: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, n] -> each row's first real token, and all other real tokens, [*, n] fp64 on the CPU."""
    values = values.to("cpu", torch.float64)
    if real is None or real.shape != values.shape[:2]:
        return values[:, 0], values[:, 1:].flatten(0, 1)
    first = real & (real.cumsum(1) == 1)
    return values[first], values[real & ~first]


def calibrate(
    model: Any, batches: Iterable[Any] | str, *, gradients: bool = False, progress: bool = True
) -> Calibration:
    """Statistics of every cached projection of ``model`` over ``batches``.

    ``batches``: token tensors [T] or [B, T]; or mappings of the model's own inputs (with a 2-d ``attention_mask``,
    padding does not count); or ``"self"``: text that the model writes from its BOS token. Each row is a text from its
    start. ``gradients`` also gathers the second moment of the loss gradient, with labels sampled from the model:
    better, and as dear as training on the text. Raises BadCalibration for no text, no sites, or activations that are
    not finite.
    """
    from .report import _uncompiled

    gatherer = Gatherer(gradients)
    torch._dynamo.reset()
    compiled = torch.compile(_uncompiled(model), backend=gatherer)
    items = _self_written(model) if isinstance(batches, str) and batches == "self" else batches
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise BadCalibration(repr(batches), "it is neither an iterable of inputs nor 'self'")
    seen = 0
    with _shown(progress) as advance, torch.set_grad_enabled(gradients):
        for batch in items:
            inputs = _inputs(batch, model)
            mask = inputs.get("attention_mask")
            gatherer.real = mask.bool().cpu() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            out = compiled(**inputs)
            if gatherer.failed:
                raise gatherer.failed[0]
            if gradients:
                _backward(out, gatherer.real)
            seen += 1
            advance(seen)
    torch._dynamo.reset()
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


def _inputs(batch: Any, model: Any) -> dict[str, Any]:
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
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        text = model.generate(start, do_sample=True, max_new_tokens=SELF_TOKENS, min_new_tokens=SELF_TOKENS)
    yield from text.split(1)


@contextlib.contextmanager
def _shown(progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda done: None
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("calibrating"), TextColumn("{task.completed} batches"), TimeElapsedColumn()) as bar:
        task = bar.add_task("calibrate", total=None)
        yield lambda done: bar.update(task, completed=done)
