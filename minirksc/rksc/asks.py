"""ASKS (attention-similarity KV sharing): may a branch whose prompt is phrased otherwise run on the first one's KV?

Exact sharing is the block manager's, and always on: what two prompts begin with alike is computed once. Here is the
approximate kind, in this order, each step cheaper than what it may save:

1. guard   numbers, units, negations, names and the like must agree (`guard.py`); else the phrasing is computed.
2. probe   the phrasing's own prefill starts, and after some layers its hidden states are compared with those of the
           first phrasing (`similarity.py`). Below tau, or NaN: the same prefill goes on, at the cost of one comparison.
3. accept  substitute: it leaves as a whole, and the branch continues the first phrasing's KV. This is the paper's mode,
           and the same as having sent the first phrasing.
           aligned: the branch keeps its own tokens. Those that both phrasings have leave, and use the first one's
           KV from here on, keys turned to their new positions. Computed to the end are the others, the first
           `AFTER_SPLICE` after each splice, the last `LAST`, and of the rest the share `DEVIATING` whose state differs
           most. Where that leaves less than `LEAST_BORROWED` of the phrasing to borrow, it is computed: it would gain
           next to nothing, and approximate for it.

Other salts never meet: both phrasings belong to one solve, and have its salt. Verification never reads what was
accepted here: see `Tree.exact_branch`. The *root*, as in the paper, is the first phrasing; a *row*, as at every gate, a
whole request: here the prefill of one phrasing.

Where this differs from the paper (Sekar 2026, arXiv 2606.09937): its similarity is taken over all layers, when nothing
is left to save, of the last tokens alone, which say more about the template than about the problem; that measure is
here too, as "sigma". Source of aligned mode: CacheBlend (arXiv 2405.16444) for the deviating tokens, EPIC (arXiv
2410.15332) for the beginning after a splice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirksc.engine.gates import LEAVE, Borrow, Decisions, GateRows
from minirksc.errors import ConfigError
from minirksc.models.spec import ArchSpec
from minirksc.rksc.similarity import MEASURES, PrefixStates, SimilarityMeasure, common_runs
from minirksc.rksc.solver_config import SolverConfig

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch

ROOT = 0
"""Row at the probe of the first phrasing, which the paper calls the root."""

MIN_RUN = 8
"""Tokens of a match that is worth a splice."""

AFTER_SPLICE = 16
LAST = 64
DEVIATING = 0.12
LEAST_BORROWED = 0.5

THRESHOLDS = {
    ("llama", 30, 576, 49152): 0.75,  # SmolLM2-135M
    ("gemma3_text", 18, 640, 262144): 0.75,  # Gemma 3 270M
}
"""The least similarity by "alignment" that was found good enough for a model, see `bench/asks_gates.py`.

By model_type, layers, hidden size and vocabulary: what was measured holds for checkpoints like those alone. Of 604
adversarial phrasings the guard let none pass, so that the measure is a second line of defence: at 0.75 it keeps 93%
of the minor paraphrases that the guard lets pass. On its own no measure is good enough: each ranks a changed number
above a harmless paraphrase.
"""

UNTESTED = 0.75
"""For a model without an entry, where the caller insists."""


@dataclass(eq=False)
class _Prefill:
    """What a probe has seen of the prefill of one phrasing.

    Attributes:
        token_ids: all tokens of the phrasing.
        first: position of its first token that was computed; None: none has been.
        parts: layer -> states `[tokens, hidden]`, chunk by chunk.
    """

    token_ids: list[int]
    first: int | None = None
    parts: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, layer: int, first: int, hidden: Tensor) -> None:
        """Takes a chunk that begins at position `first`."""
        self.first = first if self.first is None else self.first
        self.parts.setdefault(layer, []).append(hidden)

    def states(self, first: int) -> PrefixStates:
        """From position `first` on: what lies before is the same in both phrasings, and was not computed twice."""
        begin = first - (self.first or 0)
        layers = {layer: torch.cat(parts)[begin:].float() for layer, parts in self.parts.items()}
        return PrefixStates(self.token_ids[first:], layers)


class Probe:
    """Compares phrasings with the first one inside their own prefills; a layer gate.

    The first phrasing must pass with all its tokens before the others start.

    Args:
        measure: measure of how alike two are.
        num_layers: layers after which it is decided.
        tau: least similarity that is accepted.
        aligned: mode "aligned"; else "substitute".

    Attributes:
        layers: layers after which it is asked, see `minirksc.engine.gates`.
        root: branch of the first phrasing, once it has been computed; aligned mode borrows from it.
        num_layers: layers after which it is decided.
        tau: least similarity that is accepted.
        mode: "aligned" or "substitute".
        similarities: row -> similarity, where it was compared; NaN where its states were not finite.
        accepted: rows that were accepted, and have something to borrow where that is the mode.
    """

    def __init__(self, measure: SimilarityMeasure, num_layers: int, tau: float, *, aligned: bool) -> None:
        self.layers = {*measure.layers(num_layers), num_layers - 1}
        self.root: Branch | None = None
        self.num_layers = num_layers
        self.tau = tau
        self.mode = "aligned" if aligned else "substitute"
        self.similarities: dict[int, float] = {}
        self.accepted: set[int] = set()
        self._measure = measure
        self._prefills: dict[int, _Prefill] = {}

    def watch(self, row: int, token_ids: Sequence[int]) -> None:
        """Says which tokens a row has, before it starts."""
        self._prefills[row] = _Prefill(list(token_ids))

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
        """Decides about the phrasings that have come to their end here; the others go on."""
        decisions: dict[int, Any] = {}
        for index, row in enumerate(rows.rows):
            prefill, positions = self._prefills[row], rows.positions[index]
            prefill.add(layer, positions.start, rows.hidden(index))
            if row == ROOT or layer != self.num_layers - 1 or not rows.ends[index]:
                continue
            if self._is_alike(row, prefill):
                if self.mode == "substitute":
                    decisions[row] = LEAVE
                elif self.root is not None and (pairs := self._borrowed(prefill, positions, self.root)):
                    offsets = [here - positions.start for here, _ in pairs]
                    decisions[row] = Borrow(offsets, self.root.seq_id, [there for _, there in pairs])
            prefill.parts.clear()
        self.accepted.update(decisions)
        return decisions

    def _is_alike(self, row: int, prefill: _Prefill) -> bool:
        """The rule for sharing: similarity to the root >= tau. With sigma for a measure it is the paper's."""
        root, first = self._prefills[ROOT], prefill.first or 0
        value = 0.0  # where the first phrasing ends before, there is nothing to compare
        if first < len(root.token_ids):
            value = self._measure.similarity(root.states(first), prefill.states(first))
        self.similarities[row] = value
        return value >= self.tau  # never where it is NaN

    def _borrowed(self, prefill: _Prefill, positions: range, lender: "Branch") -> list[tuple[int, int]]:
        """Positions (in the branch, in the first phrasing) of tokens whose KV is borrowed from here on; [] for none."""
        root, first = self._prefills[ROOT], prefill.first or 0
        pairs = [
            (here, there)
            for here, there in reusable(prefill.token_ids, root.token_ids)
            if max(first, positions.start) <= here < len(prefill.token_ids) - LAST
        ]
        if not pairs or not lender.has_kv([there for _, there in pairs]):
            return []
        ours, theirs = (one.states(first).hidden[self.num_layers - 1] for one in (prefill, root))  # [tokens, hidden]
        here, there = (torch.tensor([pair[i] - first for pair in pairs]) for i in (0, 1))  # [pairs]
        lent = theirs[there]
        deviation = (ours[here] - lent).norm(dim=-1) / lent.norm(dim=-1).clamp_min(1e-12)
        computed = set(deviation.topk(math.ceil(DEVIATING * len(pairs))).indices.tolist())
        borrowed = [pair for i, pair in enumerate(pairs) if i not in computed]
        return borrowed if len(borrowed) >= LEAST_BORROWED * len(ours) else []


