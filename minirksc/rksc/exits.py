"""Layer exits (G3): rows leave the pass of the question once its answer is clear.

A rule holds thresholds and makes the gate of one pass. Deciding is apart from reading: `MarginExit` is fed numbers,
`LayerExit` reads them out of hidden rows through a lens. All gates are listed in `minirksc.rksc.cgee`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minirksc.engine.gates import LEAVE, Decisions, GateRows
from minirksc.rksc.thresholds import is_count, is_number

if TYPE_CHECKING:
    from torch import Tensor

    Lens = Callable[[Tensor], Tensor]
    MakeLens = Callable[[Sequence[int] | None], Lens]


@dataclass(frozen=True)
class MarginRule:
    """Thresholds of `MarginExit`.

    Attributes:
        margin: least |YES - NO|, in logits.
        patience: layers in a row that it must hold with one sign.
        start: first layer that is looked at, counted from 0; None: half of them.
        correction: (slope, offset) of each layer, from the lens's margin to an estimate of the last layer's: a lens in
            the middle of a model is biased, and has another scale (Belrose et al. 2023, arXiv 2303.08112); None: as it
            is read.
    """

    margin: float
    patience: int = 3
    start: int | None = None
    correction: tuple[tuple[float, float], ...] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are some, and those that count are whole."""
        lines = self.correction or ()
        has_counts = is_count(self.patience) and self.patience > 0 and (self.start is None or is_count(self.start))
        return has_counts and is_number(self.margin) and all(is_number(part) for line in lines for part in line)

    def gate(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> "LayerExit":
        """The gate of one pass."""
        return LayerExit(
            make_lens(choices),
            num_layers,
            margin=self.margin,
            patience=self.patience,
            start=self.start,
            correction=self.correction,
        )


class MarginExit:
    """Says which rows leave, by their margins of YES over NO after each layer.

    Args:
        rule: thresholds.
        num_layers: of the model.

    Attributes:
        layers: after which it is to be fed, counted from 0.
        margins: of each row that left, YES - NO, corrected.
        exit_layers: of each row that left, layers that it went through.
        problems: rows whose margin was not finite, and so went on.
    """

    def __init__(self, rule: MarginRule, num_layers: int) -> None:
        # After the last layer there is nothing left to save.
        self.layers = range(num_layers // 2 if rule.start is None else rule.start, num_layers - 1)
        self.margins: dict[int, float] = {}
        self.exit_layers: dict[int, int] = {}
        self.problems: set[int] = set()
        self._rule = rule
        self._streaks: dict[int, int] = {}  # layers in a row, negative for NO

    def leaving(self, layer: int, margins: Mapping[int, float]) -> list[int]:
        """Names the rows that leave.

        Args:
            layer: that has just been computed.
            margins: of each row that is still under way, YES - NO in logits, as the lens reads it.
        """
        rule = self._rule
        slope, offset = (1.0, 0.0) if rule.correction is None else rule.correction[layer]
        left = []
        for row, read in margins.items():
            margin = slope * read + offset
            is_finite = math.isfinite(margin)
            if not is_finite:
                self.problems.add(row)
            sign = 1 if margin > 0 else -1
            is_clear = is_finite and abs(margin) >= rule.margin
            # A pass that is computed once more, after a preemption, begins anew.
            before = 0 if layer == self.layers.start else self._streaks.get(row, 0)
            self._streaks[row] = sign * (max(before * sign, 0) + 1) if is_clear else 0
            if abs(self._streaks[row]) >= rule.patience:
                self.margins[row], self.exit_layers[row] = margin, layer + 1
                left.append(row)
        return left


class LayerExit(MarginExit):
    """The gate: reads the margins through a lens.

    Args:
        lens: `[rows, hidden]` of any layer -> logits `[rows, 2]` of YES and NO.
        num_layers: of the model.
        margin, patience, start, correction: as of `MarginRule`.
    """

    def __init__(
        self,
        lens: "Lens",
        num_layers: int,
        *,
        margin: float,
        patience: int,
        start: int | None = None,
        correction: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        lines = None if correction is None else tuple(correction)
        super().__init__(MarginRule(margin, patience, start, lines), num_layers)
        self._lens = lens

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """See `minirksc.engine.gates.LayerGate`."""
        read = self._lens(rows.last()).tolist()  # [rows][2]
        margins = {row: yes - no for row, is_end, (yes, no) in zip(rows.rows, rows.ends, read, strict=True) if is_end}
        return dict.fromkeys(self.leaving(layer, margins), LEAVE)


@dataclass(frozen=True)
class EntropyRule:
    """Thresholds of `EntropyExit`, see there."""

    entropy: float
    stability: float
    start: int

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are some."""
        return is_number(self.entropy) and is_number(self.stability) and is_count(self.start)

    def gate(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> "EntropyExit":
        """The gate of one pass."""
        lens = make_lens(None)
        return EntropyExit(lens, choices, num_layers, entropy=self.entropy, stability=self.stability, start=self.start)


class EntropyExit:
    """The paper's layer exit: the entropy of the whole vocabulary under the lens is low and stable.

    Args:
        lens: `[rows, hidden]` of any layer -> logits `[rows, vocab]`.
        choices: token ids of YES and NO.
        num_layers: of the model.
        entropy: the row leaves below it, nats (theta).
        stability: most that it may differ from the layer before, nats (epsilon).
        start: first layer that may be left, counted from 1.

    Attributes:
        layers, margins, exit_layers, problems: as of `MarginExit`.
    """

    def __init__(
        self,
        lens: "Lens",
        choices: tuple[int, int],
        num_layers: int,
        *,
        entropy: float,
        stability: float,
        start: int,
    ) -> None:
        self.layers = range(max(start - 2, 0), num_layers - 1)  # one before the first, to compare with
        self.margins: dict[int, float] = {}
        self.exit_layers: dict[int, int] = {}
        self.problems: set[int] = set()
        self._lens = lens
        self._choices = choices
        self._entropy, self._stability, self._start = entropy, stability, start
        self._before: dict[int, float] = {}

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """See `minirksc.engine.gates.LayerGate`."""
        logprobs = self._lens(rows.last()).log_softmax(-1)  # [rows, vocab]
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        yes, no = (logprobs[:, token_id].tolist() for token_id in self._choices)
        left = []
        for i, (row, entropy) in enumerate(zip(rows.rows, entropies.tolist(), strict=True)):
            if not rows.ends[i]:
                continue
            if not math.isfinite(entropy):
                self.problems.add(row)
            change = abs(entropy - self._before.get(row, math.inf))
            self._before[row] = entropy
            if layer + 1 >= self._start and entropy < self._entropy and change < self._stability:
                self.margins[row], self.exit_layers[row] = yes[i] - no[i], layer + 1
                left.append(row)
        return dict.fromkeys(left, LEAVE)
