"""GGUF file to checkpoint folder: config.json, model.safetensors, tokenizer.json and their companions.

The `gguf` package reads and dequantises; here names and conventions are translated back. llama.cpp stores the
rows of q and k with rotary pairs side by side, Hugging Face checkpoints with halves apart. What cannot be
translated exactly is refused by name, never dropped.

Source: the fields as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names them; the split patterns of
pre-tokenizers as the tokenizers of GPT-2, SmolLM and Llama 3 were published, and llama.cpp's "default".
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minirksc.errors import CheckpointError

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ATTENTION_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_PARTS = ("ffn_gate", "ffn_up", "ffn_down")
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
DTYPES = tuple(ITEM_BYTES)
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONTROL, USER_DEFINED = 3, 4  # GGUF token types

KNOWN_FIELDS = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "tensor_data_layout"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),  # linear scaling needs neither
    )
)
NEUTRAL_FIELDS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0}
"""Fields that mean nothing with these values."""

PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "default")
LLAMA_BPE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


class GgufModel:
    """An opened GGUF file that can be translated.

    Args:
        source: the file.

    Raises:
        CheckpointError: it is no GGUF file, or holds what cannot be translated.
    """

    def __init__(self, source: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError("reading GGUF files needs the gguf package: pip install 'minirksc[demo]'") from error
        try:
            self._reader = gguf.GGUFReader(source)
            fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # of a damaged file, whatever the reader stumbles over
            raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from error
        architecture = fields.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{source}: architecture {architecture!r} cannot be imported; known: llama")
        self._source = source
        self._fields = fields
        self._model = _Section(source, fields, "llama.")
        self._tokens = _Section(source, fields, "tokenizer.ggml.")
        self._shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._reader.tensors}
        self._config = self._make_config()
        self._check_tensors()
        self._tokenizer = _build_tokenizer(self._tokens)

    def num_bytes(self, dtype: str) -> int:
        """About how many bytes the checkpoint takes; the tokenizer's share is a guess.

        Args:
            dtype: of the weights, "bfloat16" or "float32".
        """
        num_weights = sum(int(np.prod(shape)) for shape in self._shapes.values())
        return num_weights * ITEM_BYTES[dtype] + 3 * int(self._reader.data_offset)

    def write(self, folder: Path, dtype: str, on_tensor: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Writes the checkpoint into an existing, empty folder.

        Args:
            folder: where the files go.
            dtype: of the weights, "bfloat16" or "float32".
            on_tensor: called with (tensors done, tensors in all).

        Raises:
            CheckpointError: a tensor is damaged or of a kind that cannot be dequantised.
            OSError, safetensors.SafetensorError: a file cannot be written.
        """
        import gguf
        import torch
        from safetensors.torch import save_file

        weights = {}
        for done, tensor in enumerate(self._reader.tensors):
            try:
                data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{self._source}: tensor {tensor.name} cannot be dequantised: {error}") from error
            data = data.reshape(self._shapes[tensor.name])
            if _part_of(tensor.name) in ("attn_q", "attn_k"):
                data = _halves_apart(data, self._config["head_dim"])
            weights[_translate(tensor.name)] = data.to(getattr(torch, dtype)).contiguous()
            on_tensor(done + 1, len(self._reader.tensors))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self._tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in self._json_files(dtype):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def _make_config(self) -> dict[str, Any]:
        model = self._model
        model.check_known()
        heads, hidden = model.integer("attention.head_count"), model.integer("embedding_length")
        head_dim = model.integer("attention.key_length", hidden // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if model.integer(name, head_dim) != head_dim:
                raise CheckpointError(
                    f"{self._source}: {model.prefix}{name} is {model[name]}, only the head size {head_dim} is supported"
                )
        has = {_part_of(name) for name in self._shapes if name.endswith(".bias")}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": model.integer("feed_forward_length"),
            "num_hidden_layers": model.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": model.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self._shapes.get("token_embd.weight", (0,))[0],
            "max_position_embeddings": model.integer("context_length"),
            "rope_theta": _decimal(model.get("rope.freq_base", 10000.0)),
            "rope_scaling": _rope_scaling(model, "rope_freqs.weight" in self._shapes),
            "rms_norm_eps": _decimal(model["attention.layer_norm_rms_epsilon"]),
            "attention_bias": bool(has & set(ATTENTION_PARTS)),
            "mlp_bias": bool(has & set(MLP_PARTS)),
            "tie_word_embeddings": "output.weight" not in self._shapes,
        }

    def _check_tensors(self) -> None:
        """Every tensor of the model is there with its shape, and no other is."""
        expected = dict(_expected_shapes(self._config))
        problems = [f"{name} is missing" for name in expected.keys() - self._shapes.keys()]
        problems += [f"{name} is not known" for name in self._shapes.keys() - expected.keys()]
        problems += [
            f"{name} is {list(shape)} and should be {list(expected[name])}"
            for name, shape in self._shapes.items()
            if expected.get(name, shape) != shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"the tensors of {self._source} do not fit a llama: {'; '.join(sorted(problems)[:5])}{more}"
            )

    def _json_files(self, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
        tokens = self._tokens
        ids = {
            name: tokens[f"{source}_token_id"]
            for name, source in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
            if tokens.get(f"{source}_token_id") is not None
        }
        words = tokens["tokens"]
        settings: dict[str, Any] = {f"{name}_token": words[i] for name, i in ids.items()}
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": _adds_bos(tokens),
        }
        if "tokenizer.chat_template" in self._fields:
            settings["chat_template"] = self._fields["tokenizer.chat_template"]
        model_ids = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
        # Whatever ends a turn or a message ends generation too.
        ends = [tokens.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(i for i in ends if i is not None))
        if len(ends) > 1:
            model_ids["eos_token_id"] = ends
        yield "config.json", {**self._config, **model_ids, "torch_dtype": dtype}
        yield "generation_config.json", model_ids
        yield "tokenizer_config.json", settings


