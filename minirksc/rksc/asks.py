"""ASKS: whether a branch whose prompt is worded otherwise may run on the KV of the first wording.

Exact sharing is the block manager's, and always on: what two prompts begin with alike is computed once. Here is the
approximate kind, in this order, each step cheaper than what it may save:

1. guard   numbers, units, negations, names and the like must agree (`guard.py`); else the wording is computed.
2. probe   the wording's own prefill starts, and after k layers its hidden states are compared with those of the first
           wording (`similarity.py`). Below tau, or NaN: the same prefill goes on, at the cost of one comparison.
3. accept  substitute: all its rows leave, and the branch continues the first wording's KV. This is the paper's mode,
           and the same as having sent the first wording.
           aligned: the branch keeps its own tokens. Those that both wordings have leave, and use the first wording's
           KV from here on, keys turned to their new positions. Computed to the end are the others, the first
           `AFTER_SPLICE` after each splice, the last `LAST`, and of the rest the share `DEVIATING` whose state differs
           most. Where that leaves less than `LEAST_BORROWED` of the wording to borrow, it is computed: it would gain
           next to nothing, and approximate for it.

Other salts never meet: both wordings belong to one solve, and a private root shares with nobody. Verification never
reads what was accepted here: see `Tree.exact_branch`.

Where this differs from the paper (arXiv 2606.09937): its similarity is taken over all layers, when nothing is left to
save, of the last tokens alone, which say more about the template than about the problem; that gate is here too, as
"sigma". Source of aligned mode: CacheBlend (arXiv 2405.16444) for the deviating tokens, EPIC (arXiv 2410.15332) for the
beginning after a splice.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import torch
from torch import Tensor

from minirksc.engine.gates import LEAVE, Borrow, Decisions, GateRows, Leave
from minirksc.errors import ConfigError
from minirksc.models.spec import ArchSpec
from minirksc.rksc.similarity import GATES, PrefixStates, SimilarityGate

ROOT = 0
"""Row of the first wording."""

MIN_RUN = 8
"""Tokens of a match that is worth a splice."""

AFTER_SPLICE = 16
LAST = 64
DEVIATING = 0.12
LEAST_BORROWED = 0.5


class Lender(Protocol):
    """Whose KV may be borrowed; see `Branch`."""

    @property
    def seq_id(self) -> int:
        """Its sequence."""
        ...

    def has_kv(self, positions: Sequence[int]) -> bool:
        """Whether the KV of these positions is there right now."""
        ...


class Probe:
    """Compares wordings with the first one inside their own prefills; a layer gate.

    The first wording must pass with all its tokens before the others start.

    Args:
        gate: the measure.
        depth: layers after which it is decided.
        tau: least similarity that is accepted.
        aligned: the mode; else substitute.

    Attributes:
        root: the first wording, once it has been computed; aligned mode borrows from it.
        depth, tau: as given.
        mode: "aligned" or "substitute".
        similarities: of each row that was compared; NaN where its states were not finite.
        accepted: rows that were accepted, and have something to borrow where that is the mode.
        num_borrowed: in aligned mode, tokens of each accepted row that are not computed above the probe's depth.
    """

    def __init__(
        self,
        gate: SimilarityGate,
        depth: int,
        tau: float,
        *,
        aligned: bool,
    ) -> None:
        self.root: Lender | None = None
        self.depth = depth
        self.similarities: dict[int, float] = {}
        self.accepted: set[int] = set()
        self.num_borrowed: dict[int, int] = {}
        self._needed = set(gate.layers(depth)) | {depth - 1}
        self._gate = gate
        self.tau = tau
        self.mode = "aligned" if aligned else "substitute"
        self._aligned = aligned
        self._token_ids: dict[int, list[int]] = {}
        self._parts: dict[int, dict[int, list[Tensor]]] = {}  # row -> layer -> states, chunk by chunk
        self._first: dict[int, int] = {}  # row -> position of its first token that was computed

    @property
    def layers(self) -> Collection[int]:
        """See `minirksc.engine.gates.LayerGate`."""
        return self._needed

    def watch(self, row: int, token_ids: Sequence[int]) -> None:
        """Says which tokens a row has, before it starts."""
        self._token_ids[row] = list(token_ids)

    def why_not(self, row: int) -> str:
        """Why a row was not accepted."""
        similarity = self.similarities.get(row)
        if similarity is None:
            return "it was found in the prefix cache"
        if math.isnan(similarity):
            return "its hidden states were not finite"
        if similarity < self.tau:
            return "less alike than the threshold"
        return "too little can be borrowed: the runs of equal tokens are too short, or their KV is gone"

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """See `minirksc.engine.gates.LayerGate`."""
        decisions: dict[int, Leave | Borrow] = {}
        for index, row in enumerate(rows.rows):
            self._first.setdefault(row, rows.positions[index].start)
            self._parts.setdefault(row, {}).setdefault(layer, []).append(rows.hidden(index))
            if row == ROOT or layer != self.depth - 1 or not rows.ends[index]:
                continue
            if self._accepts(row):
                borrow = self._borrow(row, rows.positions[index]) if self._aligned else None
                if borrow is not None or not self._aligned:
                    decisions[row] = LEAVE if borrow is None else borrow
                    self.accepted.add(row)
            del self._parts[row]
        return decisions

    def _accepts(self, row: int) -> bool:
        first = self._first[row]
        similarity = self._gate.similarity(self._states(ROOT, first), self._states(row, first))
        self.similarities[row] = similarity
        return similarity >= self.tau  # never where it is NaN

    def _states(self, row: int, first: int) -> PrefixStates:
        """From position `first` on: what lies before is the same in both wordings, and was not computed twice."""
        begin = first - self._first[row]
        layers = {layer: torch.cat(parts)[begin:].float() for layer, parts in self._parts[row].items()}
        return PrefixStates(self._token_ids[row][first:], layers)

    def _borrow(self, row: int, positions: range) -> Borrow | None:
        """Which tokens of this step leave, and where their KV is in the first wording; None: none can."""
        first, last = self._first[row], len(self._token_ids[row]) - LAST
        pairs = [
            (here, there)
            for here, there in reusable(self._token_ids[row], self._token_ids[ROOT])
            if max(first, positions.start) <= here < last
        ]
        if not pairs or self.root is None or not self.root.has_kv([there for _, there in pairs]):
            return None
        ours, theirs = (self._states(r, first).hidden[self.depth - 1] for r in (row, ROOT))  # [tokens, hidden]
        here_rows, there_rows = (torch.tensor([pair[i] - first for pair in pairs]) for i in (0, 1))
        there_states = theirs[there_rows]
        deviation = (ours[here_rows] - there_states).norm(dim=-1) / there_states.norm(dim=-1).clamp_min(1e-12)
        num_kept = math.ceil(DEVIATING * len(pairs))
        kept = set(deviation.topk(num_kept).indices.tolist())
        left = [pair for i, pair in enumerate(pairs) if i not in kept]
        if len(left) < LEAST_BORROWED * len(ours):
            return None
        self.num_borrowed[row] = len(left)
        return Borrow([here - positions.start for here, _ in left], self.root.seq_id, [there for _, there in left])


def reusable(branch: Sequence[int], root: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (in the branch, in the root) of tokens whose KV may be borrowed, as far as alignment goes.

    Equal runs of at least `MIN_RUN` tokens; of each but one that both begin with, the first `AFTER_SPLICE` are left
    out, since what comes right after a splice reads most of what was replaced.
    """
    pairs: list[tuple[int, int]] = []
    for there, here, size in SequenceMatcher(None, root, branch, autojunk=False).get_matching_blocks():
        skipped = 0 if here == there == 0 else AFTER_SPLICE
        if size >= MIN_RUN:
            pairs += [(here + i, there + i) for i in range(skipped, size)]
    return pairs


