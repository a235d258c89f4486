"""The engine: three calls, `add_request`, `abort` and `step`, and everything between them.

One step: the scheduler chooses, the batch is built, the runner computes logits, the sampler draws, requests
are updated and finished ones released. Nothing waits inside and nothing is global: the owner of an engine
loops over `step` from one thread, and two engines in one process know nothing of each other.

A call may break off at any line, in the midst of what it does: see `minirksc.engine.calls`. Tokens are the truth;
tables, counts and the prefix index can be made again, and so can all KV. So what changes these books marks them. Where
the next call finds such a mark of one that broke off, all blocks are freed and every live request is computed anew.
"""

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.engine.batch import LogitsRows, build_batch
from minirksc.engine.calls import Call
from minirksc.engine.gated_pass import GatedPass
from minirksc.engine.gates import Seat
from minirksc.engine.mass import MassMeter
from minirksc.engine.request import LogitsCallback, Request, Sequence
from minirksc.engine.runner import Runner
from minirksc.engine.sampling import Delivery, Sampled, SamplingRow, derived_seed, sample
from minirksc.engine.scheduler import ScheduledRequest, Scheduler
from minirksc.engine.sequences import Sequences
from minirksc.engine.stats import Counters, Stats, work_done
from minirksc.engine.stopping import StopChecker
from minirksc.errors import ConfigError, MinirkscError, NumericalError, PromptError
from minirksc.kernels.attention.batch import KEY_CHUNK
from minirksc.options import EngineConfig, SamplingParams
from minirksc.text.tokenizer import Detokenizer, Tokenizer

SEED_RANGE = 2**64


