"""What runs in the next step: continuous batching, chunked prefill, preemption by recompute.

Order of service: decodes first (what continues its own output), then prefills under way, then new requests in order of
arrival, up to max_batch_tokens. A request that finds no block for its next token takes the blocks of a kept,
idle sequence, else of the request that was admitted last; both are recomputed when they run again, so no token is
ever dropped. Requests that begin alike while nothing is cached yet wait for the first of them: one prefill.

Pure bookkeeping: knows blocks and tokens, neither torch nor the model.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import chain

from minirksc.cache.rsbcm import BlockBytes, BlockCopy, BlockManager
from minirksc.engine.request import Request, Sequence
from minirksc.errors import CacheFullError


@dataclass(slots=True)
class ScheduledRequest:
    """Part of one step: `num_tokens` tokens of the request, from position `first` on.

    `copies` come before anything is written. `is_decode` when it continues what this request has sampled, which is one
    token today and would be more with drafts to check; a prompt's last token alone is none, though it is served with
    them (`Scheduler._is_prefilling`). What a step samples in the end is a `sampling.Delivery`.
    """

    request: Request
    first: int
    num_tokens: int
    copies: list[BlockCopy]
    is_decode: bool = False

    @property
    def completes(self) -> bool:
        """True when the sequence's last token is among them, so that the next one can be sampled."""
        return self.first + self.num_tokens == len(self.request.sequence.token_ids)


