"""Keys and values on their way into the paged cache, out of it, and from block to block."""
