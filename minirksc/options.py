"""Options of the engine and of a generation: plain values, checked when they are made."""

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType
from typing import Any, Self, get_args

from minirksc.errors import ConfigError, PromptError, brief
from minirksc.token_ids import BYTES, plain, read_token_ids

MAX_SAMPLES = 256
"""As many as run at once by default; for more, ask twice with different seeds."""
MAX_LOGPROBS = 100
"""More than a person reads, and few enough that a step's results stay small."""
MAX_STOPS = 64
MAX_STOP_LEN = 256
"""Characters. Every new token is held against each beginning of each stop string."""
MAX_FLOAT = 1e30
"""Logits are float32: with this bound no option can make one overflow."""

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values that change nothing, for what neither the caller nor the checkpoint gives."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8")
QUANTIZATIONS = ("none", "int8")
KV_SPLITS = ("fixed", "adaptive")
BACKENDS = ("auto", "triton", "native", "torch", "reference")
EVICTIONS = ("rksc", "cost", "lru", "lfu")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is completed. None in a sampling value means the checkpoint's default, else neutral.

    Applied in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.

    Attributes:
        n: samples of the prompt; sample i is what a request with seed + i gives.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probabilities sum to at least this.
        top_k: the k likeliest tokens; 0 or -1 for all.
        min_p: tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides (multiplies, if negative) the logits of tokens in prompt and output.
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens in the output; of a branch,
            in all that was generated on it and its ancestors.
        max_tokens: None for as many as the model's length allows.
        min_tokens: no end, by token or string, before so many.
        stop: strings that end the text; they may span tokens.
        stop_token_ids: tokens that end it, besides the checkpoint's own.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on after the checkpoint's end tokens.
        seed: of the random numbers; None for the engine's next, which has nothing to do with any other.
        logprobs, prompt_logprobs: report the chosen token's and the top k's log-probabilities.
        logit_bias: added to the logits of these token ids.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False gives token ids only.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 256
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        _check_kinds(self)
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _as_ids("stop_token_ids", self.stop_token_ids))
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_float("temperature", self.temperature, 0)
        _check_float("top_p", self.top_p, 0, 1, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_float("min_p", self.min_p, 0, 1)
        _check_float("repetition_penalty", self.repetition_penalty, 0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_stops(stop)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ConfigError(
                    f"logit_bias {brief(self.logit_bias)} must map token ids to numbers, as in {{50: -1.5}}"
                )
            ids = _as_ids("logit_bias", list(self.logit_bias))
            if len(set(ids)) < len(ids):
                raise ConfigError(f"logit_bias {brief(self.logit_bias)} names a token id twice")
            biases = dict(zip(ids, self.logit_bias.values(), strict=True))  # the caller may change theirs
            object.__setattr__(self, "logit_bias", biases)
        for token_id, bias in (self.logit_bias or {}).items():
            _check_float(f"logit_bias[{brief(token_id)}]", bias, optional=False)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower one")
        if self.stop and not self.detokenize:
            raise ConfigError("stop strings need text: leave detokenize on, or use stop_token_ids")
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(
                f"n={self.n} with temperature 0 gives {self.n} equal samples; raise temperature or use n=1"
            )

    def resolved(self, defaults: Mapping[str, float]) -> "SamplingParams":
        """A copy without None in the sampling values: `defaults` first, then neutral values."""
        missing: dict[str, Any] = {
            name: type(neutral)(defaults.get(name, neutral))
            for name, neutral in NEUTRAL.items()
            if getattr(self, name) is None
        }
        return replace(self, **missing) if missing else self

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses ids that the model does not have: they would do nothing.

        Raises:
            ConfigError: one of stop_token_ids or logit_bias is not below vocab_size.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ConfigError(
                        f"{name} holds {brief(token_id)}, outside the vocabulary; ids are 0..{vocab_size - 1}"
                    )

    @classmethod
    def of(cls, params: Any) -> Self:
        """Sampling parameters as a call takes them: made already, a mapping of names to values, or None for defaults.

        Raises:
            ConfigError: it is something else, or a name or value is wrong.
        """
        if isinstance(params, cls):
            return params
        if params is None or isinstance(params, Mapping):
            return cls.from_dict(params or {})
        raise ConfigError(f"sampling parameters must be SamplingParams or a dict of their fields, not {brief(params)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From names and values as they arrive in a file or a request; max_new_tokens is understood.

        Raises:
            ConfigError: a name is unknown (close ones are suggested) or a value is out of range.
        """
        values = dict(values)
        if "max_new_tokens" in values:
            if "max_tokens" in values:
                raise ConfigError("max_tokens and max_new_tokens are the same option; give one")
            values["max_tokens"] = values.pop("max_new_tokens")
        if isinstance(values.get("logit_bias"), Mapping):  # JSON has string keys only
            biases = [(_as_int(k), v) for k, v in values["logit_bias"].items()]
            values["logit_bias"] = dict(biases)
            if len(values["logit_bias"]) < len(biases):
                raise ConfigError(f"logit_bias {brief(dict(biases))} was given one token id twice")
        _check_names(cls, values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is made from.

    Attributes:
        model: checkpoint folder or alias.
        dtype: "auto" is the checkpoint's where the device computes in it, else float32.
        device: "auto", "cpu", "cuda" or "cuda:N".
        kv_cache_bytes: size of the KV cache, a number or a string such as "2GiB"; None: a part of what is free once the
            weights are loaded.
        kv_cache_dtype: "auto" is the one that the model computes in; "int8" halves a 16-bit cache and is an
            approximation: each token's keys and values, head by head, are rounded to 8 bits.
        quantize: "int8" rounds matrices to 8 bits as they are loaded, and what they are multiplied with: an
            approximation, faster, with half of the memory of 16 bits; see `kernels.weights.int8_weight`.
        block_size: tokens a KV block.
        max_batch_tokens: tokens computed in one step.
        max_batch_requests: requests that run at once.
        max_model_len: longest sequence; None: what the model was made for.
        threads: of the CPU; None: one a physical core that the process may use, or fewer if torch was told so; see
            `minirksc.engine.threads`.
        backend: "triton" (GPU), "native" (CPU, compiled), "torch" (CPU) or "reference"; "auto" is the device's best.
        enforce_eager: never record decode steps, neither as CUDA graphs nor as tapes of compiled CPU operations.
        kv_split: how long contexts are cut among a GPU's programs. "fixed": at the same positions whatever else is in
            the batch; "adaptive": by how much there is to do, so that rounding depends on the batch.
        eviction: which cached block goes first: "rksc", "cost", "lru" or "lfu"; see `minirksc.cache.eviction`.
        prefix_caching: False computes every prompt anew.
        ignore_config_keys: fields of config.json that nothing here reads and that change nothing, as you know.
        seed: where requests without a seed take theirs from.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    kv_cache_bytes: int | str | None = None
    kv_cache_dtype: str = "auto"
    quantize: str = "none"
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_batch_requests: int = 256
    max_model_len: int | None = None
    threads: int | None = None
    backend: str = "auto"
    enforce_eager: bool = False
    kv_split: str = "fixed"
    eviction: str = "rksc"
    prefix_caching: bool = True
    ignore_config_keys: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model {self.model!r} must be a checkpoint folder or an alias, as text")
        _check_kinds(self)
        if isinstance(self.kv_cache_bytes, str):
            object.__setattr__(self, "kv_cache_bytes", parse_bytes(self.kv_cache_bytes))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _check_choice("quantize", self.quantize, QUANTIZATIONS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("kv_split", self.kv_split, KV_SPLITS)
        _check_choice("eviction", self.eviction, EVICTIONS)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise ConfigError(f"device {self.device!r} is unknown; use auto, cpu, cuda or cuda:N")
        _check_int("kv_cache_bytes", self.kv_cache_bytes, 1, None)
        _check_int("block_size", self.block_size, 1, 256)
        _check_int("max_batch_tokens", self.max_batch_tokens, 1, None)
        _check_int("max_batch_requests", self.max_batch_requests, 1, None)
        _check_int("max_model_len", self.max_model_len, 1, None)
        _check_int("threads", self.threads, 1, 1024)
        keys = self.ignore_config_keys
        if isinstance(keys, str) or not all(isinstance(key, str) for key in _as_tuple("ignore_config_keys", keys)):
            raise ConfigError(f"ignore_config_keys {keys!r:.200} must be a list of names, such as ['my_field']")
        object.__setattr__(self, "ignore_config_keys", tuple(keys))
        _check_int("seed", self.seed, 0, 2**64 - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From names and values.

        Raises:
            ConfigError: a name is unknown (close ones are suggested) or a value is out of range.
        """
        _check_names(cls, values)
        return cls(**values)


def parse_bytes(text: str) -> int:
    """Bytes from "512MiB", "2GB", "1.5 GiB" or a plain number.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"{text!r} is not a size; write bytes, or for example 512MiB or 2GB")
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _as_int(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    value = plain(value)
    if not isinstance(value, Sequence | Set) or isinstance(value, (str, *BYTES)):
        raise ConfigError(f"{name} {brief(value)} must be a list; leave it out for none")
    return tuple(value)


def _as_ids(name: str, value: Any) -> tuple[int, ...]:
    try:
        return tuple(read_token_ids(_as_tuple(name, value)))
    except PromptError as error:
        raise ConfigError(f"{name}: {error}") from error


def _check_stops(stop: Sequence[Any]) -> None:
    if len(stop) > MAX_STOPS:
        raise ConfigError(f"stop holds {len(stop)} strings, more than {MAX_STOPS}; keep those that matter")
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ConfigError(f"stop holds {brief(string)}; it takes non-empty strings")
        if len(string) > MAX_STOP_LEN:
            raise ConfigError(f"stop holds a string of {len(string)} characters; shorten it to {MAX_STOP_LEN} or less")


def _check_kinds(options: Any) -> None:
    """None only where the type allows it, and switches are True or False: "false" would switch on."""
    for one in fields(options):
        value = getattr(options, one.name)
        if value is None and NoneType not in get_args(one.type):
            raise ConfigError(f"{one.name} None is not a value; leave it out for the default")
        if isinstance(one.default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{one.name} {brief(value)} must be True or False")


def _check_names(cls: Any, values: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(cls)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}; {hint}")
    for one in fields(cls):
        if one.default is MISSING and one.name not in values:
            raise ConfigError(f"option {one.name!r} is missing; it has no default")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {brief(value)} is unknown; choose one of {', '.join(choices)}")


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """None passes: it means that the option was not given."""
    if value is None:
        return
    allowed = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} {brief(value)} must be an integer, {allowed}")
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name} {brief(value)} is out of range; it must be {allowed}")


def _check_float(
    name: str,
    value: Any,
    low: float = -MAX_FLOAT,
    high: float = MAX_FLOAT,
    open_low: bool = False,
    optional: bool = True,
) -> None:
    """None, if optional, passes: it means that the option was not given."""
    if value is None and optional:
        return
    allowed = f"{'above' if open_low else 'at least'} {low:g}, at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} {brief(value)} must be a number, {allowed}")
    # NaN compares false, and an int beyond all floats compares where math.isfinite would raise.
    if not low <= value <= high or (open_low and value == low):
        raise ConfigError(f"{name} {brief(value)} is out of range; it must be {allowed}")
