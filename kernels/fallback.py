"""Where a reader gets no kernel: smaller ones are tried where the device has too little room, then torch does it, and
one warning for each reader says so, with the names of the sites that it reads."""

from __future__ import annotations

import warnings
from dataclasses import replace
from weakref import WeakKeyDictionary

from lorc_fx.errors import KernelWarning

from .attend import Attend
from .config import Config
from .expressions import NotGenerated

LEAST_TOKENS = 16
"""Tokens in a block, at least: Triton's products take no fewer."""

LONGEST = 300
"""Characters of an error that a warning quotes."""

_sites: WeakKeyDictionary[Attend, dict[str, None]] = WeakKeyDictionary()
_said: set[tuple[str, str]] = set()


def used_at(about: Attend, site: str) -> None:
    """Note a place where ``about`` is used: equal layers share one."""
    _sites.setdefault(about, {})[site] = None


def named(about: Attend) -> str:
    """The first place that was noted, and how many more there are."""
    found = list(_sites.get(about, ())) or ["a place without a name"]
    return found[0] + (f" (and {len(found) - 1} more like it)" if len(found) > 1 else "")


def smaller(config: Config) -> Config | None:
    """The next config that needs less shared memory and fewer registers: no pipelining, then half the tokens."""
    if config.stages > 1:
        return replace(config, stages=1)
    return replace(config, tokens=config.tokens // 2) if config.tokens > LEAST_TOKENS else None


def too_large(error: Exception) -> bool:
    """Whether a kernel needs more shared memory or registers than the device has: Triton's ``OutOfResources``, or the
    assembler's or the driver's word for it."""
    words = ("too much shared data", "too many resources requested for launch")
    return type(error).__name__ == "OutOfResources" or any(w in str(error) for w in words)


def of_compiling(error: Exception) -> bool:
    """Whether a launch failed before it began: one of Triton's own errors, or a pass of its compiler."""
    own = type(error).__module__.split(".")[0] == "triton"
    return own or "PassManager::run" in str(error) or too_large(error)


def warn(about: Attend, error: Exception, config: Config, source: str | None = None, instead: str = "") -> None:
    """Say that torch runs ``about``, or ``instead`` of a tuned config, and why, once for each reader. ``config``: the
    last that was tried; ``source``: the file of its kernel."""
    if (about.digest, instead) in _said:
        return
    _said.add((about.digest, instead))
    reader = f"keys of {about.keys.words}; values of {about.values.words}"
    how = (
        f"The tuned config is not used, but {instead}."
        if instead
        else "It runs in plain torch, tile by tile: as right, but slower."
    )
    text = f"no kernel for attention at {named(about)} ({reader}): {_why(error, config)}. {how} {_step(error, source)}"
    warnings.warn(text, KernelWarning, stacklevel=3)


def _why(error: Exception, config: Config) -> str:
    if isinstance(error, ImportError):
        return f"Triton cannot be imported ({_short(error)})"
    if isinstance(error, NotGenerated):
        return _short(error)
    quoted = f"{type(error).__name__}: {_short(error)}"
    if too_large(error):
        least = f"{config.tokens} tokens in a block and {config.stages} stage"
        return f"even with {least} it needs more than the device has ({quoted})"
    return f"it does not compile ({quoted})"


def _step(error: Exception, source: str | None) -> str:
    """What kernels are made of, and what can be done."""
    if isinstance(error, ImportError):
        return "Only Triton compiles kernels: install it (the extra `gpu`), and start again."
    if isinstance(error, NotGenerated):
        return (
            "Kernels are made of pointwise ops, ops that move features, and sums over a head: write that part of the "
            "model so, or report this message."
        )
    if too_large(error):
        return "Only rows that fit are taken: give it fewer columns (a smaller `ratio`)."
    return f"Only what Triton compiles is taken: try another release of it, or report {source} with this message."


def _short(error: Exception) -> str:
    """An error's first line, and its last, where compilers say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " .. ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return text if len(text) <= LONGEST else text[:LONGEST] + " .."
