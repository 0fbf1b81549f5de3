"""``save_cache`` and ``load_cache``: a prompt cache on disk, at its compressed size.

One safetensors file: the rows of each LatentKV, each track of positions once, whatever is dense as it is, and in the
header how the cache object is made of them (JSON, with class names of transformers; nothing is pickled). Codecs are
not in the file. They belong to the model's weights, and are found again by a digest of their content.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import compat
from .codec import Codec
from .errors import BadCacheFile, ForeignCache, LorcError
from .latent import LatentKV
from .options import Options
from .plan_file import write_tensors
from .rows import Track, blank, unwritten
from .store import STORE, tensors_of

VERSION = 1


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a transformers cache (or a LatentKV, or a nest of lists, tuples and dicts of tensors) to one file.

    What is coded is written coded, in as many bytes as are used (``cache_nbytes(cache, used=True)``; rows that a static
    cache has not filled yet are left out); dense layers and other state as they are. The file appears whole or not at
    all. Raises BadCacheFile for a cache that holds something else than tensors, numbers and cache layers, and OSError.
    """
    writer = _Writer(str(path))
    tree = writer.encode(cache, None)
    about = {"lorc_fx_cache": str(VERSION), "tree": json.dumps(tree), "latents": json.dumps(writer.latents)}
    write_tensors(Path(path), writer.tensors, about)


def load_cache(path: str | os.PathLike[str], model: torch.nn.Module, cache: Any = None) -> Any:
    """A cache that goes on where the saved one was: the next step costs no compile that the saved one would not cost,
    and gives the same bits.

    ``model``: compiled with backend="lorc" and the options of the model that wrote the cache. If no prompt has run
    yet, it is traced on its ``dummy_inputs`` to make its codecs. Codecs that a first prompt informed exist only after
    that prompt: to load in another process, give a saved plan or calibration. ``cache``: an empty one of the same
    kind to fill (needed for classes that are not transformers'); by default a new one is made. Tensors come to the
    device of the model's weights.

    Raises BadCacheFile where the file is missing, is none, or does not fit ``cache``; ForeignCache where the model has
    other weights or codecs (compared by content) than those that wrote the file; and what tracing the model raises.
    """
    path = Path(path)
    about, tensors = _read(path)
    with _readable(path):
        tree, latents = json.loads(about["tree"]), json.loads(about["latents"])
        reader = _Reader(path, tensors, latents, model, _classes(cache))
        wanted = {x["codec"] for x in latents}

    def empty() -> Any:
        with _readable(path):
            return reader.decode(tree, None, fresh=True)

    reader.codecs = _codecs(path, wanted, model, empty)
    with _readable(path):
        return reader.decode(tree, None, into=cache)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file that is not as it was written makes of the code below: it is the file's fault, and said so."""
    try:
        yield
    except LorcError:  # many are ValueErrors too
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as why:
        raise BadCacheFile(str(path), f"it cannot be read as a cache ({type(why).__name__}: {why})") from None


# -- writing ----------------------------------------------------------------------------------------------------------


def _is_part_of_a_cache(kind: type) -> bool:
    return any(base.__module__ == "transformers.cache_utils" for base in kind.__mro__)


