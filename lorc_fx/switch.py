"""The switch in the environment: ``LORC_DISABLE=1`` turns the backend off without a change of code.

It is read when a graph is compiled: set it before the process starts. Then ``backend="lorc"`` is its inner compiler on
the untouched graph, with a dense cache; of its options only ``inner`` and ``mode`` are looked at.
"""

from __future__ import annotations

import os

from .errors import BadOption

VARIABLE = "LORC_DISABLE"
SET, UNSET = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def disabled() -> bool:
    """Whether the environment turns the backend off. Raises BadOption for a value that says neither."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value not in (*SET, *UNSET):
        raise BadOption(VARIABLE, value, f"one of {', '.join(SET)} (off), {', '.join(UNSET[1:])} (on), or unset")
    return value in SET
