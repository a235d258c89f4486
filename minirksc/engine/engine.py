"""The engine: three calls, `add_request`, `abort` and `step`, and everything between them.

One step: the scheduler chooses, the batch is built, the runner computes logits, the sampler draws, requests
are updated and finished ones released. Nothing waits inside and nothing is global: whoever owns an engine
loops over `step` from one thread, and two engines in one process know nothing of each other.

A call may be left at any line, and what it was doing half done: see `minirksc.engine.calls`. Tokens are the truth;
tables, counts and the prefix index can be made again, and so can all KV. So whoever changes the books marks them. Where
that mark is found left behind by the next one who enters, all blocks are freed and every live request is computed anew.
"""

import itertools
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from minirksc.cache.eviction import BY_IMPORTANCE
from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.engine.batch import ForwardBatch, LogitsRows, build_batch
from minirksc.engine.calls import Call, Interruptible
from minirksc.engine.depth import Depth
from minirksc.engine.gates import Seat
from minirksc.engine.request import LogitsCallback, Request, Salt, Sequence, salt_key
from minirksc.engine.runner import Runner
from minirksc.engine.sampling import Delivery, Sampled, SamplingRow, derived_seed, sample
from minirksc.engine.scheduler import ScheduledRequest, Scheduler
from minirksc.engine.stats import Counters, Stats, work_done
from minirksc.engine.stopping import StopChecker, TextSource
from minirksc.errors import BranchError, ConfigError, MinirkscError, NumericalError, PromptError, brief
from minirksc.kernels.attention.batch import KEY_CHUNK
from minirksc.models.decoder import MassSample
from minirksc.models.spec import ArchSpec
from minirksc.options import EngineConfig, SamplingParams
from minirksc.text.tokenizer import Detokenizer, Tokenizer
from minirksc.token_ids import read_token_ids

SEED_RANGE = 2**64
MASS_INTERVAL = 16
"""Decode steps between two that measure attention: its cost, under one more attention a sampled layer, is then < 1%."""
NO_STOP = frozenset[int]()


