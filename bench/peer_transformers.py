"""The worker of transformers, in the environment that bench.peers runs in: the arms of bench.solve.

"none" is its "recompute": generate() on a batch of full prompts. "exact" is its "shared": the common part is computed
once and its cache repeated.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from bench.harness import generate_transformers, load_transformers
from bench.peer_worker import Measured, serve
from bench.solve import Work, transformers_arm

SHARING = {"none": "recompute", "exact": "shared"}


class TransformersPeer:
    """AutoModelForCausalLM on a checkpoint folder.

    Args:
        options: folder, dtype, threads.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        try:
            self._model = load_transformers(options["folder"], options["dtype"])
        except SystemExit as error:
            raise RuntimeError(str(error)) from error
        self._model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._num_computed = 0
        self.facts = {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("transformers", "torch")},
            "settings": {"attn_implementation": "sdpa"},
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`."""
        sharing, style = setting.split()
        self._num_computed = 0
        measured = transformers_arm(self._model, Work(**work), SHARING[sharing], style).run()
        return {**measured, "num_computed_tokens": self._num_computed}

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        out = generate_transformers(self._model, torch.tensor(prompts), num_tokens)
        generated: list[list[int]] = out.sequences[:, len(prompts[0]) :].tolist()
        return generated

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass; generate() and bench.solve give the tokens by name."""
        self._num_computed += kwargs["input_ids"].numel()


if __name__ == "__main__":
    serve(TransformersPeer)
