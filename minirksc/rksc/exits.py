"""Layer exit: rows leave the pass of the question between two layers, once its answer is clear (CGEE-2 of the paper).

A rule holds thresholds and makes the gate of one pass. Deciding is apart from reading: `MarginExit` is fed numbers,
`LayerExit` reads them out of hidden states through a lens. All gates are listed in `minirksc.rksc.cgee`.

A *row*, as at every gate (`minirksc.engine.gates`), is a whole request: here the question about one branch, of which
the last token's hidden state is read. A *lens* reads hidden states of any layer as if they were the last one's: final
norm, then head (`Decoder.lens`; the logit lens of nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru).
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from minirksc.engine.gates import LEAVE, Decisions, GateRows

if TYPE_CHECKING:
    from torch import Tensor

    Lens = Callable[[Tensor], Tensor]
    MakeLens = Callable[[Sequence[int] | None], Lens]


def is_number(value: object) -> bool:
    """Whether a threshold is a finite number; True and False are none."""
    # NaN compares false, and an int beyond all floats compares where math.isfinite would raise.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object) -> bool:
    """Whether a threshold is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class _Exits:
    """What a layer exit has decided so far.

    Attributes:
        margins: row that departed -> YES - NO in logits, as it was there.
        exit_layers: row that departed -> number of layers that it went through.
        problems: rows at which a number was not finite, and which went on.
    """

    def __init__(self) -> None:
        self.margins: dict[int, float] = {}
        self.exit_layers: dict[int, int] = {}
        self.problems: set[int] = set()

    def _leave(self, row: int, layer: int, margin: float) -> None:
        self.margins[row], self.exit_layers[row] = margin, layer + 1