@dataclass
class _Writer:
    """Collects tensors by name, each once, and spells everything else as JSON."""

    path: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    _storages: set[int] = field(default_factory=set)

    def encode(self, value: Any, home: Any) -> Any:
        """``home``: the device of the layer that holds the value."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            what, index = (
                ("latent", self._latent(value)) if isinstance(value, LatentKV) else ("tensor", self._keep(value))
            )
            flags = {"away": True} if home is not None and value.device != home else {}
            if compat.is_static_address(value):
                flags["static"] = True
            return {what: index, **flags}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": [self.encode(v, home) for v in value]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k, home), self.encode(v, home)] for k, v in value.items()]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, type) and _is_part_of_a_cache(value):
            return {"class": value.__name__}
        if _is_part_of_a_cache(type(value)):
            home = getattr(value, "device", None)
            state = {k: self.encode(v, home) for k, v in vars(value).items() if not isinstance(v, torch.Stream)}
            return {"object": type(value).__name__, "state": state}
        raise BadCacheFile(self.path, f"the cache holds a {type(value).__name__}, which cannot be written to a file")

    def _keep(self, tensor: torch.Tensor) -> str:
        return self._once(id(tensor), tensor, lambda: self._put(tensor))

    def _once(self, key: Any, holder: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = (make(), holder)
        return self._known[key][0]

    def _put(self, tensor: torch.Tensor) -> str:
        name = f"tensor{len(self.tensors)}"
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        self.tensors[name] = plain.clone() if storage in self._storages else plain
        self._storages.add(storage)
        return name

    def _latent(self, value: LatentKV) -> int:
        def make() -> int:
            value.follow()
            assert value.rows is not None
            empty = unwritten(value.codes).all(1)
            written = int((~empty).nonzero()[-1]) + 1 if bool((~empty).any()) else 0
            line: dict[str, Any] = {"codec": value.codec.digest, "length": value.length}
            line["codes"] = self._put(value.codes[:written])
            if value.rows.track is not None:
                place = (id(value.rows.track), value.start, value.length)
                line["positions"] = self._once(place, value.rows.track, lambda: self._put(value.positions))  # type: ignore[arg-type]
            if value.tail is not None:
                line["tail"] = self._put(value.tail)
            self.latents.append(line)
            return len(self.latents) - 1

        return self._once(id(value), value, make)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("lorc_fx_cache") != str(VERSION):
                found = about.get("lorc_fx_cache")
                raise BadCacheFile(str(path), f"it is no cache of version {VERSION} (but {found!r})")
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as why:
        raise BadCacheFile(str(path), f"it cannot be read ({why})") from None


def _classes(cache: Any) -> dict[str, type]:
    """The classes that a file may name: transformers' own, layers that models registered, and those of ``cache``."""
    from transformers import cache_utils

    found = {c.__name__: c for c in vars(cache_utils).values() if isinstance(c, type) and _is_part_of_a_cache(c)}
    for registered in ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING"):
        found |= {c.__name__: c for c in getattr(cache_utils, registered, {}).values()}
    mine = [] if cache is None else [cache, getattr(cache, "self_attention_cache", None)]
    for each in [x for c in mine for x in (c, *(getattr(c, "layers", None) or ()))]:
        if _is_part_of_a_cache(type(each)):
            found[type(each).__name__] = type(each)
    return found


def _codecs(path: Path, wanted: set[str], model: torch.nn.Module, empty: Callable[[], Any]) -> dict[str, Codec]:
    """The model's codecs by digest. Made now, by tracing ``model`` over the cache ``empty()``, where some lack."""

    def known() -> dict[str, Codec]:
        return {codec.digest: codec for codec in reversed(STORE.codecs(tensors_of(model)))}

    found = known()
    if wanted <= found.keys():
        return found
    given = compat.compiled_with(model)
    if given is not None:
        _make_codecs(model, Options.parse(given[0], mode=given[1]), empty())
        found = known()
    lacking = wanted - found.keys()
    if lacking:
        if not found:
            reason = 'the model has no codecs: compile it (model.compile(backend="lorc", options=...)) and run a prompt'
        else:
            reason = (
                "the model has other weights, other options, or statistics of another first prompt (a saved plan or "
                "calibration makes codecs the same in each process)"
            )
        raise ForeignCache(
            f"{path} was written by {len(wanted)} codecs, of which {len(lacking)} are not the model's; {reason}"
        )
    return found


def _make_codecs(model: torch.nn.Module, options: Options, cache: Any) -> None:
    """Trace the model's beginning of a prompt with an empty ``cache``, for the codecs that its graphs have."""
    from .backend import make_codecs
    from .evaluate import cache_keyword
    from .report import traced

    module = getattr(model, "_orig_mod", model)
    inputs = getattr(module, "dummy_inputs", None)
    if not isinstance(inputs, Mapping):
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    short = {name: value[:, :2] if value.dim() > 1 else value for name, value in tensors.items()}
    short = {name: value.to(next(module.parameters()).device) for name, value in short.items()}
    given = {**short, cache_keyword(module): cache, "use_cache": True}
    traced(module, (), given, lambda gm, examples: make_codecs(gm, examples, options))