class _Section:
    """Fields of a GGUF file below one prefix; a missing or ill-typed one is an error that names it."""

    def __init__(self, source: Path, fields: Mapping[str, Any], prefix: str) -> None:
        self.prefix = prefix
        self._source = source
        self._fields = {name.removeprefix(prefix): v for name, v in fields.items() if name.startswith(prefix)}

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self[name] if default is None else self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self._source}: {self.prefix}{name} is {value!r:.80}, expected a positive integer")
        return value

    def check_known(self) -> None:
        for name, value in self._fields.items():
            if name not in KNOWN_FIELDS and not (name in NEUTRAL_FIELDS and NEUTRAL_FIELDS[name] == value):
                raise CheckpointError(
                    f"{self._source}: the field {self.prefix}{name} = {value!r:.80} cannot be translated; "
                    "use the safetensors checkpoint of this model"
                )

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise CheckpointError(f"{self._source} lacks the field {self.prefix}{name}")
        return self._fields[name]


def _rope_scaling(model: _Section, has_factors: bool) -> dict[str, Any] | None:
    factor = model.get("rope.scaling.factor", model.get("rope.scale_linear", 1.0)) or 1.0
    kind = model.get("rope.scaling.type", "linear")  # what a factor without a type means
    if has_factors or kind not in ("none", "linear"):
        what = "stored frequencies (rope_freqs.weight, as of Llama 3.1 and later)" if has_factors else f"type {kind!r}"
        raise CheckpointError(
            f"RoPE scaling with {what} cannot be translated from GGUF exactly; "
            "use the safetensors checkpoint of this model"
        )
    return {"rope_type": "linear", "factor": _decimal(factor)} if kind == "linear" and factor != 1.0 else None


def _expected_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    yield "token_embd.weight", (vocab, hidden)
    yield "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", (vocab, hidden)
    matrices = {
        "attn_q": (q_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, q_rows),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    for layer in range(config["num_hidden_layers"]):
        for part in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{part}.weight", (hidden,)
        for part, shape in matrices.items():
            yield f"blk.{layer}.{part}.weight", shape
            if config["attention_bias" if part in ATTENTION_PARTS else "mlp_bias"]:
                yield f"blk.{layer}.{part}.bias", shape[:1]


def _part_of(name: str) -> str:
    """The layer's part in "blk.LAYER.PART.KIND"; "" for other tensors."""
    parts = name.split(".")
    return parts[2] if len(parts) == 4 and parts[0] == "blk" else ""


def _translate(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def _halves_apart(rows: Any, head_dim: int) -> Any:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(rows.shape)


def _decimal(number: float) -> float:
    """The shortest decimal of a stored float32: 9.999999747378752e-06 was 1e-5."""
    return float(str(np.float32(number)))


def _adds_bos(tokens: _Section) -> bool:
    return bool(tokens.get("add_bos_token", tokens.get("pre") == "llama-bpe"))


def _build_tokenizer(tokens: _Section) -> Any:
    """A byte-level BPE tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind, pre = tokens["model"], tokens.get("pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} cannot be imported; known: gpt2 with {known}"
        )
    if tokens.get("add_eos_token", False):
        raise CheckpointError("a tokenizer that ends every prompt with EOS cannot be imported (add_eos_token)")
    words = tokens["tokens"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [tuple(merge.split(" ")) for merge in tokens["merges"]]
    try:
        # Llama 3 takes a whole word from its vocabulary before it looks at merges.
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"the tokenizer's merges do not fit its vocabulary: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(word, special=special, normalized=False)
            for word, token_type in zip(words, tokens["token_type"], strict=True)
            if token_type == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if _adds_bos(tokens):
        bos = words[tokens["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokens["bos_token_id"])]
        )
    return tokenizer


def _pre_tokenizer(pre: str) -> Any:
    """What splits text before BPE."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre in ("smollm", "gpt-2"):  # ByteLevel knows GPT-2's pattern
        digits = [Digits(individual_digits=True)] if pre == "smollm" else []
        return Sequence([*digits, ByteLevel(add_prefix_space=False)])
    patterns = (LLAMA_BPE_SPLIT,) if pre == "llama-bpe" else DEFAULT_SPLITS
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
