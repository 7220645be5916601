"""Distributed training of mixture-of-experts language models with null experts (AdaMoE)."""

__version__ = "0.1.0"
