"""Looking at y while a canonical graph runs: the sums that codecs are made from, and which tokens are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from .calibration import SINK_NEAR, SiteStatistics, groups_of, second_moment
from .errors import BadCalibration
from .passes.axes import Axes, arg
from .passes.readers import Reader
from .passes.sites import Site

aten = torch.ops.aten

PROBES = 8
"""Queries that are drawn for each key token."""

NEAR = 12
"""Nodes after the scores among which their mask is looked for."""

SAMPLE = 128
"""Tokens of the latest text that are kept as they are, to measure codecs on."""


class Walker(Interpreter):
    """Runs a canonical graph as it is and hands y of each site to ``sums[site]`` on the way, a layer at a time. Raises
    BadCalibration at the end of a run in which some y was not finite.

    ``real`` [B, T] bool says which tokens count; where it is None, attention does: a token is real if its reader's mask
    lets it attend to itself. With ``gradients`` the gradient of whatever is back-propagated later is summed too; else,
    with ``scores``, that of the scores which later queries give to keys: from y to the product, and no further.
    """

    def __init__(
        self, gm: GraphModule, sums: Mapping[Site, Sums], gradients: bool = False, scores: bool = True
    ) -> None:
        super().__init__(gm)
        self.sums, self.gradients, self.scores = sums, gradients, scores and not gradients
        self.real: torch.Tensor | None = None
        self.watched: dict[Node, list[Site]] = {}
        self.masks: dict[Node, Node | None] = {}
        self.waiting: dict[Site, torch.Tensor] = {}
        self.leaves: dict[Site, torch.Tensor] = {}
        self.readers: dict[Node, list[tuple[Site, Node | None]]] = {}
        self.draw = torch.Generator().manual_seed(0)
        for site in sums:
            self.watched.setdefault(site.rows.y, []).append(site)
            if site.reader is not None and site.kind == "key":
                node, mask = mask_of(site.reader)
                self.masks[node] = mask
                self.readers.setdefault(site.reader.node, []).append((site, mask))

    def walk(self, arguments: Sequence[Any], real: torch.Tensor | None = None) -> Any:
        self.real = real
        out = self.run(*arguments)
        self._flush(None)
        self.leaves.clear()
        for site, sums in self.sums.items():  # not before: other processes wait in the collectives that come after
            if not sums.finite:
                raise BadCalibration(site.name, "its activations are not finite on this text")
        return out

    def run_node(self, n: Node) -> Any:
        if self.leaves and n in self.readers:
            self._ask(n)
        if n in self.masks:
            mask = self.masks[n]
            self._flush(None if mask is None else self.env.get(mask))
        with torch.set_grad_enabled(torch.is_grad_enabled() or bool(self.leaves)):
            value = super().run_node(n)
        for site in self.watched.get(n, ()):
            y = _tokens(value.detach(), site)
            if self.gradients:
                probe = torch.zeros_like(value, requires_grad=True)
                value = value + probe
                _, ordinary = parted(y, self.real)
                probe.register_hook(lambda g, s=site, o=ordinary: self.sums[s].add_gradient(_tokens(g, s), o))
            elif self.scores and site.kind == "key" and site.reader is not None:
                self.leaves[site] = value.detach().requires_grad_()
                with torch.enable_grad():
                    value = self.leaves[site].clone()  # what follows may write into it
            self.waiting[site] = y
        return value

    def _ask(self, reader: Node) -> None:
        """The product of queries and keys comes now: sum up what the scores say of y, and end the gradient here."""
        first = int(reader.target is aten.baddbmm.default)
        query, key = (self.env[a] for a in reader.args[first : first + 2] if isinstance(a, Node))
        keys = key if reader.target is aten.scaled_dot_product_attention.default else key.mT
        for site, mask in self.readers[reader]:
            leaf = self.leaves.pop(site, None)
            if leaf is None or site not in self.waiting or not key.requires_grad:
                continue
            y = self.waiting[site]
            _, ordinary = parted(y, self._real(y, None if mask is None else self.env.get(mask)))
            for _ in range(PROBES):
                drawn = drawn_queries(query.detach(), keys, site.window, self.draw)
                if drawn is None:
                    break
                (gradient,) = torch.autograd.grad(keys, leaf, drawn, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    self.sums[site].add_gradient(_tokens(gradient, site), ordinary, local=True)
        for source in reader.all_input_nodes:
            if isinstance(self.env[source], torch.Tensor):
                self.env[source] = self.env[source].detach()

    def _flush(self, mask: Any) -> None:
        """Sum up the sites whose y is there: those of the layer whose attention comes now."""
        for site, y in self.waiting.items():
            self.sums[site].add(y, self._real(y, mask))
        self.waiting.clear()

    def _real(self, y: torch.Tensor, mask: Any) -> torch.Tensor | None:
        if self.real is None and isinstance(mask, torch.Tensor):
            return _attends_itself(mask, y)
        return self.real


def drawn_queries(
    query: torch.Tensor, keys: torch.Tensor, window: int | None, draw: torch.Generator
) -> torch.Tensor | None:
    """For each key [.., T, D] the query [.., S, D] of a random token that may read it (itself or later, in the window),
    with a random sign, so that heads which share a key do not mix. None where their tokens are not the same ones."""
    asked, there = query.shape[-2], keys.shape[-2]
    if query.dim() != keys.dim() or there < asked or query.shape[-1] != keys.shape[-1]:
        return None
    if query.shape[:-2] != keys.shape[:-2]:  # grouped queries: one of the heads that share the key
        heads, shared = query.shape[-3], keys.shape[-3]
        if heads % shared or query.shape[:-3] != keys.shape[:-3]:
            return None
        query = query.unflatten(-3, (shared, heads // shared))
        query = query.select(-3, int(torch.randint(heads // shared, (1,), generator=draw)))
    at = torch.arange(asked)
    room = (asked - at).clamp_max(window or asked)
    at = at + (torch.rand(asked, generator=draw) * room).long()
    sign = torch.randint(2, (*query.shape[:-2], asked, 1), generator=draw) * 2 - 1
    drawn = query[..., at.to(query.device), :] * sign.to(query)
    return torch.nn.functional.pad(drawn, (0, 0, 0, there - asked)).to(keys.dtype)


def mask_of(reader: Reader) -> tuple[Node, Node | None]:
    """The node where attention applies its mask to the scores of these keys, and the mask (None: it has none)."""
    if reader.node.target is aten.scaled_dot_product_attention.default:
        mask = arg(reader.node, 3, "attn_mask")
        return reader.node, mask if isinstance(mask, Node) else None
    queue, limit = [reader.node], NEAR
    while queue and limit:
        limit -= 1
        node = queue.pop(0)
        for user in node.users:
            if user.target is aten.add.Tensor and isinstance(user.args[1], Node):
                other = user.args[1] if user.args[0] is node else user.args[0]
                value = other.meta.get("val") if isinstance(other, Node) else None
                full = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
                if isinstance(other, Node) and full:
                    return user, other
            queue.append(user)
    return reader.node, None


def _attends_itself(mask: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """[B, T] bool from a mask [B or 1, heads or 1, S, T..] of a fresh cache (token i is in row and column i)."""
    batch, tokens = y.shape[:2]
    if mask.dim() != 4 or mask.shape[2] != tokens or mask.shape[3] < tokens:
        return None
    diagonal = mask[:, 0].diagonal(dim1=1, dim2=2)
    real = diagonal if mask.dtype == torch.bool else diagonal > -1e4
    return real.expand(batch, tokens).cpu()


def _tokens(value: torch.Tensor, site: Site) -> torch.Tensor:
    """y in its own layout -> [B, T, n]."""
    features, flat = site.rows.features, by_token(value, site.rows.y_axes)
    return flat if features is None else flat[..., list(features)]


def by_token(value: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A value with its batch rows and tokens in front: [B, T, features]; where it has one axis for both, [1, T, ..]."""
    assert axes.token is not None
    if axes.batch is None or axes.batch == axes.token:
        return value.movedim(axes.token, 0).flatten(1)[None]
    return value.movedim((axes.batch, axes.token), (0, 1)).flatten(2)


