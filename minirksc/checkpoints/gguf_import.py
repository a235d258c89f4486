"""GGUF file to checkpoint folder: config.json, model.safetensors, tokenizer.json and their companions.

The `gguf` package reads and dequantises; here names and conventions are translated back. For Llama, llama.cpp
stores the rows of q and k with rotary pairs side by side, Hugging Face checkpoints with halves apart; for Gemma it
stores norm weights plus one. What cannot be translated exactly is refused by name, never dropped.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minirksc.checkpoints.gguf_config import ARCHITECTURES, ROPE_FACTORS, expected_shapes, expected_tensors, make_config
from minirksc.checkpoints.gguf_fields import GgufFields
from minirksc.checkpoints.gguf_header import check_header
from minirksc.checkpoints.gguf_tokenizer import CONTROL, adds_bos, build_tokenizer, token_id
from minirksc.errors import CheckpointError

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
DTYPES = tuple(ITEM_BYTES)
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


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
        check_header(source)
        try:
            self._reader = gguf.GGUFReader(source)
            fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # of a damaged file, whatever the reader stumbles over
            raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from error
        name = fields.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{source}: architecture {name!r:.80} cannot be imported; known: {known}")
        self._source = source
        self._arch = ARCHITECTURES[name]
        self._chat_template = fields.get("tokenizer.chat_template")
        self._tokens = GgufFields(source, fields, "tokenizer.ggml.")
        self._shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._reader.tensors}
        factors = next((t.data.tolist() for t in self._reader.tensors if t.name == ROPE_FACTORS), None)
        self._config = make_config(self._arch, GgufFields(source, fields, f"{name}."), self._shapes, factors)
        self._shapes.pop(ROPE_FACTORS, None)  # the config says the same
        self._check_tensors()
        self._tokenizer = build_tokenizer(self._tokens, is_gemma=self._arch.name == "gemma3")

    def num_bytes(self, dtype: str) -> int:
        """About how many bytes the checkpoint takes; the tokenizer's share is a guess.

        Args:
            dtype: dtype of the weights, "bfloat16" or "float32".
        """
        num_weights = sum(int(np.prod(shape)) for shape in self._shapes.values())
        return num_weights * ITEM_BYTES[dtype] + 3 * int(self._reader.data_offset)

    def write(self, folder: Path, dtype: str, progress: bool = False) -> None:
        """Writes the checkpoint into an existing, empty folder.

        Args:
            folder: folder that the files go to.
            dtype: dtype of the weights, "bfloat16" or "float32".
            progress: whether to show a bar on stderr, if that is a terminal.

        Raises:
            CheckpointError: a tensor is damaged or of a kind that cannot be dequantised.
            OSError, safetensors.SafetensorError: a file cannot be written.
        """
        import gguf
        import torch
        from safetensors.torch import save_file
        from tqdm import tqdm

        from minirksc.models.families import spec_from_config
        from minirksc.models.weights.safetensors_file import halves_apart

        names = {name: hf_name for name, hf_name, _ in expected_tensors(self._arch, self._config)}
        spec = spec_from_config(self._config)
        weights = {}
        tensors = [tensor for tensor in self._reader.tensors if tensor.name in self._shapes]
        for tensor in tqdm(tensors, desc="converting", unit="tensor", disable=None if progress else True):
            try:
                data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{self._source}: tensor {tensor.name} cannot be dequantised: {error}") from error
            name, shape = names[tensor.name], self._shapes[tensor.name]
            if self._arch.is_interleaved and (".q_proj." in name or ".k_proj." in name):
                data = halves_apart(data.view(shape), shape[0] // self._config["head_dim"])
            if name.endswith("norm.weight"):
                data = data - spec.norm_offset
            weights[name] = data.reshape(shape).to(getattr(torch, dtype)).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self._tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in self._json_files(dtype):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def _check_tensors(self) -> None:
        """Every tensor of the model is there with its shape, and no other is."""
        try:
            expected = dict(expected_shapes(self._arch, self._config))
        except CheckpointError as error:
            raise CheckpointError(f"{self._source} is of a model that cannot be: {error}") from error
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
                f"the tensors of {self._source} do not fit a {self._arch.model_type}: "
                f"{'; '.join(sorted(problems)[:5])}{more}"
            )

    def _json_files(self, dtype: str) -> Iterator[tuple[str, dict[str, Any]]]:
        tokens = self._tokens
        sources = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        found = {name: token_id(tokens, source) for name, source in sources.items()}
        ids = {name: i for name, i in found.items() if i is not None}
        settings: dict[str, Any] = {
            **{f"{name}_token": tokens["tokens"][i] for name, i in ids.items()},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": adds_bos(tokens),
        }
        if self._chat_template is not None:
            settings["chat_template"] = self._chat_template
        model_ids: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
        ends = self._end_ids()
        if len(ends) > 1:
            model_ids["eos_token_id"] = ends
        yield "config.json", {**self._config, **model_ids, "torch_dtype": dtype}
        yield "generation_config.json", model_ids
        yield "tokenizer_config.json", settings

    def _end_ids(self) -> list[int]:
        """Whatever ends a turn or a message ends generation too."""
        tokens = self._tokens
        words = enumerate(zip(tokens["tokens"], tokens["token_type"], strict=True))
        named = [i for i, (word, kind) in words if kind == CONTROL and word in self._arch.end_tokens]
        ends = [token_id(tokens, name) for name in ("eos", "eot", "eom")]
        return list(dict.fromkeys(i for i in (*ends, *named) if i is not None))
