"""Who wins: asks about the branches of the last round, as far as the gates leave anything to ask, and chooses.

The gates themselves are in `minirksc.rksc.cgee`; here is the order in which they are tried. What each one saw and
decided goes into the trace.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minirksc.engine.signals import SIGNALS
from minirksc.rksc.answers import choose
from minirksc.rksc.cgee import Gates, best_and_rest, leader_of, standing

if TYPE_CHECKING:
    from minirksc.rksc.node import Node
    from minirksc.rksc.record import Record

ASK_FIRST = 2
"""Branches that are asked before it is looked who can still win: one alone settles little, all settle nothing."""


class Judge:
    """Chooses among the branches of one solve.

    Args:
        tree: whose trace says what was decided.
        gates: which are on.
        select: how the answer is chosen, see `answers.choose`.
        ask: sets verification and score of nodes, or error where that fails; None: nobody is ever asked, and the
            score of each is its confidence.
    """

    def __init__(
        self, tree: "Record", gates: Gates, select: str, ask: Callable[[Sequence["Node"]], None] | None
    ) -> None:
        self._tree = tree
        self._gates = gates
        self._select = select
        self._ask = ask

    def choose(self, nodes: Sequence["Node"], answers: Sequence[str | None], leader: int | None) -> int:
        """Index of the branch that wins.

        Args:
            nodes: of the last round; those that had finished in an earlier one have their scores.
            answers: that they give.
            leader: index of the one that led decisively while they were decoded, so that nobody is asked; None: none
                did.

        Returns:
            The index. Whoever was not asked has no score, unless nobody ever is.
        """
        if leader is not None:
            return leader
        if self._ask is None:
            for node in nodes:
                node.score = node.confidence
        elif not self._gates.exact:
            return self._after_skip(nodes, answers, self._ask_everybody)
        else:
            best, threats = self._standing(nodes, answers)
            if threats:
                return self._after_skip(nodes, answers, self._ask_while_open)
            if any(node.score is None for node in nodes):
                reason = f"all that can win answer {answers[best]!r}; the surest of them is named"
                self._tree.note("agreement", decision="nobody is asked", reason=reason)
                return best
        return choose(*_known(nodes, answers), self._select)

    def _after_skip(
        self,
        nodes: Sequence["Node"],
        answers: Sequence[str | None],
        ask: Callable[[Sequence["Node"], Sequence[str | None]], int],
    ) -> int:
        """Asks, unless one branch leads decisively by its confidence."""
        gates = self._gates
        if not gates.skip:
            return ask(nodes, answers)
        values = [SIGNALS[gates.signal](node.signals) for node in nodes]
        rivals = answers if gates.compares_answers else None
        best = leader_of(values, rivals, gates.skip)
        _, top, rest = best_and_rest(values, rivals)
        self._tree.note(
            "skip",
            value=gates.skip[0].distance(top, rest),
            threshold=gates.skip[0].gap,
            decision="ask" if best is None else "nobody is asked",
            reason=f"{gates.signal} {', '.join(f'{value:.3f}' for value in values)}",
            calibrated=gates.is_calibrated,
        )
        return ask(nodes, answers) if best is None else best

    def _ask_everybody(self, nodes: Sequence["Node"], answers: Sequence[str | None]) -> int:
        assert self._ask is not None
        self._ask([node for node in nodes if node.score is None])
        return choose(*_known(nodes, answers), self._select)

    def _ask_while_open(self, nodes: Sequence["Node"], answers: Sequence[str | None]) -> int:
        """The likeliest first; then whoever can still change the answer."""
        assert self._ask is not None
        best, threats = self._standing(nodes, answers)
        num_at_once = ASK_FIRST
        while threats:
            self._ask([nodes[i] for i in threats[:num_at_once]])
            num_at_once = len(nodes)
            best, threats = self._standing(nodes, answers)
        num_spared = sum(node.score is None and node.error is None for node in nodes)
        if num_spared:
            reason = "whatever they would score, the answer stays"
            self._tree.note("bound", value=num_spared, decision=f"{num_spared} not asked", reason=reason)
        return best

    def _standing(self, nodes: Sequence["Node"], answers: Sequence[str | None]) -> tuple[int, list[int]]:
        bounds = [math.sqrt(node.confidence or 0.0) for node in nodes]  # p(YES) is at most 1
        scores = [node.score if node.error is None else -math.inf for node in nodes]
        return standing(_of_those_well(nodes, answers), scores, bounds, self._select)


def _known(nodes: Sequence["Node"], answers: Sequence[str | None]) -> tuple[list[str | None], list[float]]:
    """Answers and scores to choose by: one that failed while it was asked about is worse than all others."""
    scores = [-math.inf if node.error is not None else node.score or 0.0 for node in nodes]
    return _of_those_well(nodes, answers), scores


def _of_those_well(nodes: Sequence["Node"], answers: Sequence[str | None]) -> list[str | None]:
    return [answer if node.error is None else None for node, answer in zip(nodes, answers, strict=True)]