@dataclass(frozen=True)
class MarginRule:
    """Thresholds of `MarginExit`.

    Attributes:
        reason: what makes a row leave, in words.
        margin: least |YES - NO|, in logits.
        patience: consecutive layers that it must hold with one sign.
        start: index of the first layer that is looked at, from 0 (`EntropyRule.start` counts from 1); None: half of
            them.
        correction: (slope, offset) of each layer, from the lens's margin to an estimate of the last layer's: a lens in
            the middle of a model is biased, and has another scale (Belrose et al. 2023, arXiv 2303.08112); None: as it
            is read.
    """

    reason: ClassVar[str] = "the margin of YES over NO is clear"
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

    @property
    def threshold(self) -> float | None:
        """What margins are held against."""
        return self.margin

    def gate(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> "LayerExit":
        """The gate of one pass."""
        return LayerExit(make_lens(choices), num_layers, **asdict(self))


class MarginExit(_Exits):
    """Says which rows leave, by their margins of YES over NO after each layer.

    Args:
        rule: thresholds.
        num_layers: layers of the model.

    Attributes:
        layers: layers after which it is to be fed, counted from 0.
        margins: row that departed -> YES - NO in logits, corrected.
        exit_layers, problems: layers of rows that departed, and rows that went on, see `_Exits`.
    """

    def __init__(self, rule: MarginRule, num_layers: int) -> None:
        super().__init__()
        # After the last layer there is nothing left to save.
        self.layers = range(num_layers // 2 if rule.start is None else rule.start, num_layers - 1)
        self._rule = rule
        self._streaks: dict[int, int] = {}  # consecutive layers, negative for NO

    def leaving(self, layer: int, margins: Mapping[int, float]) -> list[int]:
        """Names the rows that leave.

        Args:
            layer: index of the layer that has just been computed.
            margins: row that is still under way -> YES - NO in logits, as the lens reads it.
        """
        rule = self._rule
        slope, offset = (1.0, 0.0) if rule.correction is None else rule.correction[layer]
        departed = []
        for row, read in margins.items():
            margin = slope * read + offset
            if not math.isfinite(margin):
                self.problems.add(row)
            sign = 1 if margin > 0 else -1
            is_clear = rule.margin <= abs(margin) < math.inf  # neither holds of NaN
            # A pass that is computed once more, after a preemption, begins anew.
            before = 0 if layer == self.layers.start else self._streaks.get(row, 0)
            self._streaks[row] = sign * (max(before * sign, 0) + 1) if is_clear else 0
            if abs(self._streaks[row]) >= rule.patience:
                self._leave(row, layer, margin)
                departed.append(row)
        return departed


class LayerExit(MarginExit):
    """The gate: reads the margins through a lens.

    Args:
        lens: `[rows, hidden]` of any layer -> logits `[rows, 2]` of YES and NO.
        num_layers: layers of the model.
        **thresholds: fields of `MarginRule`.
    """

    def __init__(self, lens: "Lens", num_layers: int, **thresholds: Any) -> None:
        super().__init__(MarginRule(**thresholds), num_layers)
        self._lens = lens

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """Lets rows leave whose last token is among these."""
        read = self._lens(rows.last()).tolist()  # [rows][2]
        margins = {row: yes - no for row, is_end, (yes, no) in zip(rows.rows, rows.ends, read, strict=True) if is_end}
        return dict.fromkeys(self.leaving(layer, margins), LEAVE)


@dataclass(frozen=True)
class EntropyRule:
    """Thresholds of `EntropyExit`.

    Attributes:
        reason: what makes a row leave, in words.
        threshold: what margins are held against: nothing.
        entropy: the row leaves below it, nats (theta).
        stability: most that it may differ from the layer before, nats (epsilon).
        start: number of the first layer after which a row may leave, from 1 as in the paper (`MarginRule.start` is an
            index, from 0).
    """

    reason: ClassVar[str] = "the entropy of the lens is low and stable"
    threshold: ClassVar[float | None] = None
    entropy: float
    stability: float
    start: int

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are some."""
        return is_number(self.entropy) and is_number(self.stability) and is_count(self.start)

    def gate(self, make_lens: "MakeLens", choices: tuple[int, int], num_layers: int) -> "EntropyExit":
        """The gate of one pass."""
        return EntropyExit(make_lens(None), choices, num_layers, **asdict(self))


class EntropyExit(_Exits):
    """CGEE-2 as published: the entropy H of the whole vocabulary under the lens is low and stable.

    A row leaves after layer l (from 1) when l >= start, H_l < theta and |H_l - H_{l-1}| < epsilon.

    Args:
        lens: `[rows, hidden]` of any layer -> logits `[rows, vocab]`.
        choices: token ids of YES and NO.
        num_layers: layers of the model.
        **thresholds: fields of `EntropyRule`.

    Attributes:
        layers: layers after which it is asked, counted from 0.
        margins, exit_layers, problems: what it has decided, see `_Exits`.
    """

    def __init__(self, lens: "Lens", choices: tuple[int, int], num_layers: int, **thresholds: Any) -> None:
        super().__init__()
        self._rule = rule = EntropyRule(**thresholds)
        self.layers = range(max(rule.start - 2, 0), num_layers - 1)  # one before the first, to compare with
        self._lens = lens
        self._choices = choices
        self._before: dict[int, float] = {}

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """Lets rows leave whose last token is among these."""
        rule = self._rule
        logprobs = self._lens(rows.last()).log_softmax(-1)  # [rows, vocab]
        entropies = -(logprobs.exp() * logprobs).sum(-1)  # [rows]
        yes, no = (logprobs[:, token_id].tolist() for token_id in self._choices)
        departed = []
        for i, (row, entropy) in enumerate(zip(rows.rows, entropies.tolist(), strict=True)):
            if not rows.ends[i]:
                continue
            if not math.isfinite(entropy):
                self.problems.add(row)
            change = abs(entropy - self._before.get(row, math.inf))
            self._before[row] = entropy
            if layer + 1 >= rule.start and entropy < rule.entropy and change < rule.stability:
                self._leave(row, layer, yes[i] - no[i])
                departed.append(row)
        return dict.fromkeys(departed, LEAVE)
