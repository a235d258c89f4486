"""Layer gates: the one mechanism by which a request leaves a forward pass between two layers.

A request may sit at a gate. After the layers that the gate names, it is shown the hidden rows of its requests and says
which of them leave. What has departed is not computed any further: the batch really is smaller in the layers above.

The rule for the KV of what was not computed: a request that departed as a whole has no KV above that layer, so the step
stores none of its tokens: its block table ends where it ended before, and nothing can read what was half written. Of a
request of which only some tokens departed, the gate says whose KV they have in the layers above (`Borrow`).

A gate knows rows, layers and hidden states; neither the model nor the cache. One that finds NaN lets its row go on.
Without a gate a step does nothing of this.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GateRows:
    """The requests of one gate that are in the batch, in one order.

    Attributes:
        rows: name of each, as its request gave it.
        ends: True where the last token of the request's sequence is among these.
        positions: positions of each one's tokens in this step.
        last: function that gives `[requests, hidden]`, the residual stream of each one's last token.
        hidden: function of an index that gives `[tokens, hidden]` of that request.
    """

    rows: Sequence[int]
    ends: Sequence[bool]
    positions: Sequence[range]
    last: Callable[[], "Tensor"]
    hidden: Callable[[int], "Tensor"]


@dataclass(frozen=True, slots=True)
class Borrow:
    """Some tokens of a request leave and use another sequence's KV from here on, its keys turned to their positions.

    Attributes:
        offsets: places of these among the request's tokens in this step, at least one, ascending; never the last.
        seq_id: key of the sequence whose KV they use.
        positions: positions of the borrowed tokens in that sequence.
    """

    offsets: Sequence[int]
    seq_id: int
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class Leave:
    """The request leaves as a whole, and is finished; there is one of these, `LEAVE`."""


LEAVE = Leave()

Decisions = Mapping[int, Leave | Borrow]
"""What a gate decided, by row; a row that is not in it goes on."""


class LayerGate(Protocol):
    """Decides between layers.

    Attributes:
        layers: layers after which it is asked, counted from 0. All others cost nothing.
    """

    @property
    def layers(self) -> Collection[int]:
        """Layers after which it is asked."""
        ...

    def after_layer(self, layer: int, rows: GateRows) -> Decisions:
        """Decides which of the rows leave, or borrow; anything else for a decision ends the step with a ConfigError.

        Args:
            layer: index of the layer that has just been computed.
            rows: those still in the batch; at least one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a request sits. It sits at one gate; two rules for one request are a gate that asks both.

    Attributes:
        gate: the gate.
        row: name of the request there.
        sees_all: whether all its tokens are computed, and none is taken from the prefix cache.
    """

    gate: LayerGate
    row: int
    sees_all: bool = False
