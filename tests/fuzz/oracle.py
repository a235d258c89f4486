"""What is right: tokens by a plain forward pass of the same model with nothing cached, one row after the other."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from children import Fault

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.engine.branch import Branch
from minirksc.engine.sampling import SamplingRow, sample

NOISE = 3e-4
"""Differences of float32 logits between backends and batches are far below, those of wrong keys far above."""
NUM_MEMOISED = 64


@dataclass
class Held:
    """A branch, and what is right of it."""

    branch: Branch
    seed: int
    tokens: list[int]
    outputs: list[int] = field(default_factory=list)


@dataclass
class Stream:
    """A stream that was pulled in part."""

    generator: Any
    prompt: list[int]
    params: SamplingParams
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)


class Oracle:
    """A second LLM with room for everything.

    Args:
        folder: of the checkpoint.
        options: those that change results.

    Attributes:
        num_near_ties: tokens that were not the expected ones, but would be with a little noise on the logits.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.llm = LLM(folder, dtype="float32", threads=1, backend="torch", kv_cache_bytes="8MiB", **options)
        self.num_near_ties = 0
        self._rows: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()
        self._solved: dict[str, Any] = {}
        self._noise = torch.Generator().manual_seed(0)

    def rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[tokens, vocab]`."""
        key = tuple(tokens)
        if key not in self._rows:
            self._rows[key] = self.llm.logits(list(key))
            if len(self._rows) > NUM_MEMOISED:
                self._rows.popitem(last=False)
        return self._rows[key]

    def check(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        params: SamplingParams,
        seed: int | None,
        path: Sequence[int],
    ) -> None:
        """Whether these tokens follow the prompt.

        Args:
            prompt: tokens before.
            generated: to be checked.
            params: without penalties.
            seed: of the draws; None where none can be known: only greedy tokens are then checked.
            path: of the branch.

        Raises:
            Fault: another token is right.
        """
        params = params.resolved(self.llm.sampling_defaults)
        if not generated or (seed is None and params.temperature):
            return
        prompt, generated = list(prompt), list(generated)
        logits = self.rows([*prompt, *generated])[len(prompt) - 1 : -1]
        rows = [
            SamplingRow(params, prompt + generated[:i], generated[:i], seed or 0, tuple(path), len(prompt) + i)
            for i in range(len(generated))
        ]
        for place, right in enumerate(self._draw(logits, rows)):
            if right == generated[place]:
                continue
            if not self._is_near_tie(logits[place], rows[place], generated[place]):
                raise Fault(f"wrong token{'' if params.temperature == 0 else ', sampled'}")
            self.num_near_ties += 1

    def _draw(self, logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
        ops = self.llm.engine.runner.model.backend
        return [drawn.token_id for drawn in sample(logits, rows, ops.confidence, ops.draw)]

    def _is_near_tie(self, logits: torch.Tensor, row: SamplingRow, token_id: int) -> bool:
        noisy = logits + NOISE * torch.randn(50, len(logits), generator=self._noise)
        return token_id in self._draw(noisy, [row] * len(noisy))

    def scores(self, tokens: Sequence[int], question: Sequence[int], choices: Sequence[Sequence[int]]) -> torch.Tensor:
        """The distribution over the choices after tokens and question."""
        prompt, sums = [*tokens, *question], []
        for choice in choices:
            logprobs = self.rows([*prompt, *choice])[len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(sum(logprobs[i, token_id] for i, token_id in enumerate(choice)))
        return torch.tensor(sums).softmax(0)

    def solved(self, problem: str, config: SolverConfig) -> list[Any]:
        """What `summary` says of the same solve with nothing in its way."""
        key = f"{problem} {config}"
        if key not in self._solved:
            self._solved[key] = summary(Solver(self.llm, config).solve(problem))
        return self._solved[key]


def summary(result: Any) -> list[Any]:
    """What must be the same of two equal solves."""
    return [(branch.path, branch.token_ids, branch.parsed) for branch in result.branches]
