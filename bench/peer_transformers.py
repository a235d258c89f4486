"""The worker of transformers, in the environment that bench.peers runs in.

"none" is generate() on a batch of full prompts. "exact" computes the common part once and repeats its cache for the
batch (`batch_repeat_interleave`). An appended question goes onto the cache that generate() returns.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.harness import ROOT
from bench.peer_worker import Measured, serve, solve_in_phases
from minirksc.errors import ConfigError


def load_transformers(folder: str | Path, dtype: str) -> Any:
    """AutoModelForCausalLM with sdpa attention, never stopping at EOS.

    Raises:
        ConfigError: transformers is not installed.
    """
    # transformers looks for a package named `kernels`; the repository's folder must not be taken for it.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("transformers is not installed: pip install -e '.[bench]', or leave it out") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    # As ignore_eos does here: no token ends a generation, and none is forbidden.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class TransformersPeer:
    """AutoModelForCausalLM on a checkpoint folder.

    Args:
        options: folder, dtype, device, threads.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._device = torch.device(options["device"])
        self._model = load_transformers(options["folder"], options["dtype"]).to(self._device)
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._num_computed = 0
        self._cache: Any = None
        self.facts = {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("transformers", "torch")},
            "settings": {"attn_implementation": "sdpa"},
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`; counts the tokens that went through the model."""
        self._num_computed = 0
        return {**solve_in_phases(self, work, setting), "num_computed_tokens": self._num_computed}

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`; no prompt needs padding."""
        return self._continue(prompts, num_tokens, None)

    def continue_branches(
        self, prompt: list[int], hints: Sequence[list[int]], num_tokens: int, share: bool
    ) -> list[list[int]]:
        """As `BranchingEngine.continue_branches`."""
        cache = self._shared_cache(prompt, len(hints)) if share else None
        return self._continue([[*prompt, *hint] for hint in hints], num_tokens, cache)

    def ask_appended(
        self, prompt: list[int], answers: Sequence[list[int]], question: list[int], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_appended`."""
        return self._ask([[*prompt, *answer, *question] for answer in answers], choices, self._cache)

    def ask_anew(
        self, common: list[int], endings: Sequence[list[int]], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_anew`."""
        cache = self._shared_cache(common, len(endings)) if share else None
        return self._ask([[*common, *ending] for ending in endings], choices, cache)

    @torch.inference_mode()
    def _continue(self, rows: Sequence[list[int]], num_tokens: int, cache: Any) -> list[list[int]]:
        """Greedy generation of exactly `num_tokens` a row; a cache may hold what all rows begin with."""
        input_ids = torch.tensor(rows, device=self._device)  # [rows, tokens] int64
        out = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            return_dict_in_generate=True,
            past_key_values=cache,
        )
        self._cache = out.past_key_values
        generated: list[list[int]] = out.sequences[:, input_ids.shape[1] :].tolist()
        return generated

    @torch.inference_mode()
    def _ask(self, rows: list[list[int]], choices: list[int], cache: Any) -> list[list[float]]:
        """Logits of the choices after each row, of which a cache may hold the beginning."""
        num_cached = 0 if cache is None else cache.get_seq_length()
        whole = torch.tensor(rows, device=self._device)
        out = self._model(
            input_ids=whole[:, num_cached:],
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        logits: list[list[float]] = out.logits[:, -1, choices].float().tolist()  # [rows][choices]
        return logits

    @torch.inference_mode()
    def _shared_cache(self, token_ids: Sequence[int], count: int) -> Any:
        """The KV of a common beginning, computed once and repeated `count` times."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        input_ids = torch.tensor([token_ids], device=self._device)
        self._model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(count)
        return cache

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass; all give the tokens by name."""
        self._num_computed += kwargs["input_ids"].numel()


if __name__ == "__main__":
    serve(TransformersPeer)
