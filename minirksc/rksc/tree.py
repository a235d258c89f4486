"""The reasoning tree of one solve: its nodes and its live branches.

A `Tree` plants, extends, expands and prunes, and notes every step in its record. Whatever it makes it puts into the
call that it belongs to in the same breath, so that all blocks go back with the call, wherever that is left.

With share=False no branch takes a token of KV from another: each is prefilled from scratch, also
when a deeper round begins. Paths, and with them the random numbers, are those of the shared tree.

With semantic sharing a wording may run on the KV of the first one (`minirksc.rksc.asks`). Whoever is to judge such a
branch gets `exact_branch` instead: the first wording's own KV, and the answer computed on it.
"""

from collections.abc import Callable, Mapping, Sequence
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


class Tree:
    """Nodes and branches of one solve.

    Args:
        session: computes the branches.
        call: with whose end all its branches are released.
        share: False: every branch computes all its tokens.
        seed: of all branches, whose paths tell their random numbers apart.
        salt: of all branches, see `LLM.branches`.
        on_event: called with each event as it happens.

    Attributes:
        nodes: all that were ever made, in order.
        record: what happened.
        seed: as given.
    """

    def __init__(
        self,
        session: "Session",
        call: "Call",
        *,
        share: bool,
        seed: int,
        salt: "Salt | None" = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self.record = Record(session, on_event)
        self._session = session
        self.seed = seed
        self._share = share
        self._salt = salt
        self._call = call
        self._first_root: Branch | None = None  # that others may run on

    def plant(
        self,
        prompts: Sequence[list[int]],
        hints: Sequence[str | Sequence[int]],
        probe: "Probe | None" = None,
        refusals: Sequence[str | None] = (),
    ) -> list[Node]:
        """The first round: one branch a prompt; equal prompts are computed once.

        Args:
            prompts: token ids, one a branch; the first is the one that others may run on.
            hints: how each branch's answer begins.
            probe: compares the others with the first; None: each is computed.
            refusals: of each prompt, why it is not even compared; None: it is.
        """
        nodes: list[Node] = []
        with self.record.phase("prefill", nodes) as event:
            groups: dict[Any, list[int]] = {}
            for index, prompt in enumerate(prompts):
                groups.setdefault(tuple(prompt) if self._share else index, []).append(index)
            members = list(groups.values())
            if probe is None:
                roots = self._roots([prompts[indices[0]] for indices in members])
            else:
                roots = self._probed_roots([prompts[indices[0]] for indices in members], probe, members, refusals)
            grown: dict[int, tuple[Branch, Branch]] = {}  # index -> branch, its root
            substituted = [place for place, root in enumerate(roots) if root.exit_layer is not None]
            for place, (root, indices) in enumerate(zip(roots, members, strict=True)):
                if place in substituted:
                    continue
                stands_for = substituted if place == 0 else []
                own = sorted([*indices, *(i for other in stands_for for i in members[other])])
                branches = self._fork(root, own)
                grown.update((i, (b, root)) for i, b in zip(own, branches, strict=True))
            for index, hint in enumerate(hints):
                branch, root = grown[index]
                nodes.append(self._node(branch, None, self._text_of(hint), root.num_tokens, root.num_cached_tokens))
            if probe is not None:
                self._note_probes(nodes, members, roots, probe, refusals)
            self._prune([root for root in roots if not (root is roots[0] and any(n.is_approximate for n in nodes))])
            self._measure_sharing(nodes)
            for node, hint in zip(nodes, hints, strict=True):
                node.branch.append(hint)
            event["num_prompts"] = len(groups)
        return nodes

    def exact_branch(self, node: Node) -> "Branch":
        """A branch for whoever judges: the node's own where that is exact, else its answer on the first wording."""
        if not node.is_approximate:
            return node.branch
        assert self._first_root is not None
        (branch,) = self._fork(self._first_root, [0])
        branch.append(node.branch.token_ids[node.num_prompt_tokens :])
        return branch

    def extend(self, nodes: Sequence[Node], params: "SamplingParams", on_step: OnStep | None = None) -> None:
        """Decodes nodes together; one that fails has an error then, and its branch is pruned.

        Args:
            nodes: that go on.
            params: of all.
            on_step: may stop some early, see `LLM.extend`.

        Raises:
            NumericalError: it failed, and none of the nodes did.
        """
        with self.record.phase("extend", nodes):
            error = None
            try:
                self._session.extend([node.branch for node in nodes], params, on_step)
            except NumericalError as one:
                error = one
            for node in nodes:
                self._read(node)
                if node.branch.finish_reason == "error":
                    node.error = str(error)
        failed = [node.branch for node in nodes if node.error is not None]
        if error is not None and not failed:
            raise error
        self._prune(failed)

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
        with self.record.phase("fork" if self._share else "prefill", kids) as event:
            for index, parent in enumerate(parents):
                num_kids = num_slots // len(parents) + (index < num_slots % len(parents))
                for branch in self._children(parent.branch, num_kids):
                    kids.append(self._node(branch, parent, "", parent.num_prompt_tokens, parent.num_cached_tokens))
            self._prune([parent.branch for parent in parents])
            self._measure_sharing(kids)
            event["survivors"] = [node.node_id for node in survivors]
        return finished + kids

    def _roots(self, prompts: Sequence[Sequence[int]], seats: Sequence[Seat | None] | None = None) -> list["Branch"]:
        options: dict[str, Any] = {"share": self._share, "seed": self.seed, "seats": seats, "salt": self._salt}
        self._call.sequences.extend(map(attrgetter("sequence"), roots := self._session.branches(prompts, **options)))
        return roots

    def _probed_roots(
        self, prompts: Sequence[list[int]], probe: "Probe", members: Sequence[list[int]], refusals: Sequence[str | None]
    ) -> list["Branch"]:
        """The first prompt is computed; the others start, and leave where the probe says so."""
        for row, prompt in enumerate(prompts):
            probe.watch(row, prompt)
        (first,) = self._roots(prompts[:1], [Seat(probe, 0, sees_all=True)])
        self._first_root = probe.root = first
        is_refused = [refusals[indices[0]] is not None for indices in members]
        seats = [None if refused else Seat(probe, row) for row, refused in enumerate(is_refused)]
        return [first, *(self._roots(prompts[1:], seats[1:]) if len(prompts) > 1 else [])]

    def _note_probes(
        self,
        nodes: Sequence[Node],
        members: Sequence[list[int]],
        roots: Sequence["Branch"],
        probe: "Probe",
        refusals: Sequence[str | None],
    ) -> None:
        num_layers = self._session.spec.num_layers
        for row, (indices, root) in enumerate(zip(members, roots, strict=True)):
            if row == 0:
                continue
            is_accepted = row in probe.accepted
            for node in (nodes[i] for i in indices):
                node.similarity = finite(probe.similarities.get(row))
                node.is_semantic = is_accepted
                node.is_approximate = is_accepted and root.exit_layer is None
                if is_accepted:
                    node.num_saved_tokens = root.num_saved_layer_rows / num_layers
            node, refusal = nodes[indices[0]], refusals[indices[0]]
            if refusal is not None:
                self.record.note("guard", decision="computed", reason=refusal, node=node)
                continue
            saved = f"{root.num_saved_layer_rows / num_layers:.1f} prompt tokens saved"
            self.record.note(
                "share",
                decision=probe.mode if is_accepted else "computed",
                reason=saved if is_accepted else probe.why_not(row),
                node=node,
                value=node.similarity,
                threshold=probe.tau,
                layer=probe.depth,
            )

    def _fork(self, branch: "Branch", indices: Sequence[int]) -> list["Branch"]:
        """The forks with these indices: a path must not depend on what else was planted."""
        self._call.sequences.extend(map(attrgetter("sequence"), kids := branch.fork(max(indices) + 1)))
        wanted = set(indices)
        self._prune([kid for index, kid in enumerate(kids) if index not in wanted])
        return [kids[index] for index in indices]

    def _children(self, branch: "Branch", count: int) -> list["Branch"]:
        if self._share:
            return self._fork(branch, range(count))
        return [self._replant(branch, index) for index in range(count)]

    def _replant(self, branch: "Branch", index: int) -> "Branch":
        """Child `index` of a branch, all its tokens computed anew."""
        (child,) = self._roots([branch.token_ids])
        for step in (*branch.path, index):
            ancestor = child
            (child,) = self._fork(ancestor, [step])
            self._prune([ancestor])
        child.take_over(branch)
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
            node.output_ids, node.signals = list(parent.output_ids), parent.signals
            node.is_semantic, node.is_approximate = parent.is_semantic, parent.is_approximate
            node.similarity = parent.similarity
        self.nodes.append(node)
        return node

    def _read(self, node: Node) -> None:
        """Takes over what the branch has generated since the node was made."""
        branch = node.branch
        node.num_tokens = branch.num_tokens
        node.output_ids, node.signals = list(branch.output_token_ids), branch.signals
        node.text = branch.text

    def _measure_sharing(self, nodes: Sequence[Node]) -> None:
        """Before the first own token: a partial block is shared until someone writes into it."""
        for node in nodes:
            node.num_shared_tokens = max(node.branch.num_shared_tokens, node.num_cached_tokens)

    def _prune(self, branches: Sequence["Branch"]) -> None:
        for branch in branches:
            branch.prune()

    def _text_of(self, hint: str | Sequence[int]) -> str:
        return hint if isinstance(hint, str) else self._session.decode(hint)
