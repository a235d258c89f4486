"""RSBCM: which KV block holds which tokens, who shares it, and which goes first. Plain bookkeeping, no tensors."""
