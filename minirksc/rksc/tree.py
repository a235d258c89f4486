"""The reasoning tree of one solve: its nodes and its live branches.

A `Tree` plants, extends, expands and prunes, and notes every step in its record. Whatever it makes it puts into the
call that it belongs to in the same breath, so that all blocks go back with the call, wherever that is left.

With share=False no branch takes a token of KV from another: each is prefilled from scratch, also
when a later round begins. Paths, and with them the random numbers, are those of the shared tree.

With semantic sharing a phrasing may run on the KV of the first one (`minirksc.rksc.asks`). Verification of such a
branch reads `exact_branch` instead: the first phrasing's own KV, and the answer computed on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from minirksc.engine.gates import Seat
from minirksc.errors import NumericalError
from minirksc.rksc.node import Node, finite
from minirksc.rksc.record import Record

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch, BranchProgress
    from minirksc.engine.calls import Call
    from minirksc.engine.request import Salt
    from minirksc.engine.session import Session
    from minirksc.options import SamplingParams
    from minirksc.rksc.asks import Probe

OnStep = Callable[[Sequence["BranchProgress"]], Mapping[int, str]]
"""See `LLM.extend`."""


@dataclass(frozen=True)
class Start:
    """What a branch of the first round begins with.

    Attributes:
        prompt: token ids of its prompt.
        hint: text or token ids that its answer begins with.
        refusal: reason why its prompt is not even compared with the first one; None: it is.
    """

    prompt: Sequence[int]
    hint: str | Sequence[int]
    refusal: str | None = None


@dataclass(eq=False)
class Tree:
    """Nodes and branches of one solve.

    Attributes:
        session: session that computes the branches.
        call: call with whose end all its branches are released.
        share: False: every branch computes all its tokens.
        seed: seed of all branches, whose paths tell their random numbers apart.
        salt: salt of all branches, see `LLM.branches`.
        on_event: called with each event as it happens.
        nodes: all that were ever made, in order.
        record: what happened.
    """

    session: "Session"
    call: "Call"
    share: bool
    seed: int
    salt: "Salt | None" = None
    on_event: Callable[[dict[str, Any]], None] | None = None
    nodes: list[Node] = field(default_factory=list, init=False)
    _first: "Branch | None" = field(default=None, init=False)  # of the first phrasing, that others may run on

    def __post_init__(self) -> None:
        self.record = Record(self.session, self.on_event)

    def plant(self, starts: Sequence[Start], probe: "Probe | None" = None) -> list[Node]:
        """The first round: equal prompts are computed once, and each branch is forked from its own.

        Args:
            starts: what each branch begins with; the first one's prompt is the one that others may run on.
            probe: compares the other prompts with the first; None: each is computed.
        """
        nodes: list[Node] = []
        with self.record.phase("prefill", nodes) as event:
            known: dict[Any, int] = {}  # prompt -> its key, the index of the first branch that has it
            keys = [known.setdefault(tuple(one.prompt) if self.share else i, i) for i, one in enumerate(starts)]
            trunks = self._compute_prompts({key: starts[key] for key in keys}, probe)
            # What a prompt's branches are forked from: its trunk, or the first one where that is substituted for it.
            # Then its own left its prefill, which a trunk's exit_layer is about; a node's is about the question.
            grounds = {key: trunk if trunk.exit_layer is None else trunks[0] for key, trunk in trunks.items()}
            grown: dict[int, Branch] = {}
            for ground in dict.fromkeys(grounds.values()):
                indices = [index for index, key in enumerate(keys) if grounds[key] is ground]
                grown.update(zip(indices, self._fork(ground, indices), strict=True))
            for index, (start, key) in enumerate(zip(starts, keys, strict=True)):
                node = Node(
                    node_id=index,
                    parent_id=None,
                    branch=grown[index],
                    depth=1,
                    hint=start.hint if isinstance(start.hint, str) else self.session.decode(start.hint),
                    num_prompt_tokens=grounds[key].num_tokens,
                    num_cached_tokens=grounds[key].num_cached_tokens,
                )
                nodes.append(node)
                self.nodes.append(node)
                if probe is not None and key > 0:
                    self._note_probe(node, start, key, trunks[key], probe)
            is_lent = any(node.is_approximate for node in nodes)
            self._prune([trunk for key, trunk in trunks.items() if key > 0 or not is_lent])
            self._measure_sharing(nodes)
            for start, node in zip(starts, nodes, strict=True):
                node.branch.append(start.hint)
            event["num_prompts"] = len(trunks)
        return nodes

    def exact_branch(self, node: Node) -> "Branch":
        """A branch to verify: the node's own where that is exact, else its answer on the first phrasing."""
        if not node.is_approximate:
            return node.branch
        assert self._first is not None
        (branch,) = self._fork(self._first, [0])
        branch.append(node.answer_ids)
        return branch

    def extend(self, nodes: Sequence[Node], params: "SamplingParams", on_step: OnStep | None = None) -> None:
        """Decodes nodes together; one that fails has an error then, and its branch is pruned.

        Args:
            nodes: nodes that go on.
            params: sampling parameters of all.
            on_step: may stop some early, see `LLM.extend`.

        Raises:
            NumericalError: it failed, and none of the nodes did.
        """
        with self.record.phase("extend", nodes):
            error = None
            try:
                self.session.extend([node.branch for node in nodes], params, on_step)
            except NumericalError as one:
                error = one
            for node in nodes:
                node.read_branch()
                if node.branch.finish_reason == "error":
                    node.error = str(error)
        failed = [node.branch for node in nodes if node.error is not None]
        if error is not None and not failed:
            raise error
        self._prune(failed)

    def expand(self, nodes: Sequence[Node], survivors: Sequence[Node], width: int) -> list[Node]:
        """The next round: survivors are forked up to `width` nodes, the others pruned.

        Args:
            nodes: nodes of this round.
            survivors: nodes that go on, best first. A finished one stays as it is.
            width: number of nodes of the next round.
        """
        self._prune([node.branch for node in nodes if node not in survivors])
        finished = [node for node in survivors if node.finished]
        parents = [node for node in survivors if not node.finished]
        num_slots = width - len(finished)
        kids: list[Node] = []
        with self.record.phase("fork" if self.share else "prefill", kids) as event:
            for index, parent in enumerate(parents):
                num_kids = num_slots // len(parents) + (index < num_slots % len(parents))
                for branch in self._children(parent.branch, num_kids):
                    kids.append(parent.child(len(self.nodes), branch))
                    self.nodes.append(kids[-1])
            self._prune([parent.branch for parent in parents])
            self._measure_sharing(kids)
            event["survivors"] = [node.node_id for node in survivors]
        return finished + kids

    def _compute_prompts(self, starts: Mapping[int, Start], probe: "Probe | None") -> dict[int, "Branch"]:
        """Computes distinct prompts: key -> trunk, the branch that all which begin with the prompt are forked from.

        With a probe the first one is computed before the others start, and these leave where the probe says so. Their
        keys are their rows at it.
        """
        trunks: dict[int, Branch] = {}
        if probe is not None:
            for key, start in starts.items():
                probe.watch(key, start.prompt)
            (trunks[0],) = self._trunks([starts[0].prompt], [Seat(probe, 0, sees_all=True)])
            self._first = probe.root = trunks[0]
        others = {key: start for key, start in starts.items() if key not in trunks}
        seats = [Seat(probe, key) if probe and start.refusal is None else None for key, start in others.items()]
        computed = self._trunks([start.prompt for start in others.values()], seats) if others else []
        return trunks | dict(zip(others, computed, strict=True))

    def _trunks(self, prompts: Sequence[Sequence[int]], seats: Sequence[Seat | None] | None = None) -> list["Branch"]:
        options: dict[str, Any] = {"share": self.share, "seed": self.seed, "seats": seats, "salt": self.salt}
        self.call.sequences.extend(map(attrgetter("sequence"), trunks := self.session.branches(prompts, **options)))
        return trunks

    def _note_probe(self, node: Node, start: Start, key: int, trunk: "Branch", probe: "Probe") -> None:
        """Puts into the node, and for the first with its prompt into the record, what the probe decided."""
        is_accepted = key in probe.accepted
        node.similarity = finite(probe.similarities.get(key))
        node.is_semantic = is_accepted
        node.is_approximate = is_accepted and trunk.exit_layer is None
        node.num_saved_tokens = trunk.num_saved_layer_rows / self.session.spec.num_layers if is_accepted else 0.0
        if node.node_id != key:
            return
        if start.refusal is not None:
            self.record.note("guard", decision="computed", reason=start.refusal, node=node)
            return
        self.record.note(
            "share",
            decision=probe.mode if is_accepted else "computed",
            reason=f"{node.num_saved_tokens:.1f} prompt tokens saved" if is_accepted else probe.why_not(key),
            node=node,
            value=node.similarity,
            threshold=probe.tau,
            layer=probe.num_layers,
        )

    def _fork(self, branch: "Branch", indices: Sequence[int]) -> list["Branch"]:
        """The forks with these indices: a path must not depend on what else was planted."""
        self.call.sequences.extend(map(attrgetter("sequence"), kids := branch.fork(max(indices) + 1)))
        wanted = set(indices)
        self._prune([kid for index, kid in enumerate(kids) if index not in wanted])
        return [kids[index] for index in indices]

    def _children(self, branch: "Branch", count: int) -> list["Branch"]:
        if self.share:
            return self._fork(branch, range(count))
        return [self._replant(branch, index) for index in range(count)]

    def _replant(self, branch: "Branch", index: int) -> "Branch":
        """Child `index` of a branch, all its tokens computed anew."""
        (child,) = self._trunks([branch.token_ids])
        for step in (*branch.path, index):
            ancestor = child
            (child,) = self._fork(ancestor, [step])
            self._prune([ancestor])
        child.take_over(branch)
        return child

    def _measure_sharing(self, nodes: Sequence[Node]) -> None:
        """Before the first own token: a partial block is shared until one of its branches writes into it."""
        for node in nodes:
            node.num_shared_tokens = max(node.branch.num_shared_tokens, node.num_cached_tokens)

    def _prune(self, branches: Sequence["Branch"]) -> None:
        for branch in branches:
            branch.prune()
