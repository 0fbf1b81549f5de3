"""What a tuner has found, for the launchers: a database of one JSON file for each device.

    {"version": 1, "entries": [
        {"device": "AMD EPYC, 2 threads", "sources": "1f..", "triton": "", "reader": "tiled: 16 query heads, ..",
         "tokens": 2048, "batch": 1, "done": true, "config": {"tile": 1024}, "seconds": 0.00071,
         "default_seconds": 0.00083}]}

An entry is one problem: a kind of reader (in words: what its computation takes, not which weights), a number of cached
tokens and of batch rows. It holds for ``batch`` up to the next power of two and for ``tokens`` some doublings away.
``sources`` is a hash of what writes or runs the kernels, ``triton`` its version. Where the config is null the
launcher's own choice is best. An entry that is not ``done`` has ``trials``: what was timed before an interrupt. What
the package ships is read first, then what was tuned here, which wins. Nothing here can change a result: a config only
says in which pieces it is computed.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lorc_fx.errors import KernelWarning
from lorc_fx.logs import log
from lorc_fx.models import cache_root
from lorc_fx.plan_file import replaced

from . import native
from .attend import Attend
from .config import Config, Tile

VERSION = 1
OCTAVES = 2
"""How far away (in doublings of tokens) an entry may be that serves other lengths: what is best moves slowly."""


@dataclass(frozen=True)
class Target:
    """What entries are made for. device: its name, and a CPU's threads. sources: a hash. triton: "" without it."""

    device: str
    sources: str
    triton: str


@dataclass(frozen=True)
class Trial:
    """A config that was timed in turns with the default: seconds of both, None where it cannot run."""

    config: Config | Tile
    seconds: float | None
    default_seconds: float | None


@dataclass(frozen=True)
class Entry:
    """See above."""

    target: Target
    reader: str
    tokens: int
    batch: int
    done: bool = False
    config: Config | Tile | None = None
    seconds: float | None = None
    default_seconds: float | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def key(self) -> tuple[str, int, int]:
        return self.reader, bucket(self.tokens), bucket(self.batch)

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = {**asdict(self.target), "reader": self.reader}
        found |= {"tokens": self.tokens, "batch": self.batch, "done": self.done, "config": _plain(self.config)}
        found |= {"seconds": self.seconds, "default_seconds": self.default_seconds}
        if self.trials:
            found["trials"] = [[_plain(t.config), t.seconds, t.default_seconds] for t in self.trials]
        return found


def bucket(size: int) -> int:
    """The exponent of the next power of two."""
    return (size - 1).bit_length()


# -- from JSON, which anyone may have written -------------------------------------------------------------------------


def entry_of(given: Any) -> Entry:
    """Inverse of ``Entry.json``. Raises ValueError that says what is wrong."""
    if not isinstance(given, dict):
        raise ValueError(f"an entry is {type(given).__name__}, not an object")
    texts = {name: _checked(given, name, str) for name in ("device", "sources", "triton", "reader")}
    sizes = {name: _checked(given, name, int) for name in ("tokens", "batch")}
    if min(sizes.values()) < 1:
        raise ValueError(f"tokens and batch are {sizes['tokens']} and {sizes['batch']}")
    times = [_seconds(given.get(name), name) for name in ("seconds", "default_seconds")]
    config = None if given.get("config") is None else config_of(given["config"])
    trials = given.get("trials", [])
    if not isinstance(trials, list) or not all(isinstance(t, list) and len(t) == 3 for t in trials):
        raise ValueError("trials are no list of [config, seconds, default_seconds]")
    tried = tuple(Trial(config_of(c), _seconds(a, "seconds"), _seconds(b, "default_seconds")) for c, a, b in trials)
    reader = texts.pop("reader")
    done = _checked(given, "done", bool)
    return Entry(Target(**texts), reader, sizes["tokens"], sizes["batch"], done, config, times[0], times[1], tried)


def config_of(given: Any) -> Config | Tile:
    """A config from its JSON. Raises ValueError for one that no launcher can take."""
    if not isinstance(given, dict):
        raise ValueError(f"config is {given!r}")
    if set(given) == {"tile"}:
        return Tile(_within(given, "tile", 1, 1 << 40))
    names = {f.name for f in fields(Config)}
    if set(given) != names:
        raise ValueError(f"config has {sorted(given)}, not {sorted(names)}")
    return Config(
        tokens=_power(given, "tokens", 16, 1024),
        columns=_power(given, "columns", 16, 1024),
        splits=_within(given, "splits", 0, 1 << 16),
        warps=_power(given, "warps", 1, 32),
        stages=_within(given, "stages", 1, 8),
        skips=_checked(given, "skips", bool),
    )


def _plain(config: Config | Tile | None) -> dict[str, Any] | None:
    return None if config is None else {"tile": config.tokens} if isinstance(config, Tile) else asdict(config)


def _checked(given: Mapping[str, Any], name: str, kind: type) -> Any:
    found = given.get(name)
    if type(found) is not kind:  # a bool is an int elsewhere
        raise ValueError(f"{name} is {found!r}, not of {kind.__name__}")
    return found


def _within(given: Mapping[str, Any], name: str, least: int, most: int) -> int:
    found: int = _checked(given, name, int)
    if not least <= found <= most:
        raise ValueError(f"{name} is {found}, not in {least} .. {most}")
    return found


def _power(given: Mapping[str, Any], name: str, least: int, most: int) -> int:
    found = _within(given, name, least, most)
    if found & (found - 1):
        raise ValueError(f"{name} is {found}, no power of two")
    return found