@dataclass
class _Reader:
    path: Path
    tensors: dict[str, torch.Tensor]
    latents: list[dict[str, Any]]
    model: torch.nn.Module
    classes: dict[str, type]
    codecs: dict[str, Codec] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict)

    def decode(self, tree: Any, home: Any, into: Any = None, fresh: bool = False) -> Any:
        """``into``: the object to fill. ``fresh``: the same cache before its first token."""
        if not isinstance(tree, dict):
            return tree
        if "object" in tree:
            return self._object(tree, into, fresh)
        if "list" in tree:
            old = into if isinstance(into, list) and into else [None] * len(tree["list"])
            if len(old) != len(tree["list"]):
                raise BadCacheFile(str(self.path), f"it has {len(tree['list'])} layers, the cache given {len(old)}")
            return [self.decode(t, home, o, fresh) for t, o in zip(tree["list"], old, strict=True)]
        if "tuple" in tree:
            return tuple(self.decode(t, home, None, fresh) for t in tree["tuple"])
        if "dict" in tree:
            return {self.decode(k, home): self.decode(v, home, None, fresh) for k, v in tree["dict"]}
        if "dtype" in tree:
            return getattr(torch, tree["dtype"])
        if "device" in tree:
            return home if home is not None else self._device()
        if "class" in tree:
            return self._class(tree["class"])
        device = torch.device("cpu") if tree.get("away") else home or self._home([tree])
        made = self._latent(tree["latent"], device) if "latent" in tree else self._tensor(tree["tensor"], device)
        if tree.get("static"):
            torch._dynamo.mark_static_address(made)
        return made

    def _device(self) -> torch.device:
        return next((w.device for w in tensors_of(self.model)), torch.device("cpu"))

    def _class(self, name: str) -> type:
        if name not in self.classes:
            text = f"it holds a {name}, which this transformers has not; give an empty cache of that class to fill"
            raise BadCacheFile(str(self.path), text)
        return self.classes[name]

    def _object(self, tree: Any, into: Any, fresh: bool) -> Any:
        kind, state = self._class(tree["object"]), tree["state"]
        if into is not None and type(into) is not kind:
            raise BadCacheFile(str(self.path), f"it holds a {kind.__name__}, the cache given a {type(into).__name__}")
        nested = any(isinstance(v, dict) and ("object" in v or "list" in v) for v in state.values())
        made = into if into is not None else object.__new__(kind) if nested else self._layer(kind, state)
        if fresh and not nested:
            return made
        given = {} if into is None else vars(into)
        for name in ("max_cache_len", "sliding_window"):
            if name in given and given[name] != state.get(name, given[name]):
                text = f"its {name} is {state[name]}, that of the cache given {given[name]}"
                raise BadCacheFile(str(self.path), text)
        home = self._home(state.values())
        for name, value in state.items():
            vars(made)[name] = self.decode(value, home, vars(made).get(name), fresh)
        if state.get("offloading") and "prefetch_stream" not in vars(made):
            vars(made)["prefetch_stream"] = torch.Stream()
        return made

    def _layer(self, kind: type, state: Mapping[str, Any]) -> Any:
        """A layer as before its first token."""
        named = {"sliding_window": state.get("max_cache_len"), **state}  # a static layer forgets what its window was
        wanted = inspect.signature(kind).parameters
        try:
            return kind(**{n: named[n] for n in wanted if n in named and not isinstance(named[n], dict)})
        except TypeError:
            return object.__new__(kind)

    def _home(self, values: Iterable[Any]) -> torch.device:
        """Where a layer's tensors go: to the weights that its codec was made of."""
        digests = (self.latents[v["latent"]]["codec"] for v in values if isinstance(v, dict) and "latent" in v)
        found = (self.codecs[d].encode.device for d in digests if d in self.codecs)
        return next(found, self._device())

    def _tensor(self, name: str, device: torch.device) -> torch.Tensor:
        if name not in self._made:
            self._made[name] = self.tensors[name].to(device, copy=True)  # not mapped: the file may be replaced
        return self._made[name]

    def _latent(self, index: int, device: torch.device) -> LatentKV:
        if ("latent", index) not in self._made:
            line = self.latents[index]
            codec, written = self.codecs[line["codec"]], self.tensors[line["codes"]]
            form = codec.format
            if written.dtype != form.storage or written.dim() != 3 or written.shape[2] != form.width:
                raise BadCacheFile(
                    str(self.path), f"its rows {tuple(written.shape)} {written.dtype} are not its codec's"
                )
            shape = (line["length"], *written.shape[1:])
            codes = torch.full(shape, blank(form.storage), dtype=form.storage, device=device)
            codes[: len(written)].copy_(written)
            tail = None if line.get("tail") is None else self._tensor(line["tail"], device)
            self._made["latent", index] = LatentKV.born(codec, codes, self._track(line, device), tail)
        return self._made["latent", index]

    def _track(self, line: Mapping[str, Any], device: torch.device) -> Track | None:
        name = line.get("positions")
        if name is None:
            return None
        key = ("track", name, device)
        if key not in self._made:
            self._made[key] = Track(self.tensors[name].to(device, copy=True), line["length"])
        return self._made[key]
