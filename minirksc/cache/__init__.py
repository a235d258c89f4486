"""RSBCM: which KV block holds which tokens, which tables share it, and which goes first. Bookkeeping, no tensors."""
