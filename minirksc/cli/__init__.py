"""The commands: how they are read, and what becomes of results, errors and interruptions."""