class Sums:
    """Running sums of one site, in fp64 on the CPU; and ``sample`` [<= SAMPLE, n], ordinary tokens of the last text."""

    def __init__(self, layer: int, kind: str, mark: torch.Tensor, width: int, head: int = 1) -> None:
        self.layer, self.kind, self.mark = layer, kind, mark
        self.groups = groups_of(width, head)
        self.seen = self.tokens = self.sinks = self.gradients = 0
        self.total, self.sink_total = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        self.sink_square = 0.0
        self.outer = second_moment(torch.zeros(0, width, dtype=torch.float64), self.groups)
        self.gradient: torch.Tensor | None = None
        self.local, self.finite = False, True
        self.sample = torch.zeros(0, width, dtype=torch.float64)

    def add(self, y: torch.Tensor, real: torch.Tensor | None) -> None:
        """``y`` [B, T, n]; ``real`` [B, T] bool, None where all tokens are. Values that are not finite add nothing, and
        ``finite`` then says so."""
        if not bool(torch.isfinite(y).all()):
            self.finite = False
            return
        y = y.to("cpu", torch.float64)
        first, ordinary = parted(y, real)
        sinks, rest = y[first], y[ordinary]
        self.seen += y.shape[0] * y.shape[1] if real is None else int(real.sum())
        self.sinks += len(sinks)
        self.sink_total += sinks.sum(0)
        self.sink_square += float(sinks.square().sum())
        self.tokens += len(rest)
        self.total += rest.sum(0)
        self.outer += second_moment(rest, self.groups)
        self.sample = rest[torch.linspace(0, len(rest) - 1, min(SAMPLE, len(rest))).long()].clone()

    def add_gradient(self, gradient: torch.Tensor, ordinary: torch.Tensor, local: bool = False) -> None:
        """``gradient`` [B, T, n] at y, of whose tokens those of ``ordinary`` [B, T] bool count; ``local``: that of
        attention scores, not of the loss. Tokens whose gradient is not finite (the norm of a vector of zeros) do not
        count."""
        rest = gradient.to("cpu", torch.float64)[ordinary]
        rest = rest[torch.isfinite(rest).all(-1)]
        if not len(rest):
            return
        self.local = local
        outer = second_moment(rest, self.groups)
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
            local=self.local,
        )


def parted(y: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, T, n] -> bool [B, T] on the CPU: each row's first real token, and its ordinary ones.

    A row's first token is a sink. Tokens that lie on it are sinks too: models make a new one where the first falls out
    of a window. They are few and nearly equal, and hold almost all of the keys' gradient (Gemma 3 270M: ten of 8192
    tokens 86 % of it), so with them the statistics would be of nothing else.
    """
    y = y.to("cpu", torch.float64)
    if real is None or real.shape != y.shape[:2]:
        real = torch.ones(y.shape[:2], dtype=torch.bool)
    real = real.cpu()
    first = real & (real.cumsum(1) == 1)
    weight = real.double().unsqueeze(-1)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    sink = (y * first.unsqueeze(-1)).sum(1, keepdim=True)
    mean = (y * weight).sum(1, keepdim=True) / count
    spread = ((y - mean).square() * weight).sum((1, 2)) / count.flatten()
    near = (y - sink).square().sum(-1) < SINK_NEAR * spread[:, None]
    return first, real & ~first & ~near
