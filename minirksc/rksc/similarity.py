"""How alike two phrasings of a problem look to a model after its first layers: measures behind one interface.

A measure gets the residual stream of both phrasings at the layers that it asks for, and gives one number: 1 for equal
phrasings, less the less alike they are. From which number on they count as alike is the caller's, and has to be found
for each model. A measure that sees NaN answers NaN, which is no similarity: compare with `>=` and it is refused.

Here are the two that solves use: `Sigma`, the paper's, and `Alignment`. Those that were tried beside them are in
`bench/similarity_measures.py`. None sees which facts differ: one changed number moves the states of a hundred tokens
very little. That is what `minirksc.rksc.guard` is for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import Match, SequenceMatcher
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixStates:
    """What a probe has of one phrasing.

    Attributes:
        token_ids: tokens of the rows of `hidden`, at least one.
        hidden: layer -> `[tokens, hidden]` float32, the residual stream after that layer.
    """

    token_ids: Sequence[int]
    hidden: dict[int, Tensor]


class SimilarityMeasure(Protocol):
    """Compares two phrasings."""

    @property
    def name(self) -> str:
        """What to call it."""

    def layers(self, num_layers: int) -> Sequence[int]:
        """Which of the first `num_layers` layers it needs the states of."""

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """At most 1, which equal phrasings have; NaN where the states hold NaN."""


@dataclass(frozen=True)
class Sigma:
    """Equation 2 of the paper: the last tokens' cosine at every layer, the later layers counting more.

    sigma_b = sum over layers l of w_l cos(h_b, h_root), w_l = exp(alpha l / L) / sum over k of exp(alpha k / L), with h
    for the state after layer l. Blind to whatever the last token does not carry: phrasings in one template end alike,
    whatever they say.

    Attributes:
        alpha: weight by which the later layers count more.

    Source: Sekar 2026, arXiv 2606.09937, equation 2.
    """

    alpha: float = 1.5
    name: str = "sigma"

    def layers(self, num_layers: int) -> Sequence[int]:
        """All of them."""
        return range(num_layers)

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """The weighted sum of cosines; one with a vector of length 0 is 0."""
        ours, theirs = (
            torch.stack([states.hidden[i][-1] for i in sorted(states.hidden)]) for states in (root, branch)
        )  # [layers, hidden]
        if not are_finite(ours, theirs):
            return math.nan
        norms = torch.linalg.vector_norm(theirs, dim=-1) * torch.linalg.vector_norm(ours, dim=-1)  # [layers]
        cosines = torch.where(norms == 0, 0.0, torch.linalg.vecdot(theirs, ours) / norms)  # [layers]
        shares = torch.arange(len(ours), device=ours.device) / len(ours)  # l / L
        # The softmax is w_l, and the same whether layers count from 0 or from 1.
        return min(1.0, float(cosines @ torch.softmax(self.alpha * shares, 0)))


@dataclass(frozen=True)
class Alignment:
    """Deviation of the tokens that both phrasings have, and the share of those that only one of them has.

    Tokens are matched by their ids, in order. A matched token deviates by |h_b - h_r| / |h_r|, at most 1; an unmatched
    one by 1. Both count by their weight.

    Attributes:
        emphasis: weight of a token of the last quarter, where the question stands; the others have 1.

    Source: deviation of reused states as in CacheBlend (arXiv 2405.16444).
    """

    emphasis: float = 2.0
    name: str = "alignment"

    def layers(self, num_layers: int) -> Sequence[int]:
        """The last one."""
        return [num_layers - 1]

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """1 - the mean deviation over the tokens of both phrasings."""
        (ours,), (theirs,) = root.hidden.values(), branch.hidden.values()  # [tokens, hidden]
        if not are_finite(ours, theirs):
            return math.nan
        runs = common_runs(root.token_ids, branch.token_ids)
        here = [run.a + i for run in runs for i in range(run.size)]  # of the root; run by run the same tokens as ...
        there = [run.b + i for run in runs for i in range(run.size)]  # ... these of the branch
        deviation = torch.ones(len(theirs), device=theirs.device)  # [tokens]
        moved = torch.linalg.vector_norm(theirs[there] - ours[here], dim=-1)
        deviation[there] = (moved / torch.linalg.vector_norm(ours[here], dim=-1).clamp_min(1e-12)).clamp_max(1)
        weights, lost = self._weights(theirs), self._weights(ours)
        total = (weights * deviation).sum() + lost.sum() - lost[here].sum()
        return one_minus_ratio(total, weights.sum() + lost.sum())

    def _weights(self, hidden: Tensor) -> Tensor:
        """`[tokens]`, mean 1."""
        weights = torch.ones(len(hidden), device=hidden.device)
        weights[-max(1, len(hidden) // 4) :] = self.emphasis
        return weights / weights.mean()


MEASURES: dict[str, SimilarityMeasure] = {measure.name: measure for measure in (Sigma(), Alignment())}
"""By name."""


def common_runs(root: Sequence[int], branch: Sequence[int]) -> list[Match]:
    """The runs of tokens that both have, in order: (place in the root, place in the branch, length)."""
    return SequenceMatcher(None, root, branch, autojunk=False).get_matching_blocks()


def one_minus_ratio(distance: Tensor, unit: Tensor) -> float:
    """1 - distance / unit; NaN stays NaN, and equal states are 1 even where the unit is 0."""
    if not are_finite(distance, unit):
        return math.nan
    return 1.0 if float(distance) == 0.0 else 1.0 - float(distance / unit.clamp_min(1e-12))


def are_finite(*states: Tensor) -> bool:
    """Whether no number among these is NaN or infinite."""
    return all(bool(one.isfinite().all()) for one in states)
