"""Tiny random Llama checkpoints, written without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(
    folder,
    *,
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=24,
    intermediate=96,
    vocab=300,
    max_len=512,
    tie=True,
    attention_bias=False,
    mlp_bias=False,
    rope_theta=10000.0,
    rope_scaling=None,
    dtype="float32",
    shards=1,
    seed=0,
    tokenizer=False,
    chat=False,
):
    """Writes config.json and weights (and a byte-level tokenizer); returns the config.

    Layers outweigh the embedding, so that greedy text varies instead of repeating one token. Norm weights lie
    far from 1 and head_dim differs from hidden / heads, so that a model that ignores either is caught.
    """
    folder = Path(folder)
    gen = torch.Generator().manual_seed(seed)
    torch_dtype = getattr(torch, dtype)

    def randn(*shape, std=0.25):
        return (torch.randn(shape, generator=gen) * std).to(torch_dtype)

    weights = {"model.embed_tokens.weight": randn(vocab, hidden, std=0.2)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name, rows, columns, bias in (
            ("self_attn.q_proj", heads * head_dim, hidden, attention_bias),
            ("self_attn.k_proj", kv_heads * head_dim, hidden, attention_bias),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, attention_bias),
            ("self_attn.o_proj", hidden, heads * head_dim, attention_bias),
            ("mlp.gate_proj", intermediate, hidden, mlp_bias),
            ("mlp.up_proj", intermediate, hidden, mlp_bias),
            ("mlp.down_proj", hidden, intermediate, mlp_bias),
        ):
            weights[f"{prefix}{name}.weight"] = randn(rows, columns)
            if bias:
                weights[f"{prefix}{name}.bias"] = randn(rows, std=0.3)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + randn(hidden, std=0.3)
    weights["model.norm.weight"] = 1 + randn(hidden, std=0.3)
    if not tie:
        weights["lm_head.weight"] = randn(vocab, hidden, std=0.2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _save(folder, weights, shards)
    if tokenizer or chat:
        _write_tokenizer(folder, chat)
    return config


def _save(folder, weights, shards):
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names = sorted(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_tokenizer(folder, chat):
    """One token a byte, after five special tokens: 5 + 256 ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {char: i + len(special) for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
