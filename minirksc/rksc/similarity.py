"""How alike two wordings of a problem look to a model after its first layers: gates behind one interface.

A gate gets the residual stream of both wordings at the layers that it asks for, and gives one number: 1 for equal
wordings, less the less alike they are. From which number on they count as alike is the caller's, and has to be measured
for each model. A gate that sees NaN answers NaN, which is no similarity: compare with `>=` and it is refused.

None of them sees which facts differ: one changed number moves the states of a hundred tokens very little. That is what
`minirksc.rksc.guard` is for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import torch
from torch import Tensor

from minirksc.errors import ConfigError


@dataclass(frozen=True)
class PrefixStates:
    """What a probe has of one wording.

    Attributes:
        token_ids: of the rows of `hidden`, at least one.
        hidden: layer -> `[tokens, hidden]` float32, the residual stream after that layer.
        weights: `[tokens]` float32 at least 0, how much each token matters, such as the attention that the last tokens
            pay to it; None where that is not known.
    """

    token_ids: Sequence[int]
    hidden: dict[int, Tensor]
    weights: Tensor | None = None


class SimilarityGate(Protocol):
    """Compares two wordings."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    def layers(self, depth: int) -> Sequence[int]:
        """Which of the layers 0 to depth - 1 it needs the states of."""
        ...

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """At most 1, which equal wordings have; NaN where the states hold NaN."""
        ...


@dataclass(frozen=True)
class Sigma:
    """The last tokens' cosine at every layer, the deeper layers counting more.

    Blind to whatever the last token does not carry: wordings in one template end alike, whatever they say.

    Attributes:
        alpha: how much more the deeper layers count.

    Source: equation 2 of the description of ASKS, the sharing of attention states between branches.
    """

    alpha: float = 1.5
    name: str = "sigma"

    def layers(self, depth: int) -> Sequence[int]:
        """All of them."""
        return range(depth)

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """The sum over layers l of w_l times the cosine, where w is the softmax of alpha l / number of layers."""
        ours, theirs = (
            torch.stack([p.hidden[i][-1] for i in sorted(p.hidden)]) for p in (root, branch)
        )  # [layers, hidden]
        if not _finite(ours, theirs):
            return math.nan
        depths = torch.arange(len(ours), device=ours.device) / len(ours)
        norms = torch.linalg.vector_norm(theirs, dim=-1) * torch.linalg.vector_norm(ours, dim=-1)  # [layers]
        cosines = torch.where(norms == 0, 0.0, torch.linalg.vecdot(theirs, ours) / norms)
        return min(1.0, float(cosines @ torch.softmax(self.alpha * depths, 0)))


class _AtDeepest:
    """A gate that looks at one layer."""

    def layers(self, depth: int) -> Sequence[int]:
        """The deepest."""
        return [depth - 1]


@dataclass(frozen=True)
class Pooled(_AtDeepest):
    """Distance of the two mean states, in units of how far the root's tokens lie from their own mean.

    Two texts give no corpus to centre by, so the root is its own: its mean is the origin. The first token is left out,
    which in most models attracts attention and has a norm that drowns all others (Xiao et al. 2023, arXiv 2309.17453).
    """

    name: str = "pooled"

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """1 - |mean_b - mean_r| / rms |h_r - mean_r|."""
        ours, theirs = _body(root), _body(branch)
        centre = ours.mean(0)
        spread = (ours - centre).square().sum(-1).mean().sqrt()
        return _ratio((theirs.mean(0) - centre).square().sum().sqrt(), spread)


@dataclass(frozen=True)
class Whitened(_AtDeepest):
    """`Pooled` with every dimension in units of its own spread, so that no few dimensions decide alone.

    A handful of dimensions with huge values dominate raw cosines (Timkey and van Schijndel 2021, arXiv 2109.04404). A
    full covariance cannot be had from fewer tokens than dimensions: this is its diagonal.
    """

    name: str = "whitened"

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """1 - rms over dimensions of (mean_b - mean_r) / std_r."""
        ours, theirs = _body(root), _body(branch)
        difference = (theirs.mean(0) - ours.mean(0)) / _scale(ours)
        return _ratio(difference.square().mean().sqrt(), torch.ones(()))