def _seconds(found: Any, name: str) -> float | None:
    if found is None:
        return None
    if type(found) not in (int, float) or not 0 <= found < 1e6:
        raise ValueError(f"{name} is {found!r}")
    return float(found)


# -- files ------------------------------------------------------------------------------------------------------------


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def shipped_file(device: str) -> Path:
    return Path(__file__).parent / "shipped" / f"{slug(device)}.json"


def users_file(device: str) -> Path:
    """Where ``lorc autotune`` writes: ``tuned`` in ``$LORC_CACHE``, ``$XDG_CACHE_HOME/lorc_fx`` or
    ``~/.cache/lorc_fx``."""
    return cache_root() / "tuned" / f"{slug(device)}.json"


def read(path: Path, target: Target) -> tuple[list[Entry], list[str]]:
    """The entries of a file that are for ``target``, and of each other one why it is skipped. No file: none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return [], []
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"it cannot be read ({error})"]
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [], [f"it is no JSON ({error})"]
    if not isinstance(whole, dict) or whole.get("version") != VERSION or not isinstance(whole.get("entries"), list):
        return [], [f"it is no database of version {VERSION}"]
    found, skipped = [], []
    for i, given in enumerate(whole["entries"]):
        try:
            entry = entry_of(given)
        except ValueError as error:
            skipped.append(f"entry {i} is corrupt: {error}")
            continue
        why = _foreign(entry.target, target)
        if why:
            skipped.append(f"entry {i} is foreign: {why}")
        else:
            found.append(entry)
    return found, skipped


def _foreign(made: Target, here: Target) -> str | None:
    if made.device != here.device:
        return f"it was tuned on {made.device!r}, this is {here.device!r}"
    if made.triton != here.triton:
        return f"it was tuned with Triton {made.triton or 'none'}, this is {here.triton or 'none'}"
    return "it was tuned with other kernel sources" if made.sources != here.sources else None


def write(path: Path, entries: Iterable[Entry]) -> None:
    """The file is the old one or the whole new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(e.json()) for e in sorted(entries, key=lambda e: (e.target.device, e.key)))
    with replaced(path) as partial:
        partial.write_text(f'{{"version": {VERSION}, "entries": [\n{lines}\n]}}\n')


class Database:
    """The entries for one target."""

    def __init__(self, target: Target, entries: Iterable[Entry] = ()) -> None:
        self.target = target
        self.entries = {e.key: e for e in entries}

    @classmethod
    def of(cls, target: Target, path: Path) -> Database:
        """Of a file. One KernelWarning says how much of it is skipped."""
        entries, skipped = read(path, target)
        if skipped:
            text = (
                f"{path}: {skipped[0]}" + (f" (and {len(skipped) - 1} more like it)" if len(skipped) > 1 else "") + ". "
                "It is not used; `lorc autotune` writes the file anew. Until then kernels run with their defaults."
            )
            warnings.warn(text, KernelWarning, stacklevel=2)
        return cls(target, entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def put(self, path: Path, entry: Entry) -> None:
        """Add or replace an entry, in the file at once: what another process wrote before this call stays (of two that
        write at one time, one may lose its entry and time it again). What is corrupt or foreign goes. Raises
        OSError."""
        entries, _ = read(path, self.target)
        self.entries |= {e.key: e for e in entries if e.key not in self.entries} | {entry.key: entry}
        write(path, self.entries.values())
        forget()

    def find(self, reader: str, tokens: int, batch: int) -> Config | Tile | None:
        """The config for these sizes, None for the launcher's own choice: that of the nearest bucket of tokens,
        ``OCTAVES`` away at most."""
        here, rows = bucket(tokens), bucket(batch)
        near = [
            (abs(at - here), at, e.config)
            for (words, at, b), e in self.entries.items()
            if words == reader and b == rows and e.done and abs(at - here) <= OCTAVES
        ]
        return min(near, key=lambda n: n[:2])[2] if near else None


@functools.cache
def current(target: Target) -> Database:
    """What the package ships for a target, and over it what was tuned here. Shipped entries for other sources or
    another Triton are left out in silence: a user can do nothing about them."""
    shipped, skipped = read(shipped_file(target.device), target)
    for why in skipped:
        log.info("shipped database: %s", why)
    own = Database.of(target, users_file(target.device))
    return Database(target, [*shipped, *(e for e in own if e.done)])


# -- for launchers ----------------------------------------------------------------------------------------------------

_chosen: WeakKeyDictionary[Attend, dict[Any, Config | Tile | None]] = WeakKeyDictionary()


def chosen(
    about: Attend, tokens: int, batch: int, more: Any, made: Callable[[], tuple[Target, str]]
) -> Config | Tile | None:
    """The config of a reader at these sizes, None for the launcher's own choice. ``more``: whatever else tells its
    calls apart; ``made``: the target and the reader in words, asked for once for each bucket."""
    held = _chosen.get(about)
    if held is None:
        held = _chosen[about] = {}
    key = (bucket(tokens), bucket(batch), more)
    if key not in held:
        target, words = made()
        held[key] = current(target).find(words, tokens, batch)
        log.debug("%d tokens, batch %d, %s: %s", tokens, batch, words, held[key] or "default")
    return held[key]


def forget() -> None:
    """Read the databases anew when next asked."""
    _chosen.clear()
    current.cache_clear()
    native.ask_again()
