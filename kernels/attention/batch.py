"""Where the queries and keys of one step's attention are. Does not know requests or models."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")

KEY_CHUNK = 256
"""Enough programs for a whole processor at batch 1, and partials that take 3% of the traffic of the keys."""


@dataclass(slots=True)
class AttentionBatch:
    """Where each sequence's queries and keys are, for layers of one window. All lists have one entry a sequence.

    Attributes:
        cu_seqlens_q: `[sequences + 1]`, first query row of each sequence.
        context_lens: number of keys of each sequence, the new ones included: each layer stores them before it attends.
        block_tables: block ids of each sequence: equal ids mean equal keys.
        kv_tables: places of those blocks in these layers' cache; of what is behind the window -1 perhaps.
        slots: `[tokens]` int64, kv_table entry * block_size + offset of each new token.
        block_size: number of tokens a block.
        device: device of the cache.
        window: number of latest keys that a query sees, its own included; None for all.
        key_chunk: largest number of keys that one program reads where queries are few; None: so many that the processor
            is busy.
    """

    cu_seqlens_q: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    kv_tables: Sequence[Sequence[int]]
    slots: Tensor
    block_size: int
    device: torch.device
    window: int | None = None
    key_chunk: int | None = KEY_CHUNK
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    def plan(self, key: Hashable, make: Callable[["AttentionBatch"], Plan]) -> Plan:
        """What a form of the attention makes of the batch: made on first use, and kept for the other layers.

        Args:
            key: everything that the plan depends on besides the batch.
            make: function that makes the plan.
        """
        if key not in self._plans:
            self._plans[key] = make(self)
        plan: Plan = self._plans[key]
        return plan

    def num_queries(self, sequence: int) -> int:
        """Number of new tokens of a sequence."""
        return self.cu_seqlens_q[sequence + 1] - self.cu_seqlens_q[sequence]

    def first_visible(self, position: int) -> int:
        """Position of the first key that the query at a position sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def visible(self, num_queries: int, num_keys: int) -> Tensor:
        """Which keys each query sees, `[queries, keys]` bool, where the last query is at the last key.

        Args:
            num_queries: number of consecutive queries of a sequence.
            num_keys: number of consecutive keys, as many as queries at least.
        """
        key_at = torch.arange(num_keys, device=self.device)
        query_at = key_at[num_keys - num_queries :, None]
        return (key_at <= query_at) & (key_at > query_at - (self.window or num_keys))
