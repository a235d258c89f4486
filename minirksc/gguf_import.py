"""GGUF file to checkpoint folder: config.json, model.safetensors, tokenizer.json and their companions.

The `gguf` package reads and dequantises; here names and conventions are translated back. llama.cpp stores the
rows of q and k with rotary pairs side by side, Hugging Face checkpoints with halves apart.
What cannot be translated exactly is refused, never dropped.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
PERMUTED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "llama-bpe")
DTYPES = ("bfloat16", "float32")
CONTROL, USER_DEFINED = 3, 4  # GGUF token types

LLAMA_BPE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before BPE; published with its tokenizer."""


def write_checkpoint(
    source: Path, folder: Path, dtype: str, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Writes the checkpoint into an existing, empty folder.

    Args:
        source: the GGUF file.
        folder: where the files go.
        dtype: of the weights, "bfloat16" or "float32".
        on_tensor: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: the file is no GGUF, or holds what cannot be translated.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("reading GGUF files needs the gguf package: pip install gguf") from error
    import torch
    from safetensors.torch import save_file

    try:
        reader = gguf.GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from error
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{source}: architecture {architecture!r} cannot be imported; known: llama")
    model = _Section(source, fields, "llama.")
    tokens = _Section(source, fields, "tokenizer.ggml.")
    _check_rope(model, {tensor.name for tensor in reader.tensors})

    weights = {}
    for done, tensor in enumerate(reader.tensors):
        name, heads = _translate(tensor.name, model)
        data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if heads is not None:
            data = _halves_apart(data, heads)
        weights[name] = data.to(getattr(torch, dtype)).contiguous()
        on_tensor(done + 1, len(reader.tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _build_tokenizer(tokens).save(str(folder / "tokenizer.json"))
    template = fields.get("tokenizer.chat_template")
    tied = "lm_head.weight" not in weights
    for name, content in _json_files(model, tokens, template, tied, dtype):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Section:
    """Fields of a GGUF file below one prefix; a missing one is an error that names it."""

    def __init__(self, source: Path, fields: Mapping[str, Any], prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self._fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(self._prefix + name, default)

    def __getitem__(self, name: str) -> Any:
        if self._prefix + name not in self._fields:
            raise CheckpointError(f"{self._source} lacks the field {self._prefix}{name}")
        return self._fields[self._prefix + name]


def _check_rope(model: _Section, tensor_names: set[str]) -> None:
    scaling = model.get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        raise CheckpointError(
            f"RoPE scaling ({scaling}, or stored frequencies) cannot be translated from GGUF exactly; "
            "use the safetensors checkpoint of this model"
        )


def _translate(name: str, model: _Section) -> tuple[str, int | None]:
    """(checkpoint name, heads whose rows are to be reordered or None)."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], None
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER_NAMES:
        raise CheckpointError(f"tensor {name!r} of the GGUF file is not known")
    _, layer, part, kind = parts
    heads = model[PERMUTED[part]] if part in PERMUTED else None
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}", heads


def _halves_apart(rows: Any, heads: int) -> Any:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _build_tokenizer(tokens: _Section) -> Any:
    """A byte-level BPE tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = tokens["model"], tokens.get("pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} cannot be imported; "
            f"known: gpt2 with one of {', '.join(PRE_TOKENIZERS)}"
        )
    words = tokens["tokens"]
    merges = [tuple(merge.split(" ")) for merge in tokens["merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre == "llama-bpe":
        split = pre_tokenizers.Split(Regex(LLAMA_BPE_SPLIT), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = tokens["token_type"]
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(word, special=special, normalized=False)
            for word, token_type in zip(words, types, strict=True)
            if token_type == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if tokens.get("add_bos_token", False):
        bos = words[tokens["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens["bos_token_id"])]
        )
    return tokenizer


def _json_files(
    model: _Section, tokens: _Section, template: str | None, tied: bool, dtype: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    heads, hidden = model["attention.head_count"], model["embedding_length"]
    special = {
        name: tokens[f"{source}_token_id"]
        for name, source in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if tokens.get(f"{source}_token_id") is not None
    }
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special}
    words = tokens["tokens"]
    length = model["context_length"]
    yield (
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": model["feed_forward_length"],
            "num_hidden_layers": model["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": model.get("attention.head_count_kv", heads),
            "head_dim": model.get("attention.key_length", hidden // heads),
            "vocab_size": len(words),
            "max_position_embeddings": length,
            "rope_theta": model.get("rope.freq_base", 10000.0),
            # Stored as float32: 1e-5 comes back as 9.999999747378752e-06.
            "rms_norm_eps": float(f"{model['attention.layer_norm_rms_epsilon']:.3g}"),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
            **ids,
        },
    )
    yield "generation_config.json", ids
    settings: dict[str, Any] = {f"{name}_token": words[i] for name, i in special.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(tokens.get("add_bos_token", False)),
    }
    if template is not None:
        settings["chat_template"] = template
    yield "tokenizer_config.json", settings
