"""Damaged and malicious checkpoints: each loads and generates, or raises a MinirkscError.

`python tests/fuzz/checkpoints.py --seed 0 --count 10000`; every item is one valid tiny checkpoint with 1 to 3 mutations
of its JSON, its bytes or its files, see `mutations.py`.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import children
import torch
from children import Fault, Limits
from mutations import mutate

from minirksc import LLM, SamplingParams
from minirksc.checkpoints.sources import import_gguf

LIMITS = Limits(cpu_s=10, wall_s=90, memory=1 << 30, batch=20)
IDS = [5, 60, 7, 7, 33, 200]
PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)
FAMILIES = {"qwen3": "qwen3-", "gemma3": "gemma3_text-", "phi3": "phi3-"}
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 4],
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
}
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}


def write_seeds(parent: Path) -> None:
    """Writes the valid checkpoints, one folder each."""
    tiny, zoo, zoo_rows = (children.load(f"models/{name}.py") for name in ("tiny", "zoo", "zoo_rows"))
    gguf, tekken = children.load("unit/test_gguf_import.py"), children.load("unit/test_tekken.py")
    consolidated = children.load("models/test_consolidated.py")
    tiny.write_tiny_llama(parent / "llama", chat=True)
    (parent / "llama" / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
    tiny.write_tiny_llama(
        parent / "sharded", chat=True, shards=3, tie=False, rope_scaling={"type": "yarn", "factor": 2.0}
    )
    (parent / "sharded" / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    tiny.write_tiny_llama(parent / "sentencepiece", vocab=480)
    fields, own = gguf.trained_tokenizer()
    (parent / "sentencepiece" / "tokenizer.model").write_bytes(own.serialized_model_proto())
    (parent / "sentencepiece" / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "legacy": True, "chat_template": tiny.CHAT_TEMPLATE, **SPECIAL})
    )
    for name, prefix in FAMILIES.items():
        row = next(row for row in zoo_rows.ROWS if row.id.startswith(prefix))
        zoo.build(replace(row, fields={**row.fields, "vocab_size": 300}, published=None), parent / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(parent / "llama" / file, parent / name)
    tiny.write_tiny_llama(parent / "temporary", tie=False)
    mistral = parent / "mistral"
    mistral.mkdir()
    tensors = consolidated.load_file(parent / "temporary" / "model.safetensors")
    consolidated.save_file(consolidated.consolidated(tensors), mistral / "consolidated.safetensors")
    (mistral / "params.json").write_text(json.dumps(consolidated.PARAMS))
    tekken.write_tekken(mistral, special_tokens=[{"rank": 1, "token_str": "<s>", "is_control": True}])
    shutil.rmtree(parent / "temporary")
    for architecture, tokenizer in (("llama", fields), ("qwen2", gguf.BYTE_LEVEL)):
        folder = parent / f"gguf-{architecture}"
        folder.mkdir()
        gguf.write_gguf(folder / "model.gguf", architecture, tokenizer)
        (folder / "parts").write_text(json.dumps(_gguf_parts(folder / "model.gguf")))  # taken away before it is used
    for folder in parent.iterdir():
        if (folder / "config.json").exists() and not (folder / "generation_config.json").exists():
            (folder / "generation_config.json").write_text(json.dumps(GENERATION))


def _gguf_parts(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of every number and string before the tensors."""
    import gguf

    reader = gguf.GGUFReader(path)
    places = []
    for read in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        begin = read.offset
        for part in read.parts:
            places.append((int(begin), int(part.nbytes)))
            begin += part.nbytes
    return places


class Mutants:
    """The work of one run.

    Args:
        seeds: from `write_seeds`.
        temp: where the mutants go, one after the other.
    """

    def __init__(self, seeds: Path, temp: Path) -> None:
        self.seeds = sorted(folder for folder in seeds.iterdir() if folder.is_dir())
        self.temp = temp

    def __call__(self, item: int, note: Callable[[str], None]) -> str:
        rng = random.Random(item)
        folder = self.temp / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.temp / "imported", ignore_errors=True)
        seed = rng.choice(self.seeds)
        shutil.copytree(seed, folder)
        parts = json.loads(folder.joinpath("parts").read_text()) if (folder / "parts").exists() else []
        folder.joinpath("parts").unlink(missing_ok=True)
        note(f"of {seed.name}")
        for _ in range(rng.choice((1, 1, 2, 3))):
            note(mutate(folder, rng, parts))
        return try_out(folder, self.temp / "imported")

    def check_seeds(self) -> None:
        """Without a mutation all of them work; else nothing would be proved."""
        for seed in self.seeds:
            try_out(seed, self.temp / f"imported-{seed.name}")


def try_out(folder: Path, imported: Path) -> str:
    """Loads and generates from ids, text and a conversation; logits that are not finite must have been noticed."""
    warnings.simplefilter("ignore")
    if "gguf" in folder.name or (folder / "model.gguf").exists():
        folder = import_gguf(folder / "model.gguf", imported, dtype="float32")
    with LLM(folder, threads=1, kv_cache_bytes="2MiB", max_model_len=128) as llm:
        ids = [min(token_id, llm.spec.vocab_size - 1) for token_id in IDS]
        if not torch.isfinite(llm.logits(ids)[-1]).all():
            llm.generate([ids], PARAMS)
            raise Fault("logits that are not finite, and no NumericalError")
        outputs = llm.generate([ids], PARAMS)
        if llm.tokenizer is not None:
            outputs += llm.generate(["Hello, wörld"], PARAMS)
            if llm.tokenizer.has_chat_template:
                outputs += llm.chat([{"role": "user", "content": "hi"}], PARAMS)
        for output in outputs:
            one = output.outputs[0]
            if len(one.token_ids) != 2 or not isinstance(one.text, str):
                raise Fault(f"{len(one.token_ids)} tokens where 2 were asked for")
    return "" if llm.tokenizer is None else "with text"


def main() -> int:
    options = children.arguments("Mutants of checkpoints.", 10_000).parse_args()
    os.environ["MINIRKSC_CACHE"] = "/nonexistent"
    with tempfile.TemporaryDirectory(prefix="fuzz-checkpoints-") as folder:
        seeds, temp = Path(folder) / "seeds", Path(folder) / "temp"
        temp.mkdir()
        seeds.mkdir()
        children.in_child(lambda: write_seeds(seeds))
        work = Mutants(seeds, temp)
        children.in_child(work.check_seeds)
        outcomes = children.run(range(options.seed, options.seed + options.count), work, LIMITS)
        return children.report(outcomes, "tests/fuzz/checkpoints.py", options)


if __name__ == "__main__":
    sys.exit(main())
