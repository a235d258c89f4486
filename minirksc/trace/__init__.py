"""The page of a solve, made of its trace, which is plain data; docs/trace.schema.json says what each key means."""

SCHEMA_NAME = "minirksc-trace-1"
"""Name and version of the format of a trace."""
