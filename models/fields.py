"""Reading config.json field by field: each value checked where it is read, and what nobody read is known.

A field that is absent takes the family's default; null counts as a value where null means something, and as absent
where it does not.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minirksc.models.consolidated import PARAMS_FILE, config_from_params, read_params

from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.json_file import read_json_object

MAX_SIZE = 10**8
"""No real model has a dimension as large; a config that says so is damaged or hostile."""

HARMLESS = frozenset(
    {
        # where the file comes from, and how others run it
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
        "_name_or_path", "architectures", "attn_implementation", "auto_map", "cache_implementation", "dtype",
        "is_decoder", "is_llama_config", "max_sequence_length", "model_type", "output_attentions",
        "output_hidden_states", "quantization_config", "return_dict", "tokenizer_class", "torch_dtype",
        "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
        # training
        "attention_dropout", "embd_pdrop", "gradient_checkpointing", "hidden_dropout", "initializer_range",
        "neftune_noise_alpha", "resid_pdrop", "residual_dropout",
        "pretraining_tp",  # cuts products into parts and adds these up: the same but for rounding
        # labels and other tokens
        "cls_token_id", "decoder_start_token_id", "id2label", "label2id", "mask_token_id", "pad_token_id",
        "problem_type", "sep_token_id", "unk_token_id",
        # sampling defaults of old files; generation_config.json is where they are read from
        "diversity_penalty", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
        "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
"""Fields that do not change the mathematics."""


def stored_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that config.json names, by its new or old name; None when it names none."""
    return config.get("dtype") or config.get("torch_dtype")


class Fields:
    """The fields of one config.json.

    Args:
        config: its content.
        where: "config.json", or the object inside it, for messages.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = dict(config)
        self._defaults: dict[str, Any] = {}
        self._read: set[str] = set()
        self.where = where

    def default(self, **values: Any) -> None:
        """Sets what absent fields are; what was set before stays."""
        self._defaults = values | self._defaults

    def __contains__(self, name: str) -> bool:
        return name in self._config

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it stands, be it null; the default where it is absent."""
        self._read.add(name)
        return self._config.get(name, self._defaults.get(name, default))

    def size(self, name: str, default: int | None = None, limit: int = MAX_SIZE, minimum: int = 1) -> int:
        """An integer, positive as a rule.

        Raises:
            CheckpointError: it is absent without a default, no integer, below the minimum or above the limit.
        """
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= limit:
            raise CheckpointError(f"{self.where}: {name} {value!r:.80} must be an integer from {minimum} to {limit}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number.

        Raises:
            CheckpointError: it is absent without a default, or not such a number.
        """
        return positive(self._value(name, default), f"{self.where}: {name}")

    def optional_number(self, name: str) -> float | None:
        """A positive number; null and absent are None.

        Raises:
            CheckpointError: it is something else.
        """
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """A switch; null and absent are the default, else false.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(name)
        if value is None:
            value = self._defaults.get(name) or False
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} {value!r:.80} must be true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; null and absent are ().

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise CheckpointError(f"{self.where}: {name} {value!r:.80} must be a token id or a list of them")
        return tuple(values)

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What one of some words stands for.

        Raises:
            UnsupportedModelError: it is another word.
        """
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise UnsupportedModelError(f"{name} {value!r:.80} is not supported; known: {', '.join(choices)}")
        return choices[value]

    def per_layer(self, name: str, num_layers: int, allowed: Sequence[Any]) -> list[Any] | None:
        """A list with one of the allowed values a layer; None when null or absent.

        Raises:
            CheckpointError: it is no such list.
        """
        values = self.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != num_layers:
            found = f"{len(values)} entries" if isinstance(values, list) else repr(values)[:80]
            raise CheckpointError(
                f"{self.where}: {name} must have one entry for each of {num_layers} layers, not {found}"
            )
        if wrong := next((v for v in values if v not in allowed), None):
            listed = ", ".join(map(str, allowed))
            raise CheckpointError(f"{self.where}: {name} holds {wrong!r:.80}; known: {listed}")
        return values

    def only(self, name: str, *neutral: Any) -> None:
        """Refuses a field that changes the mathematics in a way that is not implemented.

        Args:
            name: of the field.
            neutral: values that change nothing, besides absent, null, false and nothing at all.

        Raises:
            UnsupportedModelError: it has another value.
        """
        value = self.get(name)
        if value not in (None, False, *neutral):
            raise UnsupportedModelError(f"{self.where}: {name} {value!r:.80} is not supported")

    def check_all_read(self) -> None:
        """Refuses what nothing read, unless it is harmless or empty.

        Raises:
            UnsupportedModelError: names every such field.
        """
        unread = {
            name: value
            for name, value in self._config.items()
            if name not in HARMLESS | self._read and value not in (None, False, [], {})
        }
        if unread:
            listed = ", ".join(f"{name}={value!r:.60}" for name, value in unread.items())
            raise UnsupportedModelError(
                f"{self.where} of model_type {self._config.get('model_type')!r} has fields that nothing reads: "
                f"{listed}; they may change what the model computes"
            )

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = self._defaults.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.where} lacks {name}")
        return value


def positive(value: Any, what: str) -> float:
    """A positive, finite number.

    Raises:
        CheckpointError: it is not; `what` names it.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer may be too large for a float. NaN compares false.
    if not is_number or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{what} {value!r:.80} must be a positive number")
    return float(value)


def load_config(folder: Path) -> dict[str, Any]:
    """Reads config.json, or Mistral's params.json where there is none.

    Raises:
        CheckpointError: it is absent, too large, not JSON or not an object.
    """
    path = folder / "config.json"
    if os.path.lexists(path):
        return read_json_object(path)
    if (folder / PARAMS_FILE).is_file():
        return config_from_params(read_params(folder))
    raise CheckpointError(f"{path} does not exist; a checkpoint folder needs a config.json")
