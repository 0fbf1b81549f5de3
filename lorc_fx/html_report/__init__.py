"""``lorc report``: what is known of a model's cache (``gather``), drawn (``figures``), on one page (``page``)."""

from .gather import Asked, check, gathered
from .page import render, write

__all__ = ["Asked", "check", "gathered", "render", "write"]
