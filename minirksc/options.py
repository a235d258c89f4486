"""Options of the engine and of a generation: each with its default, its range and its explanation, once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from minirksc.errors import ConfigError, brief
from minirksc.option_fields import REQUIRED, Options, finished, option
from minirksc.option_values import parse_bytes as parse_bytes
from minirksc.option_values import read_biases, read_bytes, read_device, read_ids, read_model, read_names, read_stops
from minirksc.vllm_names import ENGINE_NAMES, SAMPLING_NAMES

MAX_SAMPLES = 256
"""As many as run at once by default; for more, ask twice with different seeds."""
MAX_LOGPROBS = 100
"""More than a person reads, and few enough that a step's results stay small."""
MAX_SEED = 2**64 - 1

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values that change nothing, for what neither the caller nor the checkpoint gives."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@finished
@dataclass(frozen=True, kw_only=True)
class SamplingParams(Options):
    """How one prompt is completed. None in a sampling value means the checkpoint's default, else neutral.

    Applied in this order: logit_bias, penalties, temperature, top_k, top_p, min_p. With max_tokens None there are as
    many tokens as the model's length allows.

    Attributes:
        n: samples of the prompt; sample i is what a request with seed + i gives.
        temperature: scale of the randomness; 0 takes the likeliest token.
        top_p: probability to which the tokens chosen from sum up, the likeliest first.
        top_k: number of likeliest tokens to choose from; 0 or -1: all.
        min_p: least probability of a token to choose from, as a fraction of the likeliest one's.
        repetition_penalty: divisor of the logits of tokens in prompt and text (factor, if negative).
        presence_penalty: amount off the logits of tokens that the text has; of a branch, it and its ancestors.
        frequency_penalty: amount off them for each time that the text has them.
        max_tokens: most new tokens.
        min_tokens: tokens before which nothing ends the answer, neither token nor text.
        stop: text that ends the answer, and may span tokens.
        stop_token_ids: tokens that end it, besides the checkpoint's own.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on after the checkpoint's end tokens.
        seed: seed of the random numbers (default: the engine's next, independent of all others).
        logprobs: number of likeliest tokens to report at each position, beside the chosen one.
        prompt_logprobs: the same number for the prompt.
        logit_bias: amounts to add to the logits of token ids, such as {50: -1.5}.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: give text, not token ids only.
    """

    theirs = SAMPLING_NAMES
    aliases = {"max_new_tokens": "max_tokens"}  # noqa: RUF012 - as transformers calls it

    n: int = option(1, low=1, high=MAX_SAMPLES)
    temperature: float | None = option(None, low=0)
    top_p: float | None = option(None, low=0, high=1, above=True)
    top_k: int | None = option(None, low=-1, high=2**31 - 1)
    min_p: float | None = option(None, low=0, high=1)
    repetition_penalty: float | None = option(None, low=0, above=True)
    presence_penalty: float = option(0.0, low=-2, high=2)
    frequency_penalty: float = option(0.0, low=-2, high=2)
    max_tokens: int | None = option(256, low=1)
    min_tokens: int = option(0, low=0)
    stop: str | Sequence[str] = option((), also={None: ()}, read=read_stops)
    stop_token_ids: Sequence[int] = option((), also={None: ()}, read=read_ids)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = option(None, low=0, high=MAX_SEED)
    logprobs: int | None = option(None, low=0, high=MAX_LOGPROBS)
    prompt_logprobs: int | None = option(None, low=0, high=MAX_LOGPROBS)
    logit_bias: Mapping[int, float] | None = option(None, hash=False, read=read_biases)
    skip_special_tokens: bool = True
    detokenize: bool = True

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
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Options.from_dict`; token ids of logit_bias may be text, since JSON has no other keys.

        Raises:
            ConfigError: a name is unknown or a value is out of range.
        """
        biases = values.get("logit_bias")
        if isinstance(biases, Mapping):
            read = {int(key) if isinstance(key, str) and key.isdecimal() else key: biases[key] for key in biases}
            if len(read) < len(biases):
                raise ConfigError(f"logit_bias {brief(dict(biases))} was given one token id twice")
            values = {**values, "logit_bias": read}
        return super().from_dict(values)

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


@finished
@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """What an engine is made from.

    How threads are chosen is said in `minirksc.engine.threads`, how blocks are evicted in `minirksc.cache.eviction`,
    how numbers are rounded in `minirksc.kernels.weights.int8_weight` and `minirksc.kernels.kv.int8`.

    Attributes:
        model: checkpoint folder, alias or hub id.
        dtype: numbers to compute in; auto: the checkpoint's where the device computes in them, else float32.
        device: device to compute on: auto, cpu, cuda or cuda:N.
        backend: kernels to use: triton on a GPU, native (compiled) or torch on a CPU, or the plain reference.
        threads: threads of the CPU (default: one a physical core that the process may use, or fewer if torch was told
            so).
        kv_cache_bytes: size of the KV cache in bytes, or for example 2GiB (default: a part of what is free once the
            weights are loaded).
        kv_cache_dtype: numbers to keep keys and values in; int8: more tokens in as many bytes, an approximation
            (default: auto, those that are computed in).
        quantize: rounding of the matrices; int8: to 8 bits, and what they are multiplied with: faster, an
            approximation.
        block_size: tokens of a KV block.
        max_model_len: longest sequence (default: the model's).
        max_batch_tokens: tokens computed in one step.
        max_batch_requests: requests that run at once.
        kv_split: division of long contexts among a GPU's programs: alike whatever else is in the batch, or (adaptive)
            by how much there is to do, so that rounding depends on the batch.
        eviction: rule for which cached block goes first.
        prefix_caching: reuse what is cached of a prompt; False computes every prompt anew.
        enforce_eager: never record decode steps, neither as CUDA graphs nor as tapes of compiled CPU operations.
        ignore_config_keys: field of config.json that nothing reads and that, as you know, changes nothing.
        seed: seed from which requests without one take theirs.
    """

    theirs = ENGINE_NAMES

    model: str = option(REQUIRED, read=read_model, metavar="MODEL")
    dtype: str = option("auto", choices=DTYPES, also={"half": "float16", "float": "float32"})
    device: str = option("auto", read=read_device)
    backend: str = option("auto", choices=("auto", "triton", "native", "torch", "reference"))
    threads: int | None = option(None, low=1, high=1024)
    kv_cache_bytes: int | str | None = option(None, read=read_bytes, metavar="SIZE")
    kv_cache_dtype: str = option("auto", choices=("auto", "int8"))
    quantize: str = option("none", choices=("none", "int8"))
    block_size: int = option(16, low=1, high=256)
    max_model_len: int | None = option(None, low=1)
    max_batch_tokens: int = option(2048, low=1)
    max_batch_requests: int = option(256, low=1)
    kv_split: str = option("fixed", choices=("fixed", "adaptive"))
    eviction: str = option("rksc", choices=("rksc", "cost", "lru", "lfu"))
    prefix_caching: bool = True
    enforce_eager: bool = False
    ignore_config_keys: Sequence[str] = option((), read=read_names, metavar="NAME")
    seed: int = option(0, low=0, high=MAX_SEED)
