"""The worker of minirksc, in the environment that bench.peers runs in: the arms of bench.solve, and the gated one."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.measured import load_gates, solve
from bench.peer_worker import Measured, serve
from bench.solve import Work, minirksc_arm
from minirksc import LLM, SamplingParams, SolverConfig

GATED = "rksc"
"""Setting with gates: exact sharing, questions appended, asked as far as they can matter."""


class MinirkscPeer:
    """The engine on a checkpoint folder.

    Args:
        options: folder, dtype, quantize, threads, kv_cache_bytes, gates: file of `minirksc.calibrate` or None.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._llm = LLM(
            options["folder"],
            dtype=options["dtype"],
            quantize=options["quantize"],
            threads=options["threads"],
            kv_cache_bytes=options["kv_cache_bytes"],
        )
        self._gates = options["gates"]
        stats = self._llm.stats()
        self.facts = {
            "dtype": str(stats["dtype"]),
            "versions": {name: version(name) for name in ("minirksc", "torch")},
            "settings": {"kv_cache_bytes": options["kv_cache_bytes"], "backend": stats.get("backend")},
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`."""
        if setting == GATED:
            return self._gated(Work(**work))
        sharing, style = setting.split()
        measured = minirksc_arm(self._llm, Work(**work), sharing, style).run()
        return _with_computed(measured)

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        self._llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [out.outputs[0].token_ids for out in outs]

    def _gated(self, work: Work) -> Measured:
        config = SolverConfig(
            branches=len(work.hints),
            tokens_per_step=work.num_tokens,
            hints=work.hints,
            sampling=SamplingParams(temperature=0, ignore_eos=True),
            answer_parser="text",
            decode_exit="keep_leader",
        )
        gates = load_gates(Path(self._gates), self._llm, config)
        row = solve(self._llm, replace(config, gates=gates), work.prompt)
        return _with_computed({**row, "generate_s": row["total_s"] - row.get("verify_s", 0.0)})


def _with_computed(measured: Measured) -> Measured:
    total = measured["num_prefilled_tokens"] + measured["num_decoded_tokens"]
    return {**measured, "num_computed_tokens": total}


if __name__ == "__main__":
    serve(MinirkscPeer)
