"""The file of evidence: JSONL, a header that says what it was made with, then one problem a line.

A run that was interrupted goes on where it was; whatever would make other evidence is refused.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from minirksc.errors import ConfigError, brief
from minirksc.evidence import Evidence, Failed

SCHEMA = "minirksc.evidence"
SCHEMA_VERSION = 1


class EvidenceFile:
    """Evidence by problem, in a JSONL file that grows; a context manager.

    Args:
        path: new, or of an earlier run with the same header. A last line that was torn off is dropped.
        header: what the evidence is made with, plain data.

    Attributes:
        found: problem's number -> its evidence, or why there is none.

    Raises:
        ConfigError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        header = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **header}
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file; choose another --output")
        try:
            raw = path.read_bytes() if path.exists() else b""
            num_valid = raw.rfind(b"\n") + 1
            if num_valid:
                first, self.found = _parse(path, raw[:num_valid])
                _check_header(path, first, header)
            else:
                self.found = {}
                if not _line(header).startswith(raw):
                    raise ConfigError(f"{path} exists and is no evidence; choose another --output, or remove it")
            self._stream = path.open("r+b" if path.exists() else "xb")
            self._stream.truncate(num_valid)
            self._stream.seek(num_valid)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}; choose another --output") from error
        if not num_valid:
            self._write(header)

    def add(self, index: int, one: Evidence | Failed) -> None:
        """Appends what a problem gave."""
        self.found[index] = one
        values = {"error": one.error} if isinstance(one, Failed) else {"evidence": one.to_dict()}
        self._write({"problem": index, **values})

    def flush(self) -> None:
        """What was added survives whatever comes."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> "EvidenceFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def _write(self, values: dict[str, Any]) -> None:
        self._stream.write(_line(values))


def read_evidence(path: Path) -> tuple[dict[str, Any], list[Evidence]]:
    """(header, evidence by problem, those that failed left out) of a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
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
