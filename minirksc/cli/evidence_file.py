"""The file of evidence: JSONL, a header that says what it was made with, then one problem a line.

A run that was interrupted goes on where it was; whatever would make other evidence is refused.
"""

import json
from pathlib import Path
from typing import Any

from minirksc.calibrate.evidence import Evidence, Failed
from minirksc.cli.files import read_file
from minirksc.cli.resumable import GrowingFile
from minirksc.errors import ConfigError, brief

SCHEMA = "minirksc.evidence"
SCHEMA_VERSION = 1
MAX_BYTES = 4 << 30


class EvidenceFile:
    """Evidence by problem, in a JSONL file that grows.

    Args:
        file: file of this run, new or of an earlier run with the same header. A last line that was torn off is dropped.
        header: plain data: what the evidence is made with.

    Attributes:
        found: number of a problem -> its evidence, or why there is none.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
        MinirkscError: It cannot be written.
    """

    def __init__(self, file: GrowingFile, header: dict[str, Any]) -> None:
        self.found: dict[int, Evidence | Failed] = {}
        self._file = file
        header = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **header}

        def take(number: int, line: bytes) -> None:
            if line.endswith(b"\n"):
                first = _read_line(file.path, number, line, self.found)
                if first is not None:
                    _check_header(file.path, first, header)
            elif number == 1 and not _line(header).startswith(line):
                raise ConfigError(f"{file.path} exists and is no evidence; choose another --output, or remove it")

        num_whole = file.read(take)
        file.truncate(num_whole)
        if not num_whole:
            file.add(_line(header))

    def add(self, index: int, one: Evidence | Failed) -> None:
        """Appends what a problem gave."""
        self.found[index] = one
        values = {"error": one.error} if isinstance(one, Failed) else {"evidence": one.to_dict()}
        self._file.add(_line({"problem": index, **values}))


def read_evidence(path: Path) -> tuple[dict[str, Any], list[Evidence]]:
    """(header, evidence by problem, those that failed left out) of a file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    header: dict[str, Any] | None = None
    found: dict[int, Evidence | Failed] = {}
    raw = read_file(path, MAX_BYTES, "evidence")
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        header = _read_line(path, number, line, found) or header
    if header is None:
        raise ConfigError(f"{path} is empty; collect evidence with `python -m minirksc.calibrate`")
    return header, [one for _, one in sorted(found.items()) if isinstance(one, Evidence)]


def _read_line(path: Path, number: int, line: bytes, found: dict[int, Evidence | Failed]) -> dict[str, Any] | None:
    """Returns what the first line says of all others; puts into `found` what another line says of its problem."""
    try:
        values: dict[str, Any] = json.loads(line)
        if number == 1:
            if values["schema"] != SCHEMA or values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema {values['schema']!r}, version {values['schema_version']!r}")
            return values
        is_failed = "error" in values
        index = values["problem"]
        if type(index) is not int:
            raise TypeError(f"problem {brief(index)} is no number")
        found[index] = Failed(str(values["error"])) if is_failed else Evidence.from_dict(values["evidence"])
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path}: line {number} is no evidence of this version ({error}); remove the file, or choose another"
        ) from error


def _check_header(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = _flat(found), _flat(json.loads(json.dumps(expected)))
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise ConfigError(
                f"{path} was collected with {name} {brief(found.get(name))}, and this run has "
                f"{brief(expected.get(name))}; go on with the same options, choose another --output, or remove the file"
            )


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    """A header with the values of objects in it as values of its own."""
    values = {name: value for name, value in header.items() if not isinstance(value, dict)}
    parts = {name: value for name, value in header.items() if isinstance(value, dict)}
    return values | {f"{name}: {key}": value for name, part in parts.items() for key, value in part.items()}


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"
