"""The page of a solve, made of its trace, which is plain data."""