def probe_depth(num_layers: int) -> int:
    """Layers after which a wording is compared: deep enough for the states to mean something, an eighth of the way."""
    return min(max(2, round(num_layers / 8)), num_layers - 1)


@dataclass(frozen=True)
class Threshold:
    """A gate that was found good enough for one model, see `bench/asks_gates.py`."""

    gate: str
    tau: float


THRESHOLDS = {
    ("llama", 30, 576, 49152): Threshold("alignment", 0.75),  # SmolLM2-135M
    ("gemma3_text", 18, 640, 262144): Threshold("alignment", 0.75),  # Gemma 3 270M
}
"""By model_type, layers, hidden size and vocabulary: what was measured holds for checkpoints like those alone.

Of 604 adversarial wordings the guard let none pass, so that the gate is a second line of defence: at 0.75 it keeps 93%
of the minor paraphrases that the guard lets pass. On its own no gate is good enough: each ranks a changed number above
a harmless paraphrase.
"""

UNTESTED = Threshold("alignment", 0.75)
"""For a model without an entry, where the caller insists."""


def make_probe(spec: ArchSpec, tau: float | None, *, aligned: bool, can_move_kv: bool, uncalibrated: bool) -> Probe:
    """The probe for a model.

    Args:
        spec: of the model.
        tau: least similarity; None: the model's own.
        aligned: the mode.
        can_move_kv: keys can be turned to other positions, which aligned mode needs.
        uncalibrated: go on where no gate was found good enough for this model.

    Raises:
        ConfigError: none was, and the caller does not insist; or keys cannot be moved.
    """
    found = THRESHOLDS.get((spec.model_type, spec.num_layers, spec.hidden_size, spec.vocab_size))
    if found is None and not uncalibrated and (tau is None or tau <= 1):
        raise ConfigError(
            f"semantic sharing has no tested threshold for a {spec.model_type} of {spec.num_layers} layers and hidden "
            f"size {spec.hidden_size}; use sharing='exact', or insist with uncalibrated=True (--uncalibrated)"
        )
    if aligned and not can_move_kv:
        raise ConfigError(
            f"sharing_mode 'aligned' moves keys to other positions, and the rotation of this {spec.model_type} depends "
            "on more than the distance; use sharing_mode='substitute'"
        )
    found = found or UNTESTED
    return Probe(GATES[found.gate], probe_depth(spec.num_layers), found.tau if tau is None else tau, aligned=aligned)


def make_paper_probe(spec: ArchSpec, tau: float | None, *, aligned: bool) -> Probe:
    """The published rule: sigma over all layers, and no guard (which is the caller's).

    It is taken one layer before the last: after the last, leaving would save nothing at all.

    Raises:
        ConfigError: no tau, for which the paper gives no value; or aligned mode, which it has not.
    """
    if tau is None or aligned:
        raise ConfigError(
            "policy='paper' with semantic sharing substitutes from a similarity on for which the paper gives no value; "
            "set tau, and leave sharing_mode out"
        )
    return Probe(GATES["sigma"], spec.num_layers - 1, tau, aligned=False)