def reusable(branch: Sequence[int], root: Sequence[int]) -> list[tuple[int, int]]:
    """Positions (in the branch, in the root) of tokens whose KV may be borrowed, as far as alignment goes.

    Equal runs of at least `MIN_RUN` tokens; of each but one that both begin with, the first `AFTER_SPLICE` are left
    out, since what comes right after a splice reads most of what was replaced.
    """
    pairs: list[tuple[int, int]] = []
    for there, here, size in common_runs(root, branch):
        skipped = 0 if here == there == 0 else AFTER_SPLICE
        if size >= MIN_RUN:
            pairs += [(here + i, there + i) for i in range(skipped, size)]
    return pairs


def num_probe_layers(num_layers: int) -> int:
    """Layers after which a phrasing is compared: enough for the states to mean something, an eighth of the way."""
    return min(max(2, round(num_layers / 8)), num_layers - 1)


def make_probe(spec: ArchSpec, config: SolverConfig, *, can_move_kv: bool) -> Probe:
    """The probe that options with semantic sharing ask for, on a model.

    With policy "paper" it is the published rule, equation 2: sigma over all layers against tau, and no guard (which is
    the caller's). It is taken one layer before the last: after the last, leaving would save nothing at all.

    Args:
        spec: architecture of the model.
        config: options of the solve.
        can_move_kv: keys can be turned to other positions, which aligned mode needs.

    Raises:
        ConfigError: no threshold was found good enough for this model, and the options do not insist; or keys cannot
            be moved; or the paper gives no value for tau, and has no aligned mode.
    """
    tau, aligned = config.tau, config.sharing_mode == "aligned"
    if config.policy == "paper":
        if tau is None or aligned:
            raise ConfigError(
                "policy='paper' with semantic sharing substitutes from a similarity on for which the paper gives no "
                "value; set tau, and leave sharing_mode out"
            )
        return Probe(MEASURES["sigma"], spec.num_layers - 1, tau, aligned=False)
    tested = THRESHOLDS.get((spec.model_type, spec.num_layers, spec.hidden_size, spec.vocab_size))
    if tested is None and not config.uncalibrated and (tau is None or tau <= 1):
        raise ConfigError(
            f"semantic sharing has no tested threshold for a {spec.model_type} of {spec.num_layers} layers and hidden "
            f"size {spec.hidden_size}; use sharing='exact', or insist with uncalibrated=True (--uncalibrated)"
        )
    if aligned and not can_move_kv:
        raise ConfigError(
            f"sharing_mode 'aligned' moves keys to other positions, and the rotation of this {spec.model_type} depends "
            "on more than the distance; use sharing_mode='substitute'"
        )
    tau = (tested or UNTESTED) if tau is None else tau
    return Probe(MEASURES["alignment"], num_probe_layers(spec.num_layers), tau, aligned=aligned)
