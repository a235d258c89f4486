"""Measures of how alike two phrasings look that were tried beside those of `minirksc.rksc.similarity`.

All of them rank a changed number above a harmless paraphrase, as those do; `bench.asks_gates` compares them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.rksc import similarity
from minirksc.rksc.similarity import PrefixStates, SimilarityMeasure, are_finite, one_minus_ratio


class _AtDeepest:
    """A measure that looks at one layer."""

    def layers(self, num_layers: int) -> Sequence[int]:
        """The deepest."""
        return [num_layers - 1]


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
        return one_minus_ratio((theirs.mean(0) - centre).square().sum().sqrt(), spread)


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
        return one_minus_ratio(difference.square().mean().sqrt(), torch.ones(()))


@dataclass(frozen=True)
class Nearest(_AtDeepest):
    """The worst of the tokens that one phrasing has and the other has not, each held against its nearest stand-in.

    A minor paraphrase replaces words by words that mean the same, so each replaced token should have a near one among
    those that replaced it. The tokens are matched as in `Alignment`; the stand-ins of an unmatched token are those of
    the same gap in the other phrasing, or its two neighbours where that gap is empty. Cosines of standardised states.

    Attributes:
        count: number of the worst tokens, which are averaged.

    Source: greedy matching by cosine as in BERTScore (arXiv 1904.09675), of unmatched tokens only.
    """

    count: int = 2
    name: str = "nearest"

    def similarity(self, root: PrefixStates, branch: PrefixStates) -> float:
        """The mean of the smallest cosines; 1 where all tokens match."""
        (ours,), (theirs,) = root.hidden.values(), branch.hidden.values()
        if not are_finite(ours, theirs):
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


_PAPERS, _ALIGNMENT = similarity.MEASURES["sigma"], similarity.MEASURES["alignment"]
MEASURES: dict[str, SimilarityMeasure] = {
    measure.name: measure for measure in (_PAPERS, Pooled(), Whitened(), _ALIGNMENT, Nearest())
}
"""All of them by name, those that solves use included."""


def _body(prefix: PrefixStates) -> Tensor:
    """The states of the one layer without the first token, where others are left."""
    if len(prefix.hidden) != 1:
        raise ConfigError(
            f"states of {len(prefix.hidden)} layers were given; this measure takes the one that layers() names"
        )
    (hidden,) = prefix.hidden.values()
    return hidden[1:] if len(hidden) > 2 else hidden


def _scale(root: Tensor) -> Tensor:
    """The root's standard deviation of each dimension, `[hidden]`; one that never varies has not quite none."""
    deviations = root.std(0, correction=0)
    return (deviations + 0.1 * deviations.mean()).clamp_min(1e-12)
