"""The branches of a trace: what each wrote itself, and where it stands among the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minirksc.trace.figures import is_number

NUM_SHADES = 5
NODE: dict[str, Any] = {
    **dict.fromkeys(("parent", "path", "hint", "text", "tokens", "parsed", "error", "finish_reason", "exit_layer")),
    **dict.fromkeys(("score", "confidence", "signals", "verification", "similarity", "pruned", "num_tokens")),
    **dict.fromkeys(("num_output_tokens", "num_shared_tokens", "num_own_tokens", "num_saved_tokens")),
    "depth": 1,
    "sharing": "none",
}
"""What a node says by a key that it does not have."""


@dataclass(eq=False)
class PageBranch:
    """A node of the trace, and where it stands in its tree.

    Attributes:
        node: the node's keys, of `NODE` those too that the trace does not have.
        parent: the branch that it was forked from, if any.
        is_best: whether it was chosen.
        is_on_path: whether it or a branch that came of it was chosen.
        is_given_up: whether it was pruned: not one that failed, and one that was forked went on in its children.
        shade: step of its score among those of the tree, 0 (lowest) to NUM_SHADES - 1; None without a score.
    """

    node: Mapping[str, Any]
    parent: "PageBranch | None" = None
    is_best: bool = False
    is_on_path: bool = False
    is_given_up: bool = False
    shade: int | None = None

    @property
    def name(self) -> str:
        """Its path, from 1: branch 3.1 is the first fork of branch 3."""
        return ".".join(str(index + 1) for index in self.node["path"] or [self.node["id"]])

    @property
    def was_asked(self) -> bool:
        """Whether the model was asked about its answer."""
        return bool(self.node.get("verified", self.node["verification"] is not None))

    @cached_property
    def texts(self) -> tuple[str, str]:
        """The text that it was given, its hint or what its parent wrote, and the text that it wrote itself."""
        text = self.node["text"] or ""
        if self.parent is None:
            return self.node["hint"] or "", text
        inherited = self.parent.node["text"] or ""
        return (inherited, text[len(inherited) :]) if text.startswith(inherited) else ("", text)

    @property
    def own_tokens(self) -> Sequence[str]:
        """The tokens that it generated itself."""
        tokens: Sequence[str] = self.node["tokens"] or []
        num_inherited = len(self.parent.node["tokens"] or ()) if self.parent else 0
        return tokens[num_inherited:] if len(tokens) >= num_inherited else tokens


def branches_of(nodes: Sequence[Mapping[str, Any]], best: int) -> list[PageBranch]:
    """The branches, in the order of the nodes.

    Args:
        nodes: nodes of a trace.
        best: place of the chosen one.
    """
    branches = [PageBranch({**NODE, **node}, is_best=place == best) for place, node in enumerate(nodes)]
    by_id = {branch.node["id"]: branch for branch in branches}
    for branch in branches:
        branch.parent = by_id.get(branch.node["parent"])
    forked = {branch.parent for branch in branches}
    scores = [branch.node["score"] for branch in branches if is_number(branch.node["score"])]
    for branch in branches:
        branch.is_given_up = bool(branch.node["pruned"] and not branch.node["error"]) and branch not in forked
        branch.shade = _shade(branch.node["score"], scores)
    at: PageBranch | None = branches[best]
    while at is not None and not at.is_on_path:
        at.is_on_path = True
        at = at.parent
    return branches


def by_round(branches: Sequence[PageBranch]) -> dict[int, list[PageBranch]]:
    """The branches of each round, the last round first, and in a round the best first."""
    rounds: dict[int, list[PageBranch]] = {}
    for branch in sorted(branches, key=_rank):
        rounds.setdefault(branch.node["depth"], []).append(branch)
    return dict(sorted(rounds.items(), reverse=True))


def _rank(branch: PageBranch) -> tuple[float, ...]:
    """The chosen one first, then by score, and by confidence where the model was not asked."""
    values = (branch.node["score"], branch.node["confidence"])
    return (not branch.is_best, *(-value if is_number(value) else 0.0 for value in values))


def _shade(score: Any, scores: Sequence[float]) -> int | None:
    if not is_number(score):
        return None
    low, high = min(scores), max(scores)
    if low == high:
        return NUM_SHADES // 2
    return min(int((score - low) / (high - low) * NUM_SHADES), NUM_SHADES - 1)
