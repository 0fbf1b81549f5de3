"""lorc_fx: torch.compile(model, backend="lorc") gives any decoder a compressed KV cache (LoRC, arXiv 2410.03111)."""

__version__ = "0.1.0"
