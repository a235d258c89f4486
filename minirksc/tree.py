"""The reasoning tree of one solve: its nodes, its live branches, its clock.

A `Node` is a branch with what the search knows about it, and stays when the branch is pruned. A
`Tree` plants, extends, expands and prunes, notes every step as an event, and gives all blocks back
in the end.

With share=False no branch takes a token of KV from another: each is prefilled from scratch, also
when a deeper round begins. Paths, and with them the random numbers, are those of the shared tree.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minirksc.branch import Branch
    from minirksc.config import SamplingParams
    from minirksc.llm import LLM

_SECONDS = {"prefill": "prefill_s", "extend": "decode_s", "verify": "verify_s"}


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
        output_ids: generated tokens, its ancestors' included.
        text: of output_ids.
        confidence: mean probability of the likeliest token over output_ids.
        verification: p(YES); None where nobody asked.
        score: None until it has been scored.
    """

    node_id: int
    parent_id: int | None
    branch: "Branch"
    depth: int
    hint: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_shared_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    confidence: float = 0.0
    verification: float | None = None
    score: float | None = None
    num_tokens: int = 0

    @property
    def finished(self) -> bool:
        """True when it ended by itself."""
        return self.branch.finish_reason == "stop"

    @property
    def sharing(self) -> str:
        """What it got, not what was asked for."""
        return "exact" if self.num_shared_tokens else "none"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the branch."""
        return {
            "id": self.node_id,
            "parent": self.parent_id,
            "path": list(self.branch.path),
            "depth": self.depth,
            "hint": self.hint,
            "text": self.text,
            "num_tokens": self.num_tokens,
            "num_output_tokens": len(self.output_ids),
            "num_shared_tokens": self.num_shared_tokens,
            "sharing": self.sharing,
            "confidence": self.confidence,
            "verification": self.verification,
            "score": self.score,
            "finish_reason": self.branch.finish_reason,
        }


class Tree:
    """Nodes and branches of one solve.

    Args:
        llm: computes the branches.
        share: False: every branch computes all its tokens.
        on_event: called with each event as it happens.

    Attributes:
        nodes: all that were ever made, in order.
        events: what happened, in order; plain data, at_s and seconds on the clock of this solve.
        stats: filled by `finish`.
    """

    def __init__(self, llm: "LLM", *, share: bool, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.nodes: list[Node] = []
        self.events: list[dict[str, Any]] = []
        self.stats: dict[str, float] = dict.fromkeys(_SECONDS.values(), 0.0)
        self._llm = llm
        self._share = share
        self._on_event = on_event
        self._live: dict[int, Branch] = {}
        self._start = time.perf_counter()
        self._counters = self._count()
        self._blocks_used_peak = 0

    @contextmanager
    def phase(self, name: str, nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
        """Times what is done inside; the body may add plain data to the event that it yields."""
        begin = time.perf_counter()
        event: dict[str, Any] = {"event": name, "at_s": begin - self._start}
        yield event
        event["seconds"] = time.perf_counter() - begin
        event["nodes"] = [node.node_id for node in nodes]
        if name in _SECONDS:
            self.stats[_SECONDS[name]] += event["seconds"]
        used = int(self._llm.stats().get("num_blocks_used", 0))
        self._blocks_used_peak = max(self._blocks_used_peak, used)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def plant(self, prompts: Sequence[list[int]], hints: Sequence[str | Sequence[int]]) -> list[Node]:
        """The first round: one branch a prompt; equal prompts are computed once.

        Args:
            prompts: token ids, one a branch.
            hints: how each branch's answer begins.
        """
        nodes: list[Node] = []
        with self.phase("prefill", nodes) as event:
            groups: dict[Any, list[int]] = {}
            for index, prompt in enumerate(prompts):
                groups.setdefault(tuple(prompt) if self._share else index, []).append(index)
            roots: list[Branch] = []
            grown: dict[int, tuple[Branch, int]] = {}  # index -> branch, cached tokens
            for indices in groups.values():
                root, num_cached = self._root(prompts[indices[0]])
                roots.append(root)
                branches = self._fork(root, indices)
                grown.update((i, (b, num_cached)) for i, b in zip(indices, branches, strict=True))
            self._prune(roots)
            for index, hint in enumerate(hints):
                branch, num_cached = grown[index]
                nodes.append(self._node(branch, None, self._text_of(hint), len(prompts[index]), num_cached))
            self._measure_sharing(nodes)
            for node, hint in zip(nodes, hints, strict=True):
                node.branch.append(hint)
            event["num_prompts"] = len(groups)
        return nodes

    def extend(self, nodes: Sequence[Node], params: "SamplingParams") -> None:
        """Decodes nodes together."""
        with self.phase("extend", nodes):
            self._llm.extend([node.branch for node in nodes], params)
            for node in nodes:
                self._read(node)

    def expand(self, nodes: Sequence[Node], survivors: Sequence[Node], width: int) -> list[Node]:
        """The next round: survivors are forked up to `width` nodes, the others pruned.

        Args:
            nodes: of this round.
            survivors: those that go on, best first. A finished one stays as it is.
            width: nodes of the next round.
        """
        self._prune([node.branch for node in nodes if node not in survivors])
        finished = [node for node in survivors if node.finished]
        parents = [node for node in survivors if not node.finished]
        num_slots = width - len(finished)
        kids: list[Node] = []
        with self.phase("fork" if self._share else "prefill", kids) as event:
            for index, parent in enumerate(parents):
                num_kids = num_slots // len(parents) + (index < num_slots % len(parents))
                for branch in self._children(parent.branch, num_kids):
                    kids.append(self._node(branch, parent, "", parent.num_prompt_tokens, parent.num_cached_tokens))
            self._prune([parent.branch for parent in parents])
            self._measure_sharing(kids)
            event["survivors"] = [node.node_id for node in survivors]
        return finished + kids

    def finish(self) -> None:
        """Completes `stats`."""
        for name, value in self._count().items():
            self.stats[name] = value - self._counters.get(name, 0)
        self.stats["blocks_used_peak"] = self._blocks_used_peak
        self.stats["total_s"] = time.perf_counter() - self._start

    def close(self) -> None:
        """Prunes every branch that is left; twice is fine."""
        self._prune(list(self._live.values()))

    def _root(self, prompt: Sequence[int]) -> tuple["Branch", int]:
        """A new root, and how many of its tokens came from the prefix cache."""
        before = self._llm.stats()["num_cached_tokens"]
        root = self._llm.branch(prompt, share=self._share)
        self._live[id(root)] = root
        return root, int(self._llm.stats()["num_cached_tokens"] - before)

    def _fork(self, branch: "Branch", indices: Sequence[int]) -> list["Branch"]:
        """The forks with these indices: a path must not depend on what else was planted."""
        kids = branch.fork(max(indices) + 1)
        self._live.update((id(kid), kid) for kid in kids)
        wanted = set(indices)
        self._prune([kid for index, kid in enumerate(kids) if index not in wanted])
        return [kids[index] for index in indices]

    def _children(self, branch: "Branch", count: int) -> list["Branch"]:
        if self._share:
            return self._fork(branch, range(count))
        return [self._replant(branch, index) for index in range(count)]

    def _replant(self, branch: "Branch", index: int) -> "Branch":
        """Child `index` of a branch, all its tokens computed anew."""
        child, _ = self._root(branch.token_ids)
        for step in (*branch.path, index):
            ancestor = child
            (child,) = self._fork(ancestor, [step])
            self._prune([ancestor])
        return child

    def _node(self, branch: "Branch", parent: Node | None, hint: str, num_prompt: int, num_cached: int) -> Node:
        node = Node(
            node_id=len(self.nodes),
            parent_id=None if parent is None else parent.node_id,
            branch=branch,
            depth=1 if parent is None else parent.depth + 1,
            hint=hint,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
        )
        if parent is not None:
            node.output_ids, node.confidence = list(parent.output_ids), parent.confidence
        self.nodes.append(node)
        return node

    def _read(self, node: Node) -> None:
        """Takes over what the branch has generated since the node was made."""
        branch = node.branch
        num_before = len(node.output_ids)
        node.num_tokens = branch.num_tokens
        # A replanted branch knows its own round only; a forked one all of them.
        knows_all = self._share or num_before == 0
        new_ids = branch.output_token_ids[num_before:] if knows_all else branch.output_token_ids
        node.output_ids = [*node.output_ids, *new_ids]
        if knows_all:
            node.confidence = branch.confidence
        else:
            total = node.confidence * num_before + branch.confidence * len(new_ids)
            node.confidence = total / len(node.output_ids)
        # Decoded whole: a character may span rounds. A stop string at the end is not text.
        num_hidden = len(self._decode(branch.output_token_ids)) - len(branch.text)
        text = self._decode(node.output_ids)
        node.text = text[: len(text) - num_hidden]

    def _measure_sharing(self, nodes: Sequence[Node]) -> None:
        """Before the first own token: a partial block is shared until someone writes into it."""
        for node in nodes:
            node.num_shared_tokens = max(node.branch.num_shared_tokens, node.num_cached_tokens)

    def _prune(self, branches: Sequence["Branch"]) -> None:
        for branch in branches:
            branch.prune()
            self._live.pop(id(branch), None)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self._llm.tokenizer is None else self._llm.tokenizer.decode(token_ids)

    def _text_of(self, hint: str | Sequence[int]) -> str:
        return hint if isinstance(hint, str) else self._decode(hint)

    def _count(self) -> dict[str, int]:
        """The engine's counters, without what is a state rather than a count."""
        return {
            name: int(value)
            for name, value in self._llm.stats().items()
            if name.startswith("num_") and not name.startswith("num_blocks_")
        }
