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


class _Reader:
    """Takes the lines of a file of evidence.

    Args:
        path: Path of the file, for messages.

    Attributes:
        header: What the evidence was made with; empty before the first line.
        found: Number of a problem -> its evidence, or why there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.found: dict[int, Evidence | Failed] = {}

    def take(self, number: int, line: bytes) -> None:
        """Reads a line; one that was torn off is passed over.

        Raises:
            ConfigError: It is no evidence.
        """
        if not line.endswith(b"\n"):
            return
        try:
            values = json.loads(line)
            if number == 1:
                if values["schema"] != SCHEMA or values["schema_version"] != SCHEMA_VERSION:
                    raise ValueError(f"schema {values['schema']!r}, version {values['schema_version']!r}")
                self.header = values
            elif "error" in values:
                self.found[_number(values["problem"])] = Failed(str(values["error"]))
            else:
                self.found[_number(values["problem"])] = Evidence.from_dict(values["evidence"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}: line {number} is no evidence of this version ({error}); "
                "remove the file, or choose another"
            ) from error


class EvidenceFile(_Reader):
    """Evidence by problem, in a JSONL file that grows.

    Args:
        file: File of this run, new or of an earlier run with the same header.
        header: Plain data: what the evidence is made with.

    Attributes:
        header, found, path: See `_Reader`.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
        MinirkscError: It cannot be written.
    """

    def __init__(self, file: GrowingFile, header: dict[str, Any]) -> None:
        super().__init__(file.path)
        self._file = file
        self._expected = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **header}
        file.truncate(file.read(self.take))
        if not self.header:
            file.add(_line(self._expected))

    def take(self, number: int, line: bytes) -> None:
        """Reads a line; refuses what another run, or another program, has written.

        Raises:
            ConfigError: It is no evidence, or was made with something else.
        """
        super().take(number, line)
        if number == 1 and self.header:
            _check_header(self.path, self.header, self._expected)
        elif number == 1 and not _line(self._expected).startswith(line):
            raise ConfigError(f"{self.path} exists and is no evidence; choose another --output, or remove it")

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
    reader = _Reader(path)
    for number, line in enumerate(read_file(path, MAX_BYTES, "evidence").splitlines(keepends=True), start=1):
        reader.take(number, line)
    if not reader.header:
        raise ConfigError(f"{path} is empty; collect evidence with `python -m minirksc.calibrate`")
    return reader.header, [one for _, one in sorted(reader.found.items()) if isinstance(one, Evidence)]


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"problem {brief(value)} is no number")
    return value


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
