"""How much of the attention each KV block receives: measured in some decode steps, for eviction by importance."""

from collections.abc import Sequence

import torch

from minirksc.cache.eviction import BY_IMPORTANCE
from minirksc.cache.rsbcm import BlockManager
from minirksc.engine.scheduler import ScheduledRequest
from minirksc.models.hooks import MassSample
from minirksc.models.spec import ArchSpec

MASS_INTERVAL = 16
"""Decode steps between two that measure attention: its cost, under one more attention a sampled layer, is then < 1%."""


class MassMeter:
    """Decides in which steps attention is measured, and tells the block manager.

    Args:
        spec: the architecture.
        eviction: the policy; some ask for no measurements.
    """

    def __init__(self, spec: ArchSpec, eviction: str) -> None:
        self._layers = measured_layers(spec) if eviction in BY_IMPORTANCE else ()
        self._num_decode_steps = 0

    def sample(self, items: Sequence[ScheduledRequest]) -> MassSample | None:
        """What a step is to fill; None: it measures nothing."""
        if not self._layers or not all(item.is_decode for item in items):
            return None
        self._num_decode_steps += 1
        return MassSample(self._layers) if self._num_decode_steps % MASS_INTERVAL == 0 else None

    @staticmethod
    def observe(blocks: BlockManager, items: Sequence[ScheduledRequest], mass: MassSample | None) -> None:
        """Hands on what the step has found, if it measured."""
        if mass is not None:
            rows = torch.stack(mass.masses).mean(0).tolist()  # [sequences, blocks]
            for item, row in zip(items, rows, strict=True):
                blocks.observe(item.request.sequence.seq_id, row)


def measured_layers(spec: ArchSpec) -> tuple[int, ...]:
    """Three layers spread over the model, of those that see everything if there are any."""
    layers = [index for index, layer in enumerate(spec.layers) if layer.window is None] or range(spec.num_layers)
    return tuple(sorted({layers[len(layers) * part // 4] for part in (1, 2, 3)}))
