"""Faster readers than decoding to memory: absorb the decode matrix into the query or out of the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node


class Absorption:
    def emit(self, rewriter: Any, node: Node) -> Node:
        raise AssertionError


def absorb(matched: Any, codecs: Mapping[Any, Any]) -> dict[Node, Absorption]:
    return {}
