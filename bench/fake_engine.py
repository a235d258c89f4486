"""An engine without a model: the real scheduler and block manager, and a next token that is a hash of those before.

Exact and fast, and what it counts is what the real engine would compute: both drive the same `Scheduler`.
"""

import itertools
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.engine.request import Request
from minirksc.engine.request import Sequence as Branch
from minirksc.engine.scheduler import Scheduler
from minirksc.engine.stopping import StopChecker
from minirksc.options import SamplingParams

VOCAB_SIZE = 32000
HISTORY = 8
"""Tokens that the next one depends on."""


class FakeEngine:
    """The calls of `minirksc.engine.engine.Engine` that a tree search makes.

    Args:
        blocks: block manager.
        max_batch_tokens, max_batch_requests: limits of a step.
        on_finish: callback with each request right before it gives up or keeps its blocks.

    Attributes:
        num_prefilled_tokens: tokens computed, but for those that were sampled by the request that computes them.
        num_decoded_tokens: tokens sampled.
        peak_used_blocks: most blocks that tables held at once.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_tokens: int = 2048,
        max_batch_requests: int = 16,
        on_finish: Callable[[Request], None] | None = None,
    ) -> None:
        self.blocks = blocks
        self.scheduler = Scheduler(blocks, max_batch_tokens, max_batch_requests, BlockBytes(1, 0))
        self.num_prefilled_tokens = 0
        self.num_decoded_tokens = 0
        self.peak_used_blocks = 0
        self._on_finish = on_finish
        self._sequence_ids = itertools.count()
        self._request_ids = itertools.count()

    def new_sequence(self, token_ids: Sequence[int]) -> Branch:
        """As `Engine.new_sequence`."""
        return Branch(next(self._sequence_ids), list(token_ids))

    def fork_sequence(self, parent: Branch, index: int) -> Branch:
        """As `Engine.fork_sequence`."""
        child = replace(
            parent,
            seq_id=next(self._sequence_ids),
            token_ids=list(parent.token_ids),
            path=(*parent.path, index),
            depth=parent.depth + 1,
        )
        self.blocks.fork(parent.seq_id, child.seq_id, child.depth)
        self.scheduler.keep(child)
        return child

    def add_request(self, sequence: Branch, params: SamplingParams, *, prefill_only: bool = False) -> Request:
        """As `Engine.add_request`."""
        request = Request(
            request_id=next(self._request_ids),
            sequence=sequence,
            params=params,
            seed=0,
            num_prompt_tokens=len(sequence.token_ids),
            checker=None if prefill_only else StopChecker(params, frozenset(), None),
        )
        self.scheduler.add(request)
        return request

    def release(self, sequence: Branch) -> None:
        """As `Engine.release`."""
        self.scheduler.release(sequence)

    def step(self) -> list[Request]:
        """One batch; returns the requests that finished."""
        step = self.scheduler.schedule()
        self.peak_used_blocks = max(self.peak_used_blocks, self.blocks.num_used)
        self.scheduler.commit(step.scheduled)
        finished = list(step.ended)
        for item in step.scheduled:
            request = item.request
            self.num_prefilled_tokens += 0 if item.is_decode else item.num_tokens
            if not item.completes:
                continue
            if request.checker is not None:
                token_id = next_token(request.sequence.token_ids)
                self.num_decoded_tokens += 1
                request.sequence.token_ids.append(token_id)
                request.checker.push(token_id)
            if request.checker is None or request.checker.finish_reason is not None:
                if self._on_finish is not None:
                    self._on_finish(request)
                request.finish_reason = "stop" if request.checker is None else request.checker.finish_reason
                self.scheduler.finish(request)
                finished.append(request)
        return finished


def next_token(token_ids: Sequence[int]) -> int:
    """A function of the last tokens and of how many there are, as far from a language as can be."""
    last = token_ids[-HISTORY:]
    return zlib.crc32(struct.pack(f"<{len(last) + 1}q", len(token_ids), *last)) % VOCAB_SIZE
