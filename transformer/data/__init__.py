"""Text -> tokens -> examples -> batches. Nothing here needs JAX; NumPy arrays come out."""
