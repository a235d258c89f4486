"""Reads the JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from minirksc.errors import CheckpointError, MinirkscError


def read_json_object(
    path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int | None = None
) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file.

    Args:
        path: of the file.
        error: what to raise.
        max_bytes: size above which it is not even read; None for any.

    Raises:
        error: it cannot be read, is too large, not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise error(f"{path} has {path.stat().st_size} bytes, more than {max_bytes}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as cause:
        raise error(f"{path} is not readable JSON: {cause}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
