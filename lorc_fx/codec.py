"""The codec of one site: how a per-token vector y becomes a latent and is read back.

    j = the nearest mean's index       c = (y - mu_j) P        stored: j, Q(c)        y_hat = mu_j + Q(c) S

``y = W x + b`` has width n; ``P^T W`` replaces W in the graph, so y is never formed (but where P^T and W are less to
read): which mean is nearest follows from one more projection row per further mean, since
|y - mu_j|^2 = const - 2 (y - mu_0)(mu_j - mu_0) + |mu_j - mu_0|^2.
Q is the row format of ``packing``: segments of columns in the model's dtype or at 8 to 1 bits.

LoRC (arXiv 2410.03111) is one point of this: P = U_r, S = U_r^T with U_r the r leading left singular vectors of W,
all columns in the model's dtype, and one mean, the bias b: it is the same for every token and known without data, so
keeping it exact costs nothing and makes the latent a projection of W x alone. At full rank (r = n) every orthonormal
basis is lossless, so the identity is taken: no decode, no rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from .decoder import Decoder
from .factors import Factors, stripes
from .groups import compact, expanded, in_rows, own_bases
from .packing import MODEL, Format, Segment, pack, unpack
from .plan_file import checksum


@dataclass(frozen=True)
class Basis:
    """In which columns one site is coded: analysis P [n, k] and synthesis S [k, n] fp64, by falling ``energy`` [k]
    (what a column is expected to hold), around ``means`` [m, n] fp64. ``P = S^T`` where the basis is orthonormal.
    ``informed``: it knows the data, so a column of little energy may be dropped. ``absolute``: energies are predicted
    losses, comparable between sites; else only their shares within a site mean something. ``groups`` (``groups.py``):
    each column is of one of so many groups of features, and energies fall within a group."""

    analysis: torch.Tensor
    synthesis: torch.Tensor
    energy: torch.Tensor
    means: torch.Tensor
    informed: bool = False
    absolute: bool = False
    groups: int = 1


def prior_basis(factors: Factors, bias: torch.Tensor | None) -> Basis:
    """LoRC's basis, from the weight alone: left singular vectors (as many as there are), and the bias as the one
    mean."""
    u = factors.left
    return around_bias(Basis(u, u.T, factors.singular**2, u[:0]), bias)


def grouped_prior(gram: torch.Tensor, bias: torch.Tensor | None, groups: int, vectors: bool = True) -> Basis:
    """The same for each of ``groups`` of rows of W apart, from W W^T [n, n]; without ``vectors`` energies alone."""
    u, energy = own_bases(gram, groups, vectors)
    return around_bias(Basis(u, u.T, energy, u[:0], groups=groups), bias)


def around_bias(basis: Basis, bias: torch.Tensor | None) -> Basis:
    """``basis`` with the bias as its one mean: y - b is W x alone, so all columns of the weight's rank are lossless."""
    zero = basis.analysis.new_zeros(basis.analysis.shape[0])
    return replace(basis, means=(zero if bias is None else bias.detach().double())[None])


def version_of(weight: torch.Tensor) -> int:
    """The in-place version (inference tensors have none and count as 0)."""
    return 0 if weight.is_inference() else weight._version


