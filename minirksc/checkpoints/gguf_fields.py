"""Fields of a GGUF file below one prefix, read with errors that name them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minirksc.errors import CheckpointError

LARGEST_DECIMAL = float(np.finfo(np.float32).max)


class GgufFields:
    """Fields of a GGUF file below one prefix; a missing or ill-typed one is an error that names it.

    Args:
        source: path of the file, for messages.
        fields: all fields of the file.
        prefix: beginning of the names of these, "qwen2." for example.
    """

    def __init__(self, source: Path, fields: Mapping[str, Any], prefix: str) -> None:
        self.source = source
        self.prefix = prefix
        self._fields = {name.removeprefix(prefix): v for name, v in fields.items() if name.startswith(prefix)}

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default."""
        return self._fields.get(name, default)

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise CheckpointError(f"{self.source} lacks the field {self.prefix}{name}")
        return self._fields[name]

    def error(self, name: str, fault: str) -> CheckpointError:
        """What to raise for a field.

        Args:
            name: name of the field.
            fault: predicate that says what is wrong with it, "is 0, expected a number" for example.
        """
        return CheckpointError(f"{self.source}: {self.prefix}{name} {fault}")

    def untranslatable(self, fault: str) -> CheckpointError:
        """What to raise for what a checkpoint cannot say as the file does; `fault`: sentence that says so."""
        return CheckpointError(f"{self.source}: {fault}; use the safetensors checkpoint of this model")

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            CheckpointError: it is none, or is absent and has no default.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"is {value!r:.80}, expected a positive integer")
        return value

    def decimal(self, name: str, default: float | None = None) -> float:
        """The shortest decimal of a stored float32: 9.999999747378752e-06 was 1e-5.

        Raises:
            CheckpointError: it is no number, or is absent and has no default.
        """
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_DECIMAL:
            raise self.error(name, f"is {value!r:.80}, expected a number")
        return float(str(np.float32(value)))

    def check_known(self, known: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Refuses fields that nothing reads.

        Args:
            known: names of the fields that are read.
            neutral: values with which a field means nothing, by its name.

        Raises:
            CheckpointError: there is another one.
        """
        for name, value in self._fields.items():
            if name not in known and not (name in neutral and neutral[name] == value):
                raise self.untranslatable(f"the field {self.prefix}{name} = {value!r:.80} cannot be translated")
