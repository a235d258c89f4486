"""The file of evidence: JSONL, a header that says what it was made with, then one problem a line.

A run that was interrupted goes on where it was; whatever would make other evidence is refused.
"""

import json
from pathlib import Path
from typing import Any

from minirksc.calibrate.evidence import Evidence, Failed
from minirksc.cli.files import GrowingFile, read_file
from minirksc.errors import ConfigError, brief

SCHEMA = "minirksc.evidence"
SCHEMA_VERSION = 1
MAX_BYTES = 4 << 30


class EvidenceFile:
    """Evidence by problem, in a JSONL file that grows.

    Args:
        file: new, or of an earlier run with the same header. A last line that was torn off is dropped.
        header: what the evidence is made with, plain data.

    Attributes:
        path: of the file.
        found: problem's number -> its evidence, or why there is none.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
        MinirkscError: it cannot be written.
    """

    def __init__(self, file: GrowingFile, header: dict[str, Any]) -> None:
        self.path = file.path
        self._file = file
        header = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **header}
        raw = read_file(self.path, MAX_BYTES, "evidence")
        num_valid = raw.rfind(b"\n") + 1
        if num_valid:
            first, self.found = _parse(self.path, raw[:num_valid])
            _check_header(self.path, first, header)
        else:
            self.found = {}
            if not _line(header).startswith(raw):
                raise ConfigError(f"{self.path} exists and is no evidence; choose another --output, or remove it")
        file.truncate(num_valid)
        if not num_valid:
            file.add(_line(header))

    def add(self, index: int, one: Evidence | Failed) -> None:
        """Appends what a problem gave."""
        self.found[index] = one
        values = {"error": one.error} if isinstance(one, Failed) else {"evidence": one.to_dict()}
        self._file.add(_line({"problem": index, **values}))

    def flush(self) -> None:
        """What was added survives whatever comes."""
        self._file.sync()


def read_evidence(path: Path) -> tuple[dict[str, Any], list[Evidence]]:
    """(header, evidence by problem, those that failed left out) of a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    raw = read_file(path, MAX_BYTES, "evidence")
    header, found = _parse(path, raw[: raw.rfind(b"\n") + 1])
    return header, [one for _, one in sorted(found.items()) if isinstance(one, Evidence)]


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[int, Evidence | Failed]]:
    found: dict[int, Evidence | Failed] = {}
    header: dict[str, Any] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            values = json.loads(line)
            if number == 1:
                header = values
                if header["schema"] != SCHEMA or header["schema_version"] != SCHEMA_VERSION:
                    raise ValueError(f"schema {header['schema']!r}, version {header['schema_version']!r}")
            elif "error" in values:
                found[_number(values["problem"])] = Failed(str(values["error"]))
            else:
                found[_number(values["problem"])] = Evidence.from_dict(values["evidence"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{path}: line {number} is no evidence of this version ({error}); remove the file, or choose another"
            ) from error
    if not header:
        raise ConfigError(f"{path} is empty; collect evidence with `python -m minirksc.calibrate`")
    return header, found


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"problem {brief(value)} is no number")
    return value


def _check_header(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))
    for name in sorted({*found, *expected}):
        one, other = found.get(name), expected.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            name, one, other = next(
                (f"{name}: {key}", one.get(key), other.get(key))
                for key in sorted({*one, *other})
                if one.get(key) != other.get(key)
            )
        raise ConfigError(
            f"{path} was collected with {name} {brief(one)}, and this run has {brief(other)}; go on with the same "
            "options, choose another --output, or remove the file"
        )


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"
