"""The file of calibrated gates: what `minirksc.calibrate` found, for which model, and under which settings it holds.

A file is refused when it was changed by hand (a checksum), is of another version, or is of another model (a
fingerprint). Settings that differ from those it was made under are no error, but what was found does not hold there:
`read_gates` then calls the gates "uncalibrated", and `GatesFile.differences` says why. The checksum is against
accidents, not against people who can compute one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.errors import ConfigError, MinirkscError, brief
from minirksc.json_file import read_json_object
from minirksc.rksc.cgee import Gates, Lead
from minirksc.rksc.exits import MarginRule

if TYPE_CHECKING:
    from minirksc.rksc.solver_config import SolverConfig

SCHEMA = "minirksc.gates"
SCHEMA_VERSION = 1
REMEDY = "make a new one with `python -m minirksc.calibrate`"

WHOLE_FILES = (
    *("config.json", "params.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer.model", "tekken.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
MAX_FILE_BYTES = 10 << 20
"""Size of a gates file, a thousand times what one has."""

NUM_SAMPLES = 64
SAMPLE_BYTES = 64 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class GatesFile:
    """What a calibration found.

    Attributes:
        gates: gates, of source "calibrated".
        budget: most decisions that change, as a share of problems, ...
        confidence: probability over the calibration problems that it is kept.
        counts: problems, changed decisions and upper bound of each tested step, and what was saved.
        data: sha256 and number of the calibration problems.
        settings: settings that it holds for, see `settings_of`.
        model: fingerprint of the model, see `fingerprint`.
        minirksc_version: version that wrote it.
    """

    gates: Gates
    budget: float
    confidence: float
    counts: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    model: Mapping[str, str]
    minirksc_version: str

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """What is set otherwise than it was for the calibration, one sentence each; [] where nothing is."""
        return [
            f"{name} is {settings.get(name)!r}, but the gates were calibrated with {self.settings.get(name)!r}"
            for name in sorted({*settings, *self.settings})
            if settings.get(name) != self.settings.get(name)
        ]


def settings_of(config: "SolverConfig", llm: Any) -> dict[str, Any]:
    """Everything that decides what branches say, what they are asked and how one is chosen; plain data.

    Neither the seed, since problems are what is drawn at random, nor what changes rounding alone.

    Args:
        config: options of a solve.
        llm: an `LLM`, or a session on one.
    """
    values = config.to_dict()
    sampling = {name: value for name, value in values["sampling"].items() if name not in ("seed", "max_tokens")}
    names = ("branches", "depth", "tokens_per_step", "hints", "verify_style", "select", "chat", "answer_parser")
    stats = llm.stats()
    return {
        **{name: values[name] for name in names},
        **{f"sampling.{name}": value for name, value in sampling.items()},
        "sharing": "semantic" if config.sharing == "semantic" else "exact",  # "none" gives the same tokens
        "decode_exit": config.decode_exit_mode,
        "dtype": stats["dtype"],
        "kv_cache_dtype": stats["kv_cache_dtype"],
        **({} if stats["quantize"] == "none" else {"quantize": stats["quantize"]}),  # older files are silent about it
    }


def read_gates(path: str | Path, model_path: str | Path, settings: Mapping[str, Any] | None = None) -> Gates:
    """The gates in a file.

    Args:
        path: path of the file.
        model_path: folder of the model that they are to be used on.
        settings: settings at hand, see `settings_of`; None: not compared.

    Returns:
        The gates, source "calibrated"; "uncalibrated" where a setting is another one.

    Raises:
        ConfigError: as `read_gates_file`.
    """
    file = read_gates_file(path, model_path)
    if settings is not None and file.differences(settings):
        return replace(file.gates, source="uncalibrated")
    return file.gates


def read_gates_file(path: str | Path, model_path: str | Path) -> GatesFile:
    """All that a file says; see `read_gates`.

    Raises:
        ConfigError: there is no such file, it is none of ours, of another version, was changed, or is of another model.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"gates {path}: there is no such file; {REMEDY}")
    except OSError as error:
        raise ConfigError(f"gates {brief(str(path))} cannot be read: {error.strerror}; {REMEDY}") from error
    content = read_json_object(path, ConfigError, MAX_FILE_BYTES)
    if content.get("schema") != SCHEMA:
        raise ConfigError(f"gates {path}: schema is {brief(content.get('schema'))}, expected {SCHEMA!r}; {REMEDY}")
    if type(content.get("schema_version")) is not int or content["schema_version"] != SCHEMA_VERSION:
        found = brief(content.get("schema_version"))
        raise ConfigError(f"gates {path}: schema_version is {found}, this minirksc reads {SCHEMA_VERSION}; {REMEDY}")
    stored = content.pop("checksum", None)
    expected = checksum(content)
    if stored != expected:
        raise ConfigError(
            f"gates {path}: checksum is {brief(stored)}, its content has {expected!r}: it was changed after the "
            f"calibration, and says what nobody tested; {REMEDY}"
        )
    try:
        file: GatesFile = _read(GatesFile, content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"gates {path}: a field is missing or has another form ({error}); {REMEDY}") from error
    if different := model_differences(file.model, fingerprint(model_path)):
        raise ConfigError(
            f"gates {path}: they were calibrated on another model than {model_path}: {', '.join(different)}; "
            f"use that model, or {REMEDY}"
        )
    return file


