"""The zoo: tiny random checkpoints of every family, written by transformers, and transformers as the oracle.

A row is made so that a mistake shows: norm weights far from their initial value, head_dim other than
hidden / heads, windows and original lengths shorter than the long prompt, softcaps that saturate. `bites` names
what a row is there for, with the config changes that switch it off; `test_zoo.py` checks that each changes the
logits, so that no row agrees for the wrong reason.
"""

import copy
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHORT, LONG = 11, 90  # prompt lengths: inside every window and original length, and beyond
TEXT_VOCAB = 250  # prompts stay below; the ids above serve as image tokens


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Attributes:
        id: name of the case, and the seed of its weights.
        model_type: config.json's name for the family.
        fields: arguments of transformers' config class; of its text_config when `wrapper` is set.
        bites: feature -> changes of `fields` that switch it off; the long prompt's logits must change by 0.01.
        published: config.json as older files on the hub spell it; None for what save_pretrained writes.
        wrapper: model_type and fields of the multimodal model around the text model.
        dtype: of the stored weights, "mixed" for one of three a tensor.
        max_shard_size: as in save_pretrained.
        oracle: how transformers is run: "generate" or "stepwise"; see `oracle_greedy`.
        weight_std, embed_std: of the random weights.
    """

    id: str
    model_type: str
    fields: Mapping[str, Any]
    bites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, Any] | None = None
    wrapper: tuple[str, Mapping[str, Any]] | None = None
    dtype: str = "float32"
    max_shard_size: str = "1GB"
    oracle: str = "generate"
    weight_std: float = 0.25
    embed_std: float = 0.2


def make_config(row: Row, changes: Mapping[str, Any] | None = None) -> transformers.PreTrainedConfig:
    """transformers' config of a row, with changes of its text fields."""
    fields = copy.deepcopy({**row.fields, **(changes or {})})  # transformers writes into what it is given
    if row.wrapper is None:
        return CONFIG_MAPPING[row.model_type](**fields)
    outer_type, outer = row.wrapper
    return CONFIG_MAPPING[outer_type](text_config={"model_type": row.model_type, **fields}, **copy.deepcopy(outer))


def build(row: Row, folder: Path) -> Path:
    """Writes the checkpoint, unless it is there already.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(row.id.encode()))
        model = _model_class(row).from_config(make_config(row), dtype=torch.float32)
        _randomise(model, row)
    model.to(getattr(torch, row.dtype, torch.float32)).save_pretrained(folder, max_shard_size=row.max_shard_size)
    if row.dtype == "mixed":
        _mix_dtypes(folder / "model.safetensors")
    if row.published is not None:
        (folder / "config.json").write_text(json.dumps(row.published, indent=2))
    return folder


def _randomise(model: torch.nn.Module, row: Row) -> None:
    """In place; the vision tower keeps its initial values, since no text passes through it."""
    for name, parameter in sorted(model.named_parameters()):
        if "vision" in name or "multi_modal" in name:
            continue
        noise = torch.randn_like(parameter.data)
        if "norm" in name:
            parameter.data.add_(0.3 * noise)  # the initial value is 0 where the family adds 1, else 1
        elif name.endswith("bias"):
            parameter.data.copy_(0.3 * noise)
        else:
            is_embedding = "embed_tokens" in name or "lm_head" in name
            parameter.data.copy_((row.embed_std if is_embedding else row.weight_std) * noise)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


def _mix_dtypes(path: Path) -> None:
    tensors = load_file(path)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    save_file({name: tensors[name].to(dtypes[i % 3]) for i, name in enumerate(sorted(tensors))}, path, {"format": "pt"})


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids of text."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(3, TEXT_VOCAB, (length,), generator=gen).tolist()


def load_oracle(
    row: Row, folder: Path, changes: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """transformers' model of a row's folder, from its config.json or, with `changes`, from the changed fields."""
    options = {} if changes is None else {"config": make_config(row, changes)}
    return _model_class(row).from_pretrained(folder, dtype=dtype, attn_implementation="eager", **options).eval()


def _model_class(row: Row) -> Any:
    return transformers.AutoModelForImageTextToText if row.wrapper else transformers.AutoModelForCausalLM


@torch.no_grad()
def oracle_logits(row: Row, model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits at every position: `[tokens, vocab]`, in the model's dtype."""
    if row.oracle == "stepwise":
        return torch.stack(_steps(model, token_ids, 0))
    return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.no_grad()
def oracle_greedy(row: Row, model: transformers.PreTrainedModel, token_ids: list[int], num_tokens: int) -> list[int]:
    """The most likely continuation, past any end token.

    By `row.oracle`:
        "generate": transformers' own generate().
        "stepwise": every token of the prompt is a step on the cache of those before. It matters for dynamic RoPE,
            whose base grows with the sequence: over a whole prompt transformers rotates early keys with the base of
            the full length, which no cache could hold; token by token each key keeps the base of its own position.
    """
    if row.oracle == "stepwise":
        return [int(logits.argmax()) for logits in _steps(model, token_ids, num_tokens)[-num_tokens - 1 : -1]]
    ids = torch.tensor([token_ids])
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
    )
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out[0, len(token_ids) :].tolist()


def _steps(model: transformers.PreTrainedModel, token_ids: list[int], num_tokens: int) -> list[torch.Tensor]:
    """Logits after each token, and after each of `num_tokens` greedy ones."""
    rows: list[torch.Tensor] = []
    cache = None
    for i in range(len(token_ids) + num_tokens):
        token_id = token_ids[i] if i < len(token_ids) else int(rows[-1].argmax())
        out = model(input_ids=torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, 0])
    return rows