class Engine(Sequences):
    """Requests on one model and one KV cache.

    Args:
        runner: model and cache tensor.
        blocks: block manager of the same number of blocks.
        config: options, with max_model_len resolved.
        block_bytes: size of one block.
        eos_token_ids: tokens that end a generation.
        tokenizer: what makes text, for results and stop strings; None: token ids only.
        sampling_defaults: the checkpoint's values for what sampling parameters leave open.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        config: EngineConfig,
        block_bytes: BlockBytes,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        sampling_defaults: Mapping[str, float],
    ) -> None:
        spec, device = runner.model.spec, runner.model.device
        limits = config.max_batch_tokens, config.max_batch_requests
        scheduler = Scheduler(blocks, *limits, block_bytes, config.prefix_caching, spec.switch_len)
        assert config.max_model_len is not None
        super().__init__(scheduler, spec.vocab_size, config.max_model_len, device)
        self.runner = runner
        self.block_bytes = block_bytes
        # Triton launches on the process's current device, which need not be the model's.
        on_cuda = device.type == "cuda"
        self._device: AbstractContextManager[None] = torch.cuda.device(device) if on_cuda else nullcontext()
        self._windows = {layer.window for layer in spec.layers}
        self._key_chunk = KEY_CHUNK if config.kv_split == "fixed" else None
        self._mass_meter = MassMeter(spec, config.eviction)
        self.eos_token_ids = eos_token_ids
        self.tokenizer = tokenizer
        self.sampling_defaults = sampling_defaults
        self.counters = Counters()
        self._seed = config.seed
        self._num_seeds = 0
        self._request_ids = itertools.count()

    def next_seed(self) -> int:
        """A seed for what was given none: independent of all others, and the same in the next run of the same calls."""
        self._num_seeds += 1
        return derived_seed(self._seed, self._num_seeds)

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
        detokenizer: Detokenizer | None = None,
        call: Call | None = None,
    ) -> Request:
        """Queues a generation on a sequence.

        Args:
            sequence: what `new_sequence` or `fork_sequence` made; no other unfinished request may be on it.
            params: sampling parameters, for one sample; what they leave open comes from the checkpoint.
            seed: key of the random numbers; params.seed wins; None: `next_seed`.
            prefill_only: compute the KV of what is there and sample nothing.
            logits_start: position from which on logits go to on_logits; None: no logits wanted.
            on_logits: callback for them, see `LogitsCallback`.
            seat: place at a layer gate; None: it goes through all layers.
            earlier_output_ids: tokens that were generated on the sequence before, for presence and frequency penalties.
            detokenizer: detokenizer after the generation before on the sequence; None: the text begins here.
            call: the call at whose end it is aborted; None: it stays until it has ended.

        Raises:
            ConfigError: the parameters ask for what a request does not do, or name ids outside the vocabulary.
            BranchError: the sequence cannot be used, see `check_idle`.
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
            reason: finish_reason that it gets.
        """
        with self._enter():
            self._abort(request, reason)

    def _abort(self, request: Request, reason: str = "abort") -> None:
        if request.finished:
            return
        request.flush()
        self._finish(request, reason)

    @property
    def has_work(self) -> bool:
        """True while some request is not finished."""
        return self.scheduler.has_work

    def step(self) -> list[Request]:
        """Computes one batch: schedules it, runs it, delivers what it gave, and accounts for it.

        Returns:
            The requests that gained tokens or finished; none when a chunk of a prompt was computed or there was
            nothing to do. One may gain several tokens in a step, and they may come of an earlier one (see `Delivery`):
            to know what is new, look at the requests, and count no steps.

        Raises:
            EngineBusyError, EngineForkedError.
            ConfigError: a gate decided what no gate may.
        """
        self._enter()
        with self._stepping, self._device:
            with self._changes:
                schedule = self.scheduler.schedule()
            if not schedule.scheduled:
                return schedule.ended
            start = time.perf_counter()
            logits, gated = self._run(schedule.scheduled)
            drawn = self._sample(logits, gated.wanted)
            with self._changes:
                changed = self._deliver(schedule.scheduled, gated, drawn)
            seconds = time.perf_counter() - start
            self.counters.count_step(schedule.scheduled, gated, self.runner.model.spec.num_layers, seconds)
            return [*schedule.ended, *changed]

    def _run(self, items: list[ScheduledRequest]) -> tuple[Tensor, GatedPass]:
        """(logits `[rows, vocab]` float32, what became of the batch on its way); callbacks have seen their logits."""
        batch = build_batch(items, self._blocks, self._windows, self.runner.model.device, self._key_chunk)
        gated = GatedPass(items, batch, self._blocks, self.runner)
        mass = self._mass_meter.sample(items)
        logits = self.runner.forward(batch, gated.control, mass)
        self._mass_meter.observe(self._blocks, items, mass)
        for rows in gated.wanted:
            request = rows.item.request
            if request.on_logits is not None and request.logits_start is not None:
                begin = rows.begin + max(0, request.logits_start - rows.first)
                request.on_logits(rows.first + begin - rows.begin, logits[begin : rows.end])
                if rows.item.completes:
                    request.logits_start = None  # it has them all: if it is computed anew, then not for these
        return logits, gated

    def _sample(self, logits: Tensor, wanted: list[LogitsRows]) -> list[tuple[Request, Sampled]]:
        """Draws the next token of every request whose last token has been computed."""
        ends = [r for r in wanted if r.item.completes and r.item.request.checker is not None]
        if not ends:
            return []
        if len(ends) < len(logits):
            logits = logits[[rows.end - 1 for rows in ends]]  # [requests, vocab]
        requests = [rows.item.request for rows in ends]
        ops = self.runner.model.backend
        sampling_rows = [SamplingRow.of(request, self.eos_token_ids) for request in requests]
        return list(zip(requests, sample(logits, sampling_rows, ops.confidence, ops.draw), strict=True))

    def _deliver(
        self, items: list[ScheduledRequest], gated: GatedPass, drawn: list[tuple[Request, Sampled]]
    ) -> list[Request]:
        """Enters into the books which KV there is now and what each request gained; returns what gained or ended."""
        # KV of a request whose logits are not finite must not reach the prefix cache, nor what a gate has cut short.
        unusable = {request for request, one in drawn if one.failure is not None} | gated.departed.keys()
        stored = [item for item in items if item.request not in unusable]
        for request, position in gated.borrowed.items():
            self._blocks.keep_out_of_index(request.sequence.seq_id, position)
        self.scheduler.commit(stored)
        for request, one in drawn:
            self._update(Delivery(request, (one,)))
        for request, num_layers in gated.departed.items():
            request.exit_layer = num_layers
            if request.sequence.kept:
                seq_id = request.sequence.seq_id
                self._blocks.rewind(seq_id, self._blocks.num_tokens(seq_id))  # the blocks of what was half computed
            self._finish(request, "gate")
        prefilled = [item.request for item in stored if item.completes and item.request.checker is None]
        for request in prefilled:
            self._finish(request, "stop")
        return [*(request for request, _ in drawn), *gated.departed, *prefilled]

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

    def stats(self) -> Stats:
        """Counters since start and the state of the cache; see `minirksc.engine.stats.work_done`."""
        return work_done(self.counters, self.scheduler, self.blocks, self.block_bytes)

    def _make_checker(self, params: SamplingParams, num_prompt: int, before: Detokenizer | None) -> StopChecker:
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
        num_new = params.max_tokens or 1
        if num_new > room:
            what = f"a prompt of {num_prompt} tokens with max_tokens {num_new}"
            raise self.scheduler.cache_full(what, num_prompt + num_new - 1)
        if params.max_tokens is None:
            params = replace(params, max_tokens=room)
        return StopChecker(params, self.eos_token_ids, self.text_source(params, before))

    def text_source(self, params: SamplingParams, before: Detokenizer | None) -> Detokenizer | None:
        """What makes text of a generation that goes on where `before` is, or begins; None where there is no text."""
        if self.tokenizer is None or not params.detokenize:
            return None
        skip = params.skip_special_tokens
        return Detokenizer(self.tokenizer, skip) if before is None else before.copy(skip)

    # After calls that broke off, see `Interruptible`

    def _preempt(self) -> None:
        # A table may point at a copy that was never made: what ran is computed again.
        self.scheduler.preempt_all()

    def _restart(self) -> None:
        for request in self.scheduler.requests.values():
            request.put_in_order(lambda one: self._make_checker(one.params, one.num_prompt_tokens, one.detokenizer))
        self._blocks.clear()
        self.scheduler.restart()
