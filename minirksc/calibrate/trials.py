"""What gates do over many problems: replays, counted. Each problem is replayed once with the same gates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minirksc.calibrate.replay import Outcome, Replay
from minirksc.rksc.cgee import Gates


@dataclass(frozen=True)
class Tally:
    """What gates do over some problems.

    Attributes:
        num_problems: all.
        num_changed: whose decision is another one than without gates.
        reasons: what settled it -> problems, see `Outcome.reason`.
        num_question_rows, num_question_rows_full: as of `Outcome`, summed.
        num_decoded_tokens, num_decoded_tokens_full: the same.
        num_rows, num_rows_full: rows (tokens times layers) of decoding and of the question.
        mean_exit_layer: layers that a question went through, over branches that were asked; None: nobody was.
    """

    num_problems: int
    num_changed: int
    reasons: dict[str, int]
    num_question_rows: float
    num_question_rows_full: float
    num_decoded_tokens: int
    num_decoded_tokens_full: int
    num_rows: float
    num_rows_full: float
    mean_exit_layer: float | None

    @property
    def saved(self) -> float:
        """Share of all rows, of decoding and question, that need not be computed."""
        return _saved(self.num_rows, self.num_rows_full)

    @property
    def saved_question(self) -> float:
        """Share of the question's rows."""
        return _saved(self.num_question_rows, self.num_question_rows_full)

    @property
    def saved_decoding(self) -> float:
        """Share of decoded tokens."""
        return _saved(self.num_decoded_tokens, self.num_decoded_tokens_full)


REASONS = ("asked", "bound", "agreement", "consensus", "skip", "decode_exit")


class Trials:
    """Problems on which gates are tried.

    Args:
        replays: one a problem.

    Attributes:
        replays: as given.
    """

    def __init__(self, replays: Sequence[Replay]) -> None:
        self.replays = list(replays)
        whole = [replay.reference for replay in self.replays]
        # [problems, 3]: question rows, decoded tokens and all rows without gates
        self._full = np.array([[o.num_question_rows_full, o.num_decoded_tokens_full, o.num_rows_full] for o in whole])
        self._rows: dict[Gates, np.ndarray] = {}  # [problems, 7] as `_row` has them; NaN: not yet replayed

    def tally(self, gates: Gates, among: Sequence[int] | None = None) -> Tally:
        """What gates do.

        Args:
            gates: to be tried.
            among: indices of the problems; None: all.
        """
        if gates not in self._rows:
            self._rows[gates] = np.full((len(self.replays), 7), np.nan)
        found = self._rows[gates]
        indices = np.arange(len(self.replays)) if among is None else np.asarray(among, dtype=int)
        for index in indices[np.isnan(found[indices, 0])]:
            found[index] = _row(self.replays[index], gates)
        rows = found[indices]
        changed, question_rows, tokens, all_rows, num_asked, num_layers = rows[:, :6].sum(0).tolist()
        question_full, tokens_full, all_full = self._full[indices].sum(0).tolist() if len(indices) else (0.0, 0.0, 0.0)
        counts = np.bincount(rows[:, 6].astype(int), minlength=len(REASONS)).tolist()
        return Tally(
            num_problems=len(indices),
            num_changed=int(changed),
            reasons={reason: count for reason, count in zip(REASONS, counts, strict=True) if count},
            num_question_rows=question_rows,
            num_question_rows_full=question_full,
            num_decoded_tokens=int(tokens),
            num_decoded_tokens_full=int(tokens_full),
            num_rows=all_rows,
            num_rows_full=all_full,
            mean_exit_layer=num_layers / num_asked if num_asked else None,
        )


def _row(replay: Replay, gates: Gates) -> list[float]:
    """Changed, question rows, decoded tokens, all rows, branches asked, layers that they went through, reason."""
    outcome = replay.outcome(gates)
    return [
        outcome.differs(replay.reference),
        outcome.num_question_rows,
        outcome.num_decoded_tokens,
        outcome.num_rows,
        outcome.num_asked,
        _layers_asked(outcome),
        REASONS.index(outcome.reason),
    ]


def _layers_asked(outcome: Outcome) -> int:
    left = [layer for layer in outcome.exit_layers if layer is not None]
    return sum(left) + (outcome.num_asked - len(left)) * outcome.num_layers


def _saved(spent: float, full: float) -> float:
    return 1 - spent / full if full else 0.0
