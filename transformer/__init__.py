"""Pretrain, fine-tune and benchmark Transformers in JAX and Flax."""

__version__ = "0.1.0"
