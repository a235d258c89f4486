"""What gates do over many problems: replays, counted. Each problem is replayed once with the same gates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minirksc.calibrate.replay import Outcome, Replay
from minirksc.rksc.cgee import Gates

REASONS = ("asked", "bound", "agreement", "consensus", "skip", "decode_exit")
"""What can settle a problem, see `Outcome.reason`."""


@dataclass(frozen=True)
class Tally:
    """What gates do over some problems.

    Attributes:
        num_problems: number of all.
        num_changed: number of those whose decision is another one than without gates.
        reasons: what settled it -> number of problems, see `Outcome.reason`.
        num_rows: rows (tokens times layers) of decoding and of the question that are computed.
        saved: share of all rows, of decoding and question, that need not be computed.
        saved_question: share of the question's rows.
        saved_decoding: share of decoded tokens.
        mean_exit_layer: mean number of layers that a question went through, over branches that were asked about; None:
            none was.
    """

    num_problems: int
    num_changed: int
    reasons: dict[str, int]
    num_rows: float
    saved: float
    saved_question: float
    saved_decoding: float
    mean_exit_layer: float | None


class Trials:
    """Problems on which gates are tried.

    Args:
        replays: replay of each problem.

    Attributes:
        replays: list of the same.
    """

    def __init__(self, replays: Sequence[Replay]) -> None:
        self.replays = list(replays)
        # [problems, 3]: what is spent without gates, as `_spent` has it
        self._full = np.array([_spent(replay.reference) for replay in self.replays]).reshape(-1, 3)
        self._rows: dict[Gates, np.ndarray] = {}  # [problems, 7] as `_row` has them; NaN: not yet replayed

    def tally(self, gates: Gates, among: Sequence[int] | None = None) -> Tally:
        """What gates do.

        Args:
            gates: gates to be tried.
            among: indices of the problems; None: all.
        """
        if gates not in self._rows:
            self._rows[gates] = np.full((len(self.replays), 7), np.nan)
        found = self._rows[gates]
        indices = np.arange(len(self.replays)) if among is None else np.asarray(among, dtype=int)
        for index in indices[np.isnan(found[indices, 0])]:
            found[index] = _row(self.replays[index], gates)
        rows = found[indices]
        *spent, changed, num_asked, num_layers = rows[:, :6].sum(0).tolist()
        whole = self._full[indices].sum(0).tolist()
        shares = [1 - part / full if full else 0.0 for part, full in zip(spent, whole, strict=True)]
        counts = np.bincount(rows[:, 6].astype(int), minlength=len(REASONS)).tolist()
        return Tally(
            num_problems=len(indices),
            num_changed=int(changed),
            reasons={reason: count for reason, count in zip(REASONS, counts, strict=True) if count},
            num_rows=spent[0],
            saved=shares[0],
            saved_question=shares[1],
            saved_decoding=shares[2],
            mean_exit_layer=num_layers / num_asked if num_asked else None,
        )


def _spent(outcome: Outcome) -> list[float]:
    """All rows, question rows, decoded tokens."""
    return [outcome.num_rows, outcome.num_question_rows, outcome.num_decoded_tokens]


def _row(replay: Replay, gates: Gates) -> list[float]:
    """What is spent, whether the decision changed, branches asked about, layers of their questions, reason."""
    outcome = replay.outcome(gates)
    early = [layer for layer in outcome.exit_layers if layer is not None]
    num_layers = sum(early) + (outcome.num_asked - len(early)) * outcome.num_layers
    changed = outcome.differs(replay.reference)
    return [*_spent(outcome), changed, outcome.num_asked, num_layers, REASONS.index(outcome.reason)]