class Engine(Interruptible):
    """Requests on one model and one KV cache.

    Args:
        runner: model and cache tensor.
        blocks: block manager of the same number of blocks.
        config: limits of a step.
        block_bytes: of one block.
        max_model_len: longest sequence, prompt and generated tokens together.
        eos_token_ids: end a generation.
        tokenizer: for text and stop strings; None: token ids only.
        sampling_defaults: of the checkpoint, for sampling values that a request leaves open.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        config: EngineConfig,
        block_bytes: BlockBytes,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        sampling_defaults: Mapping[str, float],
    ) -> None:
        super().__init__(runner.model.device)
        spec = runner.model.spec
        self.runner = runner
        self._blocks = blocks
        self.block_bytes = block_bytes
        device = runner.model.device
        # Triton launches on the process's current device, which need not be the model's.
        on_cuda = device.type == "cuda"
        self._device: AbstractContextManager[None] = torch.cuda.device(device) if on_cuda else nullcontext()
        self._windows = {layer.window for layer in spec.layers}
        self._key_chunk = KEY_CHUNK if config.kv_split == "fixed" else None
        self.scheduler = Scheduler(
            blocks,
            config.max_batch_tokens,
            config.max_batch_requests,
            self.block_bytes,
            config.prefix_caching,
            spec.switch_len,
        )
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.tokenizer = tokenizer
        self.sampling_defaults = sampling_defaults
        self._seed = config.seed
        self._num_seeds = 0
        self._owner = object()  # what its sequences know it by
        self._sequence_ids = itertools.count()
        self._request_ids = itertools.count()
        self.counters = Counters()
        self._num_decode_steps = 0
        self._mass_layers = _mass_layers(spec) if config.eviction in BY_IMPORTANCE else ()

    # Entering

    @property
    def blocks(self) -> BlockManager:
        """The block manager, put in order if an interrupted call has left it otherwise."""
        self._mend()
        return self._blocks

    def _preempt(self) -> None:
        # A table may point at a copy that was never made: what ran is computed again.
        self.scheduler.preempt_all()

    def _restart(self) -> None:
        for request in self.scheduler.requests.values():
            request.put_in_order(lambda one: self._make_checker(one.params, one.num_prompt_tokens, one.detokenizer))
        self._blocks.clear()
        self.scheduler.restart()

    # Sequences and requests

    def next_seed(self) -> int:
        """A seed for what was given none: independent of all others, and the same in the next run of the same calls."""
        self._num_seeds += 1
        return derived_seed(self._seed, self._num_seeds)

    def new_sequence(
        self,
        token_ids: Iterable[int],
        *,
        share: bool = True,
        salt: Salt | None = None,
        seed: int = 0,
    ) -> Sequence:
        """A root sequence; nothing is computed or reserved yet.

        Args:
            token_ids: the prompt.
            share: False keeps its blocks out of all sharing but that of its own forks.
            salt: it shares blocks with sequences of the same salt alone; None: with those that have none.
            seed: of the samples of a branch on it.

        Raises:
            PromptError: it is empty, longer than max_model_len, or has a token id outside the vocabulary.
            ConfigError: the salt is none.
        """
        prompt = self.check_token_ids(token_ids, num_before=0)
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        key = salt_key(salt)
        seq_id = next(self._sequence_ids)
        key = key if share else b"private %d" % seq_id
        return Sequence(seq_id, prompt, salt=key, branch_seed=seed, owner=self._owner)

    def check_token_ids(self, token_ids: Iterable[int], num_before: int) -> list[int]:
        """Token ids that are to follow `num_before` others, as a list of int.

        Raises:
            PromptError: too many for max_model_len, or one is no whole number or outside the vocabulary.
        """
        checked = read_token_ids(token_ids, self.runner.model.spec.vocab_size)
        num_tokens = num_before + len(checked)
        if num_tokens > self.max_model_len:
            raise PromptError(
                f"{num_tokens} tokens are more than max_model_len {self.max_model_len}; shorten the prompt"
            )
        return checked

    def check_idle(self, sequence: Sequence) -> None:
        """Refuses a sequence that cannot be changed or given to a request.

        Raises:
            BranchError: it is in an unfinished request, was released, or is another engine's.
        """
        self._check_owner(sequence)
        request = self.scheduler.request_of(sequence)
        if request is not None:
            raise BranchError(
                f"sequence {sequence.seq_id} is in request {request.request_id}, which has not finished; "
                "fork it, or wait for the end"
            )

    def _check_owner(self, sequence: Sequence) -> None:
        if not isinstance(sequence, Sequence):
            raise BranchError(f"{brief(sequence)} is no sequence; make one with new_sequence or fork_sequence")
        if sequence.owner is not self._owner:
            state = "was released, or made by hand" if sequence.owner is None else "is another engine's"
            raise BranchError(f"sequence {sequence.seq_id} {state}; make one with new_sequence or fork_sequence")

    def cut_kv(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets the KV of an idle sequence from num_tokens on, before its tokens there are replaced.

        Raises:
            BranchError: see `check_idle`.
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        self.check_idle(sequence)
        seq_id = sequence.seq_id
        if seq_id in self._blocks and self._blocks.num_tokens(seq_id) > num_tokens:
            with self._changes:
                # The last token that stays is computed once more, for its logits.
                if self._blocks.can_rewind(seq_id, num_tokens - 1):
                    self._blocks.rewind(seq_id, num_tokens - 1)
                else:  # what its window would see is gone
                    self.scheduler.release(sequence)

    def fork_sequence(self, parent: Sequence, index: int, call: Call | None = None, *, kept: bool = True) -> Sequence:
        """A child that shares every block of its parent; nothing is copied.

        Args:
            parent: stays as it is.
            index: of the fork; the last part of the child's path.
            call: with whose end it is released, unless it is taken out of it.
            kept: its blocks stay when a request on it ends, until `release`.

        Raises:
            BranchError: the parent was released, or is another engine's.
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        self._check_owner(parent)
        child = replace(
            parent,
            seq_id=next(self._sequence_ids),
            token_ids=list(parent.token_ids),
            path=(*parent.path, index),
            depth=parent.depth + 1,
            kept=kept,
        )
        with self._changes:
            if call is not None:
                call.sequences.append(child)
            self._blocks.fork(parent.seq_id, child.seq_id, child.depth)
            self.scheduler.keep(child)
        return child

    def add_request(
        self,
        sequence: Sequence,
        params: SamplingParams,
        *,
        seed: int | None = None,
        prefill_only: bool = False,
        logits_start: int | None = None,
        on_logits: LogitsCallback | None = None,
        seat: Seat | None = None,
        earlier_output_ids: SequenceOf[int] = (),
        detokenizer: TextSource | None = None,
        call: Call | None = None,
    ) -> Request:
        """Queues a generation on a sequence.

        Args:
            sequence: from `new_sequence` or `fork_sequence`, and not in another unfinished request.
            params: sampling parameters, for one sample; what they leave open comes from the checkpoint.
            seed: of the random numbers; params.seed wins; None: `next_seed`.
            prefill_only: compute the KV of what is there and sample nothing.
            logits_start: see `Request`.
            on_logits: see `Request`.
            seat: see `Request`.
            earlier_output_ids: see `Request`.
            detokenizer: see `Request`.
            call: with whose end it is aborted; None: it stays until it has ended.

        Raises:
            ConfigError: the parameters ask for what a request does not do, or name ids outside the vocabulary.
            BranchError: see `check_idle`.
            PromptError: prompt and max_tokens do not fit into max_model_len.
            CacheFullError: the cache can never hold prompt and max_tokens.
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        params = SamplingParams.of(params).resolved(self.sampling_defaults)
        if params.n != 1:
            raise ConfigError(f"a request is one sample, not n={params.n}; add {params.n}, with seeds that count up")
        if params.prompt_logprobs is not None:
            raise ConfigError(
                f"a request does not report prompt_logprobs {params.prompt_logprobs}; use logits_start and on_logits"
            )
        params.check_vocabulary(self.runner.model.spec.vocab_size)
        self.check_idle(sequence)
        num_prompt = len(sequence.token_ids)
        if prefill_only and self.scheduler.room_after(num_prompt) < 1:
            raise self.scheduler.cache_full(f"a prompt of {num_prompt} tokens", num_prompt)
        checker = None if prefill_only else self._make_checker(params, num_prompt, detokenizer)
        seed = params.seed if params.seed is not None else seed
        request = Request(
            request_id=next(self._request_ids),
            sequence=sequence,
            params=params,
            seed=(self.next_seed() if seed is None else seed) % SEED_RANGE,
            num_prompt_tokens=num_prompt,
            checker=checker,
            logits_start=logits_start,
            on_logits=on_logits,
            seat=seat,
            earlier_output_ids=earlier_output_ids,
            detokenizer=detokenizer,
        )
        with self._changes:
            if call is not None:
                call.requests.append(request)
            self.scheduler.add(request)
        return request

    def abort(self, request: Request, reason: str = "abort") -> None:
        """Ends a request at any moment of its life; its blocks are free at once, unless a branch keeps them.

        Args:
            request: one that has finished stays as it is.
            reason: its finish_reason.
        """
        self._enter()
        with self._changes:
            self._abort(request, reason)

    def release(self, sequence: Sequence) -> None:
        """Gives back the blocks of a kept sequence; a request that runs on it is aborted."""
        self._enter()
        with self._changes:
            self._release(sequence)

    def _abort(self, request: Request, reason: str = "abort") -> None:
        if request.finished:
            return
        request.flush()
        self._finish(request, reason)

    def pin(self, sequence: Sequence) -> None:
        """Keeps the blocks of a kept sequence from eviction; see `BlockManager.pin`."""
        self._enter()
        with self._changes:
            self._blocks.pin(sequence.seq_id)

    def unpin(self, sequence: Sequence) -> None:
        """Takes `pin` back."""
        self._enter()
        with self._changes:
            self._blocks.unpin(sequence.seq_id)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no sequence uses, and unpins all."""
        self._enter()
        with self._changes:
            self._blocks.reset()

    def _release(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        request = self.scheduler.request_of(sequence)
        if request is not None:
            self._abort(request)
        self.scheduler.release(sequence)
        sequence.owner = None

    @property
    def has_work(self) -> bool:
        """True while some request is not finished."""
        return self.scheduler.has_work

    def step(self) -> list[Request]:
        """Computes one batch.

        Returns:
            The requests that gained tokens or finished; none when a chunk of a prompt was computed or nothing was left
            to do. One may gain several tokens in a step, and they may come of an earlier one (see `Delivery`): who
            wants to know what is new looks at the requests, and counts no steps.

        Raises:
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        with self._stepping, self._device:
            return self._step()

    def _step(self) -> list[Request]:
        with self._changes:
            step = self.scheduler.schedule()
        if not step.scheduled:
            return step.ended
        start = time.perf_counter()
        batch = build_batch(step, self._blocks, self._windows, self.runner.model.device, self._key_chunk)
        depth = self._depth(step.scheduled, batch)
        mass = self._mass_sample(step.scheduled)
        logits = self.runner.forward(batch, depth, mass)  # [rows, vocab]
        if mass is not None:
            self._observe(step.scheduled, mass)
        wanted, left = (batch.wanted, {}) if depth is None else (depth.wanted, depth.left)
        for rows in wanted:
            request = rows.item.request
            if request.on_logits is not None and request.logits_start is not None:
                begin = rows.begin + max(0, request.logits_start - rows.first)
                request.on_logits(rows.first + begin - rows.begin, logits[begin : rows.end])
                if rows.item.completes:
                    request.logits_start = None  # it has them all: if it is computed anew, then not for these
        drawn = self._sample(logits, wanted)
        delivered = [Delivery(request, (one,)) for request, one in drawn]
        # KV of a request whose logits are not finite must not reach the prefix cache, nor what a gate left half made.
        failed = {request for request, one in drawn if one.failure is not None}
        stored = [item for item in step.scheduled if item.request not in failed and item.request not in left]
        with self._changes:
            for request, position in ({} if depth is None else depth.borrowed).items():
                self._blocks.keep_out_of_index(request.sequence.seq_id, position)
            self.scheduler.commit(stored)
            for delivery in delivered:
                self._update(delivery)
            for request, num_layers in left.items():
                request.exit_layer = num_layers
                if request.sequence.kept:
                    seq_id = request.sequence.seq_id
                    self._blocks.rewind(seq_id, self._blocks.num_tokens(seq_id))  # the blocks of what was half computed
                self._finish(request, "gate")
            prefilled = [i.request for i in stored if i.completes and i.request.checker is None]
            for request in prefilled:
                self._finish(request, "stop")
        num_layers = self.runner.model.spec.num_layers
        self.counters.count_step(step.scheduled, depth, num_layers, time.perf_counter() - start)
        return [*step.ended, *(delivery.request for delivery in delivered), *left, *prefilled]

    def _depth(self, items: list[ScheduledRequest], batch: ForwardBatch) -> Depth | None:
        """Gates of a step; None where no request sits at one, or none of these will be asked."""
        if not any(item.request.seat is not None and item.request.seat.gate.layers for item in items):
            return None
        windows = [layer.window for layer in self.runner.model.spec.layers]
        return Depth(items, batch, windows, self._kv_table, self.runner.copy_kv)

    def _mass_sample(self, items: list[ScheduledRequest]) -> MassSample | None:
        """Attention is measured in some decode steps, where the eviction policy asks for it; None: not in this one."""
        if not self._mass_layers or not all(item.is_decode for item in items):
            return None
        self._num_decode_steps += 1
        return MassSample(self._mass_layers) if self._num_decode_steps % MASS_INTERVAL == 0 else None

    def _observe(self, items: list[ScheduledRequest], mass: MassSample) -> None:
        rows = torch.stack(mass.masses).mean(0).tolist()  # [sequences, blocks]
        for item, row in zip(items, rows, strict=True):
            self._blocks.observe(item.request.sequence.seq_id, row)

    def _kv_table(self, seq_id: int, window: int | None) -> list[int]:
        return self._blocks.block_table(seq_id) if window is None else self._blocks.window_table(seq_id)

    def stats(self) -> Stats:
        """Counters since start and the state of the cache; see `minirksc.engine.stats.work_done`."""
        return work_done(self.counters, self.scheduler, self.blocks, self.block_bytes)

    def _make_checker(self, params: SamplingParams, num_prompt: int, before: TextSource | None) -> StopChecker:
        room = self.max_model_len - num_prompt
        if params.max_tokens is not None and params.max_tokens > room:
            raise PromptError(
                f"{num_prompt} prompt tokens and max_tokens {params.max_tokens} are more than max_model_len "
                f"{self.max_model_len}; use max_tokens={max(room, 0)} or less, or None for what fits"
            )
        if room < 1:
            raise PromptError(
                f"a sequence of {num_prompt} tokens leaves no room for a new one in max_model_len {self.max_model_len}"
            )
        room = min(room, self.scheduler.room_after(num_prompt))
        if (params.max_tokens or 1) > room:
            num_new = params.max_tokens or 1
            what = f"a prompt of {num_prompt} tokens with max_tokens {num_new}"
            raise self.scheduler.cache_full(what, num_prompt + num_new - 1)
        if params.max_tokens is None:
            params = replace(params, max_tokens=room)
        return StopChecker(params, self.eos_token_ids, self.text_source(params, before))

    def text_source(self, params: SamplingParams, before: TextSource | None) -> TextSource | None:
        """What makes text of a generation that goes on where `before` is, or begins; None where there is no text."""
        if self.tokenizer is None or not params.detokenize:
            return None
        skip = params.skip_special_tokens
        return Detokenizer(self.tokenizer, skip) if before is None else before.copy(skip)

    def _sample(self, logits: Tensor, wanted: list[LogitsRows]) -> list[tuple[Request, Sampled]]:
        """Draws the next token of every request whose last token has been computed."""
        ends = [r for r in wanted if r.item.completes and r.item.request.checker is not None]
        if not ends:
            return []
        if len(ends) < len(logits):
            logits = logits[[rows.end - 1 for rows in ends]]  # [requests, vocab]
        requests = [rows.item.request for rows in ends]
        ops = self.runner.model.backend
        drawn = sample(logits, [self._sampling_row(r) for r in requests], ops.confidence, ops.draw)
        return list(zip(requests, drawn, strict=True))

    def _sampling_row(self, request: Request) -> SamplingRow:
        tokens = request.sequence.token_ids
        below_minimum = len(request.output_token_ids) < request.params.min_tokens
        forbidden = self.eos_token_ids.union(request.params.stop_token_ids) if below_minimum else NO_STOP
        return SamplingRow(
            params=request.params,
            token_ids=tokens,
            output_token_ids=request.output_token_ids,
            seed=request.seed,
            path=request.sequence.path,
            position=len(tokens),
            forbidden_ids=forbidden,
            earlier_output_ids=request.earlier_output_ids,
        )

    def _update(self, delivery: Delivery) -> None:
        """Adds the tokens, up to the one that ends the request: what follows that was drawn for nothing."""
        request = delivery.request
        for drawn in delivery.tokens:
            if request.finished:
                return
            if drawn.failure is None:
                self._add_token(request, drawn)
                continue
            request.flush()
            request.error = NumericalError(
                f"request {request.request_id}: {drawn.failure} at position "
                f"{len(request.sequence.token_ids)}; the checkpoint may be damaged, or its dtype too narrow "
                "(try dtype='float32')"
            )
            self._finish(request, "error")

    def _add_token(self, request: Request, drawn: Sampled) -> None:
        assert request.checker is not None
        self.counters.num_decoded_tokens += 1
        request.sequence.token_ids.append(drawn.token_id)
        request.output_token_ids.append(drawn.token_id)
        request.logprobs.append(drawn.logprob)
        request.signals.top1.append(drawn.top1_probability)
        request.signals.self_certainty.append(drawn.self_certainty)
        if drawn.top_logprobs is not None:
            request.top_logprobs.append(drawn.top_logprobs)
        try:
            request.checker.push(drawn.token_id)
        except MinirkscError as error:  # its tokenizer's; the others go on
            request.error = error
            self._finish(request, "error")
            return
        if request.checker.finish_reason is not None:
            self._finish(request, request.checker.finish_reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.finish(request)


def _mass_layers(spec: ArchSpec) -> tuple[int, ...]:
    """Where attention is measured: in three layers spread over the depth, of those that see everything if there are."""
    layers = [index for index, layer in enumerate(spec.layers) if layer.window is None] or range(spec.num_layers)
    return tuple(sorted({layers[len(layers) * part // 4] for part in (1, 2, 3)}))
