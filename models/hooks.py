"""What else may happen between the layers of a forward pass: rows are taken out, and attention is measured."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.models.layers import ResidualStream


@dataclass(frozen=True, slots=True)
class Narrowed:
    """What remains of a batch.

    Attributes:
        rows: `[rows]` int64, places in the stream that go on; may be none.
        attention: places of their queries and keys, by the window of the layers.
        logits_rows: `[logits]` int64, places among `rows` whose logits are wanted.
    """

    rows: Tensor
    attention: Mapping[int | None, AttentionBatch]
    logits_rows: Tensor


class LayerControl(Protocol):
    """What may make the batch smaller between layers."""

    def after_layer(self, layer: int, stream: ResidualStream) -> Narrowed | None:
        """Called after each layer with the stream behind it; None: nothing changes."""
        ...


@dataclass(frozen=True, slots=True)
class MassSample:
    """What KV blocks receive of the attention in a few layers.

    Attributes:
        layers: layers in which it is measured.
        masses: result of each, `[sequences, blocks]` float32, mean over heads; a row sums to 1.
    """

    layers: Collection[int]
    masses: list[Tensor] = field(default_factory=list)