@dataclass(frozen=True, eq=False)
class Codec:
    """One site's codec. Compared by identity: a latent is only ever read by the codec that wrote it, or (a cache that
    was saved) by one that ``equals`` it.

    r columns are stored, and there are m means; k = r + m - 1. Tensors are in the model's dtype; those that encode are
    in fp32 where rows are packed: activations have channels a hundred times larger than others, so P^T W rounded to 16
    bits (unlike W, which the model has in 16 bits anyway) would cost more than the quantiser.
    encode [k, d]: P^T W, then a row per further mean that says how near the token is to it.   shift [k] or None.
    from_y: encode takes y as the model computes it, and not x: P^T (of a codec in groups [r / groups, n], as S is),
    then those rows, [.., n] in fp32. ``folded`` is what x is multiplied with either way.
    offsets [m, r] or None (m = 1): what mean j takes off the columns.
    spread [r] or None (plain rows): the units in which the columns above are, about their standard deviations; 1 for a
    column in the model's dtype. Encode and decode have them folded in; the quantiser weighs errors by them.
    decode [k, n]: S, then mu_j - mu_0 for each further mean; None for the identity (r = n, m = 1). Of a codec in groups
    S is [r / groups, n], each feature's own columns alone; ``matrix`` has the zeros.
    mean [n]: mu_0, or None where it is zero.   consts: the tensors that the decoder's epilogue reads.
    origin: of an ``unprojected`` codec (``identity_codec``), which weight its site has, in hex; else "".
    groups: of features, each read from its own part of every segment alone (``groups.py``); 1: all from all.
    """

    decoder: Decoder
    format: Format
    encode: torch.Tensor
    shift: torch.Tensor | None
    offsets: torch.Tensor | None
    spread: torch.Tensor | None
    decode: torch.Tensor | None
    mean: torch.Tensor | None
    consts: tuple[torch.Tensor, ...]
    origin: str = ""
    groups: int = 1
    from_y: bool = False
    version: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", version_of(self.encode))

    @property
    def itself(self) -> Codec:
        """This codec, also to who has a weak proxy of it."""
        return self

    @property
    def unprojected(self) -> bool:
        """Whether rows hold what the dense cache would, at whatever precision: nothing is projected or decoded."""
        return bool(self.origin)

    @property
    def outdated(self) -> bool:
        """Whether ``encode``, which at full rank is the model's own weight, was written since."""
        return version_of(self.encode) != self.version

    @property
    def matrix(self) -> torch.Tensor | None:
        """``decode`` as [k, n], what latents are multiplied with; one of a codec in groups is made anew."""
        return None if self.decode is None else expanded(self.decode, self.format.segments, self.groups)

    def folded(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[k, d] and [k], fp64: a token's codes are the first times x, plus the second. ``weight`` [n, d] and ``bias``
        [n] are those of the site."""
        encode = self.encode.double()
        shift = encode.new_zeros(self.latent_width) if self.shift is None else self.shift.double()
        if not self.from_y:
            return encode, shift
        encode = expanded(encode, self.format.segments, self.groups)
        return encode @ weight.double(), shift if bias is None else shift + encode @ bias.double()

    @property
    def rank(self) -> int:
        """Stored columns, at whatever precision."""
        return self.format.columns

    @property
    def latent_width(self) -> int:
        """k: what ``latents`` gives per row."""
        return self.format.columns + self.format.choices - 1

    @property
    def width(self) -> int:
        return self.decoder.width

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """What a compiled graph depends on: two codecs of equal signature can be swapped as plain inputs."""
        has = tuple(t is None for t in (self.shift, self.offsets, self.spread, self.decode, self.mean))
        parts: tuple[Any, ...] = (self.groups,) if self.groups > 1 else ()  # else as before there were any
        parts += ("from y",) if self.from_y else ()
        return (self.format, self.latent_width, *has, self.unprojected, self.dtype, self.decoder.digest, *parts)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of all that it is: tensors by content, row format, decoder. Equal in another process that makes
        it of the same weights by the same plan or calibration; unlike any other where it is ``outdated``."""
        if self.outdated:
            return hashlib.sha256(f"outdated {id(self)}".encode()).hexdigest()
        about = (self.signature, self.origin, self.decoder.shared_positions, checksum(self.tensors()))
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def equals(self, other: Codec) -> bool:
        """Whether the other one codes and decodes alike, bit by bit."""
        if self is other:
            return True
        fresh = not self.outdated and not other.outdated
        return fresh and self.signature == other.signature and self.digest == other.digest

    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        """Stored rows [T, B, width] -> [T, B, k] in the model's dtype."""
        f = self.format
        return rows if f.plain else unpack(rows, f.spec, f.choices, f.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The codec's tensors by field name, as inputs for a graph."""
        named: dict[str, torch.Tensor | None] = {
            name: getattr(self, name) for name in ("encode", "shift", "offsets", "spread", "decode", "mean")
        }
        named.update({f"const{i}": c for i, c in enumerate(self.consts)})
        return {k: v for k, v in named.items() if v is not None}

    def nbytes(self, model: Iterable[Any] = ()) -> int:
        """Bytes of the codec's own matrices (consts belong to the model). Storages of ``model``, its tensors, are not
        counted: at full rank ``encode`` may be its weight."""
        own = (self.encode, self.shift, self.offsets, self.spread, self.decode, self.mean)
        known = {t.untyped_storage().data_ptr() for t in model if isinstance(t, torch.Tensor)}
        held = [t.untyped_storage() for t in own if t is not None]
        return sum(storage.nbytes() for storage in held if storage.data_ptr() not in known)

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        return self  # guards deep-copy metadata; identity must survive


def make_codec(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    basis: Basis,
    segments: tuple[Segment, ...],
    decoder: Decoder,
    consts: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    from_y: bool = False,
) -> Codec:
    """The codec of the effective ``weight`` [n, d] and ``bias`` [n] that stores the first columns of ``basis``.
    ``from_y``: it may encode y, where that is less to read (``reads_y``)."""
    form = Format(segments, len(basis.means), dtype)
    n, r = weight.shape[0], form.columns
    first = basis.means[0]
    mean = None if not bool(first.any()) else first.to(dtype).contiguous()
    centred = (torch.zeros_like(first) if bias is None else bias.detach().double()) - first  # b - mu_0
    if r >= n and form.plain and not bool(centred.any()):
        return Codec(decoder, form, weight.detach().to(dtype).contiguous(), None, None, None, None, mean, consts)
    basis = in_rows(basis, segments)
    spread = _spread(basis, form)
    analysis, synthesis = basis.analysis[:, :r] / spread, basis.synthesis[:r] * spread[:, None]
    gaps = basis.means[1:] - first  # mu_j - mu_0
    project, nearness = _projection(analysis, gaps)
    from_y = from_y and reads_y(weight.shape, form, basis.groups)
    shift = project @ (-first if from_y else centred)
    shift[r:] -= nearness
    offsets = torch.cat([torch.zeros_like(analysis[:1]), gaps @ analysis]) if len(gaps) else None
    decode = torch.cat([compact(synthesis, segments, basis.groups), gaps])

    exact = dtype if form.plain else torch.promote_types(dtype, torch.float32)

    def stored(tensor: torch.Tensor, kind: torch.dtype = dtype) -> torch.Tensor:
        return tensor.to(kind, copy=True).contiguous()

    return Codec(
        decoder,
        form,
        stored(_by_feature(project, form, basis.groups), exact) if from_y else _encoder(project, weight, exact),
        stored(shift, exact) if bool(shift.any()) else None,
        None if offsets is None else stored(offsets, exact),
        None if form.plain else stored(spread, exact),
        stored(decode),
        mean,
        consts,
        groups=basis.groups,
        from_y=from_y,
    )


SLOWER = 1.1
"""How many times as much a step may read for codes from y: P^T W is one more copy of the weight, up to twice as large
as the model's own, and that memory is saved."""


def reads_y(shape: Sequence[int], form: Format, groups: int) -> bool:
    """Whether codes are made of y rather than of x: P^T W is in fp32 where rows are packed, so where most columns are
    kept W itself, in the model's dtype, and P^T are less to read."""
    n, d = shape
    k, own = form.columns + form.choices - 1, form.columns // groups + form.choices - 1
    exact = torch.promote_types(form.dtype, torch.float32).itemsize
    return not form.plain and n * d * form.dtype.itemsize + own * n * exact <= SLOWER * k * d * exact


def _by_feature(project: torch.Tensor, form: Format, groups: int) -> torch.Tensor:
    """P^T and the rows behind it, [k, n] -> as ``compact`` has it."""
    return torch.cat([compact(project[: form.columns], form.segments, groups), project[form.columns :]])


def _encoder(project: torch.Tensor, weight: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """P^T W [k, d] in ``kind``; products are in fp64."""
    made = torch.empty((len(project), weight.shape[1]), dtype=kind, device=weight.device)
    for start, part in stripes(weight):
        made[:, start : start + part.shape[1]] = project @ part
    return made


def identity_codec(
    weight: torch.Tensor, origin: str, segments: tuple[Segment, ...], decoder: Decoder, dtype: torch.dtype
) -> Codec:
    """The codec of a site that is cached as it is: its rows are what the dense cache would hold, in ``segments`` of all
    n columns. ``origin`` says of which ``weight`` [n, d] the site is; ``encode`` is [n, 0]. Its one tensor is
    ``consts[0]``, [D, D], where the layout has heads of D: each is multiplied by it before it is rounded."""
    nothing = weight.new_empty((weight.shape[0], 0))
    form, sizes = Format(segments, 1, dtype), [size for size in decoder.layout if isinstance(size, int)]
    consts = (turning(sizes[-1], form.plain, dtype, weight.device),) if len(sizes) > 1 else ()
    return Codec(decoder, form, nothing, None, None, None, None, None, consts, origin)


@cache
def turning(size: int, plain: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An orthonormal [D, D] that spreads a few large channels of a head over all of them, so that one scale per token
    suits all (as in QuaRot, arXiv 2404.00456): products of queries and keys that are both turned stay what they were. A
    Hadamard matrix where D is a power of two, else Hartley's, behind fixed signs; the identity where nothing is rounded
    (``plain``). In at least fp32, one tensor for all sites."""
    exact = torch.promote_types(dtype, torch.float32)
    if plain:
        return torch.eye(size, dtype=exact, device=device)
    at = torch.arange(size, dtype=torch.float64)
    if size & (size - 1):
        angle = 2 * torch.pi / size * (at[:, None] * at).remainder(size)
        made = angle.cos() + angle.sin()
    else:
        made = torch.ones(1, 1, dtype=torch.float64)
        while len(made) < size:
            made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    signs = 1 - 2 * (((at.long() * at.long() * 2654435761) >> 7) & 1)  # a mean must not become one large channel
    return (signs[:, None] * made / size**0.5).to(exact).to(device)


def flat_basis(basis: Basis) -> Basis:
    """``basis`` where nothing is projected: every column as it comes, around zero, all expected to hold the same.

    One scale serves a whole row, mean included, so what is rounded has the same size in every direction: its loss is
    tr(G) / n times a share of E|y|^2, with G = P P^T the metric of the basis and E|y|^2 = tr C + |mu|^2. (Taking
    tr(G C) for that, as columns of their own scales have it, is ten times too low where large channels matter
    little.)"""
    n = basis.analysis.shape[0]
    eye = _eye(n, basis.energy.dtype, basis.energy.device)
    energy = basis.energy.sum()
    if basis.informed:
        size = (basis.energy * basis.synthesis.square().sum(1)).sum() + basis.means[0].square().sum()
        energy = basis.analysis.square().sum() / n * size
    return replace(basis, analysis=eye, synthesis=eye, energy=(energy / n).expand(n), means=torch.zeros_like(eye[:1]))


_EYES: WeakValueDictionary[tuple[int, torch.dtype, torch.device], torch.Tensor] = WeakValueDictionary()


def _eye(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, n]; one for all sites, as long as somebody has it."""
    key = (n, dtype, device)
    found = _EYES.get(key)
    if found is None:
        found = _EYES[key] = torch.eye(n, dtype=dtype, device=device)
    return found


def _projection(analysis: torch.Tensor, gaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[k, n] and [m - 1]: what y - mu_0 is multiplied with, columns first, then a row per further mean, from whose
    product the second is taken off: 2 (y - mu_0)(mu_j - mu_0) - |mu_j - mu_0|^2, in units that fp16 holds."""
    squares = gaps.square().sum(1)
    unit = squares.max().clamp_min(torch.finfo(torch.float64).tiny) if len(gaps) else torch.ones(())
    return torch.cat([analysis.T, 2 * gaps / unit]), squares / unit


def through(codec: Codec, basis: Basis, y: torch.Tensor) -> torch.Tensor:
    """y [N, n] written to the cache and read again, fp64. ``basis``: the one that ``codec`` was made of."""
    if codec.unprojected and not codec.format.plain:
        return as_it_reads(codec, y)
    matrix = codec.matrix
    if matrix is None:
        return y
    form, y, basis = codec.format, y.double(), in_rows(basis, codec.format.segments)
    first = basis.means[0]
    project, nearness = _projection(basis.analysis[:, : form.columns] / _spread(basis, form), basis.means[1:] - first)
    latent = (y - first) @ project.T
    latent[:, form.columns :] -= nearness
    if not form.plain:
        rows = pack(latent.float(), codec.offsets, codec.spread, form.spec, form.choices, form.dtype)
        latent = codec.latents(rows)
    read = latent.to(form.dtype).double() @ matrix.double()
    return read if codec.mean is None else read + codec.mean.double()


def as_it_reads(codec: Codec, value: torch.Tensor) -> torch.Tensor:
    """``through`` for an ``unprojected`` codec, of what is cached [N, n]: heads are turned, stored and turned back."""
    form = codec.format
    turn = codec.consts[0].double() if codec.consts else value.new_ones((1, 1), dtype=torch.float64)
    turned = (value.double().unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)
    stored = turned.to(form.dtype) if form.plain else pack(turned.float(), None, None, form.spec, 1, form.dtype)
    return (codec.latents(stored).double().unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)


SPREAD_FLOOR = 1e-3
"""No column has a unit below this fraction of the largest: what the basis thinks empty need not be."""


def _spread(basis: Basis, form: Format) -> torch.Tensor:
    """The units of the stored columns, [r] fp64: square roots of their energies, 1 in the model's dtype."""
    spread = basis.energy[: form.columns].clamp_min(0).sqrt()
    exact = sum(s.columns for s in form.segments if s.bits == MODEL)
    spread = spread.clamp_min(SPREAD_FLOOR * float(spread.max())) if bool(spread.any()) else torch.ones_like(spread)
    return torch.where(torch.arange(len(spread), device=spread.device) < exact, 1.0, spread)


def model_segments(rank: int) -> tuple[Segment, ...]:
    """``rank`` columns in the model's dtype: LoRC's rows."""
    return (Segment(rank, MODEL),)
