"""The worker of llama.cpp, run by path in the environment of llama-cpp-python: see bench.peers.

It works through the C interface, since that alone has sequences. Two contexts share the weights:

- together: all sequences in one KV cache. What `llama_memory_seq_cp` copies is then shared, cell by cell: this is
  "exact", and single requests run here too.
- apart: a KV cache a sequence, so that none looks at the cells of the others: "none", and batches of other prompts.
"""

import ctypes
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peer_worker import Measured, serve, solve_in_phases

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@dataclass
class Chunk:
    """Tokens that one sequence is given in a pass.

    Attributes:
        sequence: id of the sequence.
        token_ids: tokens that follow those it has.
    """

    sequence: int
    token_ids: list[int]


class Context:
    """A llama.cpp context with the lengths of its sequences.

    Args:
        lib: module `llama_cpp`.
        model: pointer to the weights.
        params: parameters of the context.
    """

    def __init__(self, lib: Any, model: Any, params: Any) -> None:
        import numpy

        self._lib, self._numpy = lib, numpy
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"no context of {params.n_ctx} tokens; stderr says why")
        self._memory = lib.llama_get_memory(self._context)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self._lengths = [0] * params.n_seq_max
        self.num_computed = 0

    def clear(self) -> None:
        """Forgets all sequences."""
        self._lib.llama_memory_clear(self._memory, False)
        self._lengths = [0] * len(self._lengths)

    def fork(self, count: int) -> None:
        """The first `count` sequences begin with what sequence 0 has."""
        for sequence in range(1, count):
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            self._lengths[sequence] = self._lengths[0]

    def feed(self, chunks: Sequence[Chunk]) -> list[Any]:
        """One pass; the logits after the last token of each chunk, as numpy views that the next pass overwrites."""
        total = sum(len(chunk.token_ids) for chunk in chunks)
        tokens, positions, lasts = [], [], []
        for chunk in chunks:
            start = self._lengths[chunk.sequence]
            tokens += chunk.token_ids
            positions += range(start, start + len(chunk.token_ids))
            for i in range(len(tokens) - len(chunk.token_ids), len(tokens)):
                self._batch.seq_id[i][0] = chunk.sequence
            lasts.append(len(tokens) - 1)
            self._lengths[chunk.sequence] += len(chunk.token_ids)
        self._batch.n_tokens = total
        ones = [1] * total
        wanted = [0] * total
        for last in lasts:
            wanted[last] = 1
        for name, values in (("token", tokens), ("pos", positions), ("n_seq_id", ones), ("logits", wanted)):
            self._numpy.ctypeslib.as_array(getattr(self._batch, name), (total,))[:] = values
        code = self._lib.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gives {code} for {total} tokens")
        self.num_computed += total
        return [self._row(last) for last in lasts]

    def extend(self, chunks: Sequence[Chunk], num_tokens: int) -> list[list[int]]:
        """Greedy continuations; the last token of each is not fed."""
        token_ids = [[int(row.argmax())] for row in self.feed(chunks)]
        for _ in range(num_tokens - 1):
            nexts = [Chunk(chunk.sequence, ids[-1:]) for chunk, ids in zip(chunks, token_ids, strict=True)]
            for ids, row in zip(token_ids, self.feed(nexts), strict=True):
                ids.append(int(row.argmax()))
        return token_ids

    def _row(self, index: int) -> Any:
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        return self._numpy.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))


class LlamaCppPeer:
    """llama.cpp on a GGUF file.

    Args:
        options: gguf, threads, max_len of a sequence, num_sequences, flash_attention ("auto", "on" or "off").
    """

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp as lib

        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(options["gguf"].encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{options['gguf']} cannot be loaded; stderr says why")
        self._together = self._context(lib, options, unified=True)
        self._apart = self._context(lib, options, unified=False)
        text = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, text, len(text))
        self.facts = {
            "dtype": text.value.decode().split()[-1].lower(),
            "versions": {
                "llama-cpp-python": llama_cpp.__version__,
                "numpy": importlib.metadata.version("numpy"),
            },
            "settings": {
                "flash_attention": options["flash_attention"],
                "kv_cache": "f16",
                "n_threads": options["threads"],
                "n_seq_max": options["num_sequences"],
                "system": " ".join(lib.llama_print_system_info().decode().split()),
            },
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`; counts the tokens that went through the model."""
        before = self._num_computed()
        measured = solve_in_phases(self, work, setting)
        return {**measured, "num_computed_tokens": self._num_computed() - before}

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        context = self._together if len(prompts) == 1 else self._apart
        context.clear()
        return context.extend([Chunk(k, prompt) for k, prompt in enumerate(prompts)], num_tokens)

    def continue_branches(
        self, prompt: list[int], hints: Sequence[list[int]], num_tokens: int, share: bool
    ) -> list[list[int]]:
        """As `BranchingEngine.continue_branches`."""
        context, chunks = self._begin(prompt, hints, share)
        token_ids = context.extend(chunks, num_tokens)
        self._last_ids = [ids[-1] for ids in token_ids]
        return token_ids

    def ask_appended(
        self, prompt: list[int], answers: Sequence[list[int]], question: list[int], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_appended`: the question follows in the branch's own sequence."""
        context = self._together if share else self._apart
        rows = context.feed([Chunk(k, [last, *question]) for k, last in enumerate(self._last_ids)])
        return [[float(row[choice]) for choice in choices] for row in rows]

    def ask_anew(
        self, common: list[int], endings: Sequence[list[int]], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_anew`; the branches are forgotten, so that their cells cost nothing."""
        context, chunks = self._begin(common, endings, share)
        return [[float(row[choice]) for choice in choices] for row in context.feed(chunks)]

    def _begin(self, common: list[int], endings: Sequence[list[int]], share: bool) -> tuple[Context, list[Chunk]]:
        """The context to use, and what is left to feed; with sharing, the common part is computed here."""
        context = self._together if share else self._apart
        context.clear()
        if not share:
            return context, [Chunk(k, [*common, *ending]) for k, ending in enumerate(endings)]
        context.feed([Chunk(0, common)])
        context.fork(len(endings))
        return context, [Chunk(k, list(ending)) for k, ending in enumerate(endings)]

    def _context(self, lib: Any, options: dict[str, Any], unified: bool) -> Context:
        params = lib.llama_context_default_params()
        # One cache: the longest sequence, and as much again for what branches have of their own.
        params.n_ctx = options["max_len"] * (2 if unified else options["num_sequences"])
        params.n_batch = params.n_ctx
        params.n_seq_max = options["num_sequences"]
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = FLASH_ATTENTION[options["flash_attention"]]
        params.kv_unified = unified
        return Context(lib, self._model, params)

    def _num_computed(self) -> int:
        return self._together.num_computed + self._apart.num_computed


if __name__ == "__main__":
    serve(LlamaCppPeer)
