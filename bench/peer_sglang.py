"""The worker of SGLang, run by path in SGLang's own environment: see bench.peers. It decodes, and does not solve."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from peer_worker import Measured, serve


class SglangPeer:
    """SGLang's engine on a checkpoint folder, with its own defaults.

    Args:
        options: folder, dtype, memory_share: of the GPU.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        import sglang

        settings = {"dtype": options["dtype"], "mem_fraction_static": options["memory_share"]}
        self._engine = sglang.Engine(
            model_path=options["folder"], skip_tokenizer_init=True, log_level="error", **settings
        )
        self.facts = {
            "dtype": options["dtype"],
            "versions": {name: importlib.metadata.version(name) for name in ("sglang", "torch")},
            "settings": settings,
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`; it is never asked to."""
        raise NotImplementedError("SGLang has no setting of solve")

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        self._engine.flush_cache()
        params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        outs = self._engine.generate(input_ids=list(prompts), sampling_params=params)
        return [list(out["output_ids"]) for out in outs]


if __name__ == "__main__":
    serve(SglangPeer)