def write_gates(path: str | Path, file: GatesFile) -> None:
    """Writes a file that `read_gates` reads, whole or not at all.

    Raises:
        MinirkscError: it cannot be written.
    """
    if file.gates.layer_exit is not None and not isinstance(file.gates.layer_exit, MarginRule):
        raise ConfigError(f"layer_exit={file.gates.layer_exit!r} cannot be calibrated; use a MarginRule")
    content = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(file)}
    del content["gates"]["source"]
    content["checksum"] = checksum(content)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise MinirkscError(f"{path} cannot be written: {error}") from error


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, however it is laid out."""
    # Through JSON once: what was written as a tuple is read as a list.
    canonical = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def fingerprint(folder: str | Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint folder holds: file name -> hash.

    Configuration, tokenizer and chat template whole; of each safetensors file its size, its header, and 64 samples of
    64 KiB, evenly spaced from the first byte to the last: some megabytes however large the model is. It sees another
    model, another fine-tuning, another dtype. It cannot see a change that lies between samples, such as a few weights
    edited by hand, nor code or kernels that compute otherwise.

    Raises:
        ConfigError: a file cannot be read, or the folder has no weights.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{folder} has no *.safetensors, so gates cannot be tied to it; give a checkpoint folder")
    try:
        whole = [folder / name for name in WHOLE_FILES if (folder / name).is_file()]
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in whole}
        return {**found, **{file.name: _weights_hash(file) for file in weights}}
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error


def model_differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, in words; [] where nothing does."""
    found = []
    for name in sorted({*one, *other}):
        if name not in one:
            found.append(f"{name} was not there")
        elif name not in other:
            found.append(f"{name} is missing")
        elif one[name] != other[name]:
            found.append(f"{name} has SHA-256 {other[name][:12]}..., expected {one[name][:12]}...")
    return found


def _weights_hash(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as stream:
        header_len = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header_len, MAX_HEADER_BYTES)))
        room = max(size - SAMPLE_BYTES, 0)
        for begin in sorted({room * index // (NUM_SAMPLES - 1) for index in range(NUM_SAMPLES)}):
            stream.seek(begin)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read(kind: Any, values: Any) -> Any:
    """A dataclass out of plain data, which must have every field; those without a reader the class checks itself."""
    _of_kind(values, dict)
    return kind(**{one.name: _READERS.get(one.name, lambda value: value)(values[one.name]) for one in fields(kind)})


def _of_kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{brief(value)} is no {kind.__name__}")
    return value


def _share(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{brief(value)} is not between 0 and 1")
    return value


def _leads(values: Any) -> tuple[Lead, ...]:
    return tuple(_read(Lead, one) for one in _of_kind(values, list))


def _lines(values: Any) -> tuple[tuple[float, float], ...] | None:
    return None if values is None else tuple((slope, offset) for slope, offset in _of_kind(values, list))


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "gates": lambda values: _read(Gates, _of_kind(values, dict) | {"source": "calibrated"}),
    **dict.fromkeys(("budget", "confidence"), _share),
    **dict.fromkeys(("counts", "data", "settings"), lambda value: _of_kind(value, dict)),
    "model": lambda values: {name: _of_kind(digest, str) for name, digest in _of_kind(values, dict).items()},
    "minirksc_version": lambda value: _of_kind(value, str),
    **dict.fromkeys(("skip", "decode_exit"), _leads),
    "layer_exit": lambda values: None if values is None else _read(MarginRule, values),
    "correction": _lines,
}
"""How each field of a file, its gates or its layer exit is read; no two have a field of one name."""
