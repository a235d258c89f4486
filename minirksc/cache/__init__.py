"""RSBCM: which KV block holds which tokens, which tables share it, which goes first. Plain bookkeeping, no tensors."""
