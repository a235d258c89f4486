"""Tensors of a checkpoint: their names, their bytes, and where they go."""
