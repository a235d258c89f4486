"""Reading config.json field by field: each value checked where it is read, and what nothing read is known.

A field that is absent takes the family's default; null counts as a value where null means something, and as absent
where it does not.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from minirksc.errors import CheckpointError, UnsupportedModelError, listing

MAX_SIZE = 10**8
"""No real model has a dimension as large; a config that says so is damaged or hostile."""

MAX_NUMBER = 3.4e38
"""Models are computed in float32 at best, which knows no larger number."""

HARMLESS = frozenset(
    {
        # where the file comes from, and how others run it
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_experts_implementation", "_flash_attn_2_enabled", "_name_or_path", "architectures", "attn_implementation",
        "auto_map", "base_model", "base_model_name_or_path", "bf16", "cache_implementation", "chunk_size_feed_forward",
        "device_map", "dtype", "finetuning_task", "fp16", "fp32", "framework", "is_decoder", "is_llama_config",
        "library_name", "license", "license_link", "license_name", "low_cpu_mem_usage", "max_sequence_length",
        "max_seq_len", "max_seq_length", "model_name", "model_type", "model_version", "name_or_path",
        "num_logits_to_keep", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
        "pipeline_tag", "quantization_config", "return_dict", "return_dict_in_generate", "revision", "seq_length",
        "task_specific_params", "tensor_parallel_size", "tokenizer_class", "torch_dtype", "torchscript", "tp_size",
        "transformers.js_config", "transformers_version", "transformers_weights", "trust_remote_code", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache", "use_flash_attention", "use_flash_attention_2",
        "use_flash_attn",
        # training
        "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_dropout", "attn_pdrop",
        "classifier_dropout", "dropout", "embd_pdrop", "embedding_dropout", "ffn_dropout", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "hidden_dropout", "hidden_dropout_prob", "init_method", "init_std",
        "initializer_factor", "initializer_range", "label_smoothing", "layerdrop", "loss_function", "loss_type",
        "max_grad_norm", "neftune_noise_alpha", "resid_dropout", "resid_pdrop", "residual_dropout",
        "use_gradient_checkpointing", "use_reentrant", "z_loss", "z_loss_coefficient",
        "pretraining_tp",  # cuts products into parts and adds these up: the same but for rounding
        # labels, the tokenizer and its tokens
        "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "bos_token",
        "chat_template", "clean_up_tokenization_spaces", "cls_token", "cls_token_id", "decoder_start_token_id",
        "eos_token", "id2label", "label2id", "mask_token", "mask_token_id", "model_max_len", "model_max_length",
        "num_labels", "pad_token", "pad_token_id", "padding_idx", "padding_side", "problem_type", "sep_token",
        "sep_token_id", "tokenizer_file", "tokenizer_model_max_length", "tokenizer_name", "tokenizer_padding_side",
        "truncation_side", "unk_token", "unk_token_id",
        # sampling defaults of old files; generation_config.json is where they are read from
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
        "forced_bos_token_id", "forced_eos_token_id", "frequency_penalty", "guidance_scale", "length_penalty",
        "max_length", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
        "num_assistant_tokens", "num_beam_groups", "num_beams", "num_return_sequences", "penalty_alpha", "prefix",
        "presence_penalty", "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias",
        "stop_strings", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
"""Fields that do not change the mathematics."""

ALWAYS_ON = re.compile(
    r"(is_|use_|with_|apply_|enable_)?"
    r"(causal|autoregressive|unidirectional|rope|rotary|rotary_emb|rotary_embeddings?|rms_?norm|pre_?norm|gated_mlp|"
    r"(swi)?glu|residuals?|softmax)(_mask|_attention|_attn|_lm)?"
    r"|normalize_before|do_layer_norm_before|scale_attn_weights"
)
"""Switches of what every decoder here does: true says nothing new, and whatever else does."""

FACTOR = re.compile(r".*(factor|scale|scaling|scalar|multiplier|theta|pct|percentage|percent)")
"""What something is multiplied by: 0 is not nothing there, while 1 is."""

NEUTRAL = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "output_multiplier", "lm_head_multiplier"), 1),
    **dict.fromkeys(("logit_scale", "logits_scaling", "logits_scale", "embedding_scale", "residual_scale"), 1),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_percentage", "rotary_percent"), 1),
    **dict.fromkeys(("rope_scaling_factor", "rope_scale"), 1),
    "pruned_heads": {},
}
"""Values that change nothing, of fields that may."""


def stored_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that config.json names, by its new or old name; None when it names none."""
    return config.get("dtype") or config.get("torch_dtype")