@dataclass(slots=True)
class Schedule:
    """One step. `ended` are requests for which there is no room at all; they have finished."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)


@dataclass(eq=False)
class Scheduler:
    """Queues of requests over one `BlockManager`.

    Attributes:
        blocks: block manager whose tables the requests' sequences are in.
        max_batch_tokens: tokens a step.
        max_batch_requests: requests that run at once.
        block_bytes: bytes of one block's KV, for messages.
        prefix_caching: False: no request adopts cached blocks.
        switch_len: length beyond which a sequence has other KV at all its positions (see `ArchSpec.switch_len`);
            None: there is no such length.
        requests: all that have not finished, by seq_id, in order of arrival.
        waiting: requests that are to be admitted, the next one first.
        running: requests that have blocks and are computed, in order of admission; a dict, for its fast `in`.
        idle: kept sequences that hold blocks; least recently used first.
        num_preemptions: times that blocks of a live sequence were taken back.
        num_cached_tokens: prompt tokens that were found. A request counts once: not what it finds after a preemption.
    """

    blocks: BlockManager
    max_batch_tokens: int
    max_batch_requests: int
    block_bytes: BlockBytes
    prefix_caching: bool = True
    switch_len: int | None = None
    requests: dict[int, Request] = field(default_factory=dict, init=False)
    waiting: deque[Request] = field(default_factory=deque, init=False)
    running: dict[Request, None] = field(default_factory=dict, init=False)
    idle: dict[int, Sequence] = field(default_factory=dict, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)

    @property
    def has_work(self) -> bool:
        """True while some request is not finished."""
        return bool(self.requests)

    def room_after(self, num_tokens: int) -> int:
        """How many more tokens a sequence may gain before the pool can hold no more of it.

        The last one needs no room: nothing follows it. 0 or less: not even the prompt fits.
        """
        return self.blocks.num_blocks * self.blocks.block_size - num_tokens + 1

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.requests[request.sequence.seq_id] = request
        self.idle.pop(request.sequence.seq_id, None)
        self.waiting.append(request)

    def restart(self) -> None:
        """No sequence has blocks any more: every request waits to be computed from its tokens, in order of arrival."""
        self.requests = {i: request for i, request in self.requests.items() if not request.finished}
        self.waiting = deque(self.requests.values())
        self.running.clear()
        self.idle.clear()

    def keep(self, sequence: Sequence) -> None:
        """Registers a sequence that has become idle: if it holds blocks, it may lose them under pressure."""
        if sequence.seq_id in self.blocks:
            self.idle[sequence.seq_id] = sequence

    def finish(self, request: Request) -> None:
        """Takes a request out at any moment of its life; its sequence is released unless a branch keeps it."""
        self.requests.pop(request.sequence.seq_id, None)
        if request in self.running:
            del self.running[request]
        elif request in self.waiting:
            self.waiting.remove(request)
        if request.sequence.kept:
            self.keep(request.sequence)
        else:
            self.release(request.sequence)

    def release(self, sequence: Sequence) -> None:
        """Forgets an idle sequence, and frees its table."""
        self.idle.pop(sequence.seq_id, None)
        self.blocks.free(sequence.seq_id)

    def schedule(self) -> Schedule:
        """Chooses the next step and reserves its blocks."""
        step = Schedule()
        budget = self.max_batch_tokens
        for request in sorted(self.running, key=self._is_prefilling):
            if request not in self.running or budget == 0:
                continue  # preempted by one before it, or for the next step
            if self._is_outdated(request.sequence):
                self._requeue(request)
            elif (item := self._go_on(request, budget, step)) is not None:
                budget -= item.num_tokens
                step.scheduled.append(item)
        # What was preempted after it had been scheduled has nothing in this step, copies into its blocks included.
        step.scheduled = [item for item in step.scheduled if item.request in self.running]
        self._admit(self.max_batch_tokens - sum(item.num_tokens for item in step.scheduled), step)
        return step

    def commit(self, items: list[ScheduledRequest]) -> None:
        """The KV of these has been written."""
        for item in items:
            sequence = item.request.sequence
            end = item.first + item.num_tokens
            self.blocks.commit(sequence.seq_id, sequence.token_ids[item.first : end])

    def preempt_all(self) -> None:
        """Gives up the blocks of all that runs; for a step that was interrupted before its KV was written."""
        for request in reversed(list(self.running)):
            self._preempt(request)

    def _num_pending(self, request: Request) -> int:
        """Tokens of a request with a table that are still to be computed: 1 in a decode."""
        sequence = request.sequence
        return len(sequence.token_ids) - self.blocks.num_tokens(sequence.seq_id)

    def _is_prefilling(self, request: Request) -> bool:
        """True for a prefill under way. What has one token left is served with the decodes, be it a prompt's last."""
        return self._num_pending(request) > 1

    def _num_next(self, request: Request, budget: int) -> int:
        """Tokens of a request with a table that the step computes; 0: it waits for a step that holds it whole.

        Gates decide at the end of a prompt: one at a gate is not cut where a later step has room for all of it.
        """
        num_pending = self._num_pending(request)
        num_tokens = min(num_pending, budget, self.blocks.max_chunk_tokens)
        is_cut = num_tokens < num_pending <= self.max_batch_tokens - len(self.running)
        must_wait = request.seat is not None and is_cut and num_tokens < self.blocks.max_chunk_tokens
        return 0 if must_wait else num_tokens

    def _go_on(self, request: Request, budget: int, step: Schedule) -> ScheduledRequest | None:
        """The next tokens of a running request, for which others are preempted; None: it waits, or was preempted."""
        seq_id = request.sequence.seq_id
        first, num_tokens = self.blocks.num_tokens(seq_id), self._num_next(request, budget)
        if num_tokens == 0:
            return None
        while not self._make_room(seq_id, first + num_tokens):
            if len(self.running) == 1:
                self._end_for_room(request, step)
            else:
                self._preempt(next(reversed(self.running)))
            if request not in self.running:
                return None
        copies = self.blocks.reserve(seq_id, first + num_tokens)
        is_decode = num_tokens == 1 and first >= request.num_prompt_tokens
        return ScheduledRequest(request, first, num_tokens, copies, is_decode)

    def _admit(self, budget: int, step: Schedule) -> None:
        deferred: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_requests:
            request = self.waiting.popleft()
            if self._leader_is_computing(request):
                deferred.append(request)
            elif (item := self._begin(request, budget)) is not None:
                step.scheduled.append(item)
                budget -= item.num_tokens
            elif self.running or step.ended:  # what runs, or has just ended, makes room for it
                self.waiting.appendleft(request)
                break
            else:
                self._end_for_room(request, step)
        self.waiting.extendleft(reversed(deferred))

    def _begin(self, request: Request, budget: int) -> ScheduledRequest | None:
        """The first tokens of a waiting request; None: there is no room for them now, and it goes on waiting.

        What idle and waiting sequences held may have been reclaimed for it even then.
        """
        sequence, blocks = request.sequence, self.blocks
        seq_id, tokens = sequence.seq_id, sequence.token_ids
        if self._is_outdated(sequence):
            blocks.free(seq_id)
        is_new, use_cache = seq_id not in blocks, self.prefix_caching and request.uses_cache
        copies: list[BlockCopy] = []
        if is_new:
            copies = blocks.add(seq_id, tokens, salt=self._salt(sequence), depth=sequence.depth, use_cache=use_cache)
        elif blocks.num_tokens(seq_id) > request.first_wanted:
            # Logits come only from computing: where they are wanted of a token whose KV is there, do it again. So a
            # fork that decodes writes the last token that it shares anew, and copies the block of that one first.
            blocks.rewind(seq_id, request.first_wanted)
        first, num_tokens = blocks.num_tokens(seq_id), self._num_next(request, budget)
        # Room for the whole prompt is asked for at once: a chunk that starts and cannot end helps nobody.
        if num_tokens == 0 or not self._make_room(seq_id, first + num_tokens, len(tokens)):
            if is_new:
                blocks.free(seq_id, returns=True)
            return None
        if request.num_cached_tokens is None:
            num_found = first if is_new else 0
            request.num_cached_tokens = num_found - num_found % blocks.block_size
            self.num_cached_tokens += num_found
        self.running[request] = None
        copies = copies + blocks.reserve(seq_id, first + num_tokens)
        return ScheduledRequest(request, first, num_tokens, copies)

    def _leader_is_computing(self, request: Request) -> bool:
        """True when a running prefill will soon offer more of this prompt than the cache does now."""
        if not (self.prefix_caching and request.uses_cache) or request.sequence.seq_id in self.blocks:
            return False
        tokens, salt, size = request.sequence.token_ids, self._salt(request.sequence), self.blocks.block_size
        if not self._is_computing(tokens[:size], salt):
            return False
        worth_waiting = self.blocks.match(tokens, salt) + size
        return worth_waiting < len(tokens) and self._is_computing(tokens[:worth_waiting], salt)

    def _is_computing(self, prefix: list[int], salt: bytes) -> bool:
        """True when a running prefill begins with these tokens."""
        return any(
            r.sequence.token_ids[: len(prefix)] == prefix and self._salt(r.sequence) == salt and self._is_prefilling(r)
            for r in self.running
        )

    def _make_room(self, seq_id: int, num_tokens: int, total: int = 0) -> bool:
        """Takes blocks of what is not running until a table can be extended (see `can_reserve`); False: it cannot."""
        while not self.blocks.can_reserve(seq_id, num_tokens, total):
            if not self._reclaim():
                return False
        return True

    def _reclaim(self) -> bool:
        """Takes the blocks of one sequence that is not running; False: none holds any.

        Idle ones first, least recently used first; then those whose request came last.
        """
        waiting = (request.sequence.seq_id for request in reversed(self.waiting))
        victim = next((seq_id for seq_id in chain(self.idle, waiting) if seq_id in self.blocks), None)
        if victim is None:
            return False
        self.idle.pop(victim, None)
        self.blocks.free(victim, returns=True)
        self.num_preemptions += 1
        return True

    def _preempt(self, request: Request) -> None:
        self._requeue(request)
        self.num_preemptions += 1

    def _requeue(self, request: Request) -> None:
        """Takes a running request's blocks; it is the next to be admitted, and computed anew."""
        del self.running[request]
        returns = not self._is_outdated(request.sequence)  # of an outdated one nothing is wanted again
        self.blocks.free(request.sequence.seq_id, returns=returns)
        self.waiting.appendleft(request)

    def _salt(self, sequence: Sequence) -> bytes:
        """The sequence's salt; apart for long ones, where their KV is another."""
        is_long = self.switch_len is not None and len(sequence.token_ids) > self.switch_len
        return sequence.salt + b" long" if is_long else sequence.salt

    def _is_outdated(self, sequence: Sequence) -> bool:
        """True when its KV was made for a short sequence and it has become a long one."""
        return sequence.seq_id in self.blocks and self.blocks.salt(sequence.seq_id) != self._salt(sequence)

    def _end_for_room(self, request: Request, step: Schedule) -> None:
        """Ends a request that has the cache to itself and no room in it; what it has decoded is its result."""
        if request.output_token_ids:
            request.flush()
        else:
            num_tokens = len(request.sequence.token_ids)
            request.error = self.cache_full(f"request {request.request_id} of {num_tokens} tokens", num_tokens)
        request.finish_reason = "length" if request.error is None else "error"
        self.finish(request)
        step.ended.append(request)

    def cache_full(self, what: str, num_tokens: int) -> CacheFullError:
        """The error of what needs the KV of more tokens than there is room for."""
        needed = -(-num_tokens // self.blocks.block_size)
        return CacheFullError(
            f"{what} needs the KV of {num_tokens} tokens, "
            f"{needed * self.block_bytes.full} bytes; the cache has "
            f"{self.blocks.num_blocks * self.block_bytes.full} bytes "
            f"({self.blocks.num_blocks} blocks of {self.blocks.block_size} tokens); "
            "raise kv_cache_bytes (--kv-cache-bytes), shorten the prompt or lower max_tokens" + self.blocks.pin_advice
        )
