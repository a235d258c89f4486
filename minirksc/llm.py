"""`LLM`: the engine as people use it. Prompts in, results out; branches; scores.

Everything here is a loop over `Engine.step`. Nothing is approximated, unless quantize="int8" or
kv_cache_dtype="int8" asks for it.
"""

import math
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from minirksc.cache.eviction_log import Eviction
from minirksc.engine.branch import Branch, BranchProgress, branch_list
from minirksc.engine.calls import Call
from minirksc.engine.engine import Engine
from minirksc.engine.gates import DepthGate, Seat
from minirksc.engine.host import read_cpus, resident_bytes
from minirksc.engine.loading import load
from minirksc.engine.outputs import Job
from minirksc.engine.prompts import (
    Conversation,
    Params,
    Prompt,
    conversation_list,
    one_or_many,
    params_list,
    read_prompt,
)
from minirksc.engine.request import ChunkReader, Request, RequestOutput, Salt, Stats, StreamChunk, salt_key
from minirksc.engine.scoring import score_requests
from minirksc.engine.threads import plan_threads
from minirksc.errors import (
    BranchError,
    ConfigError,
    EngineClosedError,
    MinirkscError,
    NumericalError,
    TokenizerError,
    brief,
    named,
)
from minirksc.kernels.native.ops import why_not
from minirksc.models.spec import ArchSpec
from minirksc.options import EngineConfig, SamplingParams
from minirksc.rksc.asks import Probe, make_paper_probe, make_probe
from minirksc.text.tokenizer import Tokenizer
from minirksc.token_ids import is_list, plain, read_token_ids


