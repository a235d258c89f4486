"""A node of the reasoning tree: a branch with what the search knows about it. It stays when the branch is pruned."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minirksc.engine.signals import TokenSignals, mean_top1

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch


@dataclass(eq=False)
class Node:
    """One branch of the tree.

    Attributes:
        node_id: index in `Tree.nodes`.
        parent_id: node that it was forked from; None in the first round.
        branch: branch with its tokens; pruned when it did not go on.
        depth: round in which it was made, from 1.
        hint: text that its answer was made to begin with.
        num_prompt_tokens: place in the branch's tokens where the answer, hint included, begins.
        num_cached_tokens: tokens of its prompt that were found in the prefix cache.
        num_shared_tokens: tokens whose KV it took from others when it started.
        num_saved_tokens: prompt tokens, counted by layers, that semantic sharing did not compute.
        is_semantic: it runs on KV of another phrasing.
        is_approximate: some of its KV is not what its own tokens would give.
        similarity: likeness of its phrasing to the first; None where they were not compared, or hold NaN.
        output_ids: generated tokens, its ancestors' included.
        text: text of output_ids.
        signals: signals of how sure the model was of each of output_ids.
        verification: p(YES); None where it was not asked about.
        exit_layer: layers that the pass of the question went through, where it left early; what a prompt's own prefill
            went through is the `exit_layer` of its trunk, a branch.
        score: None until it has been scored.
        error: reason why it failed; a failed node is not among those that go on.
        num_tokens: number of tokens: prompt, hint and output_ids.
    """

    node_id: int
    parent_id: int | None
    branch: "Branch"
    depth: int
    hint: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0
    num_saved_tokens: float = 0.0
    is_semantic: bool = False
    is_approximate: bool = False
    similarity: float | None = None
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    signals: TokenSignals = field(default_factory=TokenSignals)
    verification: float | None = None
    exit_layer: int | None = None
    score: float | None = None
    error: str | None = None
    num_tokens: int = 0

    def child(self, node_id: int, branch: "Branch") -> "Node":
        """A node that goes on from here, in the next round."""
        return Node(
            node_id,
            self.node_id,
            branch,
            depth=self.depth + 1,
            hint="",
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            is_semantic=self.is_semantic,
            is_approximate=self.is_approximate,
            similarity=self.similarity,
        )

    def read_branch(self) -> None:
        """Takes over what the branch has generated since the node was made."""
        self.num_tokens = self.branch.num_tokens
        self.output_ids, self.signals = list(self.branch.output_token_ids), self.branch.signals
        self.text = self.branch.text

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the answer: hint and all that was generated, perhaps an end-of-sequence token last."""
        return self.branch.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        """True when it ended by itself."""
        return self.branch.finish_reason == "stop"

    @property
    def confidence(self) -> float | None:
        """Mean probability of the likeliest token over output_ids (the paper's); None where there are none."""
        return mean_top1(self.signals) if self.signals.top1 else None

    @property
    def sharing(self) -> str:
        """What it got, not what was asked for."""
        if self.is_semantic:
            return "semantic"
        return "exact" if self.num_shared_tokens else "none"


def finite(value: float | None) -> float | None:
    """The same, None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