class Fields:
    """The fields of one config.json.

    Args:
        config: content of the file.
        where: name of the file or of an object inside it, for messages.
        ignored: names of fields that are passed over where nothing reads them, since the caller said so.

    Attributes:
        where: see above.
        passed: names out of `ignored` that were met.
    """

    def __init__(
        self, config: Mapping[str, Any], where: str = "config.json", ignored: Collection[str] = frozenset()
    ) -> None:
        self._config = dict(config)
        self._defaults: dict[str, Any] = {}
        self._read: set[str] = set()
        self._ignored = ignored
        self.passed: set[str] = set()
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

    def given(self, name: str) -> Any:
        """A field; its default where it is absent or null."""
        value = self.get(name)
        return self._defaults.get(name) if value is None else value

    def size(self, name: str, default: int | None = None, limit: int = MAX_SIZE, minimum: int = 1) -> int:
        """An integer, positive as a rule.

        Raises:
            CheckpointError: it is absent without a default, no integer, below the minimum or above the limit.
        """
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= limit:
            raise CheckpointError(f"{self.where}: {name} {value!r:.80} must be an integer from {minimum} to {limit}")
        return value

    def count(self, name: str) -> int:
        """How many or how large something is that need not be there: an integer, null and absent are 0.

        Raises:
            CheckpointError: it is something else.
        """
        return 0 if self.get(name) is None else self.size(name, minimum=0)

    def number(self, name: str) -> float:
        """A positive, finite number.

        Raises:
            CheckpointError: it is absent without a default, or not such a number.
        """
        return positive(self._value(name), f"{self.where}: {name}")

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
        value = self.given(name)
        if not isinstance(value, bool | None):
            raise CheckpointError(f"{self.where}: {name} {value!r:.80} must be true or false")
        return bool(value)

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
        if unknown := [value for value in values if value not in allowed]:
            listed = ", ".join(map(str, allowed))
            raise CheckpointError(f"{self.where}: {name} holds {unknown[0]!r:.80}; known: {listed}")
        return values

    def only(self, name: str, *neutral: Any) -> None:
        """Refuses a field that changes the mathematics in a way that is not implemented.

        Args:
            name: name of the field.
            neutral: values that change nothing, besides absent, null and false.

        Raises:
            UnsupportedModelError: it has another value.
        """
        value = self.get(name)
        if value not in (None, False, *neutral):
            raise UnsupportedModelError(f"{self.where}: {name} {value!r:.80} is not supported")

    def pass_over(self, names: Collection[str]) -> list[str]:
        """Of names that nothing reads, those that are not to be ignored, sorted."""
        self.passed.update(name for name in names if name in self._ignored)
        return sorted(name for name in names if name not in self._ignored)

    def check_all_read(self) -> None:
        """Refuses what nothing read, unless it is harmless, neutral or to be ignored.

        Raises:
            UnsupportedModelError: names every such field.
        """
        names = self._config.keys() - HARMLESS - self._read
        unread = self.pass_over([name for name in names if not _is_neutral(name, self._config[name])])
        if unread:
            listed = listing([f"{name}={self._config[name]!r:.60}" for name in unread], ", ")
            raise UnsupportedModelError(
                f"{self.where} of model_type {self._config.get('model_type')!r:.80} has fields that nothing reads: "
                f"{listed}; they may change what the model computes. If you know that one does not, pass it over: "
                f"ignore_config_keys=({unread[0]!r:.200},), --ignore-config-key {unread[0]:.200}"
            )

    def _value(self, name: str, default: Any = None) -> Any:
        value = default if self.given(name) is None else self.given(name)
        if value is None:
            raise CheckpointError(f"{self.where} lacks {name}")
        return value


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field that nothing reads says no more than that there is nothing."""
    if ALWAYS_ON.fullmatch(name):
        return value is True
    if name in NEUTRAL:
        return value is None or (not isinstance(value, bool) and value == NEUTRAL[name])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == 0 and not FACTOR.fullmatch(name)
    return value is None or value is False or value == []


def positive(value: Any, what: str) -> float:
    """A positive number that float32 can hold.

    Raises:
        CheckpointError: it is not; `what` names it.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer may be too large for a float. NaN compares false.
    if not is_number or not 0 < value <= MAX_NUMBER:
        raise CheckpointError(f"{what} {value!r:.80} must be a positive number")
    return float(value)
