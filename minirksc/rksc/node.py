"""A node of the reasoning tree: a branch with what the search knows about it. It stays when the branch is pruned."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minirksc.engine.signals import SIGNALS, TokenSignals, mean_top1

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch


@dataclass(eq=False)
class Node:
    """One branch of the tree.

    Attributes:
        node_id: its index in `Tree.nodes`.
        parent_id: of the node that it was forked from; None in the first round.
        branch: its tokens; pruned when it did not go on.
        depth: round in which it was made, from 1.
        hint: text that its answer was made to begin with.
        num_prompt_tokens: where the answer, hint included, begins in the branch's tokens.
        num_cached_tokens: of its prompt, found in the prefix cache.
        num_shared_tokens: whose KV it took from others when it started.
        num_saved_tokens: prompt tokens, counted by layers, that semantic sharing did not compute.
        is_semantic: it runs on KV of another wording.
        is_approximate: some of its KV is not what its own tokens would give.
        similarity: of its wording to the first; None where they were not compared, or hold NaN.
        output_ids: generated tokens, its ancestors' included.
        text: of output_ids.
        signals: how sure the model was of each of output_ids.
        verification: p(YES); None where nobody asked.
        exit_layer: layers that the pass of the question went through, where it left early.
        score: None until it has been scored.
        error: why it failed; a failed node is not among those that go on.
        num_tokens: prompt, hint and output_ids.
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

    @property
    def finished(self) -> bool:
        """True when it ended by itself."""
        return self.branch.finish_reason == "stop"

    @property
    def confidence(self) -> float | None:
        """Mean probability of the likeliest token over output_ids; None where there are none."""
        return mean_top1(self.signals) if self.signals.top1 else None

    @property
    def sharing(self) -> str:
        """What it got, not what was asked for."""
        if self.is_semantic:
            return "semantic"
        return "exact" if self.num_shared_tokens else "none"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the branch; see docs/trace.schema.json."""
        return {
            "id": self.node_id,
            "parent": self.parent_id,
            "path": list(self.branch.path),
            "depth": self.depth,
            "hint": self.hint,
            "text": self.text,
            "token_ids": list(self.output_ids),
            "num_tokens": self.num_tokens,
            "num_output_tokens": len(self.output_ids),
            "num_shared_tokens": self.num_shared_tokens,
            "num_own_tokens": self.num_tokens - self.num_shared_tokens,
            "num_saved_tokens": self.num_saved_tokens,
            "sharing": self.sharing,
            "similarity": self.similarity,
            "confidence": self.confidence,
            "signals": {name: finite(signal(self.signals)) for name, signal in SIGNALS.items()},
            "verified": self.verification is not None,
            "verification": self.verification,
            "exit_layer": self.exit_layer,
            "score": self.score,
            "finish_reason": self.branch.finish_reason,
            "error": self.error,
        }


def finite(value: float | None) -> float | None:
    """The same, None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
