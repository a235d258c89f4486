"""W5, tree search: what several searches on one cache ask of it, with neither a model nor a clock.

A search grows a tree from one prompt. In each round it expands the `beam` best nodes to `branches` children, each of
which decodes `tokens` tokens. Scores are drawn, not judged: from the seed, the problem and the path, half of a child's
score being its parent's. So every run of a workload does the same work, whatever the cache does. Kinds of search:

- beam: the best children go on, all others are pruned at once and never come back. `depth` rounds.
- best-first: nodes that are not expanded stay open, as kept branches, up to `num_open` of them; a round takes the best
  open nodes of any depth, so that it goes back when an earlier node beats the new ones. It ends after `depth` + 2
  rounds.
- regret: the same search, but what is not expanded at once is pruned. To go back to a node is to begin it anew from its
  token ids; the prefix cache may still have it, and nothing told the cache to expect it.

A service runs `concurrency` searches at a time, and begins the next problem when one ends. Token ids are drawn like
the scores; prompts are the words of the built-in examples.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from minirksc.engine.request import Request
from minirksc.engine.request import Sequence as Branch
from minirksc.options import SamplingParams

Path = tuple[int, ...]
Hint = Callable[[int, Path], list[int]]
"""(problem, path of the child) -> token ids that it begins with."""
KINDS = ("beam", "best-first", "regret")
PREFILL = SamplingParams(max_tokens=1).resolved({})


@dataclass(frozen=True)
class Shape:
    """Of each search, and how many there are.

    Attributes:
        kind: name out of KINDS.
        branches, beam, depth, tokens, num_open: sizes as above.
        num_problems, concurrency: searches in all, and at a time.
        seed: seed of the scores.
    """

    kind: str = "best-first"
    branches: int = 8
    beam: int = 2
    depth: int = 4
    tokens: int = 32
    num_open: int = 8
    num_problems: int = 12
    concurrency: int = 12
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """One round of a search; parents are given back once their children have been forked.

    Attributes:
        expand: pairs of (parent, its children); a parent without a branch is begun anew from its token ids.
        drop: branches that are given back when the children have been decoded.
    """

    expand: list[tuple[Path, list[Path]]]
    drop: list[Path]


def plan(shape: Shape, problem: int) -> list[Round]:
    """The rounds of one search."""
    scores: dict[Path, float] = {(): 0.0}
    frontier: list[Path] = [()]
    alive: set[Path] = {()}
    rounds: list[Round] = []
    num_rounds = shape.depth + (0 if shape.kind == "beam" else 2)
    for index in range(num_rounds):
        parents = _best(frontier, scores, shape)[: shape.beam]
        if not parents:
            break
        expand = []
        for rank, parent in enumerate(parents):
            num_children = shape.branches // len(parents) + (rank < shape.branches % len(parents))
            children = [(*parent, child) for child in range(num_children)]
            for child in children:
                noise = random.Random(f"{shape.seed} {problem} {child}").gauss(0, 1)
                scores[child] = 0.5 * scores[parent] + noise
            expand.append((parent, children))
        new = [child for _, children in expand for child in children]
        alive = (alive - set(parents)) | set(new)
        old = [] if shape.kind == "beam" else [path for path in frontier if path not in parents]
        frontier = _best(old + new, scores, shape)[: shape.num_open]
        kept = frontier if shape.kind == "best-first" else frontier[: shape.beam]
        if index == num_rounds - 1:
            kept = []
        rounds.append(Round(expand, sorted(alive.difference(kept))))
        alive &= set(kept)
    if alive:
        rounds[-1].drop.extend(sorted(alive))
    return rounds


def _best(paths: Sequence[Path], scores: dict[Path, float], shape: Shape) -> list[Path]:
    """Those that can be expanded, best first."""
    return sorted((path for path in paths if len(path) < shape.depth), key=lambda path: -scores[path])


class Host(Protocol):
    """What a service needs of an engine; `minirksc.engine.engine.Engine` has it."""

    def new_sequence(self, token_ids: Sequence[int]) -> Branch: ...
    def fork_sequence(self, parent: Branch, index: int) -> Branch: ...
    def add_request(self, sequence: Branch, params: SamplingParams, *, prefill_only: bool = False) -> Request: ...
    def release(self, sequence: Branch) -> None: ...
    def step(self) -> list[Request]: ...


@dataclass(eq=False)
class Search:
    """One problem under way.

    Attributes:
        problem: number of the problem.
        rounds: rounds still to do, the present one first.
        branches: live branches, by path.
        token_ids: tokens of every node that was ever decoded.
        pending: requests that the present round waits for.
        forked: whether the present round's children exist.
    """

    problem: int
    rounds: list[Round]
    branches: dict[Path, Branch] = field(default_factory=dict)
    token_ids: dict[Path, list[int]] = field(default_factory=dict)
    pending: list[Request] = field(default_factory=list)
    forked: bool = False


class Service:
    """Searches on one engine, some at a time.

    Args:
        host: engine.
        prompts: token ids, one a problem.
        shape: shape of the searches.
        hint: beginning of each child.

    Attributes:
        searches: searches that have begun; all of them, when `run` is through.
    """

    def __init__(self, host: Host, prompts: Sequence[list[int]], shape: Shape, hint: Hint) -> None:
        self.searches: list[Search] = []
        self._host = host
        self._prompts = prompts
        self._shape = shape
        self._hint = hint
        greedy = SamplingParams(temperature=0, max_tokens=shape.tokens, ignore_eos=True, detokenize=False)
        self._sampling = greedy.resolved({})

    def run(self) -> dict[tuple[int, Path], list[int]]:
        """Runs all searches; returns the token ids of every node by (problem, path).

        Raises:
            RuntimeError: a request failed.
        """
        active: list[Search] = []
        while active or len(self.searches) < len(self._prompts):
            while len(active) < self._shape.concurrency and len(self.searches) < len(self._prompts):
                active.append(self._begin(len(self.searches)))
            for request in self._host.step():
                if request.error is not None:
                    raise RuntimeError("the pool is too small for this workload") from request.error
            for search in active:
                search.pending = [request for request in search.pending if not request.finished]
                if not search.pending:
                    self._go_on(search)
            active = [search for search in active if search.rounds]
        return {(search.problem, path): ids for search in self.searches for path, ids in search.token_ids.items()}

    def _begin(self, problem: int) -> Search:
        search = Search(problem, plan(self._shape, problem), token_ids={(): self._prompts[problem]})
        self.searches.append(search)
        self._open_parents(search)
        return search

    def _go_on(self, search: Search) -> None:
        """All that the search waited for is there."""
        if not search.forked:
            self._fork(search)
            return
        done = search.rounds.pop(0)
        for _, children in done.expand:
            search.token_ids.update((path, list(search.branches[path].token_ids)) for path in children)
        for path in done.drop:
            self._host.release(search.branches.pop(path))
        search.forked = False
        if search.rounds:
            self._open_parents(search)
            if not search.pending:
                self._fork(search)

    def _open_parents(self, search: Search) -> None:
        """Begins the root, and nodes that had been given up, from their token ids."""
        for path, _ in search.rounds[0].expand:
            if path not in search.branches:
                branch = self._host.new_sequence(search.token_ids[path])
                branch.kept, branch.path, branch.depth = True, path, len(path)
                search.branches[path] = branch
                search.pending.append(self._host.add_request(branch, PREFILL, prefill_only=True))

    def _fork(self, search: Search) -> None:
        for path, children in search.rounds[0].expand:
            parent = search.branches.pop(path)
            for child in children:
                branch = self._host.fork_sequence(parent, child[-1])
                branch.token_ids += self._hint(search.problem, child)
                search.branches[child] = branch
            self._host.release(parent)
            for child in children:
                search.pending.append(self._host.add_request(search.branches[child], self._sampling))
        search.forked = True