@dataclass(frozen=True)
class Alignment(_AtDeepest):
    """Deviation of the tokens that both wordings have, and the share of those that only one of them has.

    Tokens are matched by their ids, in order. A matched token deviates by |h_b - h_r| / |h_r|, at most 1; an unmatched
    one by 1. Both count by their weight.

    Attributes:
        emphasis: how much more a token of the last quarter counts, where no weights are given.

    Source: deviation of reused states as in CacheBlend (arXiv 2405.16444), weighted by the attention that reads them as
    in ProphetKV (arXiv 2602.02579).
    """

    emphasis: float = 2.0
    name: str = "alignment"

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """1 - the mean deviation over the tokens of both wordings."""
        (ours,), (theirs,) = root.hidden.values(), branch.hidden.values()
        if not _finite(ours, theirs):
            return math.nan
        there, here = _matches(branch.token_ids, root.token_ids)
        lost = _weights(root, self.emphasis)
        weights = _weights(branch, self.emphasis)
        deviation = torch.ones(len(theirs), device=theirs.device)
        moved = torch.linalg.vector_norm(theirs[there] - ours[here], dim=-1)
        deviation[there] = (moved / torch.linalg.vector_norm(ours[here], dim=-1).clamp_min(1e-12)).clamp_max(1)
        total = (weights * deviation).sum() + lost.sum() - lost[here].sum()
        return _ratio(total, weights.sum() + lost.sum())


@dataclass(frozen=True)
class Nearest(_AtDeepest):
    """The worst of the tokens that one wording has and the other has not, each held against its nearest stand-in.

    A minor paraphrase replaces words by words that mean the same, so each replaced token should have a near one among
    those that replaced it. The tokens are matched as in `Alignment`; the stand-ins of an unmatched token are those of
    the same gap in the other wording, or its two neighbours where that gap is empty. Cosines of standardised states.

    Attributes:
        count: how many of the worst tokens are averaged.

    Source: greedy matching by cosine as in BERTScore (arXiv 1904.09675), of unmatched tokens only.
    """

    count: int = 2
    name: str = "nearest"

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """The mean of the smallest cosines; 1 where all tokens match."""
        (ours,), (theirs,) = root.hidden.values(), branch.hidden.values()
        if not _finite(ours, theirs):
            return math.nan
        body = ours[1:] if len(ours) > 2 else ours
        centre, scale = body.mean(0), _scale(body)
        h, a = (torch.nn.functional.normalize((x - centre) / scale, dim=-1) for x in (theirs, ours))
        cosines: list[Tensor] = []
        matcher = SequenceMatcher(None, root.token_ids, branch.token_ids, autojunk=False)
        for kind, a_begin, a_end, h_begin, h_end in matcher.get_opcodes():
            if kind == "equal":
                continue
            if a_begin == a_end or h_begin == h_end:  # only one of the two has tokens here
                a_begin, a_end = (a_begin, a_end) if a_begin < a_end else (max(0, a_begin - 1), a_end + 1)
                h_begin, h_end = (h_begin, h_end) if h_begin < h_end else (max(0, h_begin - 1), h_end + 1)
            table = h[h_begin:h_end] @ a[a_begin:a_end].T  # [branch tokens, root tokens]
            cosines += [table.amax(1), table.amax(0)]
        if not cosines:
            return 1.0
        worst = torch.cat(cosines).sort().values[: self.count]
        return min(1.0, float(worst.mean()))


GATES: dict[str, SimilarityGate] = {gate.name: gate for gate in (Sigma(), Pooled(), Whitened(), Alignment(), Nearest())}
"""By name; a caller with a gate of its own needs no entry."""


def _body(prefix: PrefixStates) -> Tensor:
    """The states of the one layer without the first token, where others are left."""
    if len(prefix.hidden) != 1:
        raise ConfigError(
            f"states of {len(prefix.hidden)} layers were given; this gate takes the one that layers() names"
        )
    (hidden,) = prefix.hidden.values()
    return hidden[1:] if len(hidden) > 2 else hidden


def _scale(root: Tensor) -> Tensor:
    """The root's standard deviation of each dimension, `[hidden]`; one that never varies has not quite none."""
    deviations = root.std(0, correction=0)
    return (deviations + 0.1 * deviations.mean()).clamp_min(1e-12)


def _matches(branch: Sequence[int], root: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places of the tokens that both have, in order."""
    blocks = SequenceMatcher(None, root, branch, autojunk=False).get_matching_blocks()
    pairs = [(block.b + i, block.a + i) for block in blocks for i in range(block.size)]
    return [there for there, _ in pairs], [here for _, here in pairs]


def _weights(prefix: PrefixStates, emphasis: float) -> Tensor:
    """`[tokens]`, mean 1."""
    weights = prefix.weights
    if weights is None:
        (hidden,) = prefix.hidden.values()
        weights = torch.ones(len(hidden), device=hidden.device)
        weights[-max(1, len(hidden) // 4) :] = emphasis  # the question stands at the end
    return weights / weights.mean().clamp_min(1e-12)


def _ratio(distance: Tensor, unit: Tensor) -> float:
    """1 - distance / unit; NaN stays NaN, and equal states are 1 even where the unit is 0."""
    if not bool(distance.isfinite() & unit.isfinite()):
        return math.nan
    return 1.0 if float(distance) == 0.0 else 1.0 - float(distance / unit.clamp_min(1e-12))


def _finite(*states: Tensor) -> bool:
    return all(bool(one.isfinite().all()) for one in states)