class LLM:
    """A model, its KV cache and its tokenizer.

    Args:
        model: a checkpoint folder or an alias such as "smollm2-135m".
        use_tqdm: progress bar on stderr, if loading takes a while.
        options: fields of `EngineConfig`: dtype, device, kv_cache_bytes, kv_cache_dtype, quantize, block_size,
            max_batch_tokens, max_model_len, threads, backend, eviction, seed and so on.

    Attributes:
        engine: the engine, for those who drive add_request, abort and step themselves.
        tokenizer: None when the folder has none; token ids still work.
        spec: the architecture.
        config: options, with max_model_len resolved.
        model_path: the folder that the weights came from.
        sampling_defaults: what generation_config.json says about sampling.

    Raises:
        ConfigError: an option is unknown or out of range.
        CheckpointError, UnsupportedModelError: the checkpoint cannot be read or run.
        CacheFullError: the cache is smaller than one block.

    Warns:
        UserWarning: threads, or what OpenMP was told by the environment, do not fit the CPUs.
    """

    def __init__(self, model: str | Path = "smollm2-135m", *, use_tqdm: bool = False, **options: Any) -> None:
        config = EngineConfig.from_dict({"model": str(model), **options})
        self._threads_before = torch.get_num_threads()
        plan = plan_threads(config.threads, self._threads_before, read_cpus(), os.environ)
        for warning in plan.warnings:
            warnings.warn(warning, stacklevel=2)
        self._has_set_threads = config.threads is not None or plan.threads != self._threads_before
        try:
            if self._has_set_threads:
                torch.set_num_threads(plan.threads)
            loaded = load(config, use_tqdm)
        except BaseException:
            self._restore_threads()
            raise
        self._engine: Engine | None = loaded.engine
        self.config = loaded.config
        self.spec: ArchSpec = loaded.spec
        self.model_path = loaded.model_path
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.sampling_defaults = loaded.sampling_defaults
        self._load_s, self._pack_s = loaded.load_s, loaded.pack_s
        self._lenses: dict[tuple[int, ...] | None, Callable[[Tensor], Tensor]] = {}

    @property
    def engine(self) -> Engine:
        """The engine below.

        Raises:
            EngineClosedError: after close().
        """
        if self._engine is None:
            raise EngineClosedError(f"LLM({self.config.model!r}) was closed; make a new one")
        return self._engine

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._engine is None

    def close(self) -> None:
        """Frees model and cache; a second call does nothing."""
        if self._engine is not None:
            self._engine = None
            self._lenses.clear()
            self._restore_threads()

    def _restore_threads(self) -> None:
        """They are the process's, not ours."""
        if self._has_set_threads:
            torch.set_num_threads(self._threads_before)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"LLM({self.config.model!r}) holds a model and its cache, and cannot be copied or pickled; "
            "make one in each process, with the same arguments"
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Generation

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: Params | Iterable[Params] = None,
        use_tqdm: bool = False,
        return_errors: bool = False,
        *,
        salt: Salt | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all of them batched together.

        Args:
            prompts: one or many, each text, token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}.
            params: for all, or one a prompt, each `SamplingParams` or a dict of its fields; None: its defaults.
            use_tqdm: progress bar on stderr.
            return_errors: put a prompt's error into its result instead of raising it, whatever is wrong with it.
            salt: cached blocks are shared with calls of the same salt alone; None: with those that have none. A prompt
                may bring its own as {"prompt": "...", "cache_salt": "..."}.

        Returns:
            One result a prompt, in order.

        Raises:
            ConfigError: the parameters are neither one nor one a prompt.
            ConfigError, PromptError, CacheFullError, NumericalError, TokenizerError: unless return_errors.
        """
        items, _ = one_or_many(prompts)
        jobs: list[Job] = []
        with self.engine.call() as call:
            for index, (prompt, one) in enumerate(zip(items, params_list(params, len(items)), strict=True)):
                jobs.append(self._start(call, prompt, one, salt))
                if not return_errors:
                    _raise_named(jobs[-1].error, "prompt", index, len(items))
            with tqdm(total=len(call.requests), disable=not use_tqdm, unit="request") as bar:
                for _ in self._run(call.requests):
                    bar.update(sum(request.finished for request in call.requests) - bar.n)
        results = [job.result() for job in jobs]
        for index, result in enumerate(() if return_errors else results):
            _raise_named(result.error, "prompt", index, len(items))
        return results

    def stream(
        self, prompt: Prompt, params: Params = None, *, salt: Salt | None = None
    ) -> Generator[StreamChunk, None, RequestOutput]:
        """Completes one prompt and yields text as it becomes final; the result is the return value.

        Other calls may be made between two chunks, and other streams read in turn: what they compute for this prompt
        comes with the next chunk. Closing the generator early aborts the generation and frees its blocks.

        Raises:
            ConfigError, PromptError, CacheFullError, NumericalError, TokenizerError.
        """
        made: list[weakref.ref[Generator[StreamChunk, None, RequestOutput]]] = []

        def is_alive() -> bool:
            stream = made[0]()
            return stream is not None and stream.gi_frame is not None  # type: ignore[attr-defined]

        stream = self._stream(prompt, params, salt, is_alive)
        made.append(weakref.ref(stream))
        return stream

    def _stream(
        self, prompt: Any, params: Any, salt: Salt | None, is_alive: Callable[[], bool]
    ) -> Generator[StreamChunk, None, RequestOutput]:
        with self.engine.call(is_alive) as call:
            job = self._start(call, prompt, params, salt)
            if job.error is not None:
                raise job.error
            readers = [ChunkReader(request, index) for index, request in enumerate(job.requests)]
            for _ in self._run(job.requests):
                # Until nothing is new: whoever takes a chunk may step the engine before he takes the next.
                while chunks := [chunk for reader in readers if (chunk := reader.read()) is not None]:
                    yield from chunks
        return job.result()

    def chat(
        self,
        conversations: Iterable[Any],
        params: Params | Iterable[Params] = None,
        use_tqdm: bool = False,
        return_errors: bool = False,
        *,
        add_generation_prompt: bool = True,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        salt: Salt | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations through the checkpoint's own chat template.

        Args:
            conversations: one list of {"role": ..., "content": ...}, a list of such lists, or a single message.
            params: as in `generate`.
            use_tqdm: as in `generate`.
            return_errors: as in `generate`.
            add_generation_prompt: end each conversation with the beginning of the assistant's turn.
            tools: functions that the model may call, each described by a JSON schema.
            chat_template_kwargs: other variables that the template knows, such as {"enable_thinking": False}.
            salt: as in `generate`.

        Raises:
            ChatTemplateError: there is no template, it fails, or it does not know a variable; unless return_errors.
        """
        self.need_tokenizer("chat()")
        prompts = [
            Conversation(conversation, add_generation_prompt, tools, chat_template_kwargs)
            for conversation in conversation_list(conversations)
        ]
        return self.generate(prompts, params, use_tqdm, return_errors, salt=salt)  # type: ignore[arg-type]

    def logits(self, token_ids: Iterable[int], *, salt: Salt | None = None) -> Tensor:
        """Next-token logits at every position: `[tokens, vocab]` float32 on the CPU.

        Args:
            token_ids: all are computed, whatever is cached of them.
            salt: whose calls may use what is computed here; None: nobody's.

        Raises:
            PromptError, CacheFullError.
        """
        sequence = self.engine.new_sequence(token_ids, share=salt is not None, salt=salt)
        out = torch.empty((len(sequence.token_ids), self.spec.vocab_size))
        with self.engine.call() as call:
            self.engine.add_request(
                sequence,
                SamplingParams(),
                prefill_only=True,
                logits_start=0,
                on_logits=lambda first, rows: _store(out, first, rows),
                call=call,
            )
            self._run_all(call.requests)
        return out

    # Branches

    def branch(
        self, prompt: Prompt, *, share: bool = True, seed: int | None = None, salt: Salt | None = None
    ) -> Branch:
        """A root branch, its prompt computed once.

        Args:
            prompt: in any form that `generate` takes.
            share: False keeps its blocks out of all sharing but that of its own forks.
            seed: of its samples and its forks'; None: the next of this LLM's.
            salt: as in `generate`, for all that is done with it and its forks.

        Raises:
            ConfigError, PromptError, CacheFullError, TokenizerError.
        """
        return self._branches([prompt], share, seed, None, salt)[0]

    def branches(
        self,
        prompts: Iterable[Prompt],
        *,
        share: bool = True,
        seed: int | None = None,
        seats: SequenceOf[Seat | None] | None = None,
        salt: Salt | None = None,
    ) -> list[Branch]:
        """Root branches, their prompts computed together.

        Args:
            prompts: as in `generate`.
            share: as in `branch`.
            seed: as in `branch`, the same for all; None: the next of this LLM's, one a branch.
            seats: at depth gates, one a prompt, None for none. A branch whose prompt left has `exit_layer` and no KV:
                prune it, or have its prompt computed by whatever is done with it next.
            salt: as in `branch`.

        Raises:
            ConfigError, PromptError, CacheFullError, TokenizerError: none of them is made.
        """
        return self._branches(one_or_many(prompts)[0], share, seed, seats, salt)

    def _branches(
        self,
        prompts: list[Any],
        share: bool,
        seed: int | None,
        seats: SequenceOf[Seat | None] | None,
        salt: Salt | None,
    ) -> list[Branch]:
        if seats is not None and len(seats) != len(prompts):
            raise ConfigError(f"{len(seats)} seats for {len(prompts)} prompts; give one each, None for none")
        SamplingParams(seed=seed)  # checks its range
        made: list[Branch] = []
        with self.engine.call() as call:
            for index, prompt in enumerate(prompts):
                try:
                    _, token_ids, own_salt = self._encode(prompt, salt)
                    own_seed = self.engine.next_seed() if seed is None else seed
                    sequence = self.engine.new_sequence(token_ids, share=share, salt=own_salt, seed=own_seed)
                    sequence.kept = True
                    call.sequences.append(sequence)
                    made.append(Branch(self, sequence))
                    seat = None if seats is None else seats[index]
                    self.engine.add_request(sequence, SamplingParams(), prefill_only=True, seat=seat, call=call)
                except MinirkscError as error:
                    _raise_named(error, "prompt", index, len(prompts))
            self._run_all(call.requests, "prompt")
            for branch, request in zip(made, call.requests, strict=True):
                branch.exit_layer = request.exit_layer
                branch.num_saved_layer_rows = request.num_saved_layer_rows
                branch.num_cached_tokens = request.num_cached_tokens or 0
            call.sequences.clear()  # they are the branches'
        return made

    def extend(
        self,
        branches: Iterable[Branch],
        params: Params | Iterable[Params] = None,
        on_step: Callable[[SequenceOf[BranchProgress]], Mapping[int, str] | None] | None = None,
        *,
        keep_stop: bool = True,
    ) -> None:
        """Decodes branches together, each until its own stop; results are in the branches.

        The random numbers of a branch depend on its seed, its path and the position alone: neither on its
        siblings nor on what was pruned.

        Args:
            branches: distinct branches of this LLM.
            params: for all, or one a branch; without n and the logprobs options.
            on_step: called after each step with the progress of every branch; names branches that stop here and why:
                index -> finish_reason.
            keep_stop: what ended a branch, a stop string or an end token, stays in its tokens, though not in its text.
                False takes it out, so that it goes on as if that had never been generated: tokens are dropped from
                the first one on that holds any of it. Where that one also spells text before it, this is tokenised
                anew and appended; it stays in `Branch.text`, and is not in `Branch.output_token_ids`.

        Raises:
            BranchError: one is pruned, foreign, in another call or given twice.
            ConfigError, PromptError, CacheFullError: a branch cannot be decoded as asked; none has changed.
            CacheFullError, NumericalError: after the other branches have ended.
        """
        owned = branch_list(branches, self)
        if len(set(map(id, owned))) < len(owned):
            raise BranchError("a branch is given twice; extend() takes each branch once")
        each = [SamplingParams.of(one) for one in params_list(params, len(owned))]
        for one in each:
            if one.n != 1:
                raise ConfigError(f"extend() takes n=1, not {one.n}; fork the branch instead")
            if one.logprobs is not None or one.prompt_logprobs is not None:
                raise ConfigError("extend() reports Branch.logprobs, of chosen tokens; leave logprobs options out")
            if one.include_stop_str_in_output and not keep_stop:
                raise ConfigError("keep_stop=False takes out what include_stop_str_in_output shows; leave one out")
        with self.engine.call() as call:
            progress: list[BranchProgress] = []
            for index, (branch, one) in enumerate(zip(owned, each, strict=True)):
                try:
                    branch._add_request(one, call)
                except MinirkscError as error:
                    _raise_named(error, "branch", index, len(owned))
            progress = [BranchProgress(branch, request) for branch, request in zip(owned, call.requests, strict=True)]
            try:
                for _ in self._run(call.requests):
                    for index, reason in _early_ends(on_step(progress) if on_step else None, len(owned)):
                        self.engine.abort(call.requests[index], reason)
            finally:
                for branch in () if keep_stop else owned:
                    branch._take_out_stop()
            self._raise_first_error(call.requests, "branch")

    def score(
        self,
        branches: Iterable[Branch],
        question: Prompt | Iterable[Prompt],
        choices: Iterable[Prompt],
        gate: DepthGate | None = None,
    ) -> Tensor:
        """How probable each choice is as the continuation of `question` after each branch.

        One batched pass; the branches stay as they were. Choices of one token each are read off one row of logits;
        of longer ones the whole sequence is scored.

        Args:
            branches: of this LLM; cached blocks are shared as the salt of each allows.
            question: text or token ids, appended to each branch for this pass only; or a list of one for each branch.
            choices: at least two, text or token ids.
            gate: at which all sit, each by its index. Whoever left has NaN for a result: the gate knows what it saw.

        Returns:
            `[branches, choices]` float32; each row sums to 1.

        Raises:
            BranchError, PromptError, CacheFullError, NumericalError.
            ConfigError: too few choices, not one question a branch, or a gate with choices of several tokens.
        """
        owned = branch_list(branches, self)
        choice_ids = self._choices(choices)
        if gate is not None and max(map(len, choice_ids)) > 1:
            raise ConfigError(f"a gate reads one row of logits a branch; choices {choice_ids} have more than one token")
        scores = torch.full((len(owned), len(choice_ids)), math.nan)
        sequences = [branch._sequence for branch in owned]
        with self.engine.call() as call:
            score_requests(
                self.engine,
                call,
                sequences,
                self._questions(question, len(owned)),
                choice_ids,
                SamplingParams(),
                scores,
                gate,
            )
            self._run_all(call.requests)
        left = [request.exit_layer is not None for request in call.requests]
        rows = scores if gate is None else scores[[not has_left for has_left in left]]
        if not rows.isfinite().all():
            raise NumericalError("the model gave NaN or infinite logits for a choice; try dtype='float32'")
        return scores.softmax(-1)

    def _choices(self, choices: Any) -> list[list[int]]:
        """Token ids of each choice."""
        items = plain(choices)
        if not is_list(items):
            raise ConfigError(f"choices must be a list of text or token ids, not {brief(items)}")
        choice_ids = [read_token_ids(self.encode_fragment(choice), vocab_size=self.spec.vocab_size) for choice in items]
        if len(choice_ids) < 2 or not all(choice_ids):
            raise ConfigError(f"score() needs at least two choices of at least one token, got {brief(choices)}")
        return choice_ids

    def _questions(self, question: Any, num_branches: int) -> list[list[int]]:
        """Token ids of the question of each branch."""
        items, is_one = one_or_many(question)
        if is_one or not items:
            return [self.encode_fragment(items[0] if items else ())] * num_branches
        if len(items) != num_branches:
            raise ConfigError(f"{len(items)} questions for {num_branches} branches; give one, or one a branch")
        return [self.encode_fragment(item) for item in items]

    def probe(self, tau: float | None, *, aligned: bool, uncalibrated: bool) -> Probe:
        """A gate that compares wordings of a problem, for seats of `branches`; see `minirksc.rksc.asks.make_probe`."""
        can_move_kv = self.engine.runner.model.can_move_kv
        return make_probe(self.spec, tau, aligned=aligned, can_move_kv=can_move_kv, uncalibrated=uncalibrated)

    def paper_probe(self, tau: float | None, *, aligned: bool) -> Probe:
        """The paper's own rule as such a gate; see `minirksc.rksc.asks.make_paper_probe`."""
        return make_paper_probe(self.spec, tau, aligned=aligned)

    # Housekeeping

    def stats(self) -> Stats:
        """Counters since start, and what the engine runs on; see the keys for units."""
        runner = self.engine.runner
        model = runner.model
        head_dims = {layer.head_dim for layer in self.spec.layers}
        resident, peak = resident_bytes()
        return {
            **self.engine.stats(),
            "load_s": self._load_s,
            "pack_s": self._pack_s,  # of load_s
            # Of the whole process, everything that it has loaded included; None where the system does not say.
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(runner.cache.dtype).removeprefix("torch."),
            # How FP8 weights were stored, which are widened to dtype as they are read; None for all others.
            "checkpoint_precision": None if self.spec.layout.fp8 is None else str(self.spec.layout.fp8),
            "quantize": self.config.quantize,
            "ignored_config_keys": list(self.config.ignore_config_keys),
            "weight_bytes": model.weight_bytes,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "backend": model.backend.name,
            # Why a CPU does without the compiled operations.
            "backend_note": None if model.backend.name != "torch" else why_not(model.dtype, head_dims),
            "num_recorded_steps": 0 if runner.recorded is None else runner.recorded.num_steps,
            "eager_steps": {} if runner.recorded is None else dict(runner.recorded.eager_steps),
        }

    def evictions(self) -> list[Eviction]:
        """What had to make room in the prefix cache lately, oldest first: why, and whether it was needed again."""
        return self.engine.blocks.evictions

    def lens(self, token_ids: Iterable[int] | None = None) -> Callable[[Tensor], Tensor]:
        """Reads hidden states of any layer as logits; see `Decoder.lens`. Kept, since making it copies the head.

        Args:
            token_ids: whose logits; None: all of the vocabulary.

        Raises:
            PromptError: a token id is none.
        """
        key = None if token_ids is None else tuple(read_token_ids(token_ids, self.spec.vocab_size))
        if key not in self._lenses:
            self._lenses[key] = self.engine.runner.model.lens(key)
        return self._lenses[key]

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no sequence uses."""
        self.engine.reset_prefix_cache()

    def encode_fragment(self, tokens: Prompt) -> list[int]:
        """Token ids of what continues something, in any form of a prompt: text gets no BOS.

        Raises:
            ConfigError, PromptError: it is neither text nor token ids, or has a salt of its own.
            TokenizerError: text, and there is no tokenizer.
        """
        piece = read_prompt(tokens)
        if piece.salt is not None:
            raise ConfigError(f"cache_salt {brief(piece.salt)} beside what continues a branch, which has its own salt")
        if piece.text is None:
            return piece.token_ids
        return self.need_tokenizer("text").encode(piece.text, add_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out; "" without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(read_token_ids(token_ids))

    # Inside

    def need_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: there is none, so `what` cannot be used.
        """
        if self.tokenizer is None:
            raise TokenizerError(f"{self.model_path} has no tokenizer, so {what} cannot be used; give token ids")
        return self.tokenizer

    def _encode(self, prompt: Any, salt: Salt | None) -> tuple[str | None, list[int], Salt | None]:
        """(text or None, token ids, salt) of one prompt."""
        if isinstance(prompt, Conversation):
            tokenizer = self.need_tokenizer("chat()")
            options = prompt.add_generation_prompt, prompt.tools, prompt.chat_template_kwargs
            return None, tokenizer.encode_chat(prompt.checked_messages(), *options), salt
        text, token_ids, own_salt = read_prompt(prompt)
        if own_salt is not None and salt is not None and salt_key(own_salt) != salt_key(salt):
            raise ConfigError(f"a prompt's cache_salt {brief(own_salt)} is not the salt of the call; leave one out")
        if text is not None:
            token_ids = self.need_tokenizer("text").encode(text)
        return text, token_ids, salt if own_salt is None else own_salt

    def _start(self, call: Call, prompt: Any, params: Any, salt: Salt | None) -> Job:
        """A prompt with its requests, or with the error that kept it from starting."""
        job = Job(None, [], SamplingParams())
        try:
            job.prompt, job.token_ids, own_salt = self._encode(prompt, salt)
            job.params = SamplingParams.of(params).resolved(self.sampling_defaults)
            job.add_requests(self.engine, call, own_salt)
        except MinirkscError as error:
            for request in job.requests:
                self.engine.abort(request)
            job.requests.clear()
            job.error = error
        return job

    def _run(self, requests: SequenceOf[Request]) -> Iterator[None]:
        """Steps the engine until all of these have finished; a pause after every step."""
        while not all(request.finished for request in requests):
            self.engine.step()
            yield

    def _run_all(self, requests: SequenceOf[Request], what: str = "request") -> None:
        """Runs until all have finished; raises the first error among them."""
        for _ in self._run(requests):
            pass
        self._raise_first_error(requests, what)

    def _raise_first_error(self, requests: SequenceOf[Request], what: str = "request") -> None:
        for index, request in enumerate(requests):
            _raise_named(request.error, what, index, len(requests))


def _early_ends(answer: Any, num_branches: int) -> list[tuple[int, str]]:
    """(index, finish_reason) of the branches that on_step stops."""
    ends = {} if answer is None else answer
    if isinstance(ends, Mapping) and all(i in range(num_branches) and isinstance(ends[i], str) for i in ends):
        return list(ends.items())
    raise ConfigError(f"on_step gave {brief(answer)} for {num_branches} branches; it gives index -> finish_reason")


def _raise_named(error: Exception | None, what: str, index: int, count: int) -> None:
    """Raises an error, if there is one; of several things, it says which one it is about."""
    if error is not None:
        raise error if count == 1 else named(error, f"{what} {index}")


def _store(out: Tensor, first: int, rows: Tensor) -> None:
    out[first : first + len(rows)] = rows
