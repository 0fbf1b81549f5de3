"""Errors through a whole graph: see ``walk.py``."""

from .coded import Coding
from .known import Known
from .walk import Track, Walker

__all__ = ["Coding", "Known", "Track", "Walker"]
