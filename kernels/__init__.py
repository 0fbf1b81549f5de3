"""Ops of lorc_fx for attention over latents. This version lowers to ATen; ``ops`` holds the one op that ATen lacks."""
