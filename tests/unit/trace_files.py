"""The schema of a trace as docs/ has it, an example that keeps to it, and what the page of a trace is made of."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRACE_SCHEMA = json.loads((ROOT / "docs" / "trace.schema.json").read_text(encoding="utf-8"))
EXAMPLE = TRACE_SCHEMA["examples"][0]
GATES = TRACE_SCHEMA["properties"]["gates"]["items"]["properties"]["gate"]["enum"]

STYLE, SCRIPT = ((ROOT / "minirksc" / "trace" / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
_LIGHT, _DARK = (rule.partition("}")[0] for rule in STYLE.split(":root{")[1:])


def documented_keys(schema=TRACE_SCHEMA, prefix=""):
    """Path and schema of every key, parents first: `nodes[].id` is the key `id` of each entry of `nodes`."""
    for name, part in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield path, part
        yield from documented_keys(part, f"{path}.")
        yield from documented_keys(part.get("items", {}), f"{path}[].")


def schema_markdown():
    """The schema as a table in Markdown: one row a key."""
    rows = ["| key | type | meaning |", "| --- | --- | --- |"]
    for path, part in documented_keys():
        meaning = part["description"].replace("|", "\\|")
        rows.append(f"| `{path}` | {_kind(part)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _kind(part):
    if "anyOf" in part:
        return " or ".join(_kind(choice) for choice in part["anyOf"])
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    if "const" in part:
        return f'"{part["const"]}"'
    if "array" in kinds:
        item = _kind(part["items"])
        item = f"({item})" if " " in item else f"{item}s"
        kinds = [f"list of {item}" if kind == "array" else kind for kind in kinds]
    return " or ".join(kinds)
