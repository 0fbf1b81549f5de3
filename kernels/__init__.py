"""Attention over latents. This version holds the plain torch reference; the passes lower to ATen."""
