"""Collects evidence: solves problems without gates, several at once, and notes all that gates look at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from minirksc.calibrate.evidence import BranchEvidence, Evidence, Failed
from minirksc.errors import ConfigError, MinirkscError, NumericalError
from minirksc.rksc.exits import LayerExit, MarginRule
from minirksc.rksc.node import Node
from minirksc.rksc.problem import Problem, read_problem
from minirksc.rksc.solver import Solver, SolverConfig
from minirksc.rksc.tree import Tree
from minirksc.rksc.verify import Verdict, Verifier

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch
    from minirksc.rksc.exits import MakeLens

BRANCHES_AT_ONCE = 24
"""More at once gain little on a CPU, and an interruption loses them."""


class Recorder(LayerExit):
    """A layer exit that lets no row leave, and notes the margin of every row after every layer but the last."""

    def __init__(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> None:
        super().__init__(make_lens(choices), num_layers, margin=math.inf, patience=1, start=0)
        self.noted: dict[int, list[float]] = {}

    def leaving(self, layer: int, margins: Mapping[int, float]) -> list[int]:
        """Notes the margins, and names no row."""
        for row, margin in margins.items():
            self.noted.setdefault(row, []).append(margin)
        return []


@dataclass(frozen=True)
class Recording(MarginRule):
    """Makes recorders, and keeps them."""

    margin: float = 0.0
    made: list[Recorder] = field(default_factory=list, compare=False)

    def gate(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> Recorder:
        """The recorder of one pass."""
        self.made.append(Recorder(make_lens, choices, num_layers))
        return self.made[-1]


@dataclass
class _Solve:
    """One problem under way."""

    problem: Problem
    reference: str | None
    nodes: list[Node]


class Collector(Solver):
    """Solves problems without gates, and notes what gates would look at.

    Args:
        llm: model, or session, as of `Solver`; with a tokenizer.
        config: options of solving, depth 1; what they say about gates is not used.

    Raises:
        ConfigError: Depth is more than 1, sharing is semantic, or no branch is asked about.
    """

    def __init__(self, llm: Any, config: SolverConfig) -> None:
        if config.depth != 1:
            raise ConfigError(f"depth={config.depth}: gates are calibrated for one round of decoding; use depth=1")
        if config.sharing == "semantic":
            raise ConfigError("sharing='semantic' is an approximation of its own; calibrate gates with sharing='exact'")
        if config.verify == "never":
            raise ConfigError("verify='never' asks nobody, so no gate can spare anything; use verify='always'")
        super().__init__(llm, replace(config, verify="always", gates=None, policy="rksc", decode_exit="auto"))

    def collect(self, problems: Sequence[tuple[str, str | None]], seeds: Sequence[int]) -> list[Evidence | Failed]:
        """Evidence of problems that are decoded together; one that fails does not harm the others.

        Args:
            problems: pairs of a text and, where it is known, the right answer.
            seeds: seed of each: with one seed all problems would share their luck.
        """
        try:
            return list(self._collect(problems, seeds))
        except MinirkscError as error:
            if len(problems) == 1:
                return [Failed(str(error))]
        pairs = zip(problems, seeds, strict=True)
        return [one for problem, seed in pairs for one in self.collect([problem], [seed])]

    def _collect(self, problems: Sequence[tuple[str, str | None]], seeds: Sequence[int]) -> list[Evidence]:
        solves: list[_Solve] = []
        with self.session.engine.call() as call:
            for (text, reference), seed in zip(problems, seeds, strict=True):
                problem = read_problem(self.session, self.config, text)
                tree = Tree(self.session, call, share=self.config.sharing != "none", seed=seed)
                solves.append(_Solve(problem, reference, tree.plant(problem.starts)))
            self._extend(solves)
            # All branches are asked about at once where the question follows the branch, else problem by problem.
            at_once = [solves] if self.config.verify_style == "append" else [[one] for one in solves]
            return [one for some in at_once for one in self._judge_together(some)]

    def _extend(self, solves: Sequence[_Solve]) -> None:
        try:
            branches = [node.branch for one in solves for node in one.nodes]
            self.session.extend(branches, replace(self.config.step_sampling, seed=None))
        except NumericalError:  # after the others have ended; as in the solver, a branch that fails alone is left out
            for one in solves:
                one.nodes = [node for node in one.nodes if node.branch.finish_reason != "error"]
                if not one.nodes:
                    raise

    def _judge_together(self, solves: Sequence[_Solve]) -> list[Evidence]:
        nodes = [node for one in solves for node in one.nodes]
        verifier = Verifier(self.session, self.config, solves[0].problem)
        recording = Recording()
        before = self.session.stats()["num_prefilled_tokens"]
        verdicts = verifier.ask([node.branch for node in nodes], [node.answer_ids for node in nodes], recording)
        num_question_tokens = (self.session.stats()["num_prefilled_tokens"] - before) / len(nodes)
        noted = recording.made[0].noted if recording.made else {}
        branches = [
            self._branch(node.branch, verdict, noted.get(row, []))
            for row, (node, verdict) in enumerate(zip(nodes, verdicts, strict=True))
        ]
        rest, num_layers = iter(branches), self.session.spec.num_layers
        return [
            Evidence(list(islice(rest, len(one.nodes))), num_layers, num_question_tokens, one.reference)
            for one in solves
        ]

    def _branch(self, branch: "Branch", verdict: Verdict, margins: list[float]) -> BranchEvidence:
        if verdict.probability is None:
            raise NumericalError(str(verdict.error))
        token_ids = list(branch.output_token_ids)
        text = self.session.decode(token_ids)
        return BranchEvidence(
            token_ids=token_ids,
            text=text,
            ends=[_num_final(self.session.decode(token_ids[:count]), text) for count in range(1, len(token_ids) + 1)],
            num_hidden=len(text) - len(branch.text),
            finish_reason=str(branch.finish_reason),
            signals=branch.signals,
            probability=verdict.probability,
            margins=margins,
        )


def _num_final(text: str, whole: str) -> int:
    """Characters that both begin with: the last of a text may be half a character."""
    pairs = enumerate(zip(text, whole, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(text), len(whole)))
