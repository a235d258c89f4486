"""Attention over a paged KV cache, and the mass that each block gets of it."""
