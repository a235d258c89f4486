"""How fast it is: one script a question, run from the repository's root as `python -m bench.NAME`."""
