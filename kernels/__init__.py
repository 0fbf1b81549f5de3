"""Attention over stored rows as one op (``attend``): in torch, compiled for CPUs, generated for GPUs; and its tuner."""
