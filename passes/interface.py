"""How a rewritten graph is called: a recipe for each input and each output, and what arguments have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from torch.fx import GraphModule

from lorc_fx.kernels.attend import Attend


@dataclass(frozen=True)
class Input:
    """One input of the rewritten graph and where the wrapper takes it from at each call.

    kind        index            name
    argument    argument i       -
    dense       LatentKV arg i   - (decoded: it ends in dense tokens)
    uncompress  LatentKV arg i   - (made dense in place: the graph writes to it in a way that is not understood)
    codes       LatentKV arg i   "codes" or "positions": the rows that it shows
    window      LatentKV arg i   "codes" or "positions": those rows and room for ``extra`` more at the end
    latent      LatentKV arg i   a field of its codec
    site        site i           a field of its codec

    Positions are taken from one LatentKV for all arguments in ``together`` (itself first), which share a track.
    """

    kind: str
    index: int
    name: str = ""
    extra: sympy.Expr | None = None
    together: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sharing:
    """What arguments and codecs share by identity; a graph built for one pattern only fits calls of that pattern.

    tracks: LatentKV argument -> the first one in step with it (``latent.in_step``).
    consts: (site, its const) -> the first (site, const) that is the same tensor.
    """

    tracks: tuple[tuple[int, int], ...] = ()
    consts: tuple[tuple[tuple[int, str], tuple[int, str]], ...] = ()


@dataclass(frozen=True)
class Output:
    """One output of the original graph and what the wrapper makes it from.

    plain       result ``index``
    born        a new LatentKV over results ``index`` (codes) and ``positions``; codec of ``owner``
    window      a LatentKV over rows [start, start + length) of the window of argument ``index``
    same        argument ``index`` itself
    none        a constant None
    """

    kind: str
    index: int = -1
    positions: int | None = None
    owner: tuple[str, int] | None = None
    start: sympy.Expr | None = None
    length: sympy.Expr | None = None


@dataclass
class Rewritten:
    """The graph over latents with its inputs and outputs. ``attends``: what its ops ``lorc::attend`` refer to, kept
    alive; ``lowerings``: how each site is read, by its name."""

    module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    attends: list[Attend] = field(default_factory=list)
    lowerings: dict[str, str] = field(default_factory=dict)
