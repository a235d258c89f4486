"""The worker of minirksc, in the environment that bench.peers runs in."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.measured import load_gates, solve
from bench.peer_plan import GATED
from bench.peer_worker import Measured, serve
from minirksc import LLM, SamplingParams, SolverConfig


class MinirkscPeer:
    """The engine on a checkpoint folder.

    Args:
        options: gates: file of `minirksc.calibrate` or None; all others are options of `LLM`, with `folder` the model.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        engine = {name: value for name, value in options.items() if name not in ("folder", "gates")}
        self._llm = LLM(options["folder"], **engine)
        self._gates = options["gates"]
        stats = self._llm.stats()
        self.facts = {
            "dtype": str(stats["dtype"]),
            "versions": {name: version(name) for name in ("minirksc", "torch")},
            "settings": {"kv_cache_bytes": options["kv_cache_bytes"], "backend": stats.get("backend")},
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`, and with the setting `GATED`."""
        config = SolverConfig(
            branches=len(work["hints"]),
            tokens_per_step=work["num_tokens"],
            hints=work["hints"],
            sampling=SamplingParams(temperature=0, ignore_eos=True),
            answer_parser="text",
        )
        if setting == GATED:
            config = replace(config, decode_exit="keep_leader")
            config = replace(config, gates=load_gates(Path(self._gates), self._llm, config))
        else:
            sharing, style = setting.split()
            config = replace(config, sharing=sharing, verify="always", verify_style=style)
        row = solve(self._llm, config, work["prompt"])
        if setting != GATED:
            del row["gates"]
        computed = row["num_prefilled_tokens"] + row["num_decoded_tokens"]
        return {**row, "generate_s": row["total_s"] - row.get("verify_s", 0.0), "num_computed_tokens": computed}

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        self._llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [out.outputs[0].token_ids for out in outs]


if __name__ == "__main__":
    serve(MinirkscPeer)
